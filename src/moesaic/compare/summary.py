"""From finished runs to one row per router: means with intervals, and differences paired by seed with the first router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesaic.compare.runner import Entry, Settings, Trial
from moesaic.compare.stats import estimate, paired
from moesaic.compare.variants import flops_ratio, layer_of
from moesaic.train.config import TrainConfig

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
    "per_token": ("experts", "{:.2f}", "rows per token and sparse layer, those of null and copy experts included"),
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
            "sees": _sees(entry),
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
        row["compute"] = _compute(settings.base, entry, found)
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


def _compute(base: TrainConfig, entry: Entry, found: Sequence[dict[str, Any]]) -> float | None:
    """Compute of the feed-forward layers over the base's, with the rows per token that were measured; mean over runs."""
    T, B = base.batch_size * base.seq_len, base.batch_size
    ratios = [flops_ratio(entry.model, base.model, T, B, expert_rows(entry, result)) for result in found]
    return sum(ratios) / len(ratios) if ratios else None


def expert_rows(entry: Entry, result: dict[str, Any]) -> list[float] | None:
    """Rows per token that feed-forward experts computed, by sparse layer."""
    moe, layers = entry.model.moe, len(result["load"])
    if moe is None or not layers:
        return None
    special = moe.zero + moe.copy + moe.constant
    rows = result.get("per_token_layers") or [result["per_token"]] * layers
    shares = [sum(load[: len(load) - special]) / max(sum(load), 1) for load in result["load"]]
    return [per_token * share for per_token, share in zip(rows, shares, strict=True)]


def _sees(entry: Entry) -> str:
    """What a loss of this router knew that a text generated token by token would not; "" if nothing."""
    if entry.model.depth is not None:
        return "training sees later tokens"
    if entry.model.moe is None:
        return ""
    facts = layer_of(entry.model).router.facts
    if not facts.causal_in_evaluation:
        return "validation sees later tokens"
    if not facts.causal or entry.model.moe.capacity is not None:
        return "training sees later tokens"
    return ""
