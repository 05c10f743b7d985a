"""Broken and hostile checkpoints: one sentence with name and reason, from loading and the command; nothing written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import moesaic as mo
from moesaic.convert.convert import convert
from moesaic.errors import MoesaicError
from tests.command import call
from tests.convert.tiny_checkpoint import make_hf, same, tensors_of, tree

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
SINGLE = "model.safetensors"


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        held = load_file(folder / SINGLE)
        change(held)
        save_file(held, folder / SINGLE, metadata={"format": "pt"})

    return spoil


def _config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def _text(old: str, new: str, file: str = "config.json") -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))

    return spoil


def _cut(folder: Path) -> None:
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:-7])


def _header(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """The header rewritten, with its length; the data stays."""

    def spoil(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = change(raw[8 : 8 + size])
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + size :])

    return spoil


def _length(size: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        (folder / SINGLE).write_bytes(struct.pack("<Q", size) + raw[8:])

    return spoil


def _twice(header: bytes) -> bytes:
    first = header.index(b'"model.norm.weight"')
    end = header.index(b"}", first) + 1
    return header[:end] + b"," + header[first:end] + header[end:]


def _index(member: str) -> Callable[[Path], None]:
    """An index that sends a tensor to ``member``."""

    def spoil(folder: Path) -> None:
        held = load_file(folder / SINGLE)
        del held["model.norm.weight"]
        (folder / SINGLE).unlink()
        save_file(held, folder / "model-00001-of-00001.safetensors")
        places = dict.fromkeys(held, "model-00001-of-00001.safetensors") | {"model.norm.weight": member}
        (folder / f"{SINGLE}.index.json").write_text(json.dumps({"weight_map": places}))

    return spoil


def _link(folder: Path) -> None:
    os.rename(folder / SINGLE, folder.parent / "elsewhere.safetensors")
    (folder / SINGLE).symlink_to(folder.parent / "elsewhere.safetensors")


def _pickles(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def _folder(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "expert tensor dropped": (_tensors(lambda t: t.pop(EXPERT)), "experts.2.w2.weight"),
    "tensor renamed": (_tensors(lambda t: t.update({EXPERT + "x": t.pop(EXPERT)})), "experts.2.w2.weight"),
    "tensor added": (_tensors(lambda t: t.update({"model.extra": torch.zeros(3)})), "model.extra"),
    "named like a path": (_tensors(lambda t: t.update({"../../x": torch.zeros(3)})), r"\.\./\.\./x"),
    "shape": (_tensors(lambda t: t.update({EXPERT: torch.zeros(8, 13)})), r"experts.2.w2.weight.*\[8, 13\].*\[8, 12\]"),
    "whole numbers": (_tensors(lambda t: t.update({EXPERT: torch.zeros(8, 12).int()})), "experts.2.w2.weight.*int32"),
    "shard cut": (_cut, SINGLE),
    "nothing in the file": (lambda f: (f / SINGLE).write_bytes(b""), SINGLE),
    "a folder instead": (_folder, SINGLE),
    "header of 2^60": (_length(2**60), SINGLE),
    "header of 2^63": (_length(2**63), SINGLE),
    "header past the end": (_length(10**7), SINGLE),
    "name twice in the header": (_header(_twice), SINGLE),
    "header not JSON": (_header(lambda h: b"[" * len(h)), SINGLE),
    "index upwards": (_index("../x.safetensors"), r"\.\./x.safetensors"),
    "index absolute": (_index("/etc/x.safetensors"), "/etc/x.safetensors"),
    "index with NUL": (_index("a\0.safetensors"), "not a plain file name"),
    "index to a pickle": (_index("x.bin"), "x.bin"),
    "index to nothing": (_index("y.safetensors"), "y.safetensors"),
    "link out of the folder": (_link, "outside the folder"),
    "pickles alone": (_pickles, "pytorch_model.bin|model.safetensors is missing"),
    "unknown key": (_config(moe_magic=3), "moe_magic"),
    "key misspelt": (_config(sliding_windw=3), 'sliding_windw.*"sliding_window"'),
    "other attention": (_config(attention_dropout=0.5), "attention_dropout"),
    "unknown rope": (_config(rope_scaling={"rope_type": "longrope", "factor": 2.0}), "longrope"),
    "k above E": (_config(num_experts_per_tok=99), "99"),
    "k of 0": (_config(num_experts_per_tok=0), "k must be at least 1|at least 1, not 0"),
    "k of a half": (_config(num_experts_per_tok=2.5), "num_experts_per_tok.*2.5"),
    "experts differ": (_config(num_local_experts=4), "experts.3|lacks"),
    "negative layers": (_config(num_hidden_layers=-1), "-1"),
    "very many layers": (_config(num_hidden_layers=10**12), "1000000000000"),
    "very wide": (_config(hidden_size=10**12, head_dim=8), "10{12}|impossible|wrong shape"),
    "vocabulary of 2^62": (_config(vocab_size=2**62), "impossible|wrong shape"),
    "eps NaN": (_text('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN'), "rms_norm_eps"),
    "another type": (_config(model_type="mamba"), "mamba"),
    "another head": (_config(architectures=["MixtralForSequenceClassification"]), "SequenceClassification"),
    "quantised otherwise": (_config(quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
    "key twice": (_text('"vocab_size": 40', '"vocab_size": 40, "vocab_size": 41'), "vocab_size"),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"model_type": "\xff"}'), "config.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json"),
    "config of brackets": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_by_name_and_nothing_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, words = CASES[case]
    folder = make_hf(tmp_path / "hf")
    assert mo.load(folder).config.vocab_size == 40  # it was whole
    spoil(folder)
    before = tree(tmp_path)
    with pytest.raises(MoesaicError, match=words):
        mo.load(folder)
    for to in ("moesaic", "hf"):
        with pytest.raises(MoesaicError, match=words):
            convert(folder, tmp_path / "out", to=to)
    monkeypatch.chdir(tmp_path)
    done = call(capsys, "convert", "hf", "out")
    assert done.status == 2
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err
    assert tree(tmp_path) == before


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_bytes_give_a_sentence_or_the_tensors(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Any bytes over the header or the end of a file: an error of ours, or a model of the same shape; never a crash."""
    base = tmp_path_factory.getbasetemp() / "fuzz"
    if not base.exists():
        make_hf(base)
    raw = (base / SINGLE).read_bytes()
    length = 8 + struct.unpack("<Q", raw[:8])[0]
    at = data.draw(st.integers(0, length - 1))
    new = data.draw(st.binary(min_size=1, max_size=8))
    keep = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))
    spoilt = (raw[:at] + new + raw[at + len(new) :])[:keep]
    folder = base.with_name("fuzzed")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    (folder / SINGLE).write_bytes(spoilt)
    try:
        model = mo.load(folder)
    except MoesaicError as error:
        assert str(error)  # noqa: PT017 - either outcome is right
    else:
        assert model.state_dict().keys() == mo.load(base).state_dict().keys()
        if spoilt == raw:
            assert same(tensors_of(folder), tensors_of(base))
