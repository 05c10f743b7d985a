"""The routers a comparison can name: each a small change of one base model, brought to the base's active compute.

>>> model = variant_model(base, VARIANTS["relu"], num_tokens=2048)

A variant is data: a router, its options, and what else of the model it needs. ``equal_compute`` then sets the expert width so
that one token costs the same forward FLOPs in each sparse layer, router included, whatever the number of experts it visits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from moesaic.config import apply_overrides, from_dict, to_dict
from moesaic.cost.flops import model_flops
from moesaic.errors import ConfigError, nearest
from moesaic.experts.layer import MoE
from moesaic.models.build import build_ffn
from moesaic.models.config import ModelConfig, MoEConfig


@dataclass(frozen=True)
class Variant:
    """One named way to route.

    Attributes:
        title: what it is, in a few words.
        router, options: a key of ``ROUTERS`` and its options.
        k: experts per token, where it is not the base model's; "all" is every expert.
        moe: other settings of ``MoEConfig``.
        depth: settings of ``DepthConfig`` (Mixture-of-Depths), or None.
        dense: the feed-forward layers are dense (Mixture-of-Depths alone).
        losses: balancing losses; None takes those the router recommends.
    """

    title: str
    router: str = "topk"
    options: Mapping[str, Any] = field(default_factory=dict)
    k: int | Literal["all"] | None = None
    moe: Mapping[str, Any] = field(default_factory=dict)
    depth: Mapping[str, Any] | None = None
    dense: bool = False
    losses: Mapping[str, float] | None = None


_TIGHT = {"factor": 1.25, "minimum": 4}

VARIANTS: dict[str, Variant] = {
    # token choice
    "topk": Variant("top-k, weights renormalised over the chosen (Mixtral, Qwen3)"),
    "topk_plain": Variant("top-k, plain softmax weights (OLMoE, Qwen2-MoE)", options={"normalize": "none"}),
    "topk_softmax_chosen": Variant(
        "top-k, then softmax (gpt-oss): the same function as topk, computed otherwise",
        options={"normalize": "softmax_chosen"},
    ),
    "sigmoid_bias": Variant(
        "sigmoid scores, selection bias instead of a loss (DeepSeek-V3)",
        options={"score": "sigmoid", "balance_bias": True},
    ),
    "group_limited": Variant(
        "top-k inside the best of four groups (DeepSeek-V2 keeps 3 of 8)", options={"groups": 4, "groups_kept": 1}
    ),
    "switch": Variant("top-1 with input jitter", "switch", k=1),
    "gshard": Variant("top-2 with a stochastic second expert", "gshard", k=2),
    "noisy_topk": Variant("learned noise and a load estimate", "noisy_topk"),
    "capacity": Variant("top-k with capacity 1.25, overflow to the residual", moe={"capacity": _TIGHT}),
    "batch_priority": Variant(
        "capacity 1.25, surest tokens first (V-MoE)", moe={"capacity": _TIGHT | {"priority": "batch"}}
    ),
    "next_best": Variant(
        "capacity 1.25, overflow to the next best (No-Token-Left-Behind)",
        moe={"capacity": _TIGHT | {"overflow": "next_best"}},
    ),
    # no gate
    "random": Variant("uniformly random experts", "random"),
    "round_robin": Variant("experts in turn by position", "round_robin"),
    "hash_random": Variant("fixed random table by token id", "hash", {"kind": "random"}, k=1),
    "hash_balanced": Variant("table balanced by token frequency", "hash", {"kind": "balanced"}, k=1),
    "hash_bigram": Variant("hash of previous and current token", "hash", {"kind": "bigram"}, k=1),
    "hash_clustered": Variant("table by k-means of token embeddings", "hash", {"kind": "clustered"}, k=1),
    "multi_hash": Variant("one hash for each half of the network", "hash", {"kind": "random"}, k=2),
    # assignment and experts that choose
    "base": Variant("balanced linear assignment (BASE)", "base", k=1),
    "sinkhorn": Variant("Sinkhorn-balanced choice (S-BASE)", "sinkhorn"),
    "expert_choice": Variant("experts choose tokens, over the batch", "expert_choice", {"group": "batch"}),
    "expert_choice_capped": Variant(
        "expert choice, at most 3 experts per token (EC-CAP)", "expert_choice", {"group": "batch", "max_experts": 3}
    ),
    "expert_choice_causal": Variant("expert choice at each position", "expert_choice", {"group": "position"}),
    "soft_moe": Variant("slots that mix tokens (Soft MoE)", "soft_moe"),
    "dense_soft": Variant("all experts, softmax weights", "dense_soft", k="all"),
    "prototype": Variant("k groups of experts, top-1 in each (M6-T)", "prototype"),
    # gradient estimators
    "straight_through": Variant("weight 1 forward, gradient of the probability", "straight_through"),
    "gumbel": Variant("Gumbel-softmax weights", "gumbel", {"hard": False}),
    "st_gumbel": Variant("straight-through Gumbel-softmax", "gumbel", {"hard": True}),
    "reinforce": Variant("policy gradient with a baseline", "reinforce", k=1),
    "sparsemixer": Variant("mid-point gradient estimate", "sparsemixer", k=1),
    "sparsemixer_v2": Variant("Heun's third-order estimate (GRIN)", "sparsemixer_v2", k=2),
    # a varying number of experts
    "relu": Variant("ReLU gate with a sparsity controller (ReMoE)", "relu"),
    "top_p": Variant("experts up to a total probability", "top_p"),
    "top_any": Variant("a learned threshold per expert (DynMoE)", "top_any"),
    "null_experts": Variant("some experts do nothing (AdaMoE)", "null_experts", k=3, moe={"zero": 8}),
    "moepp": Variant(
        "zero, copy and constant experts, gating residual (MoE++)",
        "moepp",
        moe={"zero": 1, "copy": 1, "constant": 2},
    ),
    "budget": Variant("a head decides how many experts", "budget"),
    # structure
    "hierarchical": Variant("a gate over groups, a gate in each", "hierarchical"),
    "tree_soft": Variant("binary tree, soft in training", "tree", {"train": "soft"}, k=1),
    "tree_hard": Variant("binary tree, one path", "tree", {"train": "hard"}, k=1),
    "product_keys": Variant(
        "product keys over single neurons (PEER)",
        "product_keys",
        {"heads": 8, "key_dim": 16},
        k=16,
        moe={"expert_kind": "neuron"},
    ),
    "low_rank": Variant("factorised gate", "low_rank"),
    "cosine": Variant("cosine scores in a small space (X-MoE)", "cosine"),
    "multi_head": Variant("sub-tokens routed apart (MH-MoE)", moe={"heads": 4}),
    # context
    "conv": Variant("gate on a causal convolution", "conv"),
    "attention": Variant("gate on a small causal attention", "attention", {"head_dim": 8}),
    "recurrent": Variant("recurrent over layers (RMoE)", "recurrent", {"hidden": 24}),
    "segment": Variant("one decision per segment, from the one before", "segment"),
    "memory": Variant("votes of remembered inputs", "memory", {"capacity": 64}),
    "task": Variant("one decision per task", "task"),
    "sentence": Variant("one decision per text so far", "sentence", {"pool": "prefix"}),
    "demix": Variant("one expert per domain", "demix", k=1),
    # depth
    "mixture_of_depths": Variant("some tokens skip some blocks", depth={}, dense=True),
    "mixture_of_depths_moe": Variant("tokens that do not skip are routed", depth={}),
}


def named(name: str) -> Variant:
    """The variant of this name. Raises ``ConfigError`` with the nearest one."""
    if name not in VARIANTS:
        raise ConfigError(f'There is no router "{name}".{nearest(name, VARIANTS)} Known: {", ".join(VARIANTS)}.')
    return VARIANTS[name]


def variant_model(base: ModelConfig, variant: Variant, num_tokens: int, num_sequences: int) -> ModelConfig:
    """``base`` with the variant's router, at the base's active compute.

    Args:
        num_tokens, num_sequences: T and B of one batch.

    Raises ``ConfigError`` if ``base`` is not sparse with layers all alike, or the variant cannot be built from it.
    """
    moe = base.moe
    if moe is None or not all(isinstance(size, int) for size in (moe.num_experts, moe.k, moe.hidden)):
        raise ConfigError("A comparison of routers starts from a sparse model whose layers are all alike.")
    assert isinstance(moe.k, int)
    assert isinstance(moe.num_experts, int)
    target = model_flops(base, num_tokens, num_sequences)
    settings = to_dict(base)
    options = dict(variant.options)
    k = moe.num_experts if variant.k == "all" else variant.k or moe.k
    if variant.router == "soft_moe":
        # A quarter of the slots that would make a row per choice: mixing costs as much as experts in models this narrow.
        length = num_tokens // num_sequences
        options |= {"tokens": length, "slots_per_expert": max(1, length * k // (4 * moe.num_experts))}
    settings["moe"] |= {"router": {"name": variant.router, "options": options, "allow_leak": True}}
    settings["moe"] |= {"k": k, "losses": {}, "capacity": None, **variant.moe}
    if variant.depth is not None:
        settings["depth"] = {"allow_leak": True, **variant.depth}
    if variant.dense:
        settings["moe"] = None
        return _fitted(settings, "hidden", target, num_tokens, num_sequences)
    model = _model(settings | {"moe": settings["moe"] | {"hidden": 1}})
    losses = layer_of(model).router.facts.losses if variant.losses is None else variant.losses
    settings["moe"]["losses"] = dict(losses)
    if settings["moe"].get("expert_kind") == "neuron":
        return _single_neurons(settings, moe, target, num_tokens, num_sequences)
    return _fitted(settings, "moe.hidden", target, num_tokens, num_sequences)


def flops_ratio(
    model: ModelConfig,
    base: ModelConfig,
    num_tokens: int,
    num_sequences: int,
    per_token: Sequence[float] | None = None,
) -> float:
    """Compute of the feed-forward layers of ``model`` over those of ``base``; 1 is what ``variant_model`` aims at.

    Args:
        per_token: rows per token measured in each sparse layer of ``model``; None takes what its routers aim at.
    """
    ours = model_flops(model, num_tokens, num_sequences, per_token)
    return ours / model_flops(base, num_tokens, num_sequences)


def layer_of(config: ModelConfig) -> MoE:
    """The first sparse layer of a model, without memory."""
    with torch.device("meta"):
        layer = build_ffn(config, config.moe_layers[0])
    assert isinstance(layer, MoE)
    return layer


def _model(settings: dict[str, Any]) -> ModelConfig:
    return from_dict(ModelConfig, settings, where="model")


def _flops(settings: dict[str, Any], num_tokens: int, num_sequences: int, *changes: str) -> float:
    return model_flops(_model(apply_overrides(settings, changes)), num_tokens, num_sequences)


def _fitted(settings: dict[str, Any], width: str, target: float, num_tokens: int, num_sequences: int) -> ModelConfig:
    """The model whose feed-forward layers cost ``target`` FLOPs per token: they are linear in their width. At least 8."""
    at = [_flops(settings, num_tokens, num_sequences, f"{width}={size}") for size in (16, 32)]
    per_unit = (at[1] - at[0]) / 16
    return _model(apply_overrides(settings, [f"{width}={max(8, round(16 + (target - at[0]) / per_unit))}"]))


def _single_neurons(
    settings: dict[str, Any], moe: MoEConfig, target: float, num_tokens: int, num_sequences: int
) -> ModelConfig:
    """PEER: about as many parameters in single neurons as the base has in its experts, and as many of them per token as cost
    the same."""
    assert isinstance(moe.num_experts, int)
    assert isinstance(moe.hidden, int)
    neurons = moe.num_experts * moe.hidden * 3 / 2  # a neuron has 2 vectors instead of 3
    side = max(16, round(math.sqrt(neurons)))
    settings["moe"] |= {"num_experts": side * side, "hidden": 1}
    heads = int(settings["moe"]["router"]["options"].get("heads", 1))
    each = [_flops(settings, num_tokens, num_sequences, f"moe.k={heads * k}") for k in (2, 3)]
    fit = round(2 + (target - each[0]) / (each[1] - each[0]))
    return _model(apply_overrides(settings, [f"moe.k={heads * max(2, min(side, fit))}"]))
