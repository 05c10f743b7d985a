"""Streamed conversions: the bits a load and a save would give, killed and gone on with, whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import moesaic as mo
from moesaic.checkpoint.atomic import verify_folder
from moesaic.convert import convert as module
from moesaic.convert.convert import check_plan, convert, plan_conversion
from moesaic.convert.work import work_for
from moesaic.errors import CheckpointError, ConfigError, MoesaicError
from tests.command import call, environment
from tests.convert.tiny_checkpoint import COMPANIONS, edit_tensors, make_hf, same, tensors_of, tree

ROOT = Path(__file__).parents[2]


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# ---- the same bits as the slow way ----


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
@pytest.mark.parametrize("tied", [False, True])
def test_streamed_is_what_load_and_save_give(tmp_path: Path, dtype: Any, layout: Any, tied: bool) -> None:
    source = make_hf(tmp_path / "hf", layout=layout, tie_embeddings=tied, max_shard_bytes=2000)
    convert(source, tmp_path / "ours", dtype=dtype, max_shard_bytes=1500)
    mo.save(mo.load(source, dtype=None if dtype is None else module.DTYPES[dtype]), tmp_path / "slow")
    assert same(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "slow"))
    for name in ("config.json", *COMPANIONS):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "slow" / name).read_bytes()
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    verify_folder(tmp_path / "ours")
    routers = [t for name, t in tensors_of(tmp_path / "ours").items() if ".router." in name]
    assert len(routers) == 2
    assert all(t.dtype == torch.float32 for t in routers)


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
def test_there_and_back_is_the_same_folder(tmp_path: Path, layout: Any) -> None:
    source = make_hf(tmp_path / "hf", layout=layout)
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", layout=layout)
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert same(before, after)
    for name in COMPANIONS:
        assert (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert one == other


def test_straight_from_one_layout_and_dtype_to_another(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", torch.float32)
    convert(source, tmp_path / "stacked", to="hf", layout="stacked", dtype="bf16")
    convert(tmp_path / "stacked", tmp_path / "again", to="hf", layout="per_expert")
    mo.save(mo.load(source, dtype=torch.bfloat16), tmp_path / "slow", format="hf")
    assert same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "slow"))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_ours_to_ours_changes_the_dtype_alone(tmp_path: Path) -> None:
    convert(make_hf(tmp_path / "hf", torch.float32), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to="moesaic", dtype="bf16")
    mo.save(mo.load(tmp_path / "a", dtype=torch.bfloat16), tmp_path / "slow")
    assert tree(tmp_path / "b") == tree(tmp_path / "slow")


@pytest.mark.parametrize(
    "change",
    [lambda t: t.fill_(7e4), lambda t: t[:2].copy_(torch.tensor([1e6, float("nan")])), lambda t: t[-1:].fill_(-7e4)],
    ids=["all", "beside a NaN", "the last"],
)
def test_what_fp16_cannot_hold_is_refused(
    tmp_path: Path, change: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STRIP", 3)
    source = make_hf(tmp_path / "hf")
    edit_tensors(source, lambda t: change(t["model.norm.weight"]))
    with pytest.raises(CheckpointError, match=r'"norm.weight" holds values beyond 65504'):
        convert(source, tmp_path / "ours", dtype="fp16")
    with pytest.raises(CheckpointError, match="holds values beyond 65504"):  # a dry run promises every check
        check_plan(plan_conversion(source, tmp_path / "ours", dtype="fp16"))
    assert names(tmp_path) == ["hf"]
    convert(source, tmp_path / "ours", dtype="bf16")


def test_the_report_counts_what_is_there(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf")
    seen: list[tuple[int, int]] = []
    report = convert(source, tmp_path / "ours", progress=lambda done, total: seen.append((done, total)))
    there, here = tensors_of(source), tensors_of(tmp_path / "ours")
    assert (report.to, report.family, report.files, report.resumed) == ("moesaic", None, 1, 0)
    assert (report.tensors, report.parameters) == (len(here), sum(t.numel() for t in here.values()))
    assert report.bytes == sum(t.nbytes for t in here.values())
    assert report.coverage.complete
    assert (report.coverage.tensors.total, report.coverage.experts.total) == (len(there), 6)
    assert report.coverage.parameters.total == report.parameters
    assert seen[0] == (0, report.bytes)
    assert seen[-1] == (report.bytes, report.bytes)
    assert seen == sorted(seen)
    json.dumps(report.record())


def test_one_of_our_tensors_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that was loaded is gone before the next is."""
    import gc
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []

    def watched(load: Any) -> Any:
        def call(name: str, dtype: torch.dtype) -> torch.Tensor:
            assert not [r for r in alive if r() is not None], name
            tensor: torch.Tensor = load(name, dtype)
            alive.append(weakref.ref(tensor))
            return tensor

        return call

    gc.collect()
    for source, target in ((make_hf(tmp_path / "hf"), "ours"), (tmp_path / "ours", "back")):
        plan = plan_conversion(source, tmp_path / target)
        object.__setattr__(plan.source, "load", watched(plan.source.load))
        module.run_plan(plan)
        assert len(alive) > 10
        alive.clear()


