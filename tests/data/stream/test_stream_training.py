"""``moesaic train`` on shards: killed and resumed it gives the losses of a run that nobody disturbed."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from moesaic.train.log import read_metrics
from tests.command import CONFIG, call, make_project, one_sentence, start
from tests.data.stream.shards import documents, tokenizer, write_shards
from tests.parallel.elastic import launch

TRAIN = ("train", "--data", "shards/*.jsonl.gz", "--config", "tiny.json")
_FIGURES = ("step", "loss", "lm_loss", "grad_norm", "lr", "load")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data: dict[str, Any] = CONFIG["data"] | {"stream": True, "lanes": 2, "shuffle": 4, "val_tokens": 200}
    make_project(tmp_path, data=data, steps=12, accumulate=2, checkpoint_every=3, eval_every=0)
    write_shards(tmp_path / "shards", documents(5, 30), ".jsonl.gz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def steps(folder: Path) -> list[dict[str, Any]]:
    return [{name: r.get(name) for name in _FIGURES} for r in read_metrics(folder) if r["kind"] == "step"]


def test_killed_and_resumed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = call(capsys, *TRAIN, "--out", "whole")
    assert whole.status == 0, whole
    assert len(steps(project / "whole")) == 12
    with start(*TRAIN, "--out", "killed", cwd=project) as process:
        deadline = time.monotonic() + 90
        while process.poll() is None and time.monotonic() < deadline:
            if (project / "killed" / "checkpoints" / "step-00000003").exists():
                break
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert (project / "killed" / "checkpoints" / "step-00000003").exists()
    assert len(steps(project / "killed")) < 12
    # On another machine: the shards lie elsewhere and have other times.
    shutil.move(project / "shards", project / "moved")
    resumed = call(
        capsys, "train", "--resume", "--out", "killed", "--data", "moved/*.jsonl.gz", "--set", "data.prefetch=0"
    )
    assert resumed.status == 0, resumed
    assert "Resuming killed at step" in resumed.err + resumed.out
    assert steps(project / "killed") == steps(project / "whole")
    assert [r["loss"] for r in read_metrics(project / "killed") if r["kind"] == "val"][-1] == [
        r["loss"] for r in read_metrics(project / "whole") if r["kind"] == "val"
    ][-1]


def test_a_run_whose_shards_changed_is_not_resumed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, *TRAIN, "--out", "run", "--steps", "3").status == 0
    shutil.copy(project / "shards" / "name-00001.jsonl.gz", project / "shards" / "name-00002.jsonl.gz")
    done = call(capsys, "train", "--resume", "--out", "run", "--steps", "6")
    assert "name-00002.jsonl.gz" in one_sentence(done)
    done = call(capsys, "train", "--resume", "--out", "run", "--steps", "6", "--set", "data.lanes=1")
    assert one_sentence(done).startswith("data.lanes cannot change from 2 to 1")


def test_a_broken_record_in_the_middle_of_a_run_is_one_sentence(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said at the step that needs it, with the log of the steps before it written, though it was met while reading ahead."""
    tokenizer().save("tokenizer.json")
    for number, texts in enumerate(documents(5, 30)):
        lines = [json.dumps({"text": text}) for text in texts] + ["{"]
        (project / "shards" / f"name-0000{number}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    quick = (
        "--set",
        "data.tokenizer=tokenizer.json",
        "data.val_tokens=20",
        "data.val_fraction=0.3",
        "data.prefetch=4",
        "steps=24",
    )
    sentence = one_sentence(call(capsys, *TRAIN, "--out", "run", *quick))
    assert re.match(r"shards/name-0000\d.jsonl.gz:31 is not valid JSON: .*\(--set data.on_error=skip\)\.$", sentence)
    assert 1 <= len(steps(project / "run")) < 24
    done = call(capsys, *TRAIN, "--out", "skipping", *quick, "data.on_error=skip")
    assert done.status == 0
    assert "Broken records left out so far: 1. The last one: shards/name-0000" in done.out + done.err
    assert len(steps(project / "skipping")) == 24


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_another_number_of_processes_goes_on_with_the_same_text(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes, then one, then three (of which each has a row or two), then the losses of one process alone."""
    # A large eps, or Adam would make whole steps of the last digits of gradients near zero.
    steady = (
        "--set",
        "optim.schedule=constant",
        "optim.warmup=0",
        "dtype=fp32",
        "optim.eps=0.1",
        "batch_size=4",
        "data.lanes=4",
    )
    data = ("--data", str(project / "shards"), "--config", str(project / "tiny.json"))
    assert call(capsys, "train", *data, *steady, "--out", "whole", "--steps", "9").status == 0
    for number, (processes, last) in enumerate([(2, 3), (1, 5), (3, 9)]):
        given = ("--resume", "--steps", str(last)) if number else (*data, *steady, "--steps", str(last))
        run = launch(["-m", "moesaic", "train", "--out", str(project / "run"), *given], processes, project / "log")
        assert run.wait(120) == 0, run.said
    whole, found = steps(project / "whole"), steps(project / "run")
    assert [r["step"] for r in found] == list(range(1, 10))
    for a, b in zip(whole, found, strict=True):
        assert (b["loss"], b["grad_norm"]) == (
            pytest.approx(a["loss"], rel=1e-5),
            pytest.approx(a["grad_norm"], rel=1e-4),
        )
        assert b["load"] == a["load"]
    saved = [
        json.loads((project / name / "checkpoints" / "step-00000009" / "training.json").read_text())["state"]["sampler"]
        for name in ("whole", "run")
    ]
    assert saved[0] == saved[1]  # the position of every lane, whoever read it
