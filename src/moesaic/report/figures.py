"""From runs to figures: each function returns the HTML of one section and puts what the page's script needs in ``data``.

A figure is a title, one sentence on how to read it, an accessible SVG and, where numbers were averaged, a note saying so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moesaic.report import charts, text
from moesaic.report.charts import PHONE_WIDTH, Frame, Series
from moesaic.report.runs import Run
from moesaic.report.text import big, escape

WIDE = 960
MAX_POINTS = 600  # steps drawn one by one; longer runs get a band of STRETCHES extremes
STRETCHES = 200
MAX_DOMAINS = 9
Data = dict[str, Any]


def figure(title: str, reading: str, body: str, note: str = "", css: str = "") -> str:
    """A titled figure with its reading aid; ``body`` is HTML, everything else is escaped."""
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="{css}"><figcaption><h3>{escape(title)}</h3><p>{escape(reading)}</p></figcaption>'
        f"{body}{note}</figure>"
    )


def section(anchor: str, title: str, lead: str, body: str) -> str:
    """A section of the page; ``body`` is HTML."""
    lead = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{lead}{body}</section>'


def both(draw: Callable[[int], str]) -> str:
    """The same chart for a wide page and for a phone; the stylesheet shows one."""
    return draw(WIDE) + draw(PHONE_WIDTH)


def keep(data: Data, frame: Frame, series: Sequence[Series], x: str, digits: int, unit: str = "") -> None:
    """Hand the numbers behind a line chart to the tooltip."""
    lines = [
        {"n": s.name, "x": rounded(s.x, 9), "y": rounded(s.y, 5)} | ({} if s.layer is None else {"l": s.layer})
        for s in series
    ]
    data["charts"][frame.chart_id] = {"xf": x, "digits": digits, "unit": unit, "lines": lines}


def rounded(values: Sequence[float | None], digits: int) -> list[float | int | None]:
    """Values for the page's JSON: ``digits`` significant digits, whole numbers as ints, NaN as None."""
    kept = [None if v is None or not math.isfinite(v) else float(f"{v:.{digits}g}") for v in values]
    return [int(v) if v is not None and v == int(v) else v for v in kept]


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Centred running mean over ``reach`` values each side, ignoring NaN; shorter at the ends."""
    known = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    low = np.maximum(0, np.arange(len(values)) - reach)
    high = np.minimum(len(values), np.arange(len(values)) + reach + 1)
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def loss_section(runs: dict[str, Run], data: Data) -> str:
    """Training and validation loss by tokens and by time; ``runs`` maps a colour class to its run."""
    tabs, bodies, clipped = "", "", False
    for key, label, axis in (("tokens", "by tokens", "training tokens"), ("time", "by time", "time since the start")):
        faint, lines, dots, caps = [], [], [], []
        for css, run in runs.items():
            xs = run.tokens if key == "tokens" else run.time_s
            raw = np.array(run.loss)
            soft = smooth(raw, len(raw) // 100)
            caps += charts.finite(soft[len(soft) // 40 :].tolist())
            late = raw[len(raw) // 40 :]
            caps += np.quantile(late[~np.isnan(late)], [0.02, 0.98]).tolist() if (~np.isnan(late)).any() else []
            if len(raw) > MAX_POINTS:
                x_band, low, high = charts.band(xs, raw.tolist(), STRETCHES)
                faint.append(Series(f"{css}, each step", x_band, high, css, low=low))
            else:
                faint.append(Series(f"{css}, each step", xs, raw.tolist(), f"{css} faint"))
            lines.append(Series(f"{css}, training", *_stride(xs, soft, MAX_POINTS // 2), css))
            at = [v.tokens if key == "tokens" else v.time_s for v in run.vals]
            known = [(x, v.loss) for x, v in zip(at, run.vals, strict=True) if x is not None]
            if known:
                x_known, y_known = [x for x, _ in known], [y for _, y in known]
                dots.append(Series(f"{css}, validation", x_known, y_known, f"{css} val", dots=True))
        caps += [v for s in dots for v in charts.finite(s.y)]
        y_range = charts.padded(caps)
        clipped = clipped or any(v > y_range[1] for s in faint for v in charts.finite(s.y))
        frame = Frame(
            f"Loss {label}: {' and '.join(runs)}",
            f"{axis}" if key == "tokens" else "wall-clock time since the start",
            "loss (nats per token)",
            chart_id=f"loss-{key}",
            y_range=y_range,
            y_format=lambda v: f"{v:.4g}",
            x_format=big if key == "tokens" else text.duration,
            x_ticks=None if key == "tokens" else charts.time_ticks,
        )
        keep(data, frame, lines + dots, key, 3)
        series = faint + lines + dots
        drawn = "".join(charts.line_chart(series, sized(frame, *size)) for size in ((WIDE, 400), (PHONE_WIDTH, 300)))
        checked = " checked" if key == "tokens" else ""
        tabs += f'<input type="radio" name="lossx" id="lossx-{key}"{checked}><label for="lossx-{key}">{label}</label>'
        bodies += f'<div class="tab tab-{key}">{drawn}</div>'
    legend = "".join(
        f'<span class="key"><i class="swatch {css}"></i>{escape(css)}</span>' for css in runs if len(runs) > 1
    )
    legend += '<span class="key"><i class="swatch ink"></i>training, smoothed</span>'
    legend += '<span class="key"><i class="swatch faintkey"></i>each step</span>'
    legend += (
        '<span class="key"><i class="swatch ring"></i>validation</span>' if any(r.vals for r in runs.values()) else ""
    )
    steps = max(len(run.loss) for run in runs.values())
    note = (
        f"The faint band spans the lowest and highest of about {text.plural(steps / STRETCHES, 'step')} at each point. "
        * (steps > MAX_POINTS)
    )
    note += "Losses beyond the frame, mostly of the first steps, are cut off." if clipped else ""
    reading = "Lower is better. Validation text is never trained on: where training falls and validation does not, "
    reading += "the model is memorising."
    return figure(
        "Training and validation loss",
        reading,
        f'<div class="tabs">{tabs}<div class="legend">{legend}</div>{bodies}</div>',
        note.strip(),
    )


def sized(frame: Frame, width: int, height: int) -> Frame:
    """``frame`` with another size."""
    return Frame(**{**frame.__dict__, "width": width, "height": height})


def _stride(x: Sequence[float], y: np.ndarray, points: int) -> tuple[list[float], list[float | None]]:
    index = sorted(set(np.linspace(0, len(x) - 1, min(points, len(x))).astype(int).tolist())) if len(x) else []
    return [x[i] for i in index], [float(y[i]) for i in index]


def run_layer(run: Run, index: int) -> str:
    """The model's own number of the ``index``-th MoE layer."""
    return str(run.layers[index])


def layer_name(run: Run) -> str:
    """A line the page's script keeps in step with the layer selector."""
    return f'<p class="which">Layer <b class="layername">{escape(run_layer(run, 0))}</b></p>'


def layer_key(run: Run) -> str:
    """Legend of the layer colours; a few of them when there are many layers."""
    count = len(run.layers)
    if count == 1:
        return ""
    shown = range(count) if count <= 12 else sorted({round(i * (count - 1) / 5) for i in range(6)})
    keys = "".join(
        f'<span class="key"><i class="swatch" style="background:{_depth(i, count)}"></i>layer {run_layer(run, i)}</span>'
        for i in shown
    )
    more = '<span class="key">and the layers between, in between colours</span>' if count > 12 else ""
    return f'<div class="legend">{keys}{more}</div>'


def _depth(index: int, count: int) -> str:
    return charts.depth_colour(index / max(1, count - 1))


def layer_line(run: Run, index: int, x: Sequence[float], y: Sequence[float | None]) -> Series:
    """One layer's line in its colour, tied to the layer selector."""
    colour = _depth(index, len(run.layers))
    return Series(f"layer {run_layer(run, index)}", x, y, "layer", index, colour, dots=False)