# ---- kills ----


def killed(source: Path, target: Path, dtype: str, stride: int = 1) -> int:
    """How many steps there were to be killed before; every one of them, or every ``stride``-th, was."""
    script = ROOT / "tests" / "convert" / "killer.py"
    done = subprocess.run(
        [sys.executable, str(script), str(source), str(target), dtype, str(stride)],
        env=environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), environment()["PYTHONPATH"]])},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_any_step_it_goes_on_to_the_same_bits(tmp_path: Path, stride: int) -> None:
    """The target is at every moment absent or whole; killed once it is in its place, the same command finds it there."""
    source = make_hf(tmp_path / "hf", num_layers=1, max_shard_bytes=3000)
    assert killed(source, tmp_path / "out", "bf16", stride) > 80


@pytest.mark.slow
def test_killed_before_any_step_of_an_export(tmp_path: Path) -> None:
    source = tmp_path / "alone" / "ours"
    convert(make_hf(tmp_path / "hf", num_layers=1), source)
    assert killed(source, tmp_path / "alone" / "out", "bf16") > 80


def interrupted(source: Path, target: Path, after: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Converts until ``after`` files are finished, then is interrupted as by Ctrl-C."""
    from moesaic.convert.work import Work

    finish, count = Work.finish, 0

    def stop(self: Work, path: Path) -> None:
        nonlocal count
        finish(self, path)
        count += 1
        if count == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, max_shard_bytes=1000, **options)


def test_finished_files_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_hf(tmp_path / "hf")
    interrupted(source, tmp_path / "out", 3, monkeypatch)
    assert names(tmp_path) == [".out.converting", "hf"]
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".out.converting" / "out").glob("*.safetensors")}
    assert len(kept) == 3
    said: list[str] = []
    report = convert(source, tmp_path / "out", max_shard_bytes=1000, say=said.append)
    assert report.resumed == 3
    assert said == ["Going on: 3 files were finished before."]
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}.items()
    assert names(tmp_path) == ["hf", "out"]
    convert(source, tmp_path / "straight", max_shard_bytes=1000)
    assert tree(tmp_path / "out") == tree(tmp_path / "straight")


@pytest.mark.parametrize("change", ["dtype", "source", "size", "damage", "no progress", "restart"])
def test_another_plan_starts_over_and_damage_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source = make_hf(tmp_path / "hf")
    interrupted(source, tmp_path / "out", 3, monkeypatch)
    work = tmp_path / ".out.converting"
    options: dict[str, Any] = {"max_shard_bytes": 1000}
    resumed = 0
    if change == "dtype":
        options["dtype"] = "fp32"
    elif change == "source":
        edit_tensors(source, lambda t: t["model.norm.weight"].fill_(2))
    elif change == "size":
        options["max_shard_bytes"] = 1200
    elif change == "damage":
        path = sorted((work / "out").glob("*.safetensors"))[1]
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
        resumed = 2
    elif change == "no progress":
        (work / "progress.json").write_text("{")
    else:
        options["resume"] = False
    said: list[str] = []
    assert convert(source, tmp_path / "out", say=said.append, **options).resumed == resumed
    assert len(said) == 1
    assert said[0].startswith("Going on: 2" if resumed else "Starting over: an earlier conversion left")
    options["resume"] = True
    convert(source, tmp_path / "straight", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "straight")
    assert names(tmp_path) == ["hf", "out", "straight"]


# ---- refusals ----


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf")
    with work_for(tmp_path / "out", plan="x"), pytest.raises(MoesaicError, match="out is being written by another"):
        convert(source, tmp_path / "out")
    assert names(tmp_path) == ["hf", "out"]


def test_a_full_disk_keeps_what_is_finished_and_goes_on(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf")
    # A file holds 600 bytes or one larger tensor; those of the experts are the largest.
    with file_size_limit(2000), pytest.raises(MoesaicError, match="larger than this system allows") as error:
        convert(source, tmp_path / "out", dtype="fp32", max_shard_bytes=600)
    assert not (tmp_path / "out").exists()
    assert names(tmp_path) == [".out.converting", "hf"]
    assert "goes on there" in str(error.value)
    assert convert(source, tmp_path / "out", dtype="fp32", max_shard_bytes=600).resumed > 0
    convert(source, tmp_path / "straight", dtype="fp32", max_shard_bytes=600)
    assert tree(tmp_path / "out") == tree(tmp_path / "straight")


def test_too_small_a_disk_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_hf(tmp_path / "hf")

    class Usage:
        free = 1000

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(MoesaicError, match=r"it needs [\d.]+ kB and 1 kB are free"):
        convert(source, tmp_path / "out")
    assert names(tmp_path) == ["hf"]


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(MoesaicError, match="thesis.tex"):
        convert(source, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(MoesaicError, match="a file of that name exists"):
        convert(source, tmp_path / "file")
    assert names(tmp_path) == ["file", "hf", "out"]
    assert names(tmp_path / "out") == ["thesis.tex"]


def test_another_model_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_hf(tmp_path / "hf")
    for i, target in enumerate(("mine", "edited", "trained", "other")):
        convert(source, tmp_path / target, dtype=("fp32", None, None, None)[i])
    config = (tmp_path / "edited" / "config.json").read_text()
    assert '"k": 2' in config
    (tmp_path / "edited" / "config.json").write_text(config.replace('"k": 2', '"k": 1'))
    model = mo.load(tmp_path / "trained")
    model.state_dict()["norm.weight"][-1] += 1  # the same names and shapes, another number
    mo.save(model, tmp_path / "trained")
    mo.save(mo.load(make_hf(tmp_path / "hf2", num_layers=1)), tmp_path / "other")
    before = tree(tmp_path)
    for target in ("mine", "edited", "trained", "other"):
        with pytest.raises(
            MoesaicError, match=f"{target} exists already and is not what .* choose another folder, or remove"
        ):
            convert(source, tmp_path / target)
        done = call(capsys, "convert", str(source), str(tmp_path / target))
        assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert tree(tmp_path) == before
    with pytest.raises(MoesaicError, match="exists already"), work_for(tmp_path / "mine", plan="x"):
        raise AssertionError("it began")


def test_what_is_there_already_is_said(tmp_path: Path) -> None:
    """A script that gives its command again is not stopped by its own result, and nothing is touched."""
    source = make_hf(tmp_path / "hf")
    (tmp_path / "out").mkdir()  # empty, it is nobody's
    convert(source, tmp_path / "out", max_shard_bytes=1000)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / ".out.converting").mkdir()  # of a process killed just before its end
    seen: list[tuple[int, int]] = []
    report = convert(
        source, tmp_path / "out", max_shard_bytes=1000, progress=lambda done, total: seen.append((done, total))
    )
    assert report.resumed == report.files == sum(path.suffix == ".safetensors" for path in times)
    assert "there already, whole and the same to the last bit" in report.lines()[-1]
    assert seen[-1] == (report.bytes, report.bytes)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert names(tmp_path) == ["hf", "out"]


@pytest.mark.parametrize("target", ["hf", "hf/below", ".", "link"])
def test_source_and_target_must_lie_apart(tmp_path: Path, target: str) -> None:
    source = make_hf(tmp_path / "hf")
    (tmp_path / "link").symlink_to(source)
    before = tree(tmp_path)
    with pytest.raises(MoesaicError, match="lie in each other"):
        convert(source, tmp_path / target)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onnx"}, "to must be one of"),
        ({"dtype": "fp8"}, "dtype must be one of"),
        ({"max_shard_bytes": 0}, "max_shard_bytes must be positive"),
        ({"family": "mixtral"}, "family and layout say how a Hugging Face folder is written"),
        ({"to": "hf", "family": "mixtrel"}, 'no family "mixtrel"'),
        ({"to": "hf", "family": "llama"}, "cannot be exported as that family"),
        ({"to": "gguf", "dtype": "bf16"}, "dtype does not apply to a GGUF file"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = make_hf(tmp_path / "hf")
    with pytest.raises(ConfigError, match=message):
        convert(source, tmp_path / "out", **options)
    assert names(tmp_path) == ["hf"]


def test_a_flipped_byte_of_our_own_folder_is_noticed(tmp_path: Path) -> None:
    convert(make_hf(tmp_path / "hf"), tmp_path / "ours")
    path = tmp_path / "ours" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged.*sha256"):
        convert(tmp_path / "ours", tmp_path / "back")
    assert names(tmp_path) == ["hf", "ours"]
    convert(tmp_path / "ours", tmp_path / "back", verify=False)


# ---- GGUF ----


def test_gguf_of_either_source_is_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source = make_hf(tmp_path / "hf", torch.float32)
    convert(source, tmp_path / "ours")
    one = convert(source, tmp_path / "a" / "m.gguf", to="gguf", gguf_type="f32")
    other = convert(tmp_path / "ours", tmp_path / "b" / "m.gguf", to="gguf", gguf_type="f32")
    assert (tmp_path / "a" / "m.gguf").read_bytes() == (tmp_path / "b" / "m.gguf").read_bytes()
    assert one.parameters == other.parameters == sum(t.numel() for t in tensors_of(source).values())
    with pytest.raises(ConfigError, match="type must be one of"):
        convert(source, tmp_path / "c.gguf", to="gguf", gguf_type="q9")
    assert names(tmp_path) == ["a", "b", "hf", "ours"]
