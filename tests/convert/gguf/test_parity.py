"""llama.cpp reads the files and computes the same: logits, greedy text, quantised within the error of the type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.convert.gguf import Kind, export_gguf
from moesaic.convert.gguf.architectures import architecture_of
from moesaic.convert.gguf.number_types import type_of
from moesaic.convert.gguf.tensors import targets_of
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder
from moesaic.nn.rope import RopeScaling
from tests.convert.gguf.families import (
    FAMILIES,
    VARIANTS,
    VOCAB,
    gpt_oss,
    greedy_here,
    greedy_there,
    llama_cpp_of,
    logits_there,
    loud,
    mixtral,
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


# KL(full precision, the file), its median over positions: one flipped near-tie of a router is no rounding error.
TYPE_ERROR = {"f16": 1e-5, "bf16": 1e-3, "q8_0": 5e-3, "q4_0": 0.3}
# The same against our model with the file's own rounded numbers: what is left is how activations are rounded (to 8 bits).
ACTIVATION_ERROR = {"f16": 1e-5, "bf16": 1e-3, "q8_0": 5e-3, "q4_0": 5e-3}


def _kl(want: np.ndarray, got: np.ndarray) -> float:
    p, q = (torch.tensor(t).double().log_softmax(-1) for t in (want, got))
    return float((p.exp() * (p - q)).sum(-1).median())


def _round(model: Decoder, kind: Kind) -> None:
    """Every number of the model as the file holds it. Rows keep their content where only their order changes."""
    import gguf

    arch, state = architecture_of(model.config), model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            for target in targets_of(name, model.config, arch) or ():
                part = target.take(tensor, model.config)
                type_, _ = type_of(target.name, tuple(part.shape), kind, target.exact)
                if part.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                    part = tensor
                number_type = gguf.GGMLQuantizationType[type_]
                rounded = gguf.dequantize(gguf.quantize(part.contiguous().numpy(), number_type), number_type)
                part.copy_(torch.from_numpy(rounded.reshape(part.shape).copy()))


@pytest.mark.parametrize("kind", TYPE_ERROR)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_types_differ_by_no_more_than_their_rounding(family: str, kind: Kind, tmp_path: Path) -> None:
    model, path = loud(lively(FAMILIES[family]())), tmp_path / "model.gguf"
    export_gguf(model, path, kind=kind)
    want = _logits(model)
    with llama_cpp_of(path) as reader:
        got = logits_there(reader, IDS)
    assert _kl(want, got) < TYPE_ERROR[kind]
    _round(model, kind)
    assert np.abs(_logits(model) - want).max() > 1e-4  # rounding happened
    assert _kl(_logits(model), got) < ACTIVATION_ERROR[kind]


def test_rows_that_are_no_whole_blocks_are_read_as_f16(tmp_path: Path) -> None:
    model, path = loud(lively(mixtral(dim=48, head_dim=16))), tmp_path / "model.gguf"
    report = export_gguf(model, path, kind="q8_0")
    assert "token_embd.weight" in report.fallbacks  # rows of 48
    with llama_cpp_of(path) as reader:
        assert _kl(_logits(model), logits_there(reader, IDS)) < TYPE_ERROR["q8_0"]


def test_experts_in_mxfp4_are_read(tmp_path: Path) -> None:
    model, path = loud(lively(gpt_oss())), tmp_path / "model.gguf"
    report = export_gguf(model, path, kind="mxfp4")
    assert set(report.by_type) == {"F32", "BF16", "MXFP4"}
    with llama_cpp_of(path) as reader:
        got = logits_there(reader, IDS)
    _round(model, "mxfp4")
    assert _kl(_logits(model), got) < ACTIVATION_ERROR["q4_0"]


def test_a_shorter_context_stands_in_for_windows_llama_cpp_lacks(tmp_path: Path) -> None:
    model, path = loud(lively(mixtral(sliding_window=24, max_seq_len=64))), tmp_path / "model.gguf"
    report = export_gguf(model, path, kind="f32")
    assert any("no sliding windows, so the context is 24 instead of 64" in note for note in report.notes)
    with llama_cpp_of(path) as reader:
        assert int(reader.metadata["llama.context_length"]) == 24
        assert np.abs(logits_there(reader, IDS) - _logits(model)).max() < 1e-3


def test_yarn_that_is_only_nearly_so_is_said(tmp_path: Path) -> None:
    """gpt-oss does not round YaRN's bounds to whole dimensions, llama.cpp does."""
    scaling = RopeScaling("yarn", 4.0, 32, truncate=False)
    model, path = loud(lively(gpt_oss(rope_scaling=scaling))), tmp_path / "model.gguf"
    report = export_gguf(model, path, kind="f32")
    assert any("bounds rounded to whole dimensions" in note for note in report.notes)
    with llama_cpp_of(path) as reader:
        assert _kl(_logits(model), logits_there(reader, IDS)) < 0.05
