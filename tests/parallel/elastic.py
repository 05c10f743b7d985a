"""Runs under torchrun that are killed on purpose: launch, find the workers, kill one at a random step, compare the losses.

>>> run = launch([sys.executable, "-m", "moesaic", "train", ...], 2, log, max_restarts=12)
>>> kill_at_random(run, lambda: steps_done(out), last=60, kills=10, seed=0)
>>> run.wait(120); losses(out) == losses(undisturbed)
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
_LAUNCHED: list[Run] = []


@dataclass
class Run:
    """A torchrun and its processes. ``said`` is everything any of them printed."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def workers(self) -> dict[int, int]:
        """Process ids of the living workers by rank."""
        return {rank: pid for pid, rank in descendants(self.process.pid) if rank is not None}

    def wait(self, seconds: float) -> int:
        """The exit status; a run that takes longer is killed, and fails the test with what it said."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end within {seconds} s:\n{self.said[-6000:]}") from None

    def kill(self) -> None:
        """All of it, at once."""
        for pid, _ in descendants(self.process.pid):
            _signal(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def launch(
    module: Sequence[str],
    nproc: int,
    log: Path,
    *,
    max_restarts: int = 0,
    options: Sequence[str] = ("--standalone", "--local-addr=127.0.0.1"),
    before: Sequence[str] = (),
    environ: dict[str, str] | None = None,
) -> Run:
    """torchrun with ``module`` (``["-m", "package", arguments...]``) in a session of its own.

    Args:
        options: where the processes meet. before: a command that runs a command, in a network namespace say.
    """
    command = [
        *before,
        *(sys.executable, "-m", "torch.distributed.run", *options, f"--nproc-per-node={nproc}"),
        *(f"--max-restarts={max_restarts}", "--monitor-interval=0.1", *module),
    ]
    variables = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}", **(environ or {})}
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    _LAUNCHED.append(Run(process, log))
    return _LAUNCHED[-1]


def end_all() -> None:
    """Kill every run that is left."""
    while _LAUNCHED:
        run = _LAUNCHED.pop()
        if run.process.poll() is None:
            run.kill()


def kill_at_random(
    run: Run, steps_done: Callable[[], int], last: int, kills: int, seed: int, patience: float = 90.0
) -> list[tuple[int, int]]:
    """``kill -9`` of a random rank at random steps, one after the other; every third right after the restart, when processes
    are still looking for each other. Returns (steps done, rank) of each.
    """
    rng = random.Random(seed)
    at = sorted(rng.sample(range(1, last - 1), kills))
    done: list[tuple[int, int]] = []
    dead: set[int] = set()
    for number, step in enumerate(at):
        deadline = time.monotonic() + patience
        early = number % 3 == 2
        wait = rng.uniform(0.5, 4.0) if early else rng.uniform(0.0, 0.1)
        living: dict[int, int] = {}
        while not living:  # between two attempts there is nobody to kill
            assert run.process.poll() is None, f"ended before kill {number + 1}:\n{run.said[-6000:]}"
            assert time.monotonic() < deadline, f"stuck before kill {number + 1}:\n{run.said[-6000:]}"
            if (set(run.workers().values()) - dead) and (early or steps_done() >= step):
                time.sleep(wait)
                living = {rank: pid for rank, pid in run.workers().items() if pid not in dead}
            else:
                time.sleep(0.02)
        rank = rng.choice(sorted(living))
        dead.update(living.values())
        done.append((steps_done(), rank))
        _signal(living[rank], signal.SIGKILL)
    return done


def descendants(pid: int) -> list[tuple[int, int | None]]:
    """(process id, rank or None) of all that a process has started, and they."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, ValueError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], list(children.get(pid, []))
    while waiting:
        child = waiting.pop()
        waiting += children.get(child, [])
        found.append((child, _rank(child)))
    return found


def records(folder: Path) -> dict[int, float]:
    """Loss by step; of a step that was trained again after a restart, the last."""
    path = folder / "metrics.jsonl"
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # being written
            continue
        if record.get("kind") == "step":
            found[record["step"]] = record["loss"]
    return found


def steps_done(folder: Path) -> int:
    """The last step in the log."""
    return max(records(folder), default=0)


def _rank(pid: int) -> int | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    ranks = [entry.removeprefix(b"RANK=") for entry in variables if entry.startswith(b"RANK=")]
    return int(ranks[0]) if ranks else None


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
