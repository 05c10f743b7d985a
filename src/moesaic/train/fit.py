"""Before the first step: routers that make tables from the training text get to see it (``Router.fit``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch import Tensor

from moesaic.data.split import TokenView
from moesaic.data.statistics import count_pairs, count_tokens
from moesaic.models.decoder import Decoder
from moesaic.routing import TextStatistics


def fit_routers(model: Decoder, view: TokenView, say: Callable[[str], None]) -> None:
    """Call ``fit`` of every sparse layer's router. Nothing is read unless one asks, and then once for all layers.

    Raises ``ConfigError`` where a router cannot serve this text.
    """
    vocab_size = model.config.vocab_size

    @cache
    def counts_V() -> Tensor:
        say(f"Counting the tokens of the training text ({view.num_tokens:,}) for the routers' tables ...")
        return count_tokens(view, vocab_size)

    @cache
    def pairs_VV() -> Tensor:
        say("Counting pairs of neighbouring tokens and clustering the vocabulary ...")
        return count_pairs(view, vocab_size)

    text = TextStatistics(vocab_size, counts_V, pairs_VV, view.labels)
    for sparse in model.moe_layers().values():
        sparse.router.fit(text)
