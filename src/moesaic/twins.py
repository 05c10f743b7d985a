"""A sparse model and its dense twin on the same tokens: two runs, one honest comparison, one report.

Writes ``out/sparse`` and ``out/dense`` (run folders), ``out/summary.json`` and ``out/report.html``. Both models see the same
rows in the same order and use the same number of parameters per token. An interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.atomic import atomic_file
from moesaic.cost.count import count_parameters
from moesaic.data.corpus import Corpus
from moesaic.models.build import build_model
from moesaic.models.twin import dense_twin
from moesaic.plan.read import max_violation
from moesaic.report.page import read_folder, write_report
from moesaic.report.text import Verdict, compare
from moesaic.train.config import TrainConfig
from moesaic.train.loop import TrainResult, run_training
from moesaic.train.stop import StopRequest


@dataclass(frozen=True)
class Comparison:
    """Both runs and what they show. ``verdict`` is None unless both have a loss to compare."""

    folder: Path
    runs: dict[str, TrainResult]
    summary: dict[str, Any]
    verdict: Verdict | None
    report: Path

    @property
    def finished(self) -> bool:
        """Whether both runs reached their last step."""
        return all(run.reason == "done" for run in self.runs.values()) and len(self.runs) == 2


def run_twins(
    config: TrainConfig,
    corpus: Corpus,
    out: str | Path,
    *,
    resume: bool = False,
    say: Callable[[str], None] = print,
    stop: StopRequest | None = None,
) -> Comparison:
    """Train ``config`` and its dense twin; a stop request ends the comparison after the run it met."""
    out = Path(out)
    configs = {"sparse": config, "dense": replace(config, model=dense_twin(config.model))}
    runs: dict[str, TrainResult] = {}
    for name, one in configs.items():
        counts = count_parameters(build_model(one.model, device="meta"))
        say(f"\n{name}: {counts.total:,} parameters, {counts.active:,} of them used per token, {one.steps} steps")
        runs[name] = run_training(one, corpus, out / name, name=name, resume=resume, say=say, stop=stop)
        if runs[name].reason != "done":
            break
    summary, verdict = _summarise(out, configs, runs)
    atomic_file(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return Comparison(out, runs, summary, verdict, write_report(out))


def _summarise(
    out: Path, configs: dict[str, TrainConfig], runs: dict[str, TrainResult]
) -> tuple[dict[str, Any], Verdict | None]:
    rows = {}
    for name, run in runs.items():
        counts = count_parameters(build_model(configs[name].model, device="meta"))
        evaluation = run.evaluation
        rows[name] = {
            **run.record(),
            "params_total": counts.total,
            "params_active": counts.active,
            "perplexity": None if evaluation is None else evaluation.perplexity,
            "by_domain": {} if evaluation is None else evaluation.by_domain,
            "max_vio": None if evaluation is None else _validation_max_vio(evaluation.domain_load),
        }
    logs, _ = read_folder(out)
    verdict = compare(logs["sparse"], logs["dense"]) if len(logs) == 2 and len(runs) == 2 else None
    summary: dict[str, Any] = {"runs": rows, "verdict": None}
    if verdict is not None:
        summary["verdict"] = verdict.headline
        summary["details"] = list(verdict.details)
        summary["token_ratio"] = verdict.token_ratio
        summary["time_ratio"] = verdict.time_ratio
        summary["cost_ratio"] = verdict.cost_ratio
        summary["winner"] = verdict.winner
    return summary, verdict


def _validation_max_vio(domain_load: dict[str, list[list[int]]]) -> float | None:
    """MaxVio of the most unbalanced layer over the whole validation text."""
    layers = list(zip(*domain_load.values(), strict=True))
    if not layers:
        return None
    return max(float(max_violation(torch.tensor(by_domain).sum(dim=0))) for by_domain in layers)
