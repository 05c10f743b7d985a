"""The section about the processes of a run: whose experts computed how much, what exchanges took, and what to do about it."""

from __future__ import annotations

import numpy as np

from moesaic.config import from_dict
from moesaic.cost.layout import Training, forecast
from moesaic.errors import MoesaicError
from moesaic.layout import ParallelConfig
from moesaic.models.config import ModelConfig
from moesaic.report import charts, heat
from moesaic.report.charts import PANEL_WIDTH, Frame, Series
from moesaic.report.figures import WIDE, Data, both, figure, keep, layer_key, layer_line, rounded, run_layer, sized
from moesaic.report.layers import expert_ticks, scale_legend, window_note
from moesaic.report.ranks import Moves, RankSums
from moesaic.report.runs import Run
from moesaic.report.text import escape, plural, times

EVEN = 1.1  # rows of the busiest process over the mean that are not worth a word of advice
MOST_MARKS = 40  # full-height lines in a panel
_COLOURS = ("var(--d3)", "var(--d2)")


def process_section(run: Run, final: RankSums, data: Data) -> str:
    """Findings in words, a heat map of rows, and panels over time. ``final``: of the last tenth of ``run``."""
    even = even_bytes(run)
    words = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(run, final, even))
    return f'<ul class="details findings">{words}</ul>' + _rows_figure(run, final, data) + _panels(run, even, data)


# ---- in words ---------------------------------------------------------------------------------------------------------


def findings(run: Run, final: RankSums, even: float | None) -> list[str]:
    """What to look at, the most costly first, with the setting that may help. ``even``: bytes sent by an even load."""
    told = _of_rows(run, final) if final.imbalance > 0 else []
    moves = sum((w.ranks.moves for w in run.windows if w.ranks is not None), Moves())
    if moves.steps:
        gain = 1 - moves.rows / moves.rows_before if moves.rows_before else 0.0
        told.append(
            f"Experts were moved after {plural(moves.steps, 'step')}, into {plural(moves.slots, 'slot')} in all; by the load "
            f"they were moved by, the busiest processes then had {gain:.0%} fewer rows."
        )
    if final.shadows:
        told.append(
            f"On average {final.shadows / final.num_steps:.1f} experts had shadows in a step, all layers together."
        )
    travel, other = final.time_shares
    if travel > 0:
        hint = " parallel.chunks=2 lets rows travel while others are computed." if _may_chunk(run, travel) else ""
        told.append(
            f"All-to-alls took {travel:.0%} of a step's time, other collectives {other:.0%}; waiting for slower processes is "
            f"in both.{hint}"
        )
    elif other > 0:
        told.append(f"Collectives took {other:.0%} of a step's time; waiting for slower processes is in it.")
    sent, most = final.all_to_all_bytes
    if sent > 0:
        compared = f", {times(sent / even)} what an even load sends" if even else ""
        told.append(
            f"A process sent {_size(sent)} of rows to others per step{compared}; whoever sent most, {_size(most)}."
        )
    return told


def _of_rows(run: Run, final: RankSums) -> list[str]:
    """How even rows were, and what may make them so."""
    imbalance_L = final.imbalance_L
    worst = int(np.nanargmax(imbalance_L))
    layer, steps = run_layer(run, worst), plural(final.num_steps, "step")
    if final.imbalance < EVEN:
        return [
            f"Rows were spread evenly over the processes in the last {steps}: the busiest of a step computed "
            f"{times(final.imbalance)} the mean, and {times(float(imbalance_L[worst]))} in layer {layer}, the least even one."
        ]
    told = (
        f"In the last {steps} the busiest process of a step computed {times(float(imbalance_L[worst]))} the mean rows in layer "
        f"{layer}; all layers together, steps waited for {times(final.imbalance)} the rows of an even spread."
    )
    if not final.over:
        rows_R = final.rows_RL[:, worst]
        busiest = int(np.nanargmax(rows_R))
        share = float(rows_R[busiest] / np.nanmean(rows_R))
        told += f" Over all these steps rank {busiest} had most in that layer, {times(share)} the mean."
    return [told, *_advice(run, worst)]


def _advice(run: Run, worst: int) -> list[str]:
    """For uneven rows; ``worst``: the least even layer."""
    parallel = _parallel(run)
    if parallel is None:
        return []
    told = []
    if not parallel.rebalance_every:
        told.append("--set parallel.rebalance_every=100 moves experts between steps, which changes no result.")
    else:
        told.append(
            f"parallel.rebalance_every={parallel.rebalance_every} did not keep up with the load: a smaller number follows it "
            "closer, and a stronger balancing loss leaves less to follow."
        )
    load_E = run.final_load()[run.starts[worst] : run.starts[worst + 1]]
    alone = float(load_E.max() * parallel.ep / load_E.sum()) if load_E.sum() else 0.0
    if alone > EVEN and not parallel.replicas and not parallel.shadow:
        told.append(
            f"The busiest expert of layer {run_layer(run, worst)} alone has {times(alone)} the mean rows of a process, and "
            f"moving experts cannot get below that: parallel.replicas={parallel.ep} gives busy experts copies elsewhere."
        )
    return told


def _may_chunk(run: Run, travel: float) -> bool:
    parallel = _parallel(run)
    return (
        parallel is not None
        and travel >= 0.2
        and parallel.chunks == 1
        and not parallel.padded
        and parallel.exchange == "flat"
    )


