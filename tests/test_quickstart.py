"""quickstart and the comparison of twins, tiny: the files, the table, the verdict, equal tokens and active parameters."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moesaic.config import from_dict, to_dict
from moesaic.quickstart import run_quickstart
from moesaic.train.config import TrainConfig
from moesaic.train.log import read_metrics
from moesaic.train.recipes import RECIPES
from moesaic.twins import Comparison
from tests.command import CONFIG

MODEL = CONFIG["model"] | {"vocab_size": 1}
DATA = {"sources": ["stdlib"], "stdlib_bytes": 300_000, "vocab_size": 300}


def quickstart(out: Path, resume: bool = False) -> tuple[Comparison, str]:
    config = from_dict(TrainConfig, CONFIG | {"model": MODEL, "data": DATA | {"cache_dir": str(out.parent / "cache")}})
    written = io.StringIO()
    return run_quickstart(config, out, resume=resume, console=Console(file=written, width=120)), written.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, str]:
    return quickstart(tmp_path_factory.mktemp("quickstart") / "out")


def test_what_it_leaves_behind(finished: tuple[Comparison, str]) -> None:
    comparison, _ = finished
    assert comparison.finished
    names = {p.relative_to(comparison.folder).as_posix() for p in comparison.folder.rglob("*") if p.is_file()}
    assert {"summary.json", "report.html"} <= names
    for run in ("sparse", "dense"):
        assert {f"{run}/config.json", f"{run}/metrics.jsonl", f"{run}/sample.txt"} <= names
        assert f"{run}/checkpoints/step-00000006/model.safetensors" in names
    assert [name for name in names if "incomplete" in name or ".writing" in name] == []


def test_the_twins_see_the_same_tokens_and_use_as_many_parameters(finished: tuple[Comparison, str]) -> None:
    comparison, _ = finished
    runs = comparison.summary["runs"]
    assert runs["sparse"]["tokens"] == runs["dense"]["tokens"] == 6 * 2 * 32
    assert abs(runs["sparse"]["params_active"] / runs["dense"]["params_active"] - 1) < 0.02
    assert runs["sparse"]["params_total"] > 1.2 * runs["dense"]["params_total"]
    records = {name: read_metrics(comparison.folder / name) for name in runs}
    for name, (run, *_) in records.items():
        assert run["model"] == name
        assert (run["params_total"], run["params_active"]) == (runs[name]["params_total"], runs[name]["params_active"])
    assert runs["dense"]["max_vio"] is None
    assert runs["sparse"]["max_vio"] >= 0


def test_what_it_prints_is_what_was_measured(finished: tuple[Comparison, str]) -> None:
    comparison, text = finished
    runs = comparison.summary["runs"]
    for run in runs.values():
        for words in (f"{run['val_loss']:.4f}", f"{run['perplexity']:.2f}", f"{run['params_total']:,}"):
            assert words in text
    assert comparison.verdict is not None
    flat = " ".join(text.split())
    assert comparison.verdict.headline in flat
    for sentence in comparison.verdict.details:
        assert sentence in flat
    better = min(runs, key=lambda name: runs[name]["val_loss"])
    assert comparison.summary["winner"] in (better, "tie", None)
    assert f"Report (open in a browser): {comparison.report}" in text
    assert f"Write with it: moesaic generate {comparison.folder} --prompt" in text
    assert "What the sparse model writes" in text
    assert json.loads((comparison.folder / "summary.json").read_text()) == comparison.summary


def test_resuming_a_finished_one_changes_nothing(finished: tuple[Comparison, str]) -> None:
    comparison, text = finished
    logs = {name: (comparison.folder / name / "metrics.jsonl").read_bytes() for name in comparison.runs}
    again, text_again = quickstart(comparison.folder, resume=True)
    assert again.finished
    for name, before in logs.items():
        assert (comparison.folder / name / "metrics.jsonl").read_bytes() == before
        kinds = [r["kind"] for r in read_metrics(comparison.folder / name)]
        assert (kinds.count("sample"), kinds.count("end")) == (1, 1)
    assert "Training a byte-level BPE" in text
    assert "Training a byte-level BPE" not in text_again
    assert measured(again.summary) == measured(comparison.summary)
    assert text[text.index("validation loss") :] == text_again[text_again.index("validation loss") :]


def measured(summary: dict[str, Any]) -> dict[str, Any]:
    return summary | {"runs": {n: {k: v for k, v in r.items() if k != "seconds"} for n, r in summary["runs"].items()}}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_survive_json(name: str) -> None:
    config = RECIPES[name](steps=7)
    assert config.steps == 7
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
