"""``config.json`` of tiny models, family by family and variant by variant, without transformers."""

from __future__ import annotations

from typing import Any

from tests.convert.variants import TINY

_SPARSE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DENSE: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "wide_heads": {"head_dim": 16, "num_key_value_heads": 4},
}
_MIXED: dict[str, dict[str, Any]] = {
    "every_other": {"decoder_sparse_step": 2},
    "listed": {"mlp_only_layers": [0]},
    "both": {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
}


def _all(base: dict[str, Any], *variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: base | changes for group in variants for name, changes in group.items()}


_OLMOE = {k: v for k, v in TINY.items() if k != "head_dim"} | {"num_experts": 6, "num_experts_per_tok": 2}
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "mixtral": _all(
        TINY, _DENSE,
        {"seven": {"num_local_experts": 7}, "one": {"num_local_experts": 1, "num_experts_per_tok": 1}},
    ),
    "llama": _all(TINY, _DENSE, {"biases": {"attention_bias": True, "mlp_bias": True}}),
    "mistral": _all(TINY, _DENSE, {"window": {"sliding_window": 5}}),
    "qwen3": _all(TINY, _DENSE, {"biases": {"attention_bias": True}}),
    "qwen2_moe": _all(
        TINY | _SPARSE | {"shared_expert_intermediate_size": 28}, _DENSE, _MIXED,
        {"no_biases": {"qkv_bias": False}, "narrow_shared": {"shared_expert_intermediate_size": 7}},
    ),
    "qwen3_moe": _all(TINY | _SPARSE, _DENSE, _MIXED, {"biases": {"attention_bias": True}}),
    "olmoe": _all(_OLMOE, {"plain": {}, "tied": {"tie_word_embeddings": True}, "biases": {"attention_bias": True}}),
}  # fmt: skip
