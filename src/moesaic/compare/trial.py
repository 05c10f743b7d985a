"""One run of a comparison: train, measure, write ``result.json``. It has a process of its own, so that a crash, a lack of
memory or a kill costs this run alone.

    python -m moesaic.compare.trial runs/compare/topk/seed-0      # resumes by itself

Exit status: 0 done, 2 failed in words (``error.txt``), 3 stopped on request, anything else died.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.atomic import atomic_file
from moesaic.checkpoint.native import load_model
from moesaic.compare.stats import median
from moesaic.config import from_dict
from moesaic.data.corpus import Corpus, load_corpus
from moesaic.data.packing import PackedRows
from moesaic.errors import MoesaicError
from moesaic.experts.layer import MoE
from moesaic.models.decoder import Decoder
from moesaic.plan.plan import RoutingPlan
from moesaic.plan.read import overlap
from moesaic.train.config import TrainConfig
from moesaic.train.evaluate import evenly
from moesaic.train.log import finite, read_metrics
from moesaic.train.loop import run_training
from moesaic.train.resume import saved_tokenizer
from moesaic.train.snapshot import newest_snapshots
from moesaic.train.step import forward
from moesaic.train.stop import StopRequest

DONE, FAILED, STOPPED = 0, 2, 3
_ROWS = 16  # validation rows on which routing of two checkpoints is compared and timed


def run_trial(folder: Path) -> int:
    """Train the run described by ``folder/trial.json`` and write ``folder/result.json``; returns the exit status."""
    try:
        config = from_dict(TrainConfig, json.loads((folder / "trial.json").read_text("utf-8")), where="trial")
        run = folder / "run"
        corpus = load_corpus(config.data, config.seed, tokenizer=saved_tokenizer(run))
        with StopRequest() as stop:
            result = run_training(
                config, corpus, run, name=folder.parent.name, resume=True, show_progress=False, stop=stop
            )
        if result.reason != "done":
            return STOPPED
        figures = {"val_loss": result.val_loss, "best_val_loss": result.best_val_loss, "seconds": result.seconds}
        figures |= read_figures(run) | _measure(config, corpus, run)
        atomic_file(folder / "result.json", json.dumps(finite(figures), indent=2) + "\n")
    except (MoesaicError, MemoryError, torch.OutOfMemoryError) as error:
        words = str(error) or "out of memory; make the model, the batch or the rows smaller"
        atomic_file(folder / "error.txt", words + "\n")
        return FAILED
    return DONE


def read_figures(run: Path) -> dict[str, Any]:
    """Figures of a run's log: medians over its last tenth of steps, means over layers; and curves for the page."""
    records = list(read_metrics(run))
    steps = [r for r in records if r["kind"] == "step"]
    header = next((r for r in records if r["kind"] == "run"), {})
    late = steps[-max(1, len(steps) // 10) :]

    def mean_over_layers(name: str) -> float | None:
        rows = [[v for v in r.get(name) or [] if v is not None] for r in late]
        return median([sum(row) / len(row) for row in rows if row])

    load = [
        [sum(column) for column in zip(*rows, strict=True)] for rows in zip(*(r["load"] for r in late), strict=True)
    ]
    return {
        "params_total": header.get("params_total"),
        "params_active": header.get("params_active"),
        "tokens": steps[-1]["tokens"],
        "first_loss": steps[0]["lm_loss"],
        "train_loss": median([r["lm_loss"] for r in late]),
        "tokens_per_s": median([r["tokens_per_s"] for r in steps]),
        "max_vio": mean_over_layers("max_vio"),
        "drop_rate": mean_over_layers("drop_rate"),
        "per_token": mean_over_layers("per_token"),
        "per_token_layers": [median(column) for column in zip(*(r["per_token"] for r in late), strict=True)],
        "entropy": mean_over_layers("entropy"),
        "dead": sum(late[-1]["dead"]) if late[-1].get("dead") and len(steps) >= header.get("dead_window", 0) else None,
        "num_experts": sum(header.get("num_experts") or []) or None,
        "load": load,
        "curve": [[r["tokens"], r["loss"]] for r in records if r["kind"] == "val"],
    }


def _measure(config: TrainConfig, corpus: Corpus, run: Path) -> dict[str, Any]:
    """Share of routing in the forward's time, and how far routing changed between the last two checkpoints."""
    rows = PackedRows(corpus.val, config.seq_len)
    batch = rows.batch(evenly(rows, _ROWS))
    models = [load_model(snapshot) for snapshot in newest_snapshots(run, 2)]
    for model in models:
        model.compute_dtype = torch.bfloat16 if config.dtype == "bf16" else None
    with torch.no_grad():
        plans = [forward(model.eval(), batch).plans for model in models]
    changes = [
        1 - float(overlap(now, before))
        for now, before in zip(plans[0].values(), plans[-1].values(), strict=True)
        if isinstance(now, RoutingPlan) and isinstance(before, RoutingPlan) and len(plans) == 2
    ]
    change = sum(changes) / len(changes) if changes else None
    return {"routing_change": change, "router_share": _router_share(models[0], batch)}


def _router_share(model: Decoder, batch: Any, repeats: int = 5) -> float | None:
    """Median share of a training-mode forward that goes into deciding: router, capacity, edits."""
    layers = list(model.moe_layers().values())
    if not layers:
        return None
    model.train()
    shares = []
    for _ in range(repeats + 1):
        with torch.no_grad(), _timed(layers) as spent:
            started = time.perf_counter()
            forward(model, batch)
            shares.append(spent[0] / (time.perf_counter() - started))
    return median(shares[1:])  # the first one warms up


@contextmanager
def _timed(layers: list[MoE]) -> Iterator[list[float]]:
    """Adds up the seconds that ``route`` of these layers takes."""
    spent = [0.0]

    def clocked(route: Any) -> Any:
        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            plan = route(*args)
            spent[0] += time.perf_counter() - started
            return plan

        return timed

    for layer in layers:
        layer.route = clocked(layer.route)  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        for layer in layers:
            del layer.route


def _stop_with_parent() -> None:
    """Ask for a clean stop when the comparison that started this run has died: nobody would read its result."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _stop_with_parent()
    sys.exit(run_trial(Path(sys.argv[1])))
