"""Mixtral, variant by variant, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.convert.parity import assert_parity, transformers
from tests.convert.variants import DYNAMIC, ROPES, TINY, rope, ropes_slow

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "three_of_seven": {"num_local_experts": 7, "num_experts_per_tok": 3, "num_key_value_heads": 4},
    "all_experts": {"num_local_experts": 3, "num_experts_per_tok": 3},
    "one_expert_of_one": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "window": {"sliding_window": 5},
    "window_wider_than_text": {"sliding_window": 500},
    "wide_heads": {"head_dim": 16, "hidden_act": "gelu"},
    "heads_not_given": {"head_dim": None, "router_jitter_noise": 0.1},
    "dynamic": DYNAMIC,
    **{name: rope(name, 1e6) for name in ROPES},
}


@pytest.mark.parametrize("name", ropes_slow(VARIANTS))
def test_mixtral(name: str, tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**TINY | {"num_local_experts": 6} | VARIANTS[name])
    print("mixtral", name, assert_parity(config, tmp_path))
