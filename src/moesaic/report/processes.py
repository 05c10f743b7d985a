"""The section about the processes of a run: whose experts computed how much, and what exchanges took."""

from __future__ import annotations

import numpy as np

from moesaic.report import charts, heat
from moesaic.report.charts import PANEL_WIDTH, Frame, Series
from moesaic.report.figures import (
    WIDE,
    Data,
    both,
    figure,
    keep,
    layer_key,
    layer_line,
    rounded,
    run_layer,
    section,
    sized,
)
from moesaic.report.findings import even_bytes, findings, last_steps, unit_of
from moesaic.report.layers import expert_ticks, scale_legend, window_note
from moesaic.report.ranks import RankSums
from moesaic.report.runs import Run
from moesaic.report.text import escape

MOST_MARKS = 40  # lines in a panel where experts moved; more would hide the rest
_COLOURS = ("var(--d3)", "var(--d2)")


def process_section(run: Run, data: Data) -> str:
    """The section of a run whose log says what its processes did: findings in words, a heat map of rows, panels over time."""
    final, even = run.final_ranks(), even_bytes(run)
    assert final is not None
    lead = [f"{run.layout}."] * bool(run.layout)
    lead += ["Every layer waits for its busiest process."] * (final.imbalance > 0)
    points = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(run, final, even))
    body = f'<ul class="details findings">{points}</ul>' + _rows_figure(run, final, data) + _panels(run, even, data)
    return section("processes", "Processes", " ".join(lead), body)


def _rows_figure(run: Run, final: RankSums, data: Data) -> str:
    """Rows of every process and layer over the mean of the layer; nothing for a run whose experts are not spread out."""
    if not final.imbalance > 0:
        return ""
    if final.over:
        return _bars(run, final)
    rows_LR = (final.rows_RL / final.row_steps).T
    count_L = (~np.isnan(rows_LR)).sum(axis=1)
    mean_L = np.nansum(rows_LR, axis=1) / np.maximum(count_L, 1)
    rows = [
        heat.encode(rows_LR[i] / mean if mean > 0 else np.full(rows_LR.shape[1], np.nan))
        for i, mean in enumerate(mean_L)
    ]
    data["ranks"] = {
        "layers": [run_layer(run, i) for i in range(len(rows))],
        "rows": [rounded(row.tolist(), 3) for row in rows_LR],
        "mean": rounded(mean_L.tolist(), 6),
    }
    frame = Frame("Expert rows of every process and layer", "rank", "layer", chart_id="ranks")
    height = 72 + max(18 * len(rows), 40) if len(rows) <= 20 else 72 + 8 * len(rows)
    layer_ticks = [(i, run_layer(run, int(i - 0.5))) for i, _ in expert_ticks(len(rows), 32)]
    drawn = both(
        lambda w: heat.heat_map(
            rows,
            sized(frame, w, height),
            expert_ticks(rows_LR.shape[1], 32 if w == WIDE else 10),
            layer_ticks,
            kind="ranks",
        )
    )
    reading = (
        "Neutral cells computed as many rows as the layer's mean process, orange ones more: the others wait for them. "
    )
    reading += "Empty cells are layers of other pipeline stages. " if np.isnan(rows_LR).any() else ""
    reading += "A column that stays orange is a process with too much to do."
    note = f"Mean of {last_steps(final.row_steps)}."
    return scale_legend("mean", "no row at all") + figure("Rows per process", reading, drawn, note)


def _bars(run: Run, final: RankSums) -> str:
    """The least even layers stand out; where too many processes are for a log to tell them apart."""
    frame = Frame(
        "Rows of the busiest process of every layer",
        "layer",
        "busiest ÷ mean rows",
        height=230,
        x_format=lambda v: f"{v:.2f}",
        y_format=lambda v: f"{v:.3g}",
    )
    layers = [run_layer(run, i) for i in range(len(run.layers))]
    drawn = both(lambda w: charts.bar_chart(layers, final.imbalance_L.tolist(), sized(frame, w, 230)))
    reading = (
        f"1 is even. The log tells the least, the mean and the most of {run.processes} processes, not which is which."
    )
    return figure("Rows of the busiest process", reading, drawn, f"Mean of {last_steps(final.num_steps)}.")


