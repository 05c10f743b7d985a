"""Log-log panels side by side as one SVG on a white ground, so that it reads in either theme. Numbers in, a string out.

draw([[Panel("forward + backward, ms", [Line("moesaic", "#b4432f", [8, 16], [10.0, 11.0])])]], "experts E", "About ...")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moesaic.report.text import escape

PANEL_W, PANEL_H, LEFT, TOP, GAP, BELOW = 370, 270, 64, 64, 84, 74
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #444 }
.title { font-size: 14px; font-weight: 600; fill: #222 }
.note { fill: #777 }
.grid { stroke: #e6e6e6; fill: none }
.axis { stroke: #999; fill: none }
.line { fill: none; stroke-width: 2 }
""".strip()


@dataclass(frozen=True)
class Line:
    """A named line; a dashed one is a reference and carries no dots."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    dash: str = ""


@dataclass(frozen=True)
class Panel:
    """One plot: what is on its vertical axis, with the unit, and its lines."""

    title: str
    lines: Sequence[Line]


def draw(rows: Sequence[Sequence[Panel]], x_label: str, about: str) -> str:
    """The whole SVG: rows of panels under one legend."""
    names = {line.name: line for row in rows for panel in row for line in panel.lines}
    width = LEFT + max(len(row) for row in rows) * (PANEL_W + GAP) - GAP + 24
    height = TOP + len(rows) * (PANEL_H + BELOW)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(about)}">',
        f'<style>{STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    x = float(LEFT)
    for line in names.values():
        out.append(f'<path class="line" stroke="{line.colour}"{_dash(line)} d="M{x:.0f} 18h22"/>')
        out.append(f'<text x="{x + 28:.0f}" y="22">{escape(line.name)}</text>')
        x += 52 + 6.4 * len(line.name)
    for down, row in enumerate(rows):
        for across, panel in enumerate(row):
            out += _panel(panel, LEFT + across * (PANEL_W + GAP), TOP + down * (PANEL_H + BELOW), x_label)
    return "\n".join([*out, "</svg>\n"])


def _panel(panel: Panel, left: int, top: int, x_label: str) -> list[str]:
    xs = [x for line in panel.lines for x in line.x]
    ys = [y for line in panel.lines for y in line.y]
    x_low, x_high = math.log2(min(xs)), max(math.log2(max(xs)), math.log2(min(xs)) + 1)
    y_ticks = ticks(min(ys), max(ys))
    y_low, y_high = math.log10(y_ticks[0]), math.log10(y_ticks[-1])

    def sx(x: float) -> float:
        return left + (math.log2(x) - x_low) / (x_high - x_low) * PANEL_W

    def sy(y: float) -> float:
        return top + (y_high - math.log10(y)) / (y_high - y_low) * PANEL_H

    out = [f'<text class="title" x="{left}" y="{top - 14}">{escape(panel.title)}</text>']
    for tick in y_ticks:
        out.append(f'<path class="grid" d="M{left} {sy(tick):.1f}h{PANEL_W}"/>')
        out.append(f'<text x="{left - 8}" y="{sy(tick) + 4:.1f}" text-anchor="end">{tick:,g}</text>')
    for power in range(math.ceil(x_low), math.floor(x_high) + 1):
        out.append(f'<path class="grid" d="M{sx(2.0**power):.1f} {top}v{PANEL_H}"/>')
        out.append(f'<text x="{sx(2.0**power):.1f}" y="{top + PANEL_H + 18}" text-anchor="middle">{2**power}</text>')
    out.append(f'<path class="axis" d="M{left} {top}v{PANEL_H}h{PANEL_W}"/>')
    right = f'x="{left + PANEL_W}" y="{top + PANEL_H + 36}" text-anchor="end"'
    out.append(f'<text class="note" {right}>{escape(x_label)}</text>')
    for line in panel.lines:
        points = [(sx(x), sy(y)) for x, y in zip(line.x, line.y, strict=True)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        out.append(f'<path class="line" stroke="{line.colour}"{_dash(line)} d="{path}"/>')
        if not line.dash:
            out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.colour}"/>' for x, y in points]
    return out


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around the data. At least a factor of 5, or a log axis makes cliffs of small steps."""
    low = min(low, high / 5)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    marks = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    first = max(i for i, mark in enumerate(marks) if mark <= low)
    last = min(i for i, mark in enumerate(marks) if mark >= high)
    return marks[first : last + 1]


def _dash(line: Line) -> str:
    return f' stroke-dasharray="{line.dash}"' if line.dash else ""
