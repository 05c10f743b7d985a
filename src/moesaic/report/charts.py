"""Charts as pure functions: numbers in, an SVG string out. No state, no library, no colour but CSS variables.

    line_chart([Series("sparse", xs, ys, "sparse")], Frame("Loss by tokens", "tokens", "loss (nats)"))

Every chart carries role="img" and an aria-label, escapes every label, and leaves gaps where a value is None or NaN.
The page's stylesheet (page.css) gives the classes their colours in both themes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moesaic.report.text import big, duration, escape, shorten

Number = float | None
PHONE_WIDTH = 400
PANEL_WIDTH = 320


@dataclass(frozen=True)
class Series:
    """A named line. ``css`` picks colour and stroke; ``layer`` marks lines that follow the layer selector.

    With ``low`` it is an area from ``low`` up to ``y`` instead; with ``dots`` every point is marked.
    """

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    css: str
    layer: int | None = None
    colour: str | None = None
    dots: bool = False
    low: Sequence[Number] | None = None


@dataclass(frozen=True)
class Frame:
    """The paper a chart is drawn on. ``refs`` are dashed reference lines (value, label)."""

    title: str
    x_label: str
    y_label: str
    width: int = PHONE_WIDTH
    height: int = 250
    chart_id: str = ""
    y_range: tuple[float, float] | None = None
    refs: tuple[tuple[float, str], ...] = ()
    x_format: Callable[[float], str] = big
    y_format: Callable[[float], str] = big
    x_ticks: Callable[[float, float, int], list[float]] | None = None


def finite(values: Sequence[Number]) -> list[float]:
    """The values that are numbers, in order."""
    return [v for v in values if v is not None and math.isfinite(v)]


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high], as near to ``count`` as can be."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / max(1, count)))
    steps = [m * power for m in (1, 2, 2.5, 5, 10)]
    step = min(steps, key=lambda s: abs(math.floor(high / s + 1e-9) - math.ceil(low / s - 1e-9) + 1 - count))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def time_ticks(low: float, high: float, count: int) -> list[float]:
    """Ticks for seconds: whole seconds, minutes, hours or days."""
    if not high > low:
        return [low]
    sizes = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
    rough = (high - low) / max(1, count)
    step = next((float(s) for s in sizes if s >= rough), 86400.0 * math.ceil(rough / 86400))
    if rough < 1:
        return nice_ticks(low, high, count)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def tick_labels(ticks: Sequence[float], form: Callable[[float], str]) -> list[str]:
    """Each tick in ``form``; in plain decimals, as many as it takes, where ``form`` would write two ticks alike."""
    labels = [form(tick) for tick in ticks]
    if len(set(labels)) == len(labels):
        return labels
    near = 1e-6 * min(b - a for a, b in pairwise(ticks))
    unit = " s" if form is duration else ""
    for digits in range(16):
        written = [f"{tick:.{digits}f}" for tick in ticks]
        if all(abs(float(word) - tick) <= near for word, tick in zip(written, ticks, strict=True)):
            break
    return [word + unit for word in written]


def padded(values: list[float], floor: float | None = None) -> tuple[float, float]:
    """A y range around ``values`` with air above and below; ``floor`` pins the bottom."""
    if not values:
        return (0.0, 1.0)
    low, high = min(values), max(values)
    air = (high - low) * 0.06 or abs(high) * 0.05 or 0.5
    bottom = low - air if floor is None else min(floor, low)
    return (bottom, high + air)


def band(x: Sequence[float], y: Sequence[Number], stretches: int) -> tuple[list[float], list[Number], list[Number]]:
    """The middle, lowest and highest value of each of ``stretches`` equal stretches, so that no spike is lost."""
    edges = np.linspace(0, len(x), stretches + 1).astype(int).tolist()
    middle: list[float] = []
    low: list[Number] = []
    high: list[Number] = []
    for start, stop in pairwise(edges):
        known = finite(y[start:stop])
        middle.append(x[(start + stop) // 2])
        low.append(min(known, default=None))
        high.append(max(known, default=None))
    return middle, low, high


def path(xs: Sequence[float], ys: Sequence[Number]) -> str:
    """The ``d`` of a polyline; a gap at every None, and a dot (zero-length stroke) for a point between two gaps."""
    parts: list[str] = []
    run = 0
    for x, y in zip(xs, ys, strict=True):
        if y is None or not math.isfinite(y):
            parts += ["h0"] if run == 1 else []
            run = 0
            continue
        parts.append(f"{'L' if run else 'M'}{short(x)} {short(y)}")
        run += 1
    parts += ["h0"] if run == 1 else []
    return "".join(parts)


def line_chart(series: Sequence[Series], frame: Frame) -> str:
    """Lines (and validation dots) over a light grid."""
    xs = [v for s in series for v, y in zip(s.x, s.y, strict=True) if y is not None and math.isfinite(y)]
    ys = [v for s in series for v in finite(s.y)]
    x_low, x_high = (min(xs), max(xs)) if xs else (0.0, 1.0)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5 * (abs(x_low) or 1), x_high + 0.5 * (abs(x_high) or 1)
    y_low, y_high = frame.y_range or padded(ys + [value for value, _ in frame.refs])
    left, right, top, bottom = 48, 14, 30, 42
    width, height = frame.width - left - right, frame.height - top - bottom

    def sx(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * width

    def sy(y: float) -> float:
        return top + (y_high - y) / (y_high - y_low) * height

    out = [open_chart(frame, (left, top, width, height), (x_low, x_high), (y_low, y_high))]
    out.append(f'<clipPath id="clip-{frame.chart_id}-{frame.width}"><rect x="{left - 4}" y="{top - 4}" ')
    out.append(f'width="{width + 8}" height="{height + 8}"/></clipPath>')
    ticks = nice_ticks(y_low, y_high, 4)
    for tick, label in zip(ticks, tick_labels(ticks, frame.y_format), strict=True):
        out.append(f'<path class="grid" d="M{left} {short(sy(tick))}h{width}"/>')
        out.append(f'<text class="tick" x="{left - 8}" y="{short(sy(tick) + 4)}" text-anchor="end">')
        out.append(f"{escape(label)}</text>")
    out.append(_x_axis(frame, sx, (x_low, x_high), left, top + height, width) if xs else "")
    out.append(f'<text class="axis" x="0" y="14">{escape(frame.y_label)}</text>')
    for value, label in frame.refs:
        if y_low <= value <= y_high:
            out.append(f'<path class="ref" d="M{left} {short(sy(value))}h{width}"/>')
            out.append(f'<text class="reflabel" x="{left + width}" y="{short(sy(value) - 5)}" text-anchor="end">')
            out.append(f"{escape(label)}</text>")
    if not xs:
        out.append(f'<text class="empty" x="{left + width / 2}" y="{top + height / 2}" text-anchor="middle">')
        out.append("nothing was logged</text>")
    out.append(f'<g clip-path="url(#clip-{frame.chart_id}-{frame.width})">')
    for s in series:
        style = f' style="stroke:{s.colour}"' if s.colour else ""
        tag = f' data-l="{s.layer}"' if s.layer is not None else ""
        points = [None if y is None or not math.isfinite(y) else sy(y) for y in s.y]
        if s.low is not None:
            rim = [
                (sx(x), y, sy(low))
                for x, y, low in zip(s.x, points, s.low, strict=True)
                if y is not None and low is not None
            ]
            there = path([x for x, _, _ in rim], [y for _, y, _ in rim])
            back = path([x for x, _, _ in reversed(rim)], [low for _, _, low in reversed(rim)])
            out.append(f'<path class="area {s.css}" d="{there}{back.replace("M", "L", 1)}z"/>')
            continue
        d = path([sx(x) for x in s.x], points)
        if d:
            out.append(f'<path class="line {s.css}"{tag}{style} d="{d}"/>')
        if s.dots or len(finite(points)) == 1:
            places = ((sx(x), y) for x, y in zip(s.x, points, strict=True) if y is not None)
            out += [
                f'<circle class="dot {s.css}"{tag}{style} cx="{short(x)}" cy="{short(y)}" r="3"/>' for x, y in places
            ]
    return "".join(out) + "</g></svg>"


def bar_chart(labels: Sequence[str], values: Sequence[Number], frame: Frame) -> str:
    """Vertical bars from zero, one per label, the value (written by ``x_format``) on top where there is room."""
    left, right, top, bottom = 48, 14, 30, 42
    width, height = frame.width - left - right, frame.height - top - bottom
    high = max([*finite(values), *(v for v, _ in frame.refs), 1e-9]) * 1.12
    slot = width / max(1, len(values))
    out = [open_chart(frame, (left, top, width, height), (0, len(values)), (0, high))]
    ticks = nice_ticks(0, high, 4)
    for tick, label in zip(ticks, tick_labels(ticks, frame.y_format), strict=True):
        y = top + height * (1 - tick / high)
        out.append(f'<path class="grid" d="M{left} {short(y)}h{width}"/>')
        out.append(f'<text class="tick" x="{left - 8}" y="{short(y + 4)}" text-anchor="end">{escape(label)}</text>')
    every = max(1, math.ceil(len(values) * 26 / width))
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        middle = left + slot * (i + 0.5)
        if finite([value]):
            bar = height * (value or 0.0) / high
            out.append(
                f'<rect class="bar" data-l="{i}" x="{short(middle - slot * 0.34)}" width="{short(slot * 0.68)}" '
            )
            out.append(f'y="{short(top + height - bar)}" height="{short(bar)}" rx="1.5"/>')
            if slot >= 38:
                out.append(f'<text class="value" x="{short(middle)}" y="{short(top + height - bar - 5)}" ')
                out.append(f'text-anchor="middle">{escape(frame.x_format(value or 0.0))}</text>')
        if i % every == 0:
            out.append(f'<text class="tick" x="{short(middle)}" y="{top + height + 16}" text-anchor="middle">')
            out.append(f"{escape(label)}</text>")
    out.append(f'<path class="base" d="M{left} {top + height}h{width}"/>')
    out.append(axis_labels(frame, left + width))
    return "".join(out) + "</svg>"


def dot_rows(names: Sequence[str], columns: Sequence[tuple[str, Sequence[Number]]], frame: Frame) -> str:
    """One row per name, one dot per column on a shared scale; a line joins the dots of a row."""
    longest = max((len(name) for name in names), default=0)
    left, right, top, row = 12 + min(30 + 7.2 * longest, 200, frame.width * 0.32), 18, 8, 30
    width, height = frame.width - left - right, row * len(names)
    values = [v for _, column in columns for v in finite(column)]
    low, high = padded(values)
    frame = Frame(**{**frame.__dict__, "height": top + height + 42})
    out = [open_chart(frame, (left, top, width, height), (low, high), (0, len(names)))]

    def sx(x: float) -> float:
        return left + (x - low) / (high - low) * width

    ticks = nice_ticks(low, high, max(2, int(width / 90)))
    for tick, label in zip(ticks, tick_labels(ticks, frame.x_format), strict=True):
        out.append(f'<path class="grid" d="M{short(sx(tick))} {top}v{height}"/>')
        out.append(f'<text class="tick" x="{short(sx(tick))}" y="{top + height + 16}" text-anchor="middle">')
        out.append(f"{escape(label)}</text>")
    for i, name in enumerate(names):
        y = top + row * (i + 0.5)
        out.append(f'<text class="name" x="{left - 12}" y="{y + 4}" text-anchor="end"><title>{escape(name)}</title>')
        out.append(f"{escape(shorten(name, int((left - 24) / 7.2) + 1))}</text>")
        here = finite([column[i] for _, column in columns])
        if len(here) > 1:
            out.append(f'<path class="join" d="M{short(sx(min(here)))} {y}H{short(sx(max(here)))}"/>')
        for css, column in columns:
            value = column[i]
            if value is not None and math.isfinite(value):
                out.append(f'<circle class="dot big {css}" cx="{short(sx(value))}" cy="{y}" r="5.5"/>')
    out.append(axis_labels(frame, left + width))
    return "".join(out) + "</svg>"


def depth_colour(position: float) -> str:
    """A layer's line colour, 0 (first) to 1 (last): blue to amber, of even lightness, legible on light and dark."""
    stops = ((76, 95, 201), (45, 140, 170), (112, 152, 92), (208, 138, 40))
    place = max(0.0, min(1.0, position)) * (len(stops) - 1)
    i = min(int(place), len(stops) - 2)
    mix = [round(a + (b - a) * (place - i)) for a, b in zip(stops[i], stops[i + 1], strict=True)]
    return "#" + "".join(f"{c:02x}" for c in mix)


