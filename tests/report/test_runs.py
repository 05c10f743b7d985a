"""Reading metrics.jsonl: windows add up, resumed runs do not count twice, broken lines are named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.errors import MoesaicError
from moesaic.report.runs import MAX_WINDOWS, information, read_run
from moesaic.report.text import big, clean, compare, duration, times
from tests.report.synthetic_runs import dense_records, sparse_records, write_run


def test_windows_hold_every_step_once(tmp_path: Path) -> None:
    records = sparse_records(steps=501, layers=(0, 1), experts=(3, 4))
    run = read_run(write_run(tmp_path, records))
    steps = [record for record in records if record["kind"] == "step"]
    assert len(run.step) == 501
    assert MAX_WINDOWS // 2 <= len(run.windows) <= MAX_WINDOWS
    assert sum(window.num_steps for window in run.windows) == 501
    joined = [np.concatenate(record["load"]) for record in steps]
    assert np.array_equal(sum(window.load_X for window in run.windows), sum(joined))
    width = run.window_steps
    assert width == 8
    mean = np.mean([record["max_vio"][1] for record in steps[width : 2 * width]])
    assert run.windows[1].mean_ML[0, 1] == pytest.approx(mean)
    assert run.windows[1].tokens == steps[2 * width - 1]["tokens"]


def test_resumed_run_counts_repeated_steps_once(tmp_path: Path) -> None:
    first = [r for r in sparse_records(steps=40, seed=1, end="interrupted") if r["kind"] != "sample"]
    again = sparse_records(steps=40, seed=2)
    kept = [first[0]] + [r for r in first[1:-1] if r["step"] <= 30] + [first[-1], again[0]]
    second = [r | {"time_s": r["time_s"] - 20 * 0.92} if "time_s" in r else r for r in again[1:] if r["step"] > 20]
    run = read_run(write_run(tmp_path, kept + second))
    assert list(run.step) == list(range(1, 41))
    assert run.end_reason == "done"
    expected = [r for r in first if r["kind"] == "step" and r["step"] <= 20] + [
        r for r in again if r["kind"] == "step"
    ][20:]
    assert sum(int(window.load_X.sum()) for window in run.windows) == sum(sum(map(sum, r["load"])) for r in expected)
    assert [v.step for v in run.vals] == list(range(4, 41, 4))
    assert list(run.time_s) == sorted(run.time_s)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "not JSON"),
        ("[1, 2]", "expected an object"),
        ('{"step": 3}', "missing 'kind'"),
        ('{"kind": "step", "step": 3, "lm_loss": "low"}', "expected a number, found 'low'"),
        ('{"kind": "step", "step": 3, "load": [[1, 2]]}', "2 loads, the run has 16"),
        ('{"kind": "step", "step": 3, "entropy": [1, 2]}', "entropy has 2 entries, the run has 1"),
        ('{"kind": "val", "step": 3, "domain_load": {"code": [[1]]}}', "does not have the run's layers"),
    ],
)
def test_broken_line_in_the_middle_is_named(tmp_path: Path, line: str, message: str) -> None:
    lines = [json.dumps(record) for record in sparse_records(steps=3, layers=(0,))]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(MoesaicError, match=message) as caught:
        read_run(tmp_path)
    assert f"{tmp_path / 'metrics.jsonl'}:3" in str(caught.value)


@pytest.mark.parametrize("ending", ["", "\n", "\n\n"])
def test_cut_last_line_is_ignored(tmp_path: Path, ending: str) -> None:
    lines = [json.dumps(record) for record in dense_records(steps=3, end=None)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, lines[-1][:-7]]) + ending)
    run = read_run(tmp_path)
    assert run.cut_line
    assert len(run.step) == 3
    assert run.end_reason is None


def test_nan_in_the_file_is_a_gap(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = dense_records(steps=3)
    record = next(r for r in records if r.get("step") == 2)
    record["lm_loss"] = record["loss"] = math.nan
    run = read_run(write_run(tmp_path, records))
    assert [math.isnan(value) for value in run.loss] == [False, True, False]


def test_information_by_hand() -> None:
    assert information(np.array([[10, 0], [0, 30]])) == pytest.approx(1.0)  # the expert tells the domain: 1 bit
    assert information(np.array([[5, 5], [700, 700]])) == pytest.approx(0.0)
    # Domain A always expert 0; B half and half: H(E) - mean H(E|d) = H(3/4, 1/4) - 1/2
    expected = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    assert information(np.array([[8, 0], [3, 3]])) == pytest.approx(expected)
    assert information(np.zeros((2, 3))) is None


def test_verdict_by_hand(tmp_path: Path) -> None:
    def records(losses: list[float], seconds: float, model: str) -> list[dict[str, Any]]:
        header = {"kind": "run", "name": model, "params_active": 100, "params_total": 100}
        vals = [
            {"kind": "val", "step": i, "tokens": 100 * i, "time_s": seconds * i, "loss": loss}
            for i, loss in enumerate(losses, 1)
        ]
        return [header, *vals, {"kind": "end", "step": len(losses), "reason": "done"}]

    sparse = read_run(write_run(tmp_path / "sparse", records([4.0, 3.0, 2.0, 1.5], 3.0, "sparse")))
    dense = read_run(write_run(tmp_path / "dense", records([4.0, 3.5, 3.0, 2.5], 1.0, "dense")))
    verdict = compare(sparse, dense)
    assert verdict
    assert verdict.winner == "sparse"
    assert (verdict.sparse, verdict.dense) == (1.5, 2.5)
    assert verdict.token_ratio == pytest.approx(400 / 250)  # 2.5 lies halfway between 200 and 300 tokens
    assert verdict.time_ratio == pytest.approx(4.0 / 7.5)  # and the sparse run got there later
    assert verdict.cost_ratio == pytest.approx(3.0)
    assert any("the dense model leads: 3.667 against 2.500" in sentence for sentence in verdict.details)
    assert any("but only 0.53× the time" in sentence for sentence in verdict.details)
    behind = compare(dense, sparse)
    assert behind
    assert behind.winner == "dense"
    assert "lost" in behind.headline
    same = compare(sparse, sparse)
    assert same
    assert same.winner == "tie"
    assert same.token_ratio is None
    assert "Too close to call" in same.headline


def test_unequal_tokens_are_compared_at_the_shorter_run(tmp_path: Path) -> None:
    sparse = read_run(write_run(tmp_path / "s", sparse_records(steps=100, end="interrupted")[:60]))
    dense = read_run(write_run(tmp_path / "d", dense_records(steps=100)))
    verdict = compare(sparse, dense)
    assert verdict
    assert verdict.tokens == sparse.vals[-1].tokens < dense.vals[-1].tokens
    assert any("The sparse run did not finish" in sentence for sentence in verdict.details)


def test_words() -> None:
    assert [big(v) for v in (0, 999, 1000, 33_554_432, 1.5e9, 0.25)] == ["0", "999", "1k", "33.6M", "1.5B", "0.25"]
    assert [duration(v) for v in (3, 59.6, 200, 18_720, 183_600)] == [
        "3.0 s",
        "1 min",
        "3 min 20 s",
        "5 h 12 min",
        "2 d 3 h",
    ]
    assert times(1.567) == "1.57×"
    assert times(12.2) == "12×"
    assert clean("a\x00b\x1b[0m\u202e\ud800\n\tc") == "a\u2400b\u241b[0m\ufffd\ufffd\n\tc"
