"""A comparison end to end with tiny models: results, a run that fails, a run that is killed, a stop and a resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesaic.compare.runner import Settings, Trial, make_entries, prepare, run_trials
from moesaic.compare.summary import COLUMNS, expert_rows, summarise
from moesaic.compare.variants import VARIANTS, flops_ratio
from moesaic.config import from_dict
from moesaic.errors import ConfigError, MoesaicError
from moesaic.report.compare import write_comparison
from moesaic.train.config import TrainConfig
from moesaic.train.log import read_metrics
from tests.command import CONFIG, environment, make_project

NAMES = ("topk", "switch", "soft_moe")


def settings(folder: Path, names: Sequence[str] = NAMES, seeds: int = 2, **changes: Any) -> Settings:
    make_project(folder)
    data = CONFIG["data"] | {
        "sources": [str(folder / "a.txt"), str(folder / "b.txt")],
        "cache_dir": str(folder / "cache"),
    }
    model = CONFIG["model"] | {"vocab_size": 1}
    base = from_dict(
        TrainConfig,
        CONFIG | {"model": model, "data": data, "keep_last": 2, "dead_window": 3, "sample_tokens": 0} | changes,
    )
    entries, refused = make_entries(base, {name: VARIANTS[name] for name in names}, {})
    assert not refused
    return Settings(base, entries, tuple(range(seeds)), jobs=2)


def quiet(_: Sequence[Trial], __: float) -> None:
    """No progress line."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compare")
    wanted = settings(folder)
    trials = prepare(wanted, folder / "out", resume=False, say=print)
    assert run_trials(trials, 2, say=print, show=quiet), [t.error() for t in trials]
    return folder / "out", summarise(wanted, trials, {"odd": "cannot be built"})


def test_every_figure_is_there(finished: tuple[Path, dict[str, Any]]) -> None:
    _, results = finished
    rows = {row["name"]: row for row in results["routers"]}
    assert set(rows) == set(NAMES)
    for name, row in rows.items():
        assert row["runs"] == 2
        assert row["failed"] == {}
        assert row["val_loss"]["interval"] is not None
        missing = {figure for figure in COLUMNS if row[figure] is None}
        assert missing == ({"routing_change"} if name == "soft_moe" else set())  # slots have no experts to change
        assert 0 < row["router_share"]["mean"] < 1
        assert row["per_token"]["mean"] == pytest.approx({"topk": 2, "switch": 1}.get(name, row["per_token"]["mean"]))
        assert len(row["load"]) == 2
    assert rows["topk"]["difference"] is None
    apart = rows["switch"]["difference"]
    assert apart["mean"] == pytest.approx(rows["switch"]["val_loss"]["mean"] - rows["topk"]["val_loss"]["mean"])
    losses = [row["val_loss"]["mean"] for row in results["routers"]]
    assert losses == sorted(losses)