def short(value: float) -> str:
    """A coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def anchor(place: float, frame: Frame) -> str:
    """Tick labels at the right edge end there; others are centred."""
    return "end" if place > frame.width - 24 else "middle"


def open_chart(
    frame: Frame,
    box: tuple[float, float, float, float],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    kind: str = "",
) -> str:
    """The opening tag: role, label, and the plot box and ranges the tooltips need. ``box`` is left, top, width, height."""
    size = "narrow" if frame.width <= PHONE_WIDTH else "wide"
    numbers = " ".join(f"{v:.6g}" for v in (*box, *x_range, *y_range))
    chart = f' data-chart="{escape(frame.chart_id)}"' if frame.chart_id else ""
    chart += f' data-kind="{kind}"' if kind else ""
    label = escape(f"{frame.title}. Across: {frame.x_label}. Up: {frame.y_label}.")
    return (
        f'<svg class="chart {size}" role="img" aria-label="{label}" viewBox="0 0 {frame.width} {frame.height}" '
        f'data-box="{numbers}"{chart}>'
    )


def axis_labels(frame: Frame, right: float) -> str:
    """The names of both axes, clear of the ticks: top left and bottom right."""
    return (
        f'<text class="axis" x="0" y="14">{escape(frame.y_label)}</text>'
        f'<text class="axis" x="{short(right)}" y="{frame.height - 6}" text-anchor="end">{escape(frame.x_label)}</text>'
    )


def _x_axis(
    frame: Frame, sx: Callable[[float], float], limits: tuple[float, float], left: int, y: int, width: int
) -> str:
    ticks = (frame.x_ticks or nice_ticks)(*limits, max(3, int(width / 110)))
    out = [f'<path class="base" d="M{left} {y}h{width}"/>']
    for tick, label in zip(ticks, tick_labels(ticks, frame.x_format), strict=True):
        out.append(f'<text class="tick" x="{short(sx(tick))}" y="{y + 16}" text-anchor="{anchor(sx(tick), frame)}">')
        out.append(f"{escape(label)}</text>")
    out.append(f'<text class="axis" x="{left + width}" y="{frame.height - 6}" text-anchor="end">')
    return "".join(out) + f"{escape(frame.x_label)}</text>"
