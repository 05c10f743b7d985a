"""The command under torchrun, two processes on gloo, and all that a user does with the run afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import moesaic as mo
from moesaic.checkpoint.parts import is_sharded
from moesaic.checkpoint.shards import header_of
from moesaic.train.log import read_metrics
from moesaic.train.sharded.consolidate import consolidate
from tests.command import call, make_project, one_sentence
from tests.parallel.elastic import launch, records, steps_done

pytestmark = pytest.mark.timeout(300)
CHANGES: dict[str, Any] = {"steps": 6, "dtype": "fp32", "checkpoint_every": 2, "keep_last": 2, "parallel": {"ep": 2}}
IDS = torch.arange(40)[None] * 7 % 300


def train(out: Path, *more: str, processes: int = 2, resume: bool = False) -> str:
    """All that the command said."""
    project = out.parent
    if resume:
        words = ["--resume", "--out", str(out), *more]
    else:
        texts = [str(project / name) for name in ("a.txt", "b.txt")]
        words = ["--data", *texts, "--config", str(project / "tiny.json"), "--out", str(out), *more]
    run = launch(["-m", "moesaic", "train", *words], processes, project / f"{out.name}.log")
    assert run.wait(200) == 0, run.said
    assert "Traceback" not in run.said
    return run.said


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def parts_of(run: Path) -> dict[str, bool]:
    """Checkpoint -> whether it lies in parts."""
    return {path.name: is_sharded(path) for path in sorted((run / "checkpoints").glob("step-*"))}


def last_validation(run: Path) -> float:
    loss: float = [r for r in read_metrics(run) if r["kind"] == "val"][-1]["loss"]
    return loss


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, in a project of its own. Not to be changed."""
    project = make_project(tmp_path_factory.mktemp("finished"), **CHANGES)
    said = train(project / "run")
    assert said.count("Making checkpoint step-00000006 whole ...") == said.count("Making") == 1
    return project / "run"