def _size(count: float) -> str:
    size, unit = _unit(count)
    return f"{count / size:.3g} {unit}"


def _unit(count: float) -> tuple[float, str]:
    return next(((size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= size), (1.0, "B"))


# ---- what the config says ---------------------------------------------------------------------------------------------


def _parallel(run: Run) -> ParallelConfig | None:
    try:
        return from_dict(ParallelConfig, run.config.get("parallel"), "parallel")
    except MoesaicError:  # of another version
        return None


def even_bytes(run: Run) -> float | None:
    """What the mean process sends in all-to-alls of a step under uniform load (``cost/layout.py``); None without any, and where
    the config of the run does not tell: it is of another version, or only torchrun knew the size of nodes.
    """
    parallel = _parallel(run)
    if parallel is None or (parallel.exchange == "hierarchical" and parallel.ranks_per_node is None):
        return None
    names = ("batch_size", "accumulate", "seq_len", "dtype", "recompute")
    if not run.config.keys() >= {*names, "model"}:
        return None
    try:
        model = from_dict(ModelConfig, run.config["model"], "model")
        training = from_dict(Training, {name: run.config[name] for name in names})
        found = forecast(model, parallel, run.processes, training)
    except MoesaicError:
        return None
    return sum(len(group.ranks) * group.traffic.exchange for group in found.groups) / run.processes or None


# ---- figures ----------------------------------------------------------------------------------------------------------


def _rows_figure(run: Run, final: RankSums, data: Data) -> str:
    """Rows of every process and layer over the mean of the layer; nothing for a run whose experts are not spread out."""
    if not final.imbalance > 0:
        return ""
    rows_LR = (final.rows_RL / final.row_steps).T
    count_L1 = (~np.isnan(rows_LR)).sum(axis=1, keepdims=True)
    mean_L1 = rows_LR[:, 1:2] if final.over else np.nansum(rows_LR, axis=1, keepdims=True) / np.maximum(count_L1, 1)
    ratio_LR = np.where(mean_L1 > 0, rows_LR / np.where(mean_L1 > 0, mean_L1, 1.0), np.nan)
    rows = [heat.encode(ratio_R) for ratio_R in ratio_LR]
    R = rows_LR.shape[1]
    names = ["least busy", "mean", "busiest"] if final.over else [f"rank {rank}" for rank in range(R)]
    data["ranks"] = {
        "names": names,
        "layers": [run_layer(run, i) for i in range(len(rows))],
        "cells": rows,
        "rows": [rounded(row.tolist(), 3) for row in rows_LR],
        "mean": rounded(mean_L1[:, 0].tolist(), 6),
    }
    frame = Frame("Expert rows of every process and layer", "" if final.over else "rank", "layer", chart_id="ranks")
    height = 72 + max(18 * len(rows), 40) if len(rows) <= 20 else 72 + 8 * len(rows)
    layer_ticks = [(i, run_layer(run, int(i - 0.5))) for i, _ in expert_ticks(len(rows), 32)]

    def rank_ticks(width: int) -> list[tuple[float, str]]:
        if final.over:
            return [(i + 0.5, name) for i, name in enumerate(names)]
        return expert_ticks(R, 32 if width == WIDE else 10)

    drawn = both(
        lambda w: heat.heat_map(rows, sized(frame, w, height), rank_ticks(w), layer_ticks, kind="ranks"),
    )
    reading = (
        "Neutral cells computed as many rows as the layer's mean process, orange ones more: the others wait for them. "
    )
    if final.over:
        reading += f"The log has only the least, the mean and the most of {run.processes} processes. "
    elif np.isnan(rows_LR).any():
        reading += "Empty cells are layers of other pipeline stages. "
    note = f"Mean of the last {plural(final.row_steps, 'step')}."
    return scale_legend("mean", "no row at all") + figure(
        "Rows per process", reading + "A column that stays orange is a process with too much to do.", drawn, note
    )


def _panels(run: Run, even: float | None, data: Data) -> str:
    """Balance, time and traffic over time, and where experts were moved."""
    known = [(window.tokens, window.ranks) for window in run.windows if window.ranks is not None]
    tokens, sums = [at for at, _ in known], [ranks for _, ranks in known]
    marks = [at for at, ranks in known if ranks.moves.steps]
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
        size, unit = _unit(float(sent_W2.max()))
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
        moved = '<span class="key"><i class="swatch movedkey"></i>experts moved</span>'
        legend = (legend.removesuffix("</div>") or '<div class="legend">') + f"{moved}</div>"
    return f'{legend}<div class="grid3">{"".join(out)}</div>{window_note(run)}'


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
    top = high if len(marks) <= MOST_MARKS else low + 0.07 * (high - low)
    moved = Series(
        "experts moved",
        [x for at in marks for x in (at, at, at)],
        [y for _ in marks for y in (low, top, None)],
        "moved",
    )
    keys = "".join(
        f'<span class="key"><i class="swatch" style="background:{line.colour}"></i>{escape(line.name)}</span>'
        for line in series
        if line.css.startswith("part")
    )
    legend = f'<div class="legend">{keys}</div>' if keys else ""
    return figure(title, reading, legend + charts.line_chart([moved, *series], frame), css="panel")
