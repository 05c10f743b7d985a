"""What the log and the progress line say of every process: entries by hand, and of runs of two and four processes."""

from __future__ import annotations

import io
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
from moesaic.train import ranks
from moesaic.train.log import Progress
from moesaic.train.ranks import NOT_HERE, in_short, to_entries
from tests.distributed import run_distributed
from tests.train.tiny_run import tiny_config, train


def figures() -> Tensor:
    """Three processes; layer 2 is on the last two."""
    rows = [
        [2.0, 0.5, 0.25, 1000, 80, 30, NOT_HERE],
        [2.0, 0.25, 0.5, 2000, 80, 10, 7],
        [2.0, 0.75, 0.0, 4000, 80, 50, 0],
    ]
    return torch.tensor(rows, dtype=torch.float64)


def test_an_entry_for_every_process() -> None:
    first, second, third = to_entries(figures(), [0, 2])
    assert first == {
        "rows": {"0": 30},
        "step_s": 2.0,
        "all_to_all_s": 0.5,
        "collective_s": 0.25,
        "all_to_all_bytes": 1000,
        "collective_bytes": 80,
    }
    assert (second["rows"], third["rows"]) == ({"0": 10, "2": 7}, {"0": 50, "2": 0})
    assert json.dumps(first["rows"]) == '{"0": 30}'  # whole numbers


def test_very_many_processes_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "MOST_SEPARATE", 2)
    least, mean, most = to_entries(figures(), [0, 2])
    assert [one["over"] for one in (least, mean, most)] == ["min", "mean", "max"]
    assert [one["rows"] for one in (least, mean, most)] == [{"0": 10, "2": 0}, {"0": 30, "2": 3.5}, {"0": 50, "2": 7}]
    assert [one["all_to_all_bytes"] for one in (least, mean, most)] == [1000, 2333.33, 4000]
    assert [one["all_to_all_s"] for one in (least, mean, most)] == [0.25, 0.5, 0.75]


def test_a_layer_that_nobody_counts_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "MOST_SEPARATE", 2)
    values_RF = figures()
    values_RF[:, -1] = NOT_HERE
    assert [one["rows"] for one in to_entries(values_RF, [0, 2])] == [{"0": 10}, {"0": 30}, {"0": 50}]


def test_in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["rows x1.7", "all-to-all 25%"]  # (50 + 7) / (30 + 3.5), 1.5 / 6
    assert in_short(to_entries(figures(), [0, 2])) == words
    monkeypatch.setattr(ranks, "MOST_SEPARATE", 2)
    assert in_short(to_entries(figures(), [0, 2])) == words
    alone = to_entries(torch.tensor([[2.0, 0.0, 0.5, 0, 80]], dtype=torch.float64), [])
    assert in_short(alone) == []


def test_the_progress_line_says_it() -> None:
    progress = Progress(9, stream=io.StringIO(), clock=lambda: 0.0)
    record = {"step": 9, "loss": 2.0, "ranks": to_entries(figures(), [0, 2])}
    assert progress.line(record, 0.0) == "step 9/9  loss 2.0000  rows x1.7  all-to-all 25%"


def run(rank: int, folder: str, world: int, parallel: ParallelConfig, cadences: dict[str, int]) -> dict[str, Tensor]:
    """Five steps for each cadence of validation and checkpoints; 0 is at the end alone."""
    for name, every in cadences.items():
        config = tiny_config(steps=5, eval_every=every, checkpoint_every=every, accumulate=2)
        here = Started(rank, world, rank, world, watch=Watch(rank))
        train(replace(config, parallel=parallel), Path(folder, name), here=here)
    return {}


def steps_of(folder: Path) -> list[list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["ranks"] for line in lines if line["kind"] == "step"]


def test_a_step_counts_its_own_collectives_alone(tmp_path: Path) -> None:
    """Neither those of the start, nor of validation, nor of checkpoints."""
    run_distributed(2, run, str(tmp_path), 2, ParallelConfig(ep=2), {"often": 1, "seldom": 0})
    often, seldom = steps_of(tmp_path / "often"), steps_of(tmp_path / "seldom")
    for mine, theirs in zip(often, seldom, strict=True):
        for name in ("rows", "all_to_all_bytes", "collective_bytes"):
            assert [one[name] for one in mine] == [one[name] for one in theirs], name
    # Two micro-batches of 4 rows of 24 tokens, k 2: nothing is lost; gradients and loads have one size.
    assert all(sum(one["rows"][layer] for one in step) == 2 * 4 * 24 * 2 for step in often for layer in ("0", "1"))
    assert len({one["collective_bytes"] for step in often for one in step}) == 1
    # Every row that is away travels four times, 16 numbers of 4 bytes; no step sends more than all rows.
    assert all(0 < one["all_to_all_bytes"] < 2 * 4 * 384 * 16 * 4 for step in often for one in step)
    # What a process waits for is a part of its step.
    assert all(0 < one["all_to_all_s"] + one["collective_s"] < one["step_s"] for step in often for one in step)


def test_stages_count_the_layers_they_have(tmp_path: Path) -> None:
    run_distributed(4, run, str(tmp_path), 4, ParallelConfig(ep=2, pp=2), {"run": 0})
    for step in steps_of(tmp_path / "run"):
        assert [list(one["rows"]) for one in step] == [["0"], ["0"], ["1"], ["1"]]
        for layer, stage in (("0", step[:2]), ("1", step[2:])):
            assert sum(one["rows"][layer] for one in stage) == 2 * 4 * 24 * 2
