"""Runs of two processes whose experts move or have shadows: in the log, in checkpoints, and the same losses after a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.layout import ParallelConfig
from moesaic.parallel.start import Started
from moesaic.parallel.watch import Watch
from moesaic.train.config import TrainConfig
from tests.distributed import run_distributed
from tests.train.tiny_run import StopAfter, tiny_config, train

MOVING = ParallelConfig(ep=2, replicas=2, rebalance_every=2)
SHADOWED = ParallelConfig(ep=2, shadow=True)


def config_of(parallel: ParallelConfig) -> TrainConfig:
    """Wide rows and few hidden units, so that shadows pay; a router that leaves experts unequal."""
    return replace(
        tiny_config(
            {"dim": 32}, {"hidden": 4, "losses": {}, "num_experts": 6}, steps=9, eval_every=4, checkpoint_every=3
        ),
        batch_size=8,
        parallel=parallel,
    )


def run(rank: int, folder: str, parallel: ParallelConfig) -> dict[str, Tensor]:
    """Undisturbed, and stopped after five steps and resumed."""
    config = config_of(parallel)
    for name, stop in (("whole", None), ("stopped", StopAfter(5))):
        here = Started(rank, 2, rank, 2, watch=Watch(rank))
        train(config, Path(folder, name), here=here, stop=stop)
    train(config, Path(folder, "stopped"), here=Started(rank, 2, rank, 2, watch=Watch(rank)), resume=True)
    return {}


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize(("parallel", "key"), [(MOVING, "rebalanced"), (SHADOWED, "shadows")])
def test_a_stopped_run_goes_on_with_the_same_experts_in_the_same_places(
    tmp_path: Path, parallel: ParallelConfig, key: str
) -> None:
    torch.manual_seed(0)
    run_distributed(2, run, str(tmp_path), parallel)
    whole, stopped = records(tmp_path / "whole"), records(tmp_path / "stopped")
    assert [r["step"] for r in stopped] == list(range(1, 10))
    assert any(key in r for r in whole[5:])
    for mine, theirs in zip(stopped, whole, strict=True):
        assert mine.get(key) == theirs.get(key)
        assert (mine["loss"], mine["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
        assert [r["rows"] for r in mine["ranks"]] == [r["rows"] for r in theirs["ranks"]]
    if key == "rebalanced":
        entry = next(r[key] for r in whole if key in r)[0]
        assert entry["rows"] < entry["rows_before"]
        assert entry["bytes"] > 0
