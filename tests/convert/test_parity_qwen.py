"""Qwen2-MoE, Qwen3-MoE and OLMoE, variant by variant, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moesaic as mo
from moesaic.convert.convert import convert
from tests.convert.parity import assert_parity, tiny_hf, transformers
from tests.convert.tiny_checkpoint import tensors_of
from tests.convert.variants import DYNAMIC, ROPES, TINY, rope, ropes_slow

SPARSE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {**SPARSE, "shared_expert_intermediate_size": 28}
LAYERS = ["full_attention", "sliding_attention", "sliding_attention"]
# Dense and sparse layers beside each other, of other widths.
STEP = {"num_hidden_layers": 4, "decoder_sparse_step": 2}
LISTED = {"num_hidden_layers": 4, "mlp_only_layers": [0, 2, 9]}
BOTH = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}

QWEN2_MOE: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied_normalised": {"tie_word_embeddings": True, "norm_topk_prob": True},
    "no_biases": {"qkv_bias": False, "num_key_value_heads": 4},
    "one_of_six": {"num_experts_per_tok": 1, "num_key_value_heads": 1},
    "narrow_shared": {"shared_expert_intermediate_size": 7},
    "every_other_sparse": STEP,
    "listed_dense": LISTED,
    "step_and_list": BOTH,
    "lower_windows": {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    "listed_windows": {"use_sliding_window": True, "sliding_window": 4, "layer_types": LAYERS},
    "wide_heads": {"head_dim": 16},
    "dynamic": DYNAMIC,
    **{name: rope(name, 1e6) for name in ROPES},
}
QWEN3_MOE: dict[str, dict[str, Any]] = {
    "plain": {},
    "normalised": {"norm_topk_prob": True, "num_experts_per_tok": 4},
    "tied_wide_heads": {"tie_word_embeddings": True, "head_dim": 16, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "num_key_value_heads": 4},
    "every_other_sparse": STEP,
    "listed_dense": LISTED,
    "step_and_list": BOTH,
    "windows": {"use_sliding_window": True, "sliding_window": 5},
    "unused_window": {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 2},
    "dynamic": DYNAMIC,
    **{name: rope(name, 1e6) for name in ROPES},
}
OLMOE: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_qkv": 1.0, "num_key_value_heads": 1},
    "normalised_tied": {"norm_topk_prob": True, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "num_key_value_heads": 4},
    "one_of_six": {"num_experts_per_tok": 1},
    "dynamic": DYNAMIC,
    **{name: rope(name) for name in ROPES},
}


def without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


@pytest.mark.parametrize("name", ropes_slow(QWEN2_MOE))
def test_qwen2_moe(name: str, tmp_path: Path) -> None:
    config = transformers.Qwen2MoeConfig(**TINY | SHARED | QWEN2_MOE[name])
    print("qwen2_moe", name, assert_parity(config, tmp_path))


@pytest.mark.parametrize("name", QWEN3_MOE)
def test_qwen3_moe(name: str, tmp_path: Path) -> None:
    print("qwen3_moe", name, assert_parity(transformers.Qwen3MoeConfig(**TINY | SPARSE | QWEN3_MOE[name]), tmp_path))


@pytest.mark.parametrize("name", ropes_slow(OLMOE))
def test_olmoe(name: str, tmp_path: Path) -> None:
    sizes = without(TINY, "head_dim") | without(SPARSE, "moe_intermediate_size")
    print("olmoe", name, assert_parity(transformers.OlmoeConfig(**sizes | OLMOE[name]), tmp_path))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_gate_of_the_shared_expert_stays_fp32(tmp_path: Path, dtype: Any) -> None:
    """It weighs an expert, as routers do: in eight bits of mantissa its own weight would be rounded."""
    hf = tiny_hf(transformers.Qwen2MoeConfig(**TINY | SHARED))
    hf.save_pretrained(tmp_path / "hf")
    gates = {name: t for name, t in hf.state_dict().items() if "shared_expert_gate" in name}
    convert(tmp_path / "hf", tmp_path / "ours", dtype=dtype)
    convert(tmp_path / "ours", tmp_path / "back")
    back = tensors_of(tmp_path / "back")
    assert gates
    assert all(back[name].dtype == torch.float32 and torch.equal(back[name], gate) for name, gate in gates.items())
    model = mo.load(tmp_path / "ours")
    assert model.blocks[0].ffn.shared.output_gate.weight.dtype == torch.float32
    assert model(torch.arange(9)[None]).logits.isfinite().all()
