"""Bytes that decoding one token must read: the weights it uses, and the keys and values of the tokens before it.

>>> sum(decode_bytes(model).values()) / (read_gb_per_s() * 1e9)      # no token can take fewer seconds than this

What a cache keeps from one token to the next costs less; a model that fits into it can beat this limit.
"""

from __future__ import annotations

from moesaic.cost.count import count_parameters
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder


def decode_bytes(model: Decoder) -> dict[str, int]:
    """Part -> bytes of weights that one token of one stream uses, in the dtypes the model holds them in.

    The k experts of each sparse layer (of multi-head layers k for every sub-token, at most all), one row of the embedding, and
    the whole of everything else. An upper bound for routers that read only some of their table.
    """
    counts = count_parameters(model)
    size = model.embedding.weight.element_size()
    parts = {}
    for part, active in counts.active_parts.items():
        held = counts.parts[part]
        width = size
        if part == "router":  # fp32 whatever the rest is in
            width = max(
                (p.element_size() for moe in model.moe_layers().values() for p in moe.router.parameters()), default=4
            )
        parts[part] = min(active, held) * width
    if not counts.parts["head"]:  # tied: the head reads the embedding's matrix
        parts["head"] = parts["embedding"]
    parts["embedding"] = model.config.dim * size
    return {part: amount for part, amount in parts.items() if amount}


def cache_bytes(model: Decoder, context: float) -> float:
    """Bytes of keys and values that one token attends to after ``context`` tokens, itself included."""
    config = model.config
    size = (model.compute_dtype or model.embedding.weight.dtype).itemsize
    tokens = 0.0
    for layer in range(config.num_layers):
        window = config.window(layer)
        tokens += context if window is None else min(context, window)
    return tokens * cache_width(config) * size


def cache_width(config: ModelConfig) -> int:
    """Numbers the cache holds per token in one layer: keys and values of every head, or with latent attention one vector."""
    if config.latent is not None:
        return config.latent.kv_rank + config.latent.rope_dim
    return 2 * config.kv_heads * config.heads_dim
