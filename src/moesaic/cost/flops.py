"""Forward FLOPs of a sparse layer per token, counted from the built layer (the meta device will do).

Products only, a multiply-add counts 2: the router as it states them (``Router.cost``), the rows its experts compute in training
on average, shared experts, and the mixing of Soft MoE. Legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from moesaic.experts.layer import MoE
from moesaic.experts.special import WithSpecialExperts


def layer_flops(layer: MoE, num_tokens: int, num_sequences: int, options: Mapping[str, Any]) -> float:
    """FLOPs per token of one forward in training.

    Args:
        num_tokens, num_sequences: T and B of a batch; some routers cost more per token in longer sequences.
        options: those the layer's router was built with.
    """
    router = layer.router
    heads = getattr(layer, "heads", 1)
    stacked = layer.experts.stacked if isinstance(layer.experts, WithSpecialExperts) else layer.experts
    per_row = 2 * _size(stacked) / stacked.num_experts
    length = max(
        1, num_tokens // num_sequences
    )  # sequence by sequence: attention in a router costs more in longer ones
    cost = type(router).cost(length * heads, stacked.dim, router.num_experts, router.k, **options)
    total = cost.flops / length + router.rows_per_token * heads * per_row
    if layer.shared is not None:
        total += 2 * heads * _size(layer.shared)
    if heads > 1:
        total += 4 * layer.dim**2  # into sub-tokens and back
    slots = getattr(router, "slots_per_expert", 0)
    if slots:
        # Every slot of a sequence reads every token of it, and every token every slot.
        total += 4 * layer.dim * slots * router.num_experts
    return total


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
