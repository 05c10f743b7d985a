"""From runs to figures: each function returns the HTML of one section and puts what the page's script needs in ``data``.

A figure is a title, one sentence on how to read it, an accessible SVG and, where numbers were averaged, a note saying so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from moesaic.report import charts, text
from moesaic.report.charts import PANEL_WIDTH, PHONE_WIDTH, Frame, Series
from moesaic.report.runs import MONITORS, Run
from moesaic.report.text import big, escape

WIDE = 960
MAX_POINTS = 600
MAX_DOMAINS = 9
Data = dict[str, Any]


def figure(title: str, reading: str, body: str, note: str = "", css: str = "") -> str:
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="{css}"><figcaption><h3>{escape(title)}</h3><p>{escape(reading)}</p></figcaption>'
        f"{body}{note}</figure>"
    )


def section(anchor: str, title: str, lead: str, body: str) -> str:
    lead = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{lead}{body}</section>'


def both(draw: Callable[[int], str]) -> str:
    """The same chart for a wide page and for a phone; the stylesheet shows one."""
    return draw(WIDE) + draw(PHONE_WIDTH)


def keep(data: Data, frame: Frame, series: Sequence[Series], x: str, digits: int, unit: str = "") -> None:
    """Hand the numbers behind a line chart to the tooltip."""
    lines = [
        {"n": s.name, "x": _short(s.x, 9), "y": _short(s.y, 5)} | ({} if s.layer is None else {"l": s.layer})
        for s in series
    ]
    data["charts"][frame.chart_id] = {"xf": x, "digits": digits, "unit": unit, "lines": lines}


def _short(values: Sequence[float | None], digits: int) -> list[float | int | None]:
    rounded = [None if v is None or not math.isfinite(v) else float(f"{v:.{digits}g}") for v in values]
    return [int(v) if v is not None and v == int(v) else v for v in rounded]


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
            faint.append(Series(f"{css}, each step", *charts.thin(xs, raw.tolist(), MAX_POINTS), f"{css} faint"))
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
    note = f"The faint lines show the extremes of each stretch of {text.plural(steps, 'step')}. " * (steps > MAX_POINTS)
    note += "The highest losses of the first steps lie above the frame." if clipped else ""
    reading = "Lower is better. Validation text is never trained on: where training falls and validation does not, "
    reading += "the model is memorising."
    return figure(
        "Training and validation loss",
        reading,
        f'<div class="tabs">{tabs}<div class="legend">{legend}</div>{bodies}</div>',
        note.strip(),
    )


def sized(frame: Frame, width: int, height: int) -> Frame:
    return Frame(**{**frame.__dict__, "width": width, "height": height})


def _stride(x: Sequence[float], y: np.ndarray, points: int) -> tuple[list[float], list[float | None]]:
    index = sorted(set(np.linspace(0, len(x) - 1, min(points, len(x))).astype(int).tolist())) if len(x) else []
    return [x[i] for i in index], [float(y[i]) for i in index]


def scale_legend() -> str:
    """The key of every load heat map."""
    blocks = "".join(f'<i class="b h{i}"></i>' for i in range(13))
    marks = "<span>¼ or less</span><span>½</span><span>fair share</span><span>2×</span><span>4× or more</span>"
    return (
        f'<div class="scale"><div><div class="blocks">{blocks}</div><div class="marks">{marks}</div></div>'
        '<span class="key"><i class="swatch deadkey"></i>no token at all</span></div>'
    )


def expert_ticks(count: int, room: int) -> list[tuple[float, str]]:
    """Every 1st, 2nd, 4th, ... expert, so that at most ``room`` are named; positions are cell centres."""
    step = 1
    while count / step > room:
        step *= 2
    return [(e + 0.5, str(e)) for e in range(0, count, step)]


def load_section(run: Run, data: Data) -> str:
    """Heat maps of load: all layers at the end, and one layer over time (the page's script switches the layer)."""
    starts = run.starts
    final_X = run.final_load()
    rows = []
    for start, stop in itertools.pairwise(starts):
        load_E = final_X[start:stop]
        rows.append(
            charts.encode(load_E / load_E.sum() * len(load_E) if load_E.sum() else np.full(len(load_E), np.nan))
        )
    widest = max(run.num_experts)
    rows = [row + "." * (widest - len(row)) for row in rows]
    data["overview"] = rows
    frame = Frame("Final load of every layer and expert", "expert", "layer", chart_id="overview")
    height = 72 + max(18 * len(rows), 40) if len(rows) <= 20 else 72 + 8 * len(rows)
    layer_ticks = [(i, run_layer(run, int(i - 0.5))) for i, _ in expert_ticks(len(rows), 32)]
    overview = both(
        lambda w: charts.heat_map(
            rows, sized(frame, w, height), expert_ticks(widest, 32 if w == WIDE else 10), layer_ticks, kind="overview"
        )
    )
    tokens = [window.tokens for window in run.windows]
    layers: list[Data] = []
    for layer, (start, stop) in enumerate(itertools.pairwise(starts)):
        load_WE = np.stack([window.load_X[start:stop] for window in run.windows]).astype(float)
        total_W1 = load_WE.sum(1, keepdims=True)
        ratio_WE = np.where(total_W1 > 0, load_WE / np.maximum(total_W1, 1) * (stop - start), np.nan)
        layers.append({"n": run_layer(run, layer), "e": stop - start, "s": charts.encode(ratio_WE.T)})
    data["load"] = {"x": _short(tokens, 9), "layers": layers}
    first = layers[0]
    count, columns = run.num_experts[0], len(tokens)
    time_frame = Frame(
        "Load of each expert of the selected layer over time", "training tokens", "expert", chart_id="load"
    )
    first_rows = [first["s"][e * columns : (e + 1) * columns] for e in range(count)]
    height = 72 + max(40, min(384, widest * 16))
    over_time = both(
        lambda w: charts.heat_map(
            first_rows,
            sized(time_frame, w, height),
            _window_ticks(tokens, 8 if w == WIDE else 3),
            expert_ticks(count, 16),
            kind="load",
        )
    )
    share = "1/E" if len(set(run.num_experts)) > 1 else f"1/{widest} ({100 / widest:.3g}%)"
    reading = (
        f"Neutral cells get their fair share, {share} of the layer's assignments; blue ones less, orange ones more. "
    )
    step_note = ""
    if run.window_steps > 1:
        step_note = f"Each column adds up {text.plural(run.window_steps, 'logged step')}, to keep the page small."
    tenth = "Sums over the last tenth of the run."
    return (
        scale_legend()
        + figure("Final load, all layers", reading + "A row with one hot cell is a collapse.", overview, tenth)
        + figure(
            "Load over time",
            "One row per expert: a row that stays blue is starved; one that ends in the no-token colour is dead.",
            layer_name(run) + over_time,
            step_note,
        )
    )


def run_layer(run: Run, index: int) -> str:
    return str(run.layers[index])


def layer_name(run: Run) -> str:
    """A line the page's script keeps in step with the layer selector."""
    return f'<p class="which">Layer <b class="layername">{escape(run_layer(run, 0))}</b></p>'


def _window_ticks(tokens: list[float], count: int) -> list[tuple[float, str]]:
    if len(tokens) < 2:
        return [(0.5, big(tokens[0]))] if tokens else []
    ends = [0.0, *tokens]
    ticks = charts.nice_ticks(tokens[0], tokens[-1], count)
    return [(float(np.interp(tick, ends, range(len(ends)))), big(tick)) for tick in ticks]


PANELS = (
    ("max_vio", "MaxVio", "busiest ÷ mean load − 1", 2, "", "0 is balance; 1 means the busiest expert gets twice the mean."),
    ("effective", "Effective experts", "experts", 1, "", "How many equally busy experts would spread the load as much."),
    ("dead", "Dead experts", "experts without a token", 1, "", "Got nothing in a step. A lasting count is wasted memory."),
    ("entropy", "Router entropy", "nats", 2, " nats", "Near ln E the router cannot tell experts apart; near 0 it is sure."),
    ("margin", "Margin", "best − second probability", 3, "", "A small margin is a choice that tiny changes can flip."),
    ("drop_rate", "Drop rate", "% of assignments", 2, "%", "Assignments refused because the expert was full."),
)  # fmt: skip


def _effective_experts(run: Run) -> np.ndarray:
    """exp(entropy of load) per window and layer; NaN where a layer logged no load."""
    out_WL = np.full((len(run.windows), len(run.layers)), np.nan)
    for w, window in enumerate(run.windows):
        for layer, (start, stop) in enumerate(pairwise(run.starts)):
            load_E = window.load_X[start:stop]
            share_E = load_E[load_E > 0] / max(1, load_E.sum())
            if len(share_E):
                out_WL[w, layer] = np.exp(-(share_E * np.log(share_E)).sum())
    return out_WL


def panel_section(run: Run, data: Data) -> str:
    """Small multiples: one panel per monitor, one line per layer, coloured from first layer to last."""
    most = max(run.num_experts)
    refs = {"entropy": ((math.log(most), f"ln {most}: undecided"),), "effective": ((most, f"all {most}"),)}
    tokens = [window.tokens for window in run.windows]
    mean_WML = np.stack([window.mean_ML for window in run.windows])
    value = {name: mean_WML[:, i] for i, name in enumerate(MONITORS)}
    value["drop_rate"] = value["drop_rate"] * 100
    value["effective"] = _effective_experts(run)
    out = []
    for name, title, y_label, digits, unit, reading in PANELS:
        value_WL = value[name]
        series = [layer_line(run, i, tokens, value_WL[:, i].tolist()) for i in range(len(run.layers))]
        values = charts.finite(value_WL.reshape(-1).tolist()) or [0.0]
        high = max([*values, *(v for v, _ in refs.get(name, ()))])
        flat = {"dead": 1.0, "drop_rate": 1.0}.get(name, 0.1)
        frame = Frame(
            title,
            "training tokens",
            y_label,
            PANEL_WIDTH,
            230,
            chart_id=name,
            y_range=(min(0.0, min(values)), max(high, flat) * 1.1),
            refs=refs.get(name, ()),
            y_format=lambda v: f"{v:.3g}",
        )
        keep(data, frame, series, "tokens", digits, unit)
        out.append(figure(title, reading, charts.line_chart(series, frame), css="panel"))
    return layer_key(run) + f'<div class="grid3">{"".join(out)}</div>' + _window_note(run)


def _window_note(run: Run) -> str:
    if run.window_steps == 1:
        return ""
    return f'<p class="note">Each point is the mean of {text.plural(run.window_steps, "logged step")}.</p>'


def layer_key(run: Run) -> str:
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
    colour = _depth(index, len(run.layers))
    return Series(f"layer {run_layer(run, index)}", x, y, "layer", index, colour, dots=False)
