"""Tiny configurations shared by the parity tests, and every rope scaling in the words of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

_OLD = {"original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, **_OLD},
    "yarn_all": {
        "rope_type": "yarn", "factor": 8.0, **_OLD, "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.3,
        "truncate": False,
    },
    "yarn_mscale": {"rope_type": "yarn", "factor": 8.0, **_OLD, "mscale": 0.7, "mscale_all_dim": 1.1},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **_OLD, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}  # fmt: skip
# Past the old context of 16 in the text and while generating; or from below it.
DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0},
}


def rope(name: str, theta: float = 10000.0) -> dict[str, Any]:
    """``rope_parameters`` of one of the scalings."""
    return {"rope_parameters": {**ROPES[name], "rope_theta": theta}}


def ropes_slow(names: Iterable[str]) -> list[Any]:
    """Test parameters, the scalings among them marked slow: they share their code with a family whose are not."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in ROPES else name for name in names]
