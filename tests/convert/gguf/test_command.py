"""``moesaic convert`` to GGUF: what a target means, what is in its way, and a dry run that checks what the real one does."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.convert.convert import convert
from moesaic.convert.gguf import KINDS, Kind
from tests.command import call
from tests.convert.gguf.checkpoints import CASES, OLMOE_CLIPPED, write
from tests.convert.gguf.test_by_hand import File
from tests.convert.tiny_checkpoint import edit_tensors, make_hf, tree

gguf = pytest.importorskip("gguf")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_hf(tmp_path / "hf", torch.float32)


# ---- what is written ----


@pytest.mark.parametrize("words", [("m.gguf",), ("m.GGUF",), ("m", "--type", "f16"), ("m", "--to", "gguf")])
def test_a_name_or_a_type_of_gguf_means_gguf(source: Path, words: tuple[str, ...], capsys: Capture) -> None:
    target = source.parent / words[0]
    assert call(capsys, "convert", str(source), str(target), *words[1:]).status == 0
    assert File(target).keys["general.file_type"] == 1  # f16


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_listed_and_written(source: Path, kind: Kind, capsys: Capture) -> None:
    listed = re.search(r"--type\{(.*?)\}", re.sub(r"[\s│]", "", call(capsys, "convert", "--help").out))
    assert listed is not None
    assert kind in listed[1].split(",")
    assert call(capsys, "convert", str(source), str(source.parent / "m.gguf"), "--type", kind).status == 0
    assert kind.upper() in gguf.LlamaFileType(File(source.parent / "m.gguf").keys["general.file_type"]).name


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("m.gguf", "--to", "hf"), "m.gguf is named like a GGUF file, and to=hf writes a folder"),
        (("m.gguf", "--to", "moesaic"), "named like a GGUF file, and to=moesaic writes a folder"),
        (("m", "--to", "hf", "--type", "q8_0"), "type=q8_0 is for GGUF files, and to=hf writes a folder"),
        (("m.gguf", "--type", "zz"), '--type must be one of .*, not "zz"'),
        (("m.gguf", "--dtype", "bf16"), "dtype does not apply to a GGUF file"),
        (("m.gguf", "--family", "llama"), "family and layout say how a Hugging Face folder is written"),
    ],
)
def test_what_does_not_go_together_is_refused(
    source: Path, words: tuple[str, ...], message: str, dry: tuple[str, ...], capsys: Capture
) -> None:
    before = tree(source.parent)
    done = call(capsys, "convert", str(source), str(source.parent / words[0]), *words[1:], *dry)
    assert done.status == 2
    assert re.search(message, done.err)
    assert len(done.err.splitlines()) == 1
    assert tree(source.parent) == before


# ---- what is in the way ----


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_what_stands_there_is_not_replaced(source: Path, what: str, dry: tuple[str, ...], capsys: Capture) -> None:
    target = source.parent / "prec.gguf"
    if what == "file":
        target.write_bytes(b"precious")
    elif what == "folder":
        target.mkdir()
    else:
        target.symlink_to("nowhere")
    done = call(capsys, "convert", str(source), str(target), *dry)
    assert (done.status, done.err) == (2, f"moesaic: {target} exists already; choose another target, or remove it.\n")
    assert target.is_symlink() or target.is_dir() or target.read_bytes() == b"precious"


def test_what_is_in_the_way_is_said_before_anything_is_fetched(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesaic.commands.convert.resolve", lambda name: pytest.fail(f"{name} was fetched"))
    (tmp_path / "m.gguf").write_bytes(b"precious")
    done = call(capsys, "convert", "owner/name", str(tmp_path / "m.gguf"))
    assert (done.status, "exists already" in done.err) == (2, True)


def test_a_killed_export_is_begun_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = source.parent / "m.gguf"
    convert(source, source.parent / "whole" / "m.gguf")
    if (pid := os.fork()) == 0:
        monkeypatch.setattr(os, "fsync", lambda handle: os.kill(os.getpid(), signal.SIGKILL))
        convert(source, target)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert [path.name for path in source.parent.glob(".*")] == [f".m.gguf.writing-{pid}"]
    convert(source, target)
    assert target.read_bytes() == (source.parent / "whole" / "m.gguf").read_bytes()
    assert list(source.parent.glob(".*")) == []


# ---- dry runs ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe, tied", "llama 3, tied", "deepseek_v3", "gpt_oss"])
def test_a_dry_run_says_what_the_real_one_does(name: str, kind: Kind, tmp_path: Path, capsys: Capture) -> None:
    write(CASES[name], tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text("{}")
    before = tree(tmp_path)
    words = ("convert", str(tmp_path / "hf"), str(tmp_path / "m.gguf"), "--type", kind)
    dry, dry_json = call(capsys, *words, "--dry-run"), call(capsys, *words, "--dry-run", "--json")
    assert tree(tmp_path) == before
    real = call(capsys, *words)
    assert dry.status == dry_json.status == real.status == 0
    assert dry.out == f"Nothing is written (--dry-run). It would be:\n{real.out}"
    assert "copied" not in real.out
    said = json.loads(dry_json.out)
    tensors = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    assert said["written"] is False
    assert said["bytes"] == said["gguf"]["file_bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert said["tensors"] == len(tensors) - len(said["gguf"]["added"])
    own = [t for t in tensors if t.name not in said["gguf"]["added"]]
    assert said["parameters"] == sum(int(t.n_elements) for t in own)
    assert said["parameters"] == sum(torch.Size(shape).numel() for shape in CASES[name].shapes.values())
    types = {t.tensor_type.name for t in tensors}
    assert said["gguf"]["by_type"] == {
        type_: {
            "tensors": sum(t.tensor_type.name == type_ for t in tensors),
            "parameters": sum(int(t.n_elements) for t in tensors if t.tensor_type.name == type_),
            "bytes": sum(int(t.n_bytes) for t in tensors if t.tensor_type.name == type_),
        }
        for type_ in types
    }
    left = "2 tensors that were kept aside have no place in a GGUF file and were left out"
    assert (left in real.out) == (name == "deepseek_v3")


def _put(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name][0, 0] = value

    return change


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_put("lm_head.weight", float("nan")), "The tensor output.weight holds NaN or infinity"),
        (_put("lm_head.weight", 1e6), r"output.weight holds 1e\+06, more than F16 can"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    ],
)
def test_a_dry_run_refuses_the_numbers_the_real_one_does(
    source: Path, spoil: Any, message: str, dry: tuple[str, ...], capsys: Capture
) -> None:
    edit_tensors(source, spoil)
    before = tree(source.parent)
    done = call(capsys, "convert", str(source), str(source.parent / "m.gguf"), *dry)
    assert done.status == 2
    assert re.search(message, done.err)
    assert tree(source.parent) == before


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_dry_run_refuses_the_models_the_real_one_does(tmp_path: Path, dry: tuple[str, ...], capsys: Capture) -> None:
    write(OLMOE_CLIPPED, tmp_path / "hf")
    done = call(capsys, "convert", str(tmp_path / "hf"), str(tmp_path / "m.gguf"), *dry)
    assert done.status == 2
    assert "No architecture of llama.cpp computes model.clip_qkv=8.0" in done.err
    write(CASES["olmoe"], tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    done = call(capsys, "convert", str(tmp_path / "other"), str(tmp_path / "m.gguf"), *dry)
    assert done.status == 2
    assert "is not a tokenizer" in done.err
    assert not (tmp_path / "m.gguf").exists()
