"""The numbers of ``build_model`` one piece at a time, for processes that could never hold a model whole.

>>> draw_pieces(config, lambda layer: (4, 5), keep_what_is_mine)      # keep_what_is_mine("blocks.3", block), ...

Building draws one stream of random numbers in two passes: constructors first, block by block (a router keeps what its own
drew), then embedding, head and every block anew. ``build_model`` holds the whole model from one pass to the next. Here a block
of the first pass is let go at once, and made again from the random state noted before it when the second pass comes to it.
Experts draw from generators of their own, so those that nobody asks for are never made; everything else is drawn once more
than in ``build_model``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moesaic.models.build import build_block, initialise
from moesaic.models.config import ModelConfig
from moesaic.nn.linear import Linear
from moesaic.nn.norm import make_norm


def draw_pieces(
    config: ModelConfig, slots: Callable[[int], Sequence[int]], take: Callable[[str, nn.Module], None]
) -> None:
    """Draw the pieces of a model as ``build_model`` would from the random state as it is, which ends up the same.

    Args:
        slots: the experts of a sparse layer whose weights are wanted, by the index of the block (``MoE``).
        take: called with "embedding", "head" (if it has a matrix of its own), "norm" and "blocks.0" on, and the piece, on the
            processor. One that it does not keep is freed before the next one is made.
    """
    with torch.device("cpu"):
        before = [_state_before(config, layer) for layer in range(config.num_layers)]
        _draw_ends(config, take)
        take("norm", make_norm(config.norm, config.dim, config.norm_eps))
        for layer, state in enumerate(before):
            _draw_block(config, layer, state, slots(layer), take)


def _state_before(config: ModelConfig, layer: int) -> Tensor:
    """The random state before a block is constructed; it ends up as it is after that."""
    state = torch.get_rng_state()
    build_block(config, layer, ())
    return state


def _draw_ends(config: ModelConfig, take: Callable[[str, nn.Module], None]) -> None:
    Linear(config.dim, config.vocab_size, bias=False)  # for what its constructor draws
    embedding = nn.Embedding(config.vocab_size, config.dim)
    initialise(embedding, config)
    take("embedding", embedding)
    del embedding
    if not config.tie_embeddings:
        head = Linear(config.dim, config.vocab_size, bias=False, device="meta").to_empty(device="cpu")
        initialise(head, config)
        take("head", head)


def _draw_block(
    config: ModelConfig, layer: int, state: Tensor, slots: Sequence[int], take: Callable[[str, nn.Module], None]
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        block = build_block(config, layer, slots)
    initialise(block, config)
    take(f"blocks.{layer}", block)
