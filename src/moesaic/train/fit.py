"""Before the first step: routers that make tables from the training text get to see it (``Router.fit``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch import Tensor

from moesaic.data.split import TokenView
from moesaic.data.statistics import count_pairs, count_tokens
from moesaic.data.stream.tokens import TokenStream
from moesaic.models.decoder import Decoder
from moesaic.routing import TextStatistics


def fit_routers(model: Decoder, text: TokenView | TokenStream, say: Callable[[str], None]) -> None:
    """Call ``fit`` of every sparse layer's router. Nothing is read unless one asks, and then once for all layers; of a stream
    it is the beginning of many shards.

    Raises ``ConfigError`` where a router cannot serve this text.
    """
    vocab_size = model.config.vocab_size

    @cache
    def counts_V() -> Tensor:
        say(f"Counting the tokens of the training text ({text.sample().num_tokens:,}) for the routers' tables ...")
        return count_tokens(text.sample(), vocab_size)

    @cache
    def pairs_VV() -> Tensor:
        say("Counting pairs of neighbouring tokens and clustering the vocabulary ...")
        return count_pairs(text.sample(), vocab_size)

    statistics = TextStatistics(vocab_size, counts_V, pairs_VV, text.labels)
    for sparse in model.moe_layers().values():
        sparse.router.fit(statistics)
