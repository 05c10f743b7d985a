"""What is refused, and that nothing is ever there in part."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moesaic.convert.gguf import Kind, export_gguf, export_tensors
from moesaic.errors import CheckpointError, ConfigError, MoesaicError
from moesaic.models.decoder import Decoder
from tests.convert.gguf.families import FAMILIES, deepseek_v2, deepseek_v3, llama, loud
from tests.models.tiny import lively

gguf = pytest.importorskip("gguf")


def _model(family: str = "mixtral") -> Decoder:
    return loud(lively(FAMILIES[family]()))


# ---- refused, and nothing written ----


def _state(model: Decoder) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def _export_state(model: Decoder, state: dict[str, torch.Tensor], path: Path, kind: Kind = "f16") -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    export_tensors(model.config, shapes, lambda name: state[name], path, kind)


EXPERTS = "blocks.1.ffn.experts.w_in"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("drop", rf'lacks 1 tensors: "{EXPERTS}"'),
        ("rename", rf'lacks 1 tensors: "{EXPERTS}"'),
        ("add", r'no place in architecture "llama" for 1 tensors: "blocks.1.ffn.lora.a"'),
        ("transpose", rf"1 tensors have another shape than the config says, first {EXPERTS}: \[8, 64, 32\] instead"),
        ("nan", r"The tensor blk.1.ffn_up_exps.weight holds NaN or infinity"),
        ("huge", r"The tensor blk.1.ffn_gate_exps.weight holds 1e\+06, more than F16"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(change: str, message: str, tmp_path: Path) -> None:
    model = _model()
    state = _state(model)
    experts = state.pop(EXPERTS).detach().clone()
    if change == "rename":
        state["blocks.1.ffn.experts.w_inn"] = experts
    elif change == "transpose":
        state[EXPERTS] = experts[..., :32]
    elif change == "nan":
        experts[3, 5, 40] = float("nan")
    elif change == "huge":
        experts[7, 5, 2] = -1e6
    elif change == "add":
        state["blocks.1.ffn.lora.a"] = torch.zeros(2, 2)
    if change in ("add", "nan", "huge"):
        state[EXPERTS] = experts
    with pytest.raises(MoesaicError, match=message):
        _export_state(model, state, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_is_not_the_embedding_it_should_be(tmp_path: Path) -> None:
    model = lively(llama(tie_embeddings=True))
    model.head.weight = torch.nn.Parameter(model.head.weight.detach() * 2)
    with pytest.raises(CheckpointError, match="head is not its embedding although"):
        export_gguf(model, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kind must be one of .*not 'q4_k'"):
        export_gguf(_model(), tmp_path / "m.gguf", kind="q4_k")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_command_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MoesaicError, match=r'needs the package "gguf".*pip install "gguf>=0.17"'):
        export_gguf(_model(), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


# ---- whole or not at all ----


@contextmanager
def _file_limit(limit: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("limit", [100, 3000, 30_000])  # in the header, among the tensors' names, in their numbers
def test_a_full_disk_leaves_the_old_file(limit: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    with _file_limit(limit), pytest.raises(MoesaicError, match="larger than this system allows"):
        export_gguf(_model(), path, kind="f32")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, CheckpointError])
def test_a_failure_on_the_way_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    model = _model()
    state, seen = _state(model), 0

    def read(name: str) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == 8:
            raise error
        return state[name]

    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with pytest.raises(error):
        export_tensors(model.config, shapes, read, tmp_path / "m.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_swept_by_the_next(tmp_path: Path) -> None:
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)  # a number that was a process and is none
    left = tmp_path / f".m.gguf.writing-{pid}"
    left.write_bytes(b"half")
    export_gguf(_model(), tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_folder_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").mkdir()
    with pytest.raises(MoesaicError, match="a folder stands where a file is needed"):
        export_gguf(_model(), tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    export_gguf(lively(deepseek_v2()), tmp_path / "a" / "b" / "m.gguf")
    assert (tmp_path / "a" / "b" / "m.gguf").is_file()


def test_metadata_is_the_same_however_often(tmp_path: Path) -> None:
    model = lively(deepseek_v3())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export_gguf(model, tmp_path / name / "m.gguf", kind="q4_0")
    assert (tmp_path / "a" / "m.gguf").read_bytes() == (tmp_path / "b" / "m.gguf").read_bytes()
