"""Forward FLOPs per token, of feed-forward layers and of a whole model, counted from built layers (the meta device will do).

Products only, a multiply-add counts 2: the router as it states them (``Router.cost``), the rows its experts compute, shared
experts, the mixing of Soft MoE, attention (projections, scores, weighted values), the head, and of Mixture-of-Depths blocks the
share of tokens they take. Legend: T tokens, S positions, D model width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moesaic.experts.layer import MoE
from moesaic.experts.special import WithSpecialExperts
from moesaic.models.build import build_ffn
from moesaic.models.config import ModelConfig

_BIAS = re.compile(r"(^|\.)(bias|b_in|b_out)$")


def model_flops(
    config: ModelConfig, num_tokens: int, num_sequences: int, per_token: Sequence[float] | None = None
) -> float:
    """FLOPs per token of all feed-forward layers of a model in training.

    Args:
        num_tokens, num_sequences: T and B of a batch.
        per_token: rows per token that were measured in each sparse layer; None takes what the routers aim at.
    """
    parts = _ffn_parts(config, num_tokens, num_sequences, per_token)
    return sum(parts.values())


def part_flops(
    config: ModelConfig,
    num_tokens: int,
    num_sequences: int,
    per_token: Sequence[float] | None = None,
    *,
    causal: bool = True,
) -> dict[str, float]:
    """FLOPs per token of a whole model's forward in training, by part: attention, router, experts, ..., head.

    Args:
        num_tokens, num_sequences, per_token: as for ``model_flops``.
        causal: count the keys a query may see, on average; False counts every pair of positions, as a plain product over the
            full square computes them.
    """
    parts = {"attention": 0.0, **_ffn_parts(config, num_tokens, num_sequences, per_token)}
    projections, per_key = _attention_flops(config)
    for layer in range(config.num_layers):
        share = _share(config, layer)
        length = math.ceil(share * max(1, num_tokens // num_sequences))
        keys = mean_keys(length, config.window(layer)) if causal else float(length)
        parts["attention"] += share * (projections + per_key * keys)
    parts["head"] = 2.0 * config.dim * config.vocab_size
    return parts


def _attention_flops(config: ModelConfig) -> tuple[float, float]:
    """FLOPs of one layer's projections, and of each key a query sees: its score and its value's share.

    Latent attention counts as it trains and reads prompts, with keys and values made for every token.
    """
    heads, width = config.num_heads, config.heads_dim
    if (latent := config.latent) is None:
        return 2.0 * config.dim * width * (2 * heads + 2 * config.kv_heads), 4.0 * heads * width
    query = heads * width
    weights = config.dim * query if latent.q_rank is None else latent.q_rank * (config.dim + query)
    weights += config.dim * (latent.kv_rank + latent.rope_dim)
    weights += latent.kv_rank * heads * (latent.nope_dim + latent.value_dim) + heads * latent.value_dim * config.dim
    return 2.0 * weights, 2.0 * heads * (width + latent.value_dim)


def mean_keys(length: int, window: int | None = None) -> float:
    """Keys a query may see, itself included: the mean over the ``length`` positions of a document."""
    reach = length if window is None else min(window, length)
    return (reach * (reach + 1) / 2 + (length - reach) * reach) / length


def _ffn_parts(
    config: ModelConfig, num_tokens: int, num_sequences: int, per_token: Sequence[float] | None
) -> dict[str, float]:
    total: dict[str, float] = {}
    sparse = 0
    options = {} if config.moe is None else config.moe.router.options
    for layer in range(config.num_layers):
        with torch.device("meta"):
            ffn = build_ffn(config, layer)
        if isinstance(ffn, MoE):
            rows = None if per_token is None else per_token[sparse]
            parts = layer_parts(ffn, num_tokens, num_sequences, options, rows)
            sparse += 1
        else:
            parts = {"feed-forward": 2.0 * _size(ffn)}
        for name, flops in parts.items():
            total[name] = total.get(name, 0.0) + flops * _share(config, layer)
    return total


def _share(config: ModelConfig, layer: int) -> float:
    """Share of the tokens that a block takes in training."""
    return config.depth.capacity if config.depth is not None and layer in config.depth_layers else 1.0


def layer_flops(
    layer: MoE, num_tokens: int, num_sequences: int, options: Mapping[str, Any], rows: float | None = None
) -> float:
    """FLOPs per token of one sparse layer's forward in training.

    Args:
        num_tokens, num_sequences: T and B of a batch; some routers cost more per token in longer sequences.
        options: those the layer's router was built with.
        rows: rows per token (and sub-token) that experts compute; None takes what the router aims at.
    """
    return sum(layer_parts(layer, num_tokens, num_sequences, options, rows).values())


def layer_parts(
    layer: MoE, num_tokens: int, num_sequences: int, options: Mapping[str, Any], rows: float | None = None
) -> dict[str, float]:
    """``layer_flops`` by part: router, experts, and where there are any, shared experts, head projections, mixing."""
    router = layer.router
    heads = getattr(layer, "heads", 1)
    stacked = layer.experts.stacked if isinstance(layer.experts, WithSpecialExperts) else layer.experts
    per_row = 2 * _size(stacked) / stacked.num_experts
    length = max(1, num_tokens // num_sequences)  # sequence by sequence: attention costs more in longer ones
    cost = type(router).cost(length * heads, stacked.dim, router.num_experts, router.k, **options)
    rows = router.rows_per_token if rows is None else rows
    parts = {"router": cost.flops / length, "experts": rows * heads * per_row}
    if layer.shared is not None:
        parts["shared experts"] = 2.0 * heads * _size(layer.shared)
    if heads > 1:
        parts["head projections"] = 4.0 * layer.dim**2  # into sub-tokens and back
    slots = getattr(
        router, "slots", 0
    )  # of Soft MoE: each reads every token of its sequence, and every token each of them
    if slots:
        parts["mixing"] = 4.0 * layer.dim * slots * router.num_experts
    return parts


def _size(module: nn.Module) -> int:
    """Numbers that are multiplied with something: biases are only added."""
    return sum(p.numel() for name, p in module.named_parameters() if not _BIAS.search(name))
