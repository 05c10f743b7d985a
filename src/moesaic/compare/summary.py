"""From finished runs to one row per router: means with intervals, and differences paired by seed with the first router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesaic.compare.runner import Settings, Trial
from moesaic.compare.stats import estimate, paired

# Figure of result.json -> heading, format, what it says. Order of the table.
COLUMNS: dict[str, tuple[str, str, str]] = {
    "val_loss": ("loss", "{:.3f}", "validation loss at the end, nats per token"),
    "tokens_per_s": ("tokens/s", "{:,.0f}", "median over training steps"),
    "router_share": ("routing", "{:.1%}", "share of a forward pass spent on deciding, not computing"),
    "max_vio": (
        "MaxVio",
        "{:.2f}",
        "busiest expert over the mean, minus 1; mean over layers, median of the last tenth",
    ),
    "dead": ("dead", "{:.1f}", "experts without a token in the last steps, all layers"),
    "drop_rate": ("dropped", "{:.1%}", "chosen rows that no expert computed"),
    "per_token": ("experts", "{:.2f}", "rows computed per token and layer"),
    "routing_change": (
        "change",
        "{:.1%}",
        "experts of a token that differ between the last two checkpoints (1 - Jaccard)",
    ),
}


def summarise(settings: Settings, trials: Sequence[Trial], refused: dict[str, str]) -> dict[str, Any]:
    """Plain JSON data: one record per router, best loss first, then those without a result."""
    by_entry: dict[str, list[Trial]] = {}
    for trial in trials:
        by_entry.setdefault(trial.entry.name, []).append(trial)
    results = {name: [trial.result() for trial in mine] for name, mine in by_entry.items()}
    first = settings.entries[0].name
    rows = []
    for entry in settings.entries:
        mine = results[entry.name]
        found = [r for r in mine if r is not None]
        row: dict[str, Any] = {
            "name": entry.name,
            "title": entry.title,
            "router": None if entry.model.moe is None else entry.model.moe.router.name,
            "flops_ratio": entry.flops_ratio,
            "runs": len(found),
            "failed": {str(t.seed): t.error() for t in by_entry[entry.name] if t.error() is not None},
            "params_total": found[0]["params_total"] if found else None,
            "params_active": found[0]["params_active"] if found else None,
            "num_experts": found[0]["num_experts"] if found else None,
        }
        for figure in COLUMNS:
            value = estimate([None if r is None else r.get(figure) for r in mine])
            row[figure] = None if value is None else value.record()
        difference = paired(
            [None if r is None else r["val_loss"] for r in mine],
            [None if r is None else r["val_loss"] for r in results[first]],
        )
        row["difference"] = None if difference is None or entry.name == first else difference.record()
        row["falls"] = bool(found) and all(
            r["train_loss"] is not None and r["train_loss"] < r["first_loss"] for r in found
        )
        row["curves"] = [r["curve"] for r in found]
        row["load"] = found[0]["load"] if found else []
        rows.append(row)
    rows.sort(key=lambda r: r["val_loss"]["mean"] if r["val_loss"] else float("inf"))
    return {
        "baseline": first,
        "seeds": list(settings.seeds),
        "jobs": settings.jobs,
        "tokens": settings.base.steps * settings.base.batch_size * settings.base.accumulate * settings.base.seq_len,
        "routers": rows,
        "refused": refused,
    }
