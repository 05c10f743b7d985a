"""Ctrl-C and SIGTERM on the command line: a clean stop, exit status 130, and a resumed run equal to the last bit."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.terminal import guarded
from tests.command import CONFIG, Done, call, make_project, run, start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals work otherwise there")

Whole = Callable[[tuple[str, ...]], Path]
STEPS = 120
TRAIN = ("train", "--data", "a.txt", "b.txt", "--config", "tiny.json")
TWINS = (*TRAIN, "--twin")
QUICKSTART = (
    "quickstart",
    *("--steps", str(STEPS), "--set", "data.stdlib_bytes=300000", "data.vocab_size=300", "tensorboard=false"),
    *("batch_size=2", "seq_len=32", "eval_rows=2", "checkpoint_every=50", "sample_tokens=8", "eval_every=40"),
    *("model.dim=16", "model.num_layers=2", "model.num_heads=2", "model.max_seq_len=64", "model.hidden=32"),
    *("model.moe.num_experts=4", "model.moe.hidden=16"),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and a config."""
    folder = make_project(tmp_path_factory.mktemp("project"), steps=STEPS, eval_every=40, checkpoint_every=50)
    return folder


@pytest.fixture(scope="module")
def whole(project: Path) -> Callable[[tuple[str, ...]], Path]:
    """The folder of the uninterrupted run of a command, run when first asked for."""

    @lru_cache
    def finished(args: tuple[str, ...]) -> Path:
        out = f"whole-{args[0]}-{len(args)}"
        done = run(*args, "--out", out, cwd=project)
        assert done.status == 0, done
        return Path(out)

    return finished


@pytest.fixture(autouse=True)
def _one_thread(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    monkeypatch.chdir(project)
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock; floats read back from JSON are the floats that were written."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "time_s", "tokens_per_s", "name")
    return [{key: value for key, value in r.items() if key not in clock} for r in lines]


def interrupt(args: tuple[str, ...], out: Path, watch: Path, after: int, *numbers: int) -> Done:
    """Start the command, wait for ``after`` steps in ``watch``, send the signals, and wait for the end."""
    log = watch / "metrics.jsonl"
    with start(*args, "--out", str(out), cwd=Path.cwd()) as process:
        while not log.exists() or log.read_bytes().count(b'{"kind":"step"') < after:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.005)
        stdout, stderr = process.communicate(timeout=60)
    return Done(process.returncode, stdout, stderr)


def resume_command(done: Done) -> list[str]:
    """The words of the command that the output says to go on with."""
    found = re.findall(r"[Gg]o on (?:from the last checkpoint )?with: moesaic (.*)$", done.out, re.MULTILINE)
    assert len(found) == 1, done
    return found[0].split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_train_stops_cleanly_and_goes_on(
    number: signal.Signals, whole: Whole, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(f"stopped-{number.name}")
    done = interrupt(TRAIN, out, out, 20, number)
    assert done.status == 130, done
    assert "Traceback" not in done.err
    assert f"{number.name}: finishing this step and saving a checkpoint (again to stop at once) ..." in done.out
    last = records(out)[-1]
    assert (last["kind"], last["reason"]) == ("end", "interrupted")
    assert 20 <= last["step"] < STEPS
    assert f"Stopped at step {last['step']} of {STEPS}." in done.out
    assert (out / "checkpoints/latest").read_text() == f"step-{last['step']:08d}\n"
    assert (out / "report.html").exists()
    resumed = call(capsys, *resume_command(done))
    assert resumed.status == 0, resumed
    assert f"Resuming {out} at step {last['step']}." in resumed.out
    assert records(out) == records(whole(TRAIN))
    assert (out / "sample.txt").read_text() == (whole(TRAIN) / "sample.txt").read_text()


@pytest.mark.parametrize(
    "signals", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_more_signals_stop_at_once_without_damage(
    signals: int, whole: Whole, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(f"many-{signals}")
    done = interrupt(TRAIN, out, out, 60 + signals, *[signal.SIGINT] * signals)
    assert done.status == 130, done
    assert "Traceback" not in done.err
    assert not [p for p in out.rglob("*") if "incomplete" in p.name and p.is_file() and p.parent == out]
    resumed = call(capsys, *resume_command(done))
    assert resumed.status == 0, resumed
    assert records(out) == records(whole(TRAIN))


def test_the_json_of_an_interrupted_run(capsys: pytest.CaptureFixture[str]) -> None:
    out = Path("two words")
    done = interrupt((*TRAIN, "--json"), out, out, 10, signal.SIGINT)
    assert done.status == 130
    result = json.loads(done.out)
    assert (result["reason"], result["folder"]) == ("interrupted", "two words")
    assert (
        f"Stopped at step {result['step']} of {STEPS}. Go on with: moesaic train --resume --out 'two words'" in done.err
    )


@pytest.mark.parametrize(
    ("args", "half"),
    [
        (TWINS, "dense"),
        pytest.param(TWINS, "sparse", marks=pytest.mark.slow),
        pytest.param(QUICKSTART, "dense", marks=pytest.mark.slow),
        pytest.param(QUICKSTART, "sparse", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_comparison_goes_on_in_the_half_it_was_stopped_in(
    args: tuple[str, ...], half: str, whole: Whole, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(f"{args[0]}-{half}")
    done = interrupt(args, out, out / half, 15, signal.SIGINT)
    assert done.status == 130, done
    assert "Traceback" not in done.err
    assert (out / "dense").exists() == (half == "dense")
    finished = records(out / "sparse") if half == "dense" else None
    command = resume_command(done)
    assert not {"--steps", "--set"} & set(command)  # the settings are those of the folder
    resumed = call(capsys, *command, "--json")
    assert resumed.status == 0, resumed
    if finished is not None:
        assert records(out / "sparse") == finished
    for name in ("sparse", "dense"):
        assert records(out / name) == records(whole(args) / name)
    clock = ("folder", "seconds", "tokens_per_s")
    mine, theirs = (json.loads(Path(o, "summary.json").read_text()) for o in (out, whole(args)))
    for name in ("sparse", "dense"):
        a, b = ({k: v for k, v in s["runs"][name].items() if k not in clock} for s in (mine, theirs))
        assert a == b
    assert mine["verdict"] == theirs["verdict"]
    assert json.loads(resumed.out)["winner"] == theirs["winner"]


def test_a_signal_before_training_ends_the_command_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """While text is read there is nothing to save: both signals end it, with a sentence and no traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):

        def call_meets_signal(number: int = number) -> int:
            os.kill(os.getpid(), number)
            time.sleep(5)
            return 0

        before = signal.getsignal(signal.SIGTERM)
        assert guarded(call_meets_signal) == 130
        assert capsys.readouterr().err == "moesaic: interrupted.\n"
        assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_interrupted_while_tokenising_leaves_no_half_written_store(tmp_path: Path) -> None:
    """A text large enough that the signal meets it being read."""
    (tmp_path / "large.txt").write_text((Path("a.txt").read_text() + "\n\n") * 500)
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG | {"data": {"vocab_size": 300, "cache_dir": "cache"}}))
    with start("train", "--data", "large.txt", "--config", "tiny.json", "--out", "run", cwd=tmp_path) as process:
        assert process.stdout is not None
        time.sleep(0.5)
        while not list((tmp_path / "cache").glob("*.incomplete-*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "moesaic: interrupted.\n"
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (tmp_path / "run").exists()
