"""Killed, interrupted or stopped at any step and resumed, a run writes what an unbroken one writes, to the last bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.native import load_model
from moesaic.models.config import RouterConfig
from moesaic.plan.capacity import CapacityRule
from moesaic.train.config import TrainConfig
from moesaic.train.log import read_metrics
from tests.train.tiny_run import as_data, run_in_a_process, tiny_config, train

BIASED = RouterConfig("topk", {"balance_bias": True, "bias_rate": 0.05})
CONFIGS = {
    "plain": tiny_config(),
    "noise": tiny_config(moe={"router": RouterConfig("noisy_topk"), "losses": {"load": 0.1, "importance": 0.1}}),
    "sampled second": tiny_config(
        moe={"router": RouterConfig("gshard"), "capacity": CapacityRule(1.0, priority="random")}
    ),
    "everything": tiny_config(
        {"tie_embeddings": False, "sliding_window": 8},
        {"router": BIASED, "shared": 1, "constant": 1, "capacity": CapacityRule(1.0), "loss_scope": "global_batch"},
        dtype="bf16",
        accumulate=2,
        recompute=True,
    ),
}
NOT_COMPARED = ("time", "time_s", "tokens_per_s")


@pytest.fixture(scope="module")
def context() -> Iterator[ForkServerContext]:
    """Children that start in milliseconds: forked from a server that has imported everything and run nothing."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    made = multiprocessing.get_context("forkserver")
    # The first optimizer step imports torch._dynamo, which takes a second.
    made.set_forkserver_preload(["torch._dynamo", "tests.train.tiny_run"])
    yield made
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, context: ForkServerContext) -> dict[str, Path]:
    """One uninterrupted run of each config."""
    folders = {name: tmp_path_factory.mktemp("unbroken") / "run" for name in CONFIGS}
    for name, folder in folders.items():
        process = start(context, CONFIGS[name], folder)
        process.join(60)
        assert process.exitcode == 0
    return folders


def start(context: ForkServerContext, config: TrainConfig, folder: Path, resume: bool = False) -> ForkServerProcess:
    process = context.Process(target=run_in_a_process, args=(as_data(config), str(folder), resume))
    process.start()
    return process


def lines_written(folder: Path) -> int:
    """Step records so far."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b'{"kind":"step"') if path.exists() else 0


def signalled(process: ForkServerProcess, folder: Path, after: int, number: int) -> bool:
    """Send the signal once ``after`` step records are there; False if the process ended before."""
    assert process.pid is not None
    while lines_written(folder) < after:
        if process.exitcode is not None:
            return False
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join(60)
    return True


def comparable(folder: Path) -> list[dict[str, Any]]:
    """Every record of a run but the clock."""
    return [{k: v for k, v in r.items() if k not in NOT_COMPARED} for r in read_metrics(folder)]


def check_equal(folder: Path, reference: Path, why: str) -> None:
    mine, theirs = comparable(folder), comparable(reference)
    steps = [r for r in mine if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 41)), why
    for a, b in zip(mine, theirs, strict=True):
        if a["kind"] == "run":
            a, b = a | {"name": ""}, b | {"name": ""}
        assert a == b, why  # floats read back from JSON are the floats that were written: equality is to the last bit
    one, two = (load_model(f / "checkpoints" / "step-00000040") for f in (folder, reference))
    for (name, p), q in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(p, q), f"{why}: {name}"
    assert (folder / "sample.txt").read_text() == (reference / "sample.txt").read_text()


def test_the_records_compared_hold_every_figure_of_a_step(unbroken: dict[str, Path]) -> None:
    for name, folder in unbroken.items():
        records = comparable(folder)
        step = next(r for r in records if r["kind"] == "step" and r["step"] == 20)
        assert set(step) == {
            *("kind", "step", "tokens", "loss", "lm_loss", "lr", "grad_norm", "losses", "dead", "load"),
            *("max_vio", "drop_rate", "entropy", "margin", "per_token"),
        }
        losses = [r["loss"] for r in records if r["kind"] == "step"]
        assert len(set(losses)) == 40
        assert losses[-1] < losses[0] - 0.3, name  # it learns, so equal is not equal by standing still
        assert [r["kind"] for r in records if r["kind"] not in ("step", "val")] == ["run", "sample", "end"]
    drops = [sum(r["drop_rate"]) for r in comparable(unbroken["everything"]) if r["kind"] == "step"]
    assert sum(drop > 0 for drop in drops) > 20


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
@pytest.mark.parametrize("name", CONFIGS)
def test_killed_and_resumed(
    name: str, seed: int, unbroken: dict[str, Path], context: ForkServerContext, tmp_path: Path
) -> None:
    """kill -9 after random steps, up to three times in one run, then to the end."""
    chance = random.Random(f"{name}/{seed}")
    folder, kills, sittings = tmp_path / "run", [], 0
    while True:
        sittings += 1
        process = start(context, CONFIGS[name], folder, resume=sittings > 1)
        after = chance.randint(max(lines_written(folder), 1), 39)
        if len(kills) < 3 and signalled(process, folder, after, signal.SIGKILL):
            assert process.exitcode == -signal.SIGKILL
            kills.append(lines_written(folder))
            continue
        process.join(60)
        assert process.exitcode == 0
        break
    assert kills
    check_equal(folder, unbroken[name], f"{name}, seed {seed}, killed after steps {kills}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", CONFIGS)
def test_stopped_by_a_signal_and_resumed(
    name: str, number: signal.Signals, unbroken: dict[str, Path], context: ForkServerContext, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    after = random.Random(f"{name}/{number}").randint(2, 30)
    process = start(context, CONFIGS[name], folder)
    assert signalled(process, folder, after, number)
    assert process.exitcode == 0  # a clean end, not a traceback
    last = comparable(folder)[-1]
    assert (last["kind"], last["reason"]) == ("end", "interrupted")
    assert after <= last["step"] < 40
    assert (folder / "checkpoints" / "latest").read_text().strip() == f"step-{last['step']:08d}"
    assert not (folder / "sample.txt").exists()
    process = start(context, CONFIGS[name], folder, resume=True)
    process.join(60)
    assert process.exitcode == 0
    check_equal(folder, unbroken[name], f"{name}, {number.name} after step {last['step']}")


def test_a_run_in_this_process_equals_one_in_another(unbroken: dict[str, Path], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    train(CONFIGS["plain"], tmp_path / "run")
    check_equal(tmp_path / "run", unbroken["plain"], "another process")


@pytest.mark.slow
def test_a_separate_interpreter_killed_and_resumed(unbroken: dict[str, Path], tmp_path: Path) -> None:
    """The same with nothing shared: a fresh Python for every sitting."""
    script = textwrap.dedent("""
        import json, sys
        from tests.train.tiny_run import run_in_a_process
        run_in_a_process(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume")
    """)
    folder = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    for sitting, after in enumerate((9, 23, 99)):
        arguments = [json.dumps(as_data(CONFIGS["everything"])), str(folder), "resume" if sitting else "new"]
        with subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=root, env=environment) as process:
            while process.poll() is None and lines_written(folder) < after:
                time.sleep(0.001)
            if after < 40:
                process.kill()
        assert process.returncode == (-signal.SIGKILL if after < 40 else 0)
    check_equal(folder, unbroken["everything"], "separate interpreters")
