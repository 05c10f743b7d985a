"""Dense families, variant by variant, against transformers: Llama, Mistral, Qwen3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.convert.parity import assert_parity, transformers
from tests.convert.variants import DYNAMIC, ROPES, TINY, rope, ropes_slow

LLAMA: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one_kv_head": {"num_key_value_heads": 1},
    "as_many_kv_heads": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 16},
    "gelu": {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-4},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "dynamic": DYNAMIC,
    **{name: rope(name) for name in ROPES},
}
MISTRAL: dict[str, dict[str, Any]] = {
    "full": {"sliding_window": None},
    "window": {"sliding_window": 5},
    # Of one token transformers is at odds with itself: its cache keeps everything.
    "window_of_two": {"sliding_window": 2},
    "window_tied": {"sliding_window": 7, "tie_word_embeddings": True, "num_key_value_heads": 4},
    "window_yarn": {"sliding_window": 6, **rope("yarn", 1e6)},
}
LAYERS = ["full_attention", "sliding_attention", "full_attention"]
QWEN3: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied_wide_heads": {"tie_word_embeddings": True, "head_dim": 16},
    "biases": {"attention_bias": True, "num_key_value_heads": 1},
    "upper_windows": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "all_windows": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "listed_windows": {"use_sliding_window": True, "sliding_window": 4, "layer_types": LAYERS},
    "unused_window": {"use_sliding_window": False, "sliding_window": 4},
    "dynamic": DYNAMIC,
    **{name: rope(name, 1e6) for name in ROPES},
}


@pytest.mark.parametrize("name", LLAMA)
def test_llama(name: str, tmp_path: Path) -> None:
    print("llama", name, assert_parity(transformers.LlamaConfig(**TINY | LLAMA[name]), tmp_path))


@pytest.mark.parametrize("name", MISTRAL)
def test_mistral(name: str, tmp_path: Path) -> None:
    print("mistral", name, assert_parity(transformers.MistralConfig(**TINY | MISTRAL[name]), tmp_path))


@pytest.mark.parametrize("name", ropes_slow(QWEN3))
def test_qwen3(name: str, tmp_path: Path) -> None:
    print("qwen3", name, assert_parity(transformers.Qwen3Config(**TINY | QWEN3[name]), tmp_path))