def test_all_routers_of_a_seed_see_the_same_rows(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    for seed in (0, 1):
        snapshots = [
            json.loads((out / name / f"seed-{seed}/run/checkpoints/step-00000006/training.json").read_text())
            for name in NAMES
        ]
        assert len({json.dumps(s["state"]["sampler"]) for s in snapshots}) == 1
        assert len({s["state"]["corpus"] for s in snapshots}) == 1


def test_the_page_holds_names_figures_and_troubles(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, results = finished
    results = results | {"refused": {"<b>odd</b>": "cannot be built"}}
    page = write_comparison(results, COLUMNS, tmp_path / "page.html").read_text()
    for row in results["routers"]:
        assert f"{row['val_loss']['mean']:.3f}" in page
        assert row["name"] in page
    assert "&lt;b&gt;odd&lt;/b&gt;" in page
    assert "<b>odd" not in page
    assert page.count('class="chart') >= 2 + len(NAMES)


def test_a_finished_comparison_is_not_run_again(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = finished
    before = (out / "topk/seed-0/run/metrics.jsonl").read_bytes()
    wanted = settings(out.parent)
    trials = prepare(wanted, out, resume=True, say=print)
    assert run_trials(trials, 2, say=print, show=quiet)
    assert all(trial.process is None for trial in trials)
    assert (out / "topk/seed-0/run/metrics.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match="add --resume"):
        prepare(wanted, out, resume=False, say=print)
    with pytest.raises(ConfigError, match="other settings"):
        prepare(settings(out.parent, batch_size=3), out, resume=True, say=print)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        prepare(wanted, tmp_path, resume=False, say=print)


@pytest.mark.timeout(400)
def test_a_failed_and_a_killed_run_cost_no_other(tmp_path: Path) -> None:
    wanted = settings(tmp_path, ("topk", "switch", "topk_plain"), seeds=1, steps=12)
    trials = prepare(wanted, tmp_path / "out", resume=False, say=print)
    broken = json.loads((trials[1].folder / "trial.json").read_text())
    broken["data"]["sources"] = [str(tmp_path / "missing.txt")]
    (trials[1].folder / "trial.json").write_text(json.dumps(broken))
    killed = False

    def kill_first(trials: Sequence[Trial], _: float) -> None:
        nonlocal killed
        first = trials[0]
        if not killed and (first.folder / "run" / "checkpoints").exists() and first.process is not None:
            os.kill(first.process.pid, signal.SIGKILL)
            killed = True

    said: list[str] = []
    assert run_trials(trials, 1, say=said.append, show=kill_first)
    states = {trial.entry.name: trial.state for trial in trials}
    assert states["switch"] == "failed"
    assert states["topk_plain"] == "done"
    assert "missing.txt" in (trials[1].error() or "")
    assert any("switch, seed 0 failed" in line and "The others go on." in line for line in said)
    if killed and states["topk"] == "failed":  # it may have ended just before
        assert "SIGKILL" in (trials[0].error() or "")
    row = next(r for r in summarise(wanted, trials, {})["routers"] if r["name"] == "switch")
    assert "missing.txt" in row["failed"]["0"]
    # Resumed, the killed one goes on from its checkpoint and the mended one runs.
    again = prepare(wanted, tmp_path / "out", resume=True, say=print)
    assert run_trials(again, 1, say=print, show=quiet)
    assert [trial.state for trial in again] == ["done"] * 3
    steps = [r["step"] for r in read_metrics(again[0].folder / "run") if r["kind"] == "step"]
    assert steps == list(range(1, 13))


@pytest.mark.timeout(400)
def test_a_run_stops_cleanly_when_its_comparison_was_killed(tmp_path: Path) -> None:
    trial = prepare(settings(tmp_path, ("topk",), seeds=1, steps=100_000), tmp_path / "out", resume=False, say=print)[0]
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-m', 'moesaic.compare.trial', {str(trial.folder)!r}])"
    log = trial.folder / "run" / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-c", code], env=environment()) as comparison:
        while not log.exists():
            time.sleep(0.1)
        comparison.kill()
    deadline = time.monotonic() + 120
    while '"reason":"interrupted"' not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert '"reason":"interrupted"' in log.read_text()


@pytest.mark.timeout(400)
def test_a_stop_ends_cleanly_and_resumes(tmp_path: Path) -> None:
    wanted = settings(tmp_path, ("topk", "switch"), seeds=1, steps=60)
    trials = prepare(wanted, tmp_path / "out", resume=False, say=print)

    def stop_early(trials: Sequence[Trial], _: float) -> None:
        if (trials[0].folder / "run" / "metrics.jsonl").exists() and trials[0].state == "running":
            os.kill(os.getpid(), signal.SIGINT)

    assert not run_trials(trials, 1, say=print, show=stop_early)
    assert trials[1].state == "waiting"
    results = summarise(wanted, trials, {})
    write_comparison(results, COLUMNS, tmp_path / "partial.html")
    assert "Not all runs are there" in (tmp_path / "partial.html").read_text()
    again = prepare(replace(wanted, jobs=2), tmp_path / "out", resume=True, say=print)
    assert run_trials(again, 2, say=print, show=quiet)
    assert all(trial.state == "done" for trial in again)


def test_a_variant_may_change_the_model_alone_and_the_text_may_not_change(tmp_path: Path) -> None:
    wanted = settings(tmp_path, ("topk",), seeds=1)
    with pytest.raises(ConfigError, match="steps is not of the model"):
        make_entries(wanted.base, {}, {"x": ["steps=5"]})
    prepare(wanted, tmp_path / "out", resume=False, say=print)
    (tmp_path / "a.txt").write_text((tmp_path / "b.txt").read_text()[::-1])
    with pytest.raises(ConfigError, match="text has changed"):
        prepare(wanted, tmp_path / "out", resume=True, say=print)


def test_compute_is_counted_with_the_rows_that_were_measured(finished: tuple[Path, dict[str, Any]]) -> None:
    out, results = finished
    rows = {row["name"]: row for row in results["routers"]}
    assert rows["topk"]["compute"] == pytest.approx(1)
    assert rows["switch"]["compute"] == pytest.approx(1, abs=0.02)
    assert rows["soft_moe"]["sees"] == "validation sees later tokens"
    assert rows["topk"]["sees"] == ""
    # Twice the rows must show: the figure comes from results, not from intentions.
    entries, _ = make_entries(settings(out.parent).base, {"topk": VARIANTS["topk"]}, {})
    base = settings(out.parent).base
    result = json.loads((out / "topk/seed-0/result.json").read_text())
    doubled = result | {"per_token_layers": [2 * rows for rows in result["per_token_layers"]]}
    T, B = base.batch_size * base.seq_len, base.batch_size
    ratio = flops_ratio(entries[0].model, base.model, T, B, expert_rows(entries[0], doubled))
    assert 1.8 < ratio < 2


def test_a_damaged_record_of_the_comparison_is_one_sentence(tmp_path: Path) -> None:
    wanted = settings(tmp_path, ("topk",), seeds=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.json").write_text('{"base": ')
    with pytest.raises(MoesaicError, match="Cannot read .*compare.json"):
        prepare(wanted, tmp_path / "out", resume=True, say=print)
