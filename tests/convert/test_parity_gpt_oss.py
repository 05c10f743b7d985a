"""gpt-oss, variant by variant, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.convert.parity import assert_parity, transformers
from tests.convert.variants import DYNAMIC, TINY, rope

FULL, SLIDING = "full_attention", "sliding_attention"
SMALL: dict[str, Any] = {**TINY, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},  # its own yarn, windows shorter than the text in every other layer
    "four_of_six": {
        "num_experts_per_tok": 4,
        "num_key_value_heads": 4,
        "sliding_window": 2,
    },  # of 1, their cache keeps all
    "tied_one_key_head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "no_attention_bias": {"attention_bias": False, "head_dim": 16},
    "all_full": {"layer_types": [FULL] * 3},
    "full_first": {"layer_types": [FULL, SLIDING, SLIDING], "sliding_window": 9},
    "wide_window": {"sliding_window": 500},
    "linear": rope("linear", 150000.0),
    "yarn_all": rope("yarn_all", 150000.0),
    "llama3": rope("llama3"),
    "dynamic": DYNAMIC,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_gpt_oss(name: str, tmp_path: Path) -> None:
    config = transformers.GptOssConfig(**SMALL | VARIANTS[name])
    print("gpt_oss", name, assert_parity(config, tmp_path))
