"""Realistic made-up run folders for the report: a sparse run and its dense twin, with drift, collapse and recovery.

python tests/report/synthetic_runs.py FOLDER      # writes FOLDER/sparse, FOLDER/dense, FOLDER/summary.json
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

DOMAINS = ("code", "prose", "maths", "dialogue")
TOKENS_PER_STEP = 8192
Record = dict[str, Any]


def sparse_records(
    steps: int = 400,
    layers: tuple[int, ...] = (1, 2, 3, 4, 5, 6),
    experts: tuple[int, ...] | None = None,
    domains: tuple[str, ...] = DOMAINS,
    k: int = 2,
    final: float = 2.35,
    seconds: float = 0.92,
    end: str | None = "done",
    seed: int = 0,
) -> list[Record]:
    """The records of a sparse run, one per line of metrics.jsonl."""
    rng = np.random.default_rng(seed)
    experts = experts or (16,) * len(layers)
    header = header_record("sparse", layers, experts, domains)
    records = [header]
    taste_LDE = [rng.normal(0, 0.9 * (i + 1) / len(layers), (len(domains), e)) for i, e in enumerate(experts)]
    drift_LE = [rng.normal(0, 1.0, e) for e in experts]
    for step in range(1, steps + 1):
        done = step / steps
        shares = [_shares(drift, done, i, len(layers)) for i, drift in enumerate(drift_LE)]
        load = [rng.multinomial(TOKENS_PER_STEP * k, share).tolist() for share in shares]
        records.append(
            step_record(step, final, seconds, done, rng)
            | {
                "losses": {"switch": 0.01 + 0.01 * math.exp(-4 * done), "z": 0.002},
                "load": load,
                "max_vio": [max(row) / (sum(row) / len(row)) - 1 for row in load],
                "drop_rate": [max(0.0, 0.03 * math.exp(-6 * done) + 0.001 * rng.normal()) for _ in load],
                "dead": [sum(count == 0 for count in row) for row in load],
                "entropy": [
                    math.log(len(row)) * (1 - 0.12 * (i + 1) * (1 - math.exp(-3 * done))) + 0.01 * rng.normal()
                    for i, row in enumerate(load)
                ],
                "margin": [abs(0.02 + 0.05 * (i + 1) * done + 0.004 * rng.normal()) for i in range(len(load))],
            }
        )
        if step % max(1, steps // 10) == 0:
            domain_load = {
                name: [
                    rng.multinomial(20_000, _softmax(np.log(shares[i] + 1e-9) + done * taste_LDE[i][d])).tolist()
                    for i in range(len(experts))
                ]
                for d, name in enumerate(domains)
            }
            records.append(val_record(step, final, seconds, done, domains) | {"domain_load": domain_load})
    records.append(
        {"kind": "sample", "step": steps, "prompt": "def area(r):", "text": "def area(r):\n    return 3.14 * r ** 2\n"}
    )
    records.append(
        {
            "kind": "sample",
            "step": steps,
            "prompt": "Once upon",
            "text": " a time there was a router who could not choose.",
        }
    )
    return records + ([{"kind": "end", "step": steps, "reason": end}] if end else [])


def dense_records(
    steps: int = 400, final: float = 2.46, seconds: float = 0.55, end: str | None = "done", seed: int = 1
) -> list[Record]:
    """The records of the dense twin."""
    rng = np.random.default_rng(seed)
    records = [header_record("dense", (), (), DOMAINS)]
    empty: Record = {"losses": {}, "load": [], "max_vio": [], "drop_rate": [], "dead": [], "entropy": [], "margin": []}
    for step in range(1, steps + 1):
        records.append(step_record(step, final, seconds, step / steps, rng) | empty)
        if step % max(1, steps // 10) == 0:
            records.append(val_record(step, final, seconds, step / steps, DOMAINS) | {"domain_load": {}})
    records.append({"kind": "sample", "step": steps, "prompt": "Once upon", "text": " a time the the the cat sat."})
    return records + ([{"kind": "end", "step": steps, "reason": end}] if end else [])


def over_processes(records: list[Record], ranks: int, every: int = 0) -> list[Record]:
    """The same run over so many processes, experts in equal parts; with ``every``, of a rebalancer that claims a fifth."""
    rng = np.random.default_rng(0)
    found = []
    for record in records:
        if record["kind"] == "run":
            parallel = {"ep": ranks, "rebalance_every": every}
            record = record | {"processes": ranks, "layout": f"{ranks} processes: dp {ranks}, ep {ranks}"}
            record["config"] = record["config"] | {"parallel": parallel}
            layers = record["layers"]
        elif record["kind"] == "step":
            parts = [[int(sum(part)) for part in np.array_split(row, ranks)] for row in record["load"]]
            mine = ({str(layer): rows[r] for layer, rows in zip(layers, parts, strict=True)} for r in range(ranks))
            record = record | {"ranks": [entry(rows, 0.9, 0.2 + 0.1 * float(rng.random()), 0.1) for rows in mine]}
            if every and record["step"] % every == 0:
                record["rebalanced"] = [
                    {"layer": layer, "moved": 2, "bytes": 4096, "rows": 0.8 * max(rows), "rows_before": 1.0 * max(rows)}
                    for layer, rows in zip(layers, parts, strict=True)
                ]
        found.append(record)
    return found


def entry(rows: dict[str, int], step_s: float, all_to_all_s: float, collective_s: float) -> Record:
    """One process of a step; 1000 bytes for every row."""
    return {
        "rows": rows,
        "step_s": step_s,
        "all_to_all_s": all_to_all_s,
        "collective_s": collective_s,
        "all_to_all_bytes": 1000 * sum(rows.values()),
        "collective_bytes": 5000,
    }


def header_record(model: str, layers: tuple[int, ...], experts: tuple[int, ...], domains: tuple[str, ...]) -> Record:
    moe = {"experts": max(experts), "k": 2, "router": "topk"} if experts else None
    return {
        "kind": "run",
        "time": 1.7e9,
        "name": f"tiny-{model}",
        "config": {
            "model": {"dim": 256, "num_layers": 7, "moe": moe},
            "optim": {"lr": 0.003, "betas": [0.9, 0.95]},
            "seed": 0,
        },
        "params_total": 41_200_000 if experts else 9_830_000,
        "params_active": 9_800_000,
        "layers": list(layers),
        "num_experts": list(experts),
        "routers": ["topk"] * len(layers),
        "domains": list(domains),
        "model": model,
    }


def curve(done: float, final: float) -> float:
    return final + 1.4 * math.exp(-5 * done) + 4.5 * math.exp(-45 * done) - 0.02 * done


def step_record(step: int, final: float, seconds: float, done: float, rng: np.random.Generator) -> Record:
    loss = curve(done, final) - 0.05 + 0.06 * float(rng.normal())
    return {
        "kind": "step",
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "time_s": step * seconds,
        "loss": loss + 0.01,
        "lm_loss": loss,
        "lr": 0.003 * (1 - done),
        "grad_norm": 1.0,
        "tokens_per_s": TOKENS_PER_STEP / seconds,
    }


def val_record(step: int, final: float, seconds: float, done: float, domains: tuple[str, ...]) -> Record:
    loss = curve(done, final)
    offsets = np.linspace(-0.55, 0.4, len(domains))
    tilt = 0.06 * (final - 2.4)
    by_domain = {
        name: float(loss + offsets[i] * (1 + tilt) + 0.03 * math.sin(9 * i * final)) for i, name in enumerate(domains)
    }
    return {
        "kind": "val",
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "time_s": step * seconds,
        "loss": loss,
        "ppl": math.exp(loss),
        "by_domain": by_domain,
    }


def _shares(drift_E: np.ndarray, done: float, layer: int, layers: int) -> np.ndarray:
    """Skewed early, balanced later; the drift turns slowly, and one expert of the last layer starves and dies."""
    turn = np.cos(6 * done + np.arange(len(drift_E)))
    logits = drift_E * (0.25 + 1.3 * math.exp(-3 * done)) * (0.7 + 0.5 * turn)
    share = _softmax(logits)
    if layer == layers - 1 and len(share) > 3:
        share[3] *= max(0.0, 1 - 1.6 * done)
    return share / share.sum()


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())


def write_run(folder: Path, records: list[Record]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def write_comparison(folder: Path, **sparse: Any) -> Path:
    write_run(folder / "sparse", sparse_records(**sparse))
    write_run(folder / "dense", dense_records(steps=sparse.get("steps", 400)))
    summary = {"runs": {"sparse": {"seconds": 368}, "dense": {"seconds": 220}}, "verdict": "sparse ahead by 0.11 nats"}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


if __name__ == "__main__":
    write_comparison(Path(sys.argv[1]))
