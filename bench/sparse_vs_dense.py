"""Claim: at equal active parameters and equal tokens, the sparse model (E=16, k=2) beats its dense twin.

    python bench/sparse_vs_dense.py                                  # this Python's own text, 3 seeds
    python bench/sparse_vs_dense.py --data books/ a.txt --steps 800  # your text, one domain per file

For each seed the sparse model and its dense twin train in turn on the same rows in the same order. Reported per pair and
as mean and standard deviation over seeds: final validation loss of both; steps ratio = steps of the run / steps the sparse
model needed to reach the dense twin's final loss (above 1: sparse needs fewer); wall-clock ratio = time of the dense run /
time the sparse model needed for the same loss (above 1: sparse is there sooner); cost ratio = time of the sparse run / time
of the dense run for all tokens. Validation is left out of all times. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moesaic.config import apply_overrides, from_dict, to_dict
from moesaic.data.corpus import load_corpus
from moesaic.train.config import TrainConfig
from moesaic.train.loop import fit_vocabulary
from moesaic.train.recipes import quickstart
from moesaic.train.stop import StopRequest
from moesaic.twins import run_twins

COLUMNS = ("sparse_loss", "dense_loss", "gap", "steps_ratio", "wall_clock_ratio", "cost_ratio", "max_vio")


def main() -> None:
    """Run the pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["stdlib"], help="text, one domain per file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("runs/sparse_vs_dense"))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings by dotted name")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    args = parser.parse_args()

    settings = apply_overrides(to_dict(quickstart()), args.set)
    settings["data"] |= {"sources": args.data, "label_by": "stem"}
    settings["steps"] = args.steps
    base = from_dict(TrainConfig, settings)
    rows = []
    for seed in range(args.seeds):
        rows.append(_pair(replace(base, seed=seed, sample_tokens=0), args.out / f"seed{seed}", args.resume))
        print(_line(f"seed {seed}", rows[-1]), flush=True)
    mean = {c: _mean([row[c] for row in rows]) for c in COLUMNS}
    spread = {c: _spread([row[c] for row in rows]) for c in COLUMNS}
    print(_line("mean", mean))
    print(_line("std dev", spread))
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"data": args.data, "steps": base.steps, "rows": rows, "mean": mean, "std": spread, **machine}))


def _pair(config: TrainConfig, out: Path, resume: bool) -> dict[str, Any]:
    def say(sentence: str) -> None:
        print(sentence, file=sys.stderr)

    with StopRequest(say) as stop:
        corpus = load_corpus(config.data, config.seed, say)
        pair = run_twins(fit_vocabulary(config, corpus), corpus, out, resume=resume, say=say, stop=stop)
    if not pair.finished or pair.verdict is None:
        raise SystemExit("Interrupted; go on with --resume.")
    verdict, runs = pair.verdict, pair.summary["runs"]
    sparse_won = verdict.gap < 0
    return {
        "sparse_loss": verdict.sparse,
        "dense_loss": verdict.dense,
        "gap": verdict.gap,
        # Where the dense twin won, the sparse run never reached its loss: no ratio rather than a flattering one.
        "steps_ratio": verdict.token_ratio if sparse_won else None,
        "wall_clock_ratio": verdict.time_ratio if sparse_won else None,
        "cost_ratio": verdict.cost_ratio,
        "max_vio": runs["sparse"]["max_vio"],
        "params_total": [runs[name]["params_total"] for name in ("sparse", "dense")],
        "params_active": [runs[name]["params_active"] for name in ("sparse", "dense")],
        "tokens": runs["sparse"]["tokens"],
        "tokens_per_s": [runs[name]["tokens_per_s"] for name in ("sparse", "dense")],
    }


def _line(label: str, row: dict[str, Any]) -> str:
    cells = [f"{c} {'-' if row[c] is None else format(row[c], '.3f')}" for c in COLUMNS]
    return f"{label:<8} " + "  ".join(cells)


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _spread(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.stdev(known) if len(known) == len(values) and len(known) > 1 else None


if __name__ == "__main__":
    main()
