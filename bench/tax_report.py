"""The words of ``layer_tax.py``: its table, its geometric means, and the verdict on each target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import Shape, geometric_mean, milliseconds

SHAPES = (Shape(1024, 512, 64, 8), Shape(1024, 1024, 8, 2), Shape(512, 256, 128, 8), Shape(2048, 1024, 64, 8))
ALL_SHAPES = tuple(one.label for one in SHAPES)
TARGET_SHAPES = ALL_SHAPES[:3]
PARTS = ("router", "grouping", "gather", "products", "activation", "combine")

Row = dict[str, Any]


def ours(backend: str) -> str:
    """The contender's name of moesaic's layer with a back end."""
    return "moesaic" if backend == "auto" else f"moesaic {backend}"


def first_of_ours(row: Row) -> str:
    """The contender that ratios are about: moesaic with the first back end asked for."""
    return str(next(name for name in row["seconds"] if name.startswith("moesaic")))


# ---- the table -----------------------------------------------------------------------------------------------------


def heading(layer: Shape, dtype: str, backends: Sequence[str], hf: Sequence[str], cuda: bool) -> str:
    """The lines above the cells of one shape and dtype."""
    names = ["dense", "dense (moesaic)", *map(ours, backends), *(f"hf {name}" for name in hf)]
    names += ["others"] if cuda else []
    title = f"\nD {layer.D}  H {layer.H}  E {layer.E}  k {layer.k}  {dtype}    milliseconds, medians"
    cells = "".join(f"{name:>16}" for name in names)
    return (
        f"{title}\n{'T':>6} {'mode':<6} {'load':<9}{cells}{'tax (min-max)':>20}{'best HF':>9}{'eager':>8}{'TFLOP/s':>9}"
    )


def line(row: Row) -> str:
    """One cell: medians, tax with its range over the rounds, times faster than Hugging Face; the split in a second line."""
    mine = first_of_ours(row)
    shown = [*row["seconds"], *row["left_out"]]
    order = [n for n in shown if n.startswith("dense")] + [n for n in shown if n.startswith("moesaic")]
    order += [n for n in ("hf eager", "hf batched_mm", "hf grouped_mm") if n in shown]
    cells = "".join(f"{milliseconds(_median(row, name)):>16}" for name in order)
    others = [n for n in shown if n not in order]
    cells += "".join(f"  {name} {milliseconds(_median(row, name))}" for name in others)
    tax = row["tax"][mine]
    text = f"{tax['median']:.2f} ({tax['min']:.2f}-{tax['max']:.2f})"
    best = _times(row, row.get("best_hf"))
    end = f"{text:>20}{best:>9}{_times(row, 'hf eager'):>8}{row['tflop_per_s'][mine]:>9.3g}"
    return "\n".join([f"{row['tokens']:>6} {row['mode']:<6} {row['load']:<9}{cells}{end}", *_notes(row)])


def _median(row: Row, name: str) -> float | None:
    return row["seconds"][name]["median"] if name in row["seconds"] else None


def _times(row: Row, name: str | None) -> str:
    return f"{row['times_faster_than'][name]['median']:.2f}x" if name in row["times_faster_than"] else "-"


def _notes(row: Row) -> list[str]:
    notes = [f"       load: {_load(row)}", *(f"       {name} left out: {why}" for name, why in row["left_out"].items())]
    if row["layers"] < row["layers_wanted"]:
        notes.append(
            f"       partly warm: {row['layers']} layers in rotation where {row['layers_wanted']} would exceed the cache"
        )
    rounds = max(s["rounds"] for s in row["seconds"].values())
    slow = {name: s["rounds"] for name, s in row["seconds"].items() if s["rounds"] < rounds}
    notes += [f"       {name} is slow: {count} of {rounds} rounds" for name, count in slow.items()]
    if "split" in row:
        split = row["split"]
        parts = [f"{name} {split[name] / split['total']:.1%}" for name in _parts(split)]
        missing = [name for name in PARTS if name not in split]
        notes.append("       " + "  ".join(parts) + (f"  (not reported: {', '.join(missing)})" if missing else ""))
    return notes


def _load(row: Row) -> str:
    E, k = (int(number) for number in row["shape"].split(",")[2:])
    used = f"{row['experts_used']:.0f} of {E} experts used, {row['experts_used'] / k:.1f} times the weights of the twin"
    return f"busiest expert {row['skew']:.1f} times the mean; {used}"


def _parts(split: dict[str, float]) -> list[str]:
    named = [name for name in PARTS if name in split]
    return [*named, *(name for name in split if name not in (*PARTS, "total", "rest")), "rest"]


# ---- means and verdicts --------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> str:
    """Geometric means over shapes, and the targets of the project with what was reached."""
    out = ["\nGeometric means over shapes", f"{'T':>6} {'mode':<6} {'load':<9} {'dtype':<6}{'tax':>7}{'best HF':>10}"]
    kinds = dict.fromkeys((row["tokens"], row["mode"], row["load"], row["dtype"]) for row in rows)
    for tokens, mode, load, dtype in kinds:
        group = _where(rows, tokens=tokens, mode=mode, load=load, dtype=dtype)
        tax = geometric_mean([_tax(row) for row in group])
        faster = [_best(row) for row in group if "best_hf" in row]
        best = f"{geometric_mean(faster):.2f}x" if faster else "-"
        out.append(f"{tokens:>6} {mode:<6} {load:<9} {dtype:<6}{tax:>7.2f}{best:>10}")
    out.append("\nTargets (tax against the plain dense twin; medians)")
    for target in targets(rows):
        if target["value"] is None:
            out.append(f"  {target['target']}  {target['what']}: not measured here")
            continue
        verdict = "met" if target["met"] else "NOT MET"
        if target["goal"] is None:
            verdict = ""
        elif target["cells"] < target["of"]:
            verdict += f" on {target['cells']} of {target['of']} cells"
        goal = f"  (goal {target['goal']})" if target["goal"] else ""
        out.append(f"  {target['target']}  {target['what']}: {target['text']}{goal}  {verdict}".rstrip())
    return "\n".join(out)


def targets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each target with the value reached, from which cells, and whether it is met; value None where no cell was measured."""
    step = [row for row in _where(rows, tokens=2048, mode="fw+bw") if row["shape"] in TARGET_SHAPES]
    even = _where(step, load="balanced")
    skewed = [
        _tax(row) / _tax(twin)
        for row in _where(step, load="zipf")
        for twin in _where(even, shape=row["shape"], dtype=row["dtype"])
    ]
    faster = [_best(row) for row in even if "best_hf" in row]
    eager = [
        row["times_faster_than"]["hf eager"]["median"]
        for row in _where(rows, tokens=2048, mode="fw+bw", load="balanced")
        if "hf eager" in row["times_faster_than"] and int(row["shape"].split(",")[2]) >= 64
    ]
    taxes, fastest = [_tax(row) for row in even], [row["tax_fastest_dense"]["median"] for row in even]
    decode, sixteen = (
        [_tax(row) for row in _where(rows, tokens=T, mode="fw", load="balanced") if row["shape"] in ALL_SHAPES]
        for T in (1, 16)
    )
    single = [
        row["tax_fastest_dense"]["median"]
        for row in _where(rows, tokens=1, mode="fw", load="balanced")
        if row["shape"] in ALL_SHAPES
    ]
    split = [row["split"] for row in even if row["shape"] == TARGET_SHAPES[0] and "split" in row]
    small = [_share(one, "router", "grouping", "combine") for one in split if {"grouping", "combine"} <= one.keys()]
    around = [1 - _share(one, "products", "activation") for one in split if "products" in one]
    return [
        _target(1, "fw+bw tax at T=2048, geometric mean", taxes, 6, "<= 1.20", geometric_mean),
        _target(1, "fw+bw tax at T=2048, highest", taxes, 6, "<= 1.40", max),
        _target(1, "the same against the faster of two dense twins, geometric mean", fastest, 6, None, geometric_mean),
        _target(1, "tax with Zipf load over tax with balanced load, highest", skewed, 6, "<= 1.10", max),
        _target(
            2, "times faster than Hugging Face's best, fw+bw, geometric mean", faster, 6, ">= 1.50", geometric_mean
        ),
        _target(2, "times faster than its eager loop where E >= 64, lowest", eager, 6, ">= 10.00", min),
        _target(3, "router + grouping + combine, share of fw+bw, highest", small, 2, "<= 0.05", max),
        _target(3, "all but products and activation, share of fw+bw, highest", around, 2, None, max),
        _target(4, "decode tax at T=1, highest", decode, 8, "<= 1.30", max),
        _target(4, "the same against the faster of two dense twins, highest", single, 8, None, max),
        _target(4, "tax at T=16, highest", sixteen, 8, None, max),
    ]


def _target(number: int, what: str, values: Sequence[float], of: int, goal: str | None, how: Any) -> dict[str, Any]:
    value = how(values) if values else None
    met = None
    if goal is not None and value is not None:
        bound = float(goal.split()[1])
        met = value <= bound if goal.startswith("<") else value >= bound
    text = "-" if value is None else f"{value:.3f}" if what.startswith(("router", "all")) else f"{value:.2f}"
    return {
        "target": number,
        "what": what,
        "value": value,
        "text": text,
        "goal": goal,
        "met": met,
        "cells": len(values),
        "of": of,
    }


def _where(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _tax(row: Row) -> float:
    return float(row["tax"][first_of_ours(row)]["median"])


def _best(row: Row) -> float:
    return float(row["times_faster_than"][row["best_hf"]]["median"])


def _share(split: dict[str, float], *names: str) -> float:
    return sum(split.get(name, 0.0) for name in names) / split["total"]
