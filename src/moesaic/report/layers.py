"""The figures about load and router health: who gets the tokens, and how sure the routers are of it."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from moesaic.report import charts, heat, text
from moesaic.report.charts import PANEL_WIDTH, Frame
from moesaic.report.figures import (
    WIDE,
    Data,
    both,
    figure,
    keep,
    layer_key,
    layer_line,
    layer_name,
    rounded,
    run_layer,
    sized,
)
from moesaic.report.runs import MONITORS, Run
from moesaic.report.text import big


def scale_legend(middle: str = "fair share", none: str = "no token at all") -> str:
    """The key of every load heat map; ``middle``: what 1 stands for, ``none``: what 0 does."""
    blocks = "".join(f'<i class="b h{i}"></i>' for i in range(13))
    marks = f"<span>¼ or less</span><span>½</span><span>{middle}</span><span>2×</span><span>4× or more</span>"
    return (
        f'<div class="scale"><div><div class="blocks">{blocks}</div><div class="marks">{marks}</div></div>'
        f'<span class="key"><i class="swatch deadkey"></i>{none}</span></div>'
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
    for start, stop in pairwise(starts):
        load_E = final_X[start:stop]
        rows.append(heat.encode(load_E / load_E.sum() * len(load_E) if load_E.sum() else np.full(len(load_E), np.nan)))
    widest = max(run.num_experts)
    rows = [row + "." * (widest - len(row)) for row in rows]
    data["overview"] = rows
    frame = Frame("Final load of every layer and expert", "expert", "layer", chart_id="overview")
    height = 72 + max(18 * len(rows), 40) if len(rows) <= 20 else 72 + 8 * len(rows)
    layer_ticks = [(i, run_layer(run, int(i - 0.5))) for i, _ in expert_ticks(len(rows), 32)]
    overview = both(
        lambda w: heat.heat_map(
            rows, sized(frame, w, height), expert_ticks(widest, 32 if w == WIDE else 10), layer_ticks, kind="overview"
        )
    )
    tokens = [window.tokens for window in run.windows]
    layers: list[Data] = []
    for layer, (start, stop) in enumerate(pairwise(starts)):
        load_WE = np.stack([window.load_X[start:stop] for window in run.windows]).astype(float)
        total_W1 = load_WE.sum(1, keepdims=True)
        ratio_WE = np.where(total_W1 > 0, load_WE / np.maximum(total_W1, 1) * (stop - start), np.nan)
        layers.append({"n": run_layer(run, layer), "e": stop - start, "s": heat.encode(ratio_WE.T)})
    data["load"] = {"x": rounded(tokens, 9), "layers": layers}
    first = layers[0]
    count, columns = run.num_experts[0], len(tokens)
    time_frame = Frame(
        "Load of each expert of the selected layer over time", "training tokens", "expert", chart_id="load"
    )
    first_rows = [first["s"][e * columns : (e + 1) * columns] for e in range(count)]
    height = 72 + max(40, min(384, widest * 16))
    over_time = both(
        lambda w: heat.heat_map(
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


def _window_ticks(tokens: list[float], count: int) -> list[tuple[float, str]]:
    if len(tokens) < 2:
        return [(0.5, big(tokens[0]))] if tokens else []
    ends = [0.0, *tokens]
    ticks = charts.nice_ticks(tokens[0], tokens[-1], count)
    labels = charts.tick_labels(ticks, big)
    return [(float(np.interp(t, ends, range(len(ends)))), label) for t, label in zip(ticks, labels, strict=True)]


_DEAD = 'Got nothing in the {window} before each point; the tile "Unused experts" counts the last tenth of the run.'
PANELS = (
    ("max_vio", "MaxVio", "busiest ÷ mean load − 1", 2, "", "0 is balance; 1 means the busiest expert gets twice the mean."),
    ("effective", "Effective experts", "experts", 1, "", "How many equally busy experts would spread the load as much."),
    ("dead", "Dead experts", "experts without a token", 1, "", _DEAD),
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
    steps = run.config.get("dead_window")
    window = text.plural(steps, "step") if isinstance(steps, int) else "steps"
    out = []
    for name, title, y_label, digits, unit, reading in PANELS:
        value_WL = value[name]
        series = [layer_line(run, i, tokens, value_WL[:, i].tolist()) for i in range(len(run.layers))]
        values = charts.finite(value_WL.reshape(-1).tolist()) or [0.0]
        high = max([*values, *(v for v, _ in refs.get(name, ()))])
        flat = {"dead": 1.0, "drop_rate": 1.0}.get(name, 0.1)
        if name == "margin" and 0 < high < flat:  # late in a run of undecided routers all are tiny, and still differ
            flat, digits = high, max(digits, 2 - math.floor(math.log10(high)))
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
        reading = reading.format(window=window)
        out.append(figure(title, reading, charts.line_chart(series, frame), css="panel"))
    return layer_key(run) + f'<div class="grid3">{"".join(out)}</div>' + window_note(run)


def window_note(run: Run) -> str:
    """How many steps a point of the panels is the mean of; nothing for one."""
    if run.window_steps == 1:
        return ""
    return f'<p class="note">Each point is the mean of {text.plural(run.window_steps, "logged step")}.</p>'
