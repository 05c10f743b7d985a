"""Claim: a linear gate's cost grows as E, two levels and product keys as sqrt(E), a tree's as log E.

    python bench/router_scaling.py --plot docs/router-scaling.svg

Each router decides for T = 256 tokens of width 256 in evaluation, without gradient. Reported per router and E: FLOPs of
matrix products per token as ``torch.utils.flop_counter`` counts them in that very forward (not by a formula), trained
parameters, and the median time per token over ``--repeats`` forwards, routers interleaved. Time is processor time of one
thread, so that the turns of other programs are not in it; it includes what FLOPs leave out: sorting, gathering, the plan.
k = 4 experts per token, but for the tree, which ends at one leaf. The last line of standard output is one JSON object with
slopes: d log(cost) / d log(E) between the two largest sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from moesaic.report.text import escape
from moesaic.routing import Router, build_router

T, D = 256, 256


@dataclass(frozen=True)
class Kind:
    """A router to measure: its name and options, the powers of two it is measured at, and how it is drawn."""

    label: str
    name: str
    k: int
    options: dict[str, Any]
    powers: range
    growth: str
    colour: str


KINDS = (
    Kind("linear top-k", "topk", 4, {}, range(6, 17), "E", "#b4432f"),
    Kind("two levels", "hierarchical", 4, {}, range(6, 17, 2), "sqrt E", "#b7791f"),
    Kind("product keys", "product_keys", 4, {}, range(6, 21, 2), "sqrt E", "#3b6fb6"),
    Kind("tree, hard path", "tree", 1, {"train": "hard"}, range(6, 17), "log E", "#2f7d4f"),
)


def main() -> None:
    """Measure, print the table and the JSON line, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--plot", type=Path, help="write an SVG here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = measure(args.repeats)
    print(f"{'router':<16} {'E':>8} {'parameters':>12} {'FLOPs/token':>12} {'us/token':>10}")
    for row in rows:
        numbers = f"{row['parameters']:>12,} {row['flops']:>12,.0f} {row['microseconds']:>10.3f}"
        print(f"{row['router']:<16} {row['experts']:>8} {numbers}")
    slopes = {kind.label: {c: slope(rows, kind.label, c) for c in ("flops", "microseconds")} for kind in KINDS}
    for label, slope_of in slopes.items():
        print(f"{label:<16} last slopes: FLOPs {slope_of['flops']:.2f}, time {slope_of['microseconds']:.2f}")
    if args.plot is not None:
        args.plot.write_text(draw(rows), encoding="utf-8")
    machine = {"torch": torch.__version__, "threads": 1}
    print(json.dumps({"tokens": T, "dim": D, "repeats": args.repeats, "rows": rows, "slopes": slopes, **machine}))


@torch.no_grad()
def measure(repeats: int) -> list[dict[str, Any]]:
    """One row per router and size."""
    x_TD = torch.randn(T, D)
    built: list[tuple[Kind, int, Router]] = []
    for kind in KINDS:
        for power in kind.powers:
            built.append((kind, 2**power, build_router(kind.name, D, 2**power, kind.k, kind.options).eval()))
    times: list[list[float]] = [[] for _ in built]
    for _ in range(repeats + 1):
        for mine, (_, _, router) in zip(times, built, strict=True):
            mine.append(_seconds(lambda router=router: router(x_TD)))  # type: ignore[misc]
    rows = []
    for mine, (kind, experts, router) in zip(times, built, strict=True):
        with FlopCounterMode(display=False) as counter:
            router(x_TD)
        rows.append(
            {
                "router": kind.label,
                "experts": experts,
                "parameters": sum(p.numel() for p in router.parameters()),
                "flops": counter.get_total_flops() / T,
                "microseconds": statistics.median(mine[1:]) / T * 1e6,  # the first warms up
            }
        )
    return rows


def _seconds(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def slope(rows: Sequence[dict[str, Any]], label: str, column: str) -> float:
    """d log(column) / d log(E) between the two largest sizes of a router."""
    last, end = [row for row in rows if row["router"] == label][-2:]
    return math.log(end[column] / last[column]) / math.log(end["experts"] / last["experts"])


# ---- the plot: log-log, counted FLOPs on the left, measured time on the right --------------------------------------


WIDTH, HEIGHT = 920, 420
LEFT, TOP, PANEL_W, PANEL_H, GAP = 64, 62, 360, 288, 92
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #444 }
.title { font-size: 14px; font-weight: 600; fill: #222 }
.note { fill: #777 }
.grid { stroke: #e6e6e6; fill: none }
.axis { stroke: #999; fill: none }
.line { fill: none; stroke-width: 2 }
""".strip()


def draw(rows: Sequence[dict[str, Any]]) -> str:
    """The whole SVG, on a white ground so that it reads in either theme."""
    about = "Cost of routing one token against the number of experts, log-log: counted FLOPs and measured time."
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{about}">',
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        *_panel(rows, "flops", "FLOPs per token, counted", LEFT),
        *_panel(rows, "microseconds", "microseconds per token, measured", LEFT + PANEL_W + GAP),
        *_legend(),
        "</svg>\n",
    ]
    return "\n".join(out)


def _panel(rows: Sequence[dict[str, Any]], column: str, title: str, left: int) -> list[str]:
    values = [row[column] for row in rows]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    first, last = min(k.powers[0] for k in KINDS), max(k.powers[-1] for k in KINDS)

    def sx(experts: float) -> float:
        return left + (math.log2(experts) - first) / (last - first) * PANEL_W

    def sy(value: float) -> float:
        return TOP + (high - math.log10(value)) / (high - low) * PANEL_H

    out = [f'<text class="title" x="{left}" y="{TOP - 14}">{escape(title)}</text>']
    for power in range(low, high + 1):
        y = sy(10.0**power)
        out.append(f'<path class="grid" d="M{left} {y:.1f}h{PANEL_W}"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{_tick(power)}</text>')
    for power in range(first, last + 1, 2):
        x = sx(2.0**power)
        out.append(f'<path class="grid" d="M{x:.1f} {TOP}v{PANEL_H}"/>')
        out.append(f'<text x="{x:.1f}" y="{TOP + PANEL_H + 18}" text-anchor="middle">{_experts(power)}</text>')
    out.append(f'<path class="axis" d="M{left} {TOP}v{PANEL_H}h{PANEL_W}"/>')
    out.append(f'<text class="note" x="{left + PANEL_W}" y="{TOP + PANEL_H + 36}" text-anchor="end">experts E</text>')
    for kind in KINDS:
        points = [(sx(row["experts"]), sy(row[column])) for row in rows if row["router"] == kind.label]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        out.append(f'<path class="line" stroke="{kind.colour}" d="{path}"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8" fill="{kind.colour}"/>' for x, y in points]
    return out


def _legend() -> list[str]:
    out, x, y = [], LEFT, 22
    for kind in KINDS:
        out.append(f'<path class="line" stroke="{kind.colour}" d="M{x} {y - 4}h22"/>')
        growth = kind.growth.replace("sqrt ", "\u221a")
        out.append(f'<text x="{x + 28}" y="{y}">{escape(kind.label)} <tspan class="note">~ {growth}</tspan></text>')
        x += 190
    return out


def _tick(power: int) -> str:
    if -3 <= power <= 2:
        return f"{10.0**power:g}"
    return f'10<tspan dy="-4" font-size="9">{power}</tspan>'


def _experts(power: int) -> str:
    size = 2**power
    if size >= 2**20:
        return f"{size >> 20}M"
    return f"{size >> 10}k" if size >= 2**10 else str(size)


if __name__ == "__main__":
    main()
