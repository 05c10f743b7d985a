"""Forward FLOPs of feed-forward layers per token, counted from built layers (the meta device will do).

Products only, a multiply-add counts 2: the router as it states them (``Router.cost``), the rows its experts compute, shared
experts, the mixing of Soft MoE, and of Mixture-of-Depths blocks the share of tokens they take. Legend: T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moesaic.experts.layer import MoE
from moesaic.experts.special import WithSpecialExperts
from moesaic.models.build import build_ffn
from moesaic.models.config import ModelConfig


def model_flops(
    config: ModelConfig, num_tokens: int, num_sequences: int, per_token: Sequence[float] | None = None
) -> float:
    """FLOPs per token of all feed-forward layers of a model in training.

    Args:
        num_tokens, num_sequences: T and B of a batch.
        per_token: rows per token that were measured in each sparse layer; None takes what the routers aim at.
    """
    total, sparse = 0.0, 0
    options = {} if config.moe is None else config.moe.router.options
    for layer in range(config.num_layers):
        with torch.device("meta"):
            ffn = build_ffn(config, layer)
        if isinstance(ffn, MoE):
            rows = None if per_token is None else per_token[sparse]
            flops = layer_flops(ffn, num_tokens, num_sequences, options, rows)
            sparse += 1
        else:
            flops = 2.0 * _size(ffn)
        deep = config.depth is not None and layer in config.depth_layers
        total += flops * (config.depth.capacity if deep and config.depth is not None else 1.0)
    return total


def layer_flops(
    layer: MoE, num_tokens: int, num_sequences: int, options: Mapping[str, Any], rows: float | None = None
) -> float:
    """FLOPs per token of one sparse layer's forward in training.

    Args:
        num_tokens, num_sequences: T and B of a batch; some routers cost more per token in longer sequences.
        options: those the layer's router was built with.
        rows: rows per token (and sub-token) that experts compute; None takes what the router aims at.
    """
    router = layer.router
    heads = getattr(layer, "heads", 1)
    stacked = layer.experts.stacked if isinstance(layer.experts, WithSpecialExperts) else layer.experts
    per_row = 2 * _size(stacked) / stacked.num_experts
    length = max(1, num_tokens // num_sequences)  # sequence by sequence: attention costs more in longer ones
    cost = type(router).cost(length * heads, stacked.dim, router.num_experts, router.k, **options)
    rows = router.rows_per_token if rows is None else rows
    total = cost.flops / length + rows * heads * per_row
    if layer.shared is not None:
        total += 2 * heads * _size(layer.shared)
    if heads > 1:
        total += 4 * layer.dim**2  # into sub-tokens and back
    slots = getattr(
        router, "slots", 0
    )  # of Soft MoE: each reads every token of its sequence, and every token each of them
    return total + 4 * layer.dim * slots * router.num_experts


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
