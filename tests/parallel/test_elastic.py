"""Runs under torchrun whose processes are killed, stopped and signalled: they end with the losses of the undisturbed run."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parallel.elastic import Run, kill_at_random, launch, records, steps_done

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("none_left"),
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found through /proc"),
]

TIMEOUT_S = 5
Command = Callable[[Path, int], list[str]]  # run folder, steps -> what torchrun starts


def toy(out: Path, steps: int) -> list[str]:
    return ["-m", "tests.parallel.toy_run", "--out", str(out), "--steps", str(steps), "--timeout-s", str(TIMEOUT_S)]


def real(out: Path, steps: int) -> list[str]:
    """Experts spread over both processes, checkpoints every 5 steps."""
    folder = out.parent
    if not (folder / "run.json").exists():
        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(50)]
        texts = (" ".join(rng.choices(words, k=60)) for _ in range(200))
        (folder / "text.txt").write_text("\n\n".join(texts))
        moe = {"num_experts": 5, "k": 2, "hidden": 16}
        model = {"dim": 16, "num_layers": 2, "num_heads": 2, "hidden": 32, "max_seq_len": 32, "moe": moe}
        run = {"model": model, "seq_len": 32, "batch_size": 4, "eval_rows": 4, "eval_every": 0, "checkpoint_every": 5}
        run |= {"sample_tokens": 0, "data": {"vocab_size": 300}, "parallel": {"ep": 2, "timeout_s": TIMEOUT_S}}
        (folder / "run.json").write_text(json.dumps(run))
    inputs = ["--config", str(folder / "run.json"), "--data", str(folder / "text.txt")]
    return ["-m", "moesaic", "train", *inputs, "--steps", str(steps), "--out", str(out)]


COMMANDS: dict[str, Command] = {"toy": toy, "moesaic train": real}


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest) -> Command:
    return COMMANDS[request.param]


def undisturbed(command: Command, folder: Path, steps: int, nproc: int = 2) -> dict[int, float]:
    run = launch(command(folder, steps), nproc, folder.with_suffix(".log"))
    assert run.wait(300) == 0, run.said
    assert "moesaic:" not in run.said
    losses = records(folder)
    assert sorted(losses) == list(range(1, steps + 1))
    return losses


def until(condition: Callable[[], bool], run: Run, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert run.process.poll() is None, run.said[-4000:]
        assert time.monotonic() < deadline, run.said[-4000:]
        time.sleep(0.02)


def sentences(said: str) -> list[str]:
    return [line.removeprefix("moesaic: ") for line in said.splitlines() if line.startswith("moesaic: ")]


def test_ten_kills_at_random_steps_leave_the_losses_of_the_undisturbed_run(tmp_path: Path, command: Command) -> None:
    steps, last = 80, 50  # the run goes on while the last step is being looked for
    expected = undisturbed(command, tmp_path / "undisturbed", steps)
    run = launch(command(tmp_path / "killed", steps), 2, tmp_path / "killed.log", max_restarts=14)
    kills = kill_at_random(run, lambda: steps_done(tmp_path / "killed"), last, kills=10, seed=int(time.time()))
    assert run.wait(300) == 0, run.said[-6000:]
    assert records(tmp_path / "killed") == expected, kills
    assert len(kills) == 10
    assert "Traceback" not in run.said
    for sentence in sentences(run.said):
        if sentence == "interrupted.":  # by torchrun, before there was anything to fail
            continue
        if re.match(r"Rank [01]: all ranks came, but were not connected .*: one of them has ended since", sentence):
            continue
        assert re.match(r"Rank [01]: .* over .* with ranks 0, 1 failed", sentence), sentence
        assert re.search(r"Rank [01] (does not answer|has ended)", sentence), sentence


@pytest.mark.parametrize("layout", ["fsdp=true", "pp=2", "tp=2"])
def test_a_killed_rank_is_named_whatever_shares_the_model(tmp_path: Path, layout: str) -> None:
    out = tmp_path / "run"
    settings = ["accumulate=2", "checkpoint_every=10000", "parallel.ep=1", f"parallel.{layout}"]
    run = launch([*real(out, 1000), "--set", *settings], 2, tmp_path / "log")
    until(lambda: steps_done(out) >= 5, run)
    os.kill(run.workers()[1], signal.SIGKILL)
    assert run.wait(60) != 0
    (sentence,) = sentences(run.said)
    assert re.match(r"Rank 0: .* (failed|took longer than 5 s)", sentence), sentence
    assert "Rank 1 does not answer, last heard of " in sentence
    assert "[rank0]" not in run.said  # a traceback


def test_a_stopped_rank_is_named_killed_and_started_again(tmp_path: Path) -> None:
    expected = undisturbed(toy, tmp_path / "undisturbed", 30)
    out = tmp_path / "stopped"
    run = launch(
        toy(out, 30),
        2,
        tmp_path / "log",
        max_restarts=1,
        environ={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"},
    )
    until(lambda: steps_done(out) >= 8, run)
    os.kill(run.workers()[1], signal.SIGSTOP)
    assert run.wait(120) == 0, run.said[-6000:]
    assert records(out) == expected
    (sentence,) = sentences(run.said)
    assert re.match(r"Rank 0: .* with ranks 0, 1 took longer than 5 s in layer \d\. Rank 1 does not answer", sentence)


def saved_steps(out: Path) -> list[int]:
    """Steps of the checkpoints of a run, the toy's or the real one's."""
    if (out / "saves").exists():
        return [int(line) for line in (out / "saves").read_text().split()]
    return sorted(
        int(found[1]) for path in (out / "checkpoints").iterdir() if (found := re.fullmatch(r"step-(\d+)", path.name))
    )


@pytest.mark.parametrize("whom", ["torchrun", "rank 0", "rank 1"])
def test_a_signal_saves_once_and_starts_nothing_again(tmp_path: Path, command: Command, whom: str) -> None:
    out = tmp_path / "run"
    rare = ["--checkpoint-every", "10000"] if command is toy else ["--set", "checkpoint_every=10000"]
    run = launch([*command(out, 1000), *rare], 2, tmp_path / "log", max_restarts=3)
    until(lambda: steps_done(out) >= 8, run)
    os.kill(run.process.pid if whom == "torchrun" else run.workers()[int(whom[-1])], signal.SIGTERM)
    status = run.wait(60)
    stopped = steps_done(out)
    assert saved_steps(out) == [stopped], run.said
    assert "failed" not in run.said.replace("FAILED", "")
    assert (status == 0) == (whom != "torchrun"), run.said  # torchrun itself ends as one that was signalled
    resume = [] if command is toy else ["--resume"]
    again = launch([*command(out, stopped + 5), *rare, *resume], 2, tmp_path / "again.log")
    assert again.wait(60) == 0, again.said
    assert sorted(records(out)) == list(range(1, stopped + 6))


def test_processes_end_in_words_when_torchrun_itself_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = launch(toy(out, 10_000), 2, tmp_path / "log")
    until(lambda: steps_done(out) >= 3, run)
    orphans = set(run.workers().values())
    assert len(orphans) == 2
    run.process.kill()
    run.process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in orphans) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in orphans if Path(f"/proc/{pid}").exists()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert any("the torchrun that started it is gone" in sentence for sentence in sentences(run.said))
    assert all(sentence.startswith(("Rank 0: ", "Rank 1: ")) for sentence in sentences(run.said))