def test_a_finished_run_is_used_like_one_of_one_process(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parts_of(finished) == {"step-00000004": True, "step-00000006": False}
    assert [(finished / "checkpoints" / name).read_text() for name in ("latest", "best")] == 2 * ["step-00000006\n"]
    model, run = mo.load(finished), str(finished)

    done = call(capsys, "eval", run, "--rows", "2", "--batch-size", "2", "--json")
    assert json.loads(done.out)["loss"] == pytest.approx(last_validation(finished), rel=1e-6)

    done = call(capsys, "generate", run, "--prompt", "the cat", "--max-new-tokens", "5", "--json")
    assert json.loads(done.out)["results"][0]["prompt"] == "the cat"

    facts = json.loads(call(capsys, "info", run, "--json").out)
    assert facts["total"] == sum(p.numel() for p in model.parameters()) == facts["checkpoint"]["numbers"]
    assert (facts["checkpoint"]["matches"], facts["checkpoint"]["saved_by"]) == (True, None)

    assert call(capsys, "convert", run, str(tmp_path / "hf")).status == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "qwen3_moe"
    assert torch.equal(mo.load(tmp_path / "hf")(IDS).logits, model(IDS).logits)

    assert call(capsys, "densify", run, "--out", str(tmp_path / "dense")).status == 0
    assert call(capsys, "upcycle", str(tmp_path / "dense"), "--out", str(tmp_path / "sparse")).status == 0
    assert call(capsys, "report", run, "--out", str(tmp_path / "page.html")).status == 0


def test_a_checkpoint_in_parts_is_described_converted_and_otherwise_refused_in_words(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    middle = step(finished, 4)
    whole = mo.load(consolidate(middle, tmp_path / "whole"))

    facts = json.loads(call(capsys, "info", str(middle), "--json").out)
    held = facts["checkpoint"]
    assert facts["experts"] == 4
    assert facts["total"] == held["numbers"] == sum(p.numel() for p in whole.parameters())
    assert (held["matches"], held["files"], held["saved_by"]) == (True, 2, "2 processes: dp 2, ep 2")
    said = call(capsys, "info", str(middle)).out
    assert f"In parts, as written by 2 processes: dp 2, ep 2; make it one with: moesaic convert {middle} OUT" in said

    for words in (["generate"], ["eval"], ["profile"], ["densify", "--out", "x"], ["upcycle", "--out", "x"]):
        sentence = one_sentence(call(capsys, words[0], str(middle), *words[1:]))
        assert sentence == f"{middle} lies in parts of 2 processes; make it one with `moesaic convert {middle} OUT`."

    done = call(capsys, "convert", str(middle), str(tmp_path / "OUT"), "--json")
    report = json.loads(done.out)
    assert (report["to"], report["parameters"], report["coverage"]["parameters"]) == (
        "moesaic",
        facts["total"],
        {"used": facts["total"], "total": facts["total"]},
    )
    back, wanted = mo.load(tmp_path / "OUT"), whole.state_dict()
    assert back.config == whole.config
    assert back.tokenizer.to_str() == whole.tokenizer.to_str()
    assert all(torch.equal(x, wanted[name]) for name, x in back.state_dict().items())

    assert (
        call(capsys, "convert", str(middle), str(tmp_path / "hf"), "--to", "hf", "--layout", "per_expert").status == 0
    )
    assert torch.equal(mo.load(tmp_path / "hf")(IDS).logits, whole(IDS).logits)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["OUT", "hf", "whole"]  # nothing temporary


def test_a_damaged_part_is_named_and_nothing_is_written(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(step(finished, 4), tmp_path / "copy"))
    path = copy / "rank-00001.safetensors"
    info = next(info for name, info in header_of(path).items() if name.endswith("experts.3.w_in"))
    data = bytearray(path.read_bytes())
    data[info.start] ^= 1
    path.write_bytes(data)
    sentence = one_sentence(call(capsys, "convert", str(copy), str(tmp_path / "out")))
    assert "rank-00001.safetensors is damaged" in sentence
    # Without hashing, its fingerprint tells.
    sentence = one_sentence(call(capsys, "convert", str(copy), str(tmp_path / "out"), "--no-verify"))
    assert "experts.3.w_in" in sentence
    assert "is not what was saved: its fingerprint is" in sentence
    (copy / "rank-00001.safetensors").unlink()
    for words in (["info", str(copy)], ["convert", str(copy), str(tmp_path / "out")]):
        assert "rank-00001.safetensors is missing" in one_sentence(call(capsys, *words))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_gguf_of_a_checkpoint_in_parts(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    one = consolidate(step(finished, 4), tmp_path / "whole")
    files = [tmp_path / "from-parts" / "model.gguf", tmp_path / "from-whole" / "model.gguf"]
    for source, file in zip((step(finished, 4), one), files, strict=True):
        file.parent.mkdir()
        assert call(capsys, "convert", str(source), str(file), "--to", "gguf").status == 0
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [{"pp": 2}, {"tp": 2}, {"fsdp": True}, {"ep": 2, "replicas": 2, "rebalance_every": 2}]
)
def test_runs_of_every_layout_end_whole(
    tmp_path: Path, layout: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    project = make_project(tmp_path, **CHANGES | {"steps": 4, "accumulate": 2, "parallel": layout})
    train(project / "run")
    assert parts_of(project / "run") == {"step-00000002": True, "step-00000004": False}
    done = call(capsys, "eval", str(step(project / "run", 4)), "--rows", "2", "--batch-size", "2", "--json")
    assert json.loads(done.out)["loss"] == pytest.approx(last_validation(project / "run"), rel=1e-6)


@pytest.mark.slow
def test_a_finished_run_goes_on_with_one_and_with_two_processes_alike(finished: Path, tmp_path: Path) -> None:
    """From the whole checkpoint and from the same in parts; the losses of one process, and its model."""
    project = make_project(tmp_path, **CHANGES)
    train(project / "parts", "--set", "parallel.consolidate=false")
    assert parts_of(project / "parts") == {"step-00000004": True, "step-00000006": True}
    assert records(project / "parts") == records(finished)
    runs = {}
    for source in (finished, project / "parts"):
        for processes in (1, 2):
            run = Path(shutil.copytree(source, project / f"{source.name}-{processes}"))
            layout = ["--ep", "1"] if processes == 1 else []
            train(run, "--steps", "10", *layout, processes=processes, resume=True)
            assert len(records(run)) == 10
            runs[run.name] = run
    # The run of two processes in parts stays so, as it was asked; the others are whole.
    assert [name for name, run in runs.items() if parts_of(run)["step-00000010"]] == ["parts-2"]
    first = runs["run-1"]
    model = mo.load(step(first, 10)).state_dict()
    consolidate(step(runs["parts-2"], 10), step(runs["parts-2"], 10))
    for run in runs.values():
        assert records(run) == pytest.approx(records(first), rel=1e-6)
        assert last_validation(run) == pytest.approx(last_validation(first), rel=1e-6)
        state = mo.load(step(run, 10)).state_dict()
        assert all(torch.allclose(state[name], x, rtol=1e-4, atol=1e-6) for name, x in model.items())
    # The same processes do the same whatever form they go on from.
    assert records(runs["run-2"]) == records(runs["parts-2"])
    assert records(runs["run-1"]) == records(runs["parts-1"])


@pytest.mark.slow
def test_what_was_left_in_parts_becomes_whole_when_the_run_is_resumed(tmp_path: Path) -> None:
    project = make_project(tmp_path, **CHANGES)
    out = project / "run"
    said = train(out, "--set", "parallel.consolidate=false")
    assert "whole" not in said
    said = train(out, "--set", "parallel.consolidate=true", resume=True)
    assert "Making checkpoint step-00000006 whole ..." in said
    assert parts_of(out) == {"step-00000004": True, "step-00000006": False}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found through /proc")
def test_an_interrupted_run_is_whole_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = make_project(tmp_path, **CHANGES | {"steps": 100_000, "checkpoint_every": 0, "eval_every": 0})
    out = project / "run"
    texts = [str(project / name) for name in ("a.txt", "b.txt")]
    words = ["--data", *texts, "--config", str(project / "tiny.json"), "--out", str(out)]
    run = launch(["-m", "moesaic", "train", *words], 2, project / "log")
    deadline = time.monotonic() + 100
    while steps_done(out) < 3:
        assert run.process.poll() is None, run.said
        assert time.monotonic() < deadline, run.said
        time.sleep(0.05)
    os.kill(run.workers()[1], signal.SIGTERM)
    assert run.wait(100) == 0, run.said
    assert parts_of(out) == {step(out, steps_done(out)).name: False}
    assert call(capsys, "generate", str(out), "--max-new-tokens", "2").status == 0


@pytest.mark.slow
def test_a_disk_too_full_to_make_it_whole_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each part fits under the limit of a file's size, the whole state of the optimizer does not."""
    model = {"dim": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64, "hidden": 64}
    model["moe"] = {"num_experts": 4, "k": 2, "hidden": 32}  # type: ignore[assignment]
    project = make_project(tmp_path, **CHANGES | {"model": model})
    out = project / "run"
    limit = "import resource as r, sys; r.setrlimit(r.RLIMIT_FSIZE, (300_000, 300_000)); from moesaic.cli import main; main()"
    (project / "limited.py").write_text(limit)
    texts = [str(project / name) for name in ("a.txt", "b.txt")]
    words = ["train", "--data", *texts, "--config", str(project / "tiny.json"), "--out", str(out)]
    run = launch([str(project / "limited.py"), *words], 2, project / "log")
    assert run.wait(100) == 0, run.said
    place = step(out, 6)
    assert f"moesaic: warning: The checkpoint {place} stays in parts; make it one with" in run.said
    assert parts_of(out) == {"step-00000004": True, "step-00000006": True}
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "best",
        "latest",
        "step-00000004",
        "step-00000006",
    ]
    assert call(capsys, "convert", str(place), str(project / "OUT")).status == 0
    assert mo.load(project / "OUT").config.dim == 32


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--ep", "0"], "parallel.ep must be at least 1, not 0."),
        (["--set", "model.moe.router.name=switch"], "switch"),
    ],
    ids=["before they meet", "after"],
)
def test_what_is_wrong_for_all_is_said_once(tmp_path: Path, more: list[str], sentence: str) -> None:
    make_project(tmp_path, **CHANGES)
    words = ["--data", str(tmp_path / "a.txt"), "--config", str(tmp_path / "tiny.json"), "--out", str(tmp_path / "run")]
    run = launch(["-m", "moesaic", "train", *words, *more], 2, tmp_path / "log")
    assert run.wait(100) != 0
    (said,) = [line for line in run.said.splitlines() if line.startswith("moesaic: ")]
    assert sentence in said
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_are_all_damaged_are_said_once(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent, tmp_path / "project")
    out = tmp_path / "project" / finished.name
    for file in out.glob("checkpoints/*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    run = launch(["-m", "moesaic", "train", "--resume", "--out", str(out), "--steps", "9"], 2, tmp_path / "log")
    assert run.wait(100) != 0
    said = [line for line in run.said.splitlines() if "Every checkpoint in" in line and line.startswith("moesaic: ")]
    assert len(said) == 1, run.said
