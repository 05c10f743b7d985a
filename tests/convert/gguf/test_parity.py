"""llama.cpp reads the files and computes the same: logits, greedy text, quantised within the error of the type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.convert.gguf import Kind, export_gguf
from moesaic.models.config import ModelConfig
from tests.convert.gguf.families import (
    FAMILIES,
    VARIANTS,
    VOCAB,
    greedy_here,
    greedy_there,
    llama_cpp_of,
    logits_there,
    loud,
)
from tests.models.tiny import lively

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

IDS = torch.randint(VOCAB, (24,), generator=torch.Generator().manual_seed(9)).tolist()


def _logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([IDS])).logits[0].numpy()
    return logits


def _check(config: ModelConfig, path: Path) -> None:
    model = loud(lively(config))
    export_gguf(model, path, kind="f32")
    want = _logits(model)
    with llama_cpp_of(path) as reader:
        got = logits_there(reader, IDS)
        assert np.abs(got - want).max() < 1e-3
        assert np.abs(want).max() > 1  # loud enough for the bound to mean something
        assert greedy_there(reader, IDS[:8], 32) == greedy_here(model, IDS[:8], 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_logits_and_greedy_tokens_agree(family: str, tmp_path: Path) -> None:
    _check(FAMILIES[family](), tmp_path / "model.gguf")


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_agree(variant: str, tmp_path: Path) -> None:
    _check(VARIANTS[variant], tmp_path / "model.gguf")