def _panels(run: Run, even: float | None, data: Data) -> str:
    """Balance, time and traffic over time, and where experts were moved."""
    known = [(window.tokens, window.ranks) for window in run.windows if window.ranks is not None]
    tokens, sums = [at for at, _ in known], [ranks for _, ranks in known]
    moved = [at for at, ranks in known if ranks.moves.steps]
    marks = moved if len(moved) <= MOST_MARKS else []
    out = []
    imbalance_WL = np.stack([ranks.imbalance_L for ranks in sums])
    if (imbalance_WL > 0).any():
        series = [layer_line(run, i, tokens, imbalance_WL[:, i].tolist()) for i in range(len(run.layers))]
        reading = "Rows of each step's busiest process over the mean: 1 is even, 2 means all wait twice as long."
        out.append(_panel("busiest", "Busiest process", reading, "busiest ÷ mean rows", series, marks, data, 1.0))
    shares = np.array([ranks.time_shares for ranks in sums]) * 100
    names = ("all-to-all", "other collectives")
    lines = [
        Series(name, tokens, shares[:, i].tolist(), "part", colour=_COLOURS[i])
        for i, name in enumerate(names)
        if np.nansum(shares[:, i]) > 0
    ]
    if lines:
        reading = "Of a step, in exchanges of rows and in all else that processes tell one another. Waiting counts."
        out.append(_panel("collectives", "Time in collectives", reading, "% of the step", lines, marks, data, unit="%"))
    sent_W2 = np.array([ranks.all_to_all_bytes for ranks in sums])
    if sent_W2.any():
        size, unit = unit_of(float(sent_W2.max()))
        lines = [
            Series(name, tokens, (sent_W2[:, i] / size).tolist(), "part", colour=_COLOURS[i])
            for i, name in enumerate(("mean", "most"))
        ]
        if even:
            lines.append(
                Series("even load", [tokens[0], tokens[-1]], [even / size] * 2, "part even", colour="var(--faint)")
            )
        reading = "Rows and their gradients that left a process in a step; an even load is what plan-layout expects."
        y_label = f"{unit} per process and step"
        out.append(_panel("sent", "All-to-all bytes", reading, y_label, lines, marks, data, unit=f" {unit}"))
    legend = layer_key(run) if (imbalance_WL > 0).any() else ""
    if marks:
        key = '<span class="key"><i class="swatch movedkey"></i>experts moved</span>'
        legend = (legend.removesuffix("</div>") or '<div class="legend">') + f"{key}</div>"
    often = f'<p class="note">Experts moved before {len(moved)} of the {len(known)} points.</p>' * (
        len(moved) > len(marks)
    )
    return f'{legend}<div class="grid3">{"".join(out)}</div>{window_note(run)}{often}'


def _panel(
    chart_id: str,
    title: str,
    reading: str,
    y_label: str,
    series: list[Series],
    marks: list[float],
    data: Data,
    low: float = 0.0,
    *,
    unit: str = "",
) -> str:
    """One small chart. ``marks``: tokens at which experts moved."""
    high = max((v for line in series for v in charts.finite(line.y)), default=1.0)
    high = high + 0.1 * ((high - low) or 1.0)
    frame = Frame(
        title,
        "training tokens",
        y_label,
        PANEL_WIDTH,
        230,
        chart_id=chart_id,
        y_range=(low, high),
        y_format=lambda v: f"{v:.3g}",
    )
    keep(data, frame, series, "tokens", 0 if unit == "%" else 2, unit)
    moved = Series("experts moved", [at for at in marks for _ in range(3)], [low, high, None] * len(marks), "moved")
    keys = "".join(
        f'<span class="key"><i class="swatch" style="background:{line.colour}"></i>{escape(line.name)}</span>'
        for line in series
        if line.css.startswith("part")
    )
    legend = f'<div class="legend">{keys}</div>' if keys else ""
    return figure(title, reading, legend + charts.line_chart([moved, *series], frame), css="panel")
