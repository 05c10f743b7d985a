"""The page of a comparison of routers: who won, the table, loss curves, load heat maps, what failed.

write_comparison(results, Path("runs/compare/report.html"))     # results: the data of results.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.report import charts, heat
from moesaic.report.charts import PANEL_WIDTH, PHONE_WIDTH, Frame, Series
from moesaic.report.figures import WIDE, Data, figure, keep, section, sized
from moesaic.report.layers import expert_ticks, scale_legend
from moesaic.report.shell import assemble, write_page
from moesaic.report.text import big, escape, plural, shorten, signed

_COLOURS = ("#3b4cc0", "#b3541e", "#2f9e8f", "#c7566a", "#8a8f2b", "#a0489a", "#1c7040", "#d9a13b")
_WIDEST = 96  # experts drawn one by one; more are added up in groups
Columns = Mapping[str, tuple[str, str, str]]


def write_comparison(results: Mapping[str, Any], columns: Columns, out: Path) -> Path:
    """Write the page of ``results`` (see ``compare.summary``) to ``out``, atomically.

    Args:
        columns: figure -> (heading, format, what it says), in the order of the table.
    """
    rows = results["routers"]
    done = [row for row in rows if row["val_loss"]]
    data: Data = {"charts": {}}
    parts = [("table", "Table", section("table", "All routers", _lead(results), _table(results, columns)))]
    if done:
        parts.append(("curves", "Curves", section("curves", "Validation loss", "", _curves(done, data))))
        lead = "Where the tokens of the last tenth of the first run went. A hot cell in a cold row is a collapse."
        parts.append(("load", "Load", section("load", "Load per expert", lead, _loads(done))))
    troubles = _troubles(results)
    if troubles:
        parts.append(("failed", "Not run", section("failed", "Failed or not built", "", troubles)))
    name = escape(out.resolve().parent.name)
    write_page(assemble(name, _hero(results, done, name), parts, data, "results.json"), out)
    return out


def _lead(results: Mapping[str, Any]) -> str:
    seeds = plural(len(results["seeds"]), "seed")
    ranges = "; ± is a 95% interval of the mean (Student's t)" if len(results["seeds"]) > 1 else ""
    company = "" if results["jobs"] == 1 else f" Speeds were measured with {results['jobs']} runs side by side."
    return (
        f"{seeds}, {big(results['tokens'])} tokens each, same data order, expert widths set for equal active compute{ranges}. "
        f"Difference: loss minus that of {results['baseline']}, paired by seed; bold where the interval leaves out "
        f"zero.{company}"
    )


def shown(value: Mapping[str, Any] | None, form: str) -> str:
    """A mean with its interval in words."""
    if value is None:
        return "–"
    text = form.format(value["mean"])
    half = value["interval"]
    return text if half is None else f"{text} ± {form.format(half)}"


def _cell(value: Mapping[str, Any] | None, form: str) -> str:
    """A mean, its interval below it."""
    if value is None:
        return "<td>–</td>"
    half = value["interval"]
    below = "" if half is None else f"<small>± {escape(form.format(half))}</small>"
    return f"<td>{escape(form.format(value['mean']))}{below}</td>"


def _table(results: Mapping[str, Any], columns: Columns) -> str:
    heads = [("loss", columns["val_loss"]), ("difference", ("difference", "", "loss minus that of the first router"))]
    heads += [(name, column) for name, column in columns.items() if name != "val_loss"]
    head = "".join(f'<th title="{escape(words)}">{escape(label)}</th>' for _, (label, _, words) in heads)
    body = ""
    for row in results["routers"]:
        cells = _cell(row["val_loss"], columns["val_loss"][1]) + _difference(row["difference"])
        cells += "".join(_cell(row[name], form) for name, (_, form, _) in columns.items() if name != "val_loss")
        cells += f"<td>{big(row['params_active'])}<small>of {big(row['params_total'])}</small></td>"
        cells += f"<td>{'–' if row['compute'] is None else format(row['compute'], '.2f')}</td>"
        sees = f"<small class='sees'>{escape(row['sees'])}</small>" if row["sees"] else ""
        short = (
            ""
            if row["runs"] == len(results["seeds"])
            else f"<small>{row['runs']} of {len(results['seeds'])} runs</small>"
        )
        title = f"<small>{escape(shorten(row['title'], 60))}</small>"
        body += f"<tr><th>{escape(row['name'])}{title}{sees}{short}</th>{cells}</tr>"
    notes = "".join(f"<li>{escape(label)}: {escape(words)}.</li>" for label, _, words in columns.values())
    notes += (
        "<li>active: parameters a token uses, of all. compute: FLOPs of the feed-forward layers over the base's, with the rows "
        "per token that were measured; expert widths aim at 1.</li>"
    )
    return (
        f'<div class="scroll"><table class="compare"><thead><tr><th>router</th>{head}<th>active</th><th>compute</th></tr>'
        f"</thead><tbody>{body}</tbody></table></div><ul class='note'>{notes}</ul>"
    )


def _difference(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "<td>–</td>"
    half = value["interval"]
    sure = ' class="sure"' if half is not None and abs(value["mean"]) > half else ""
    below = "" if half is None else f"<small>± {half:.3f}</small>"
    return f"<td{sure}>{escape(signed(value['mean']))}{below}</td>"


def _curves(done: list[dict[str, Any]], data: Data) -> str:
    """Mean over seeds; the first few routers in colour, the rest faint."""
    series = []
    for rank, row in reversed(list(enumerate(done))):
        curves = [curve for curve in row["curves"] if curve]
        length = min((len(curve) for curve in curves), default=0)
        if not length:
            continue
        x = [curves[0][i][0] for i in range(length)]
        y: list[float | None] = []
        for i in range(length):
            here = charts.finite([curve[i][1] for curve in curves])
            y.append(sum(here) / len(here) if here else None)
        colour = _COLOURS[rank] if rank < len(_COLOURS) else None
        series.append(Series(row["name"], x, y, "layer" if colour else "ink faint", None, colour))
    late = [v for s in series for v in charts.finite(s.y[len(s.y) // 4 :])]
    frame = Frame(
        "Validation loss by tokens", "training tokens", "loss (nats per token)", chart_id="compare",
        y_range=charts.padded(late), y_format=lambda v: f"{v:.4g}",
    )  # fmt: skip
    keep(data, frame, list(reversed(series)), "tokens", 3)
    drawn = "".join(charts.line_chart(series, sized(frame, *size)) for size in ((WIDE, 420), (PHONE_WIDTH, 300)))
    legend = "".join(
        f'<span class="key"><i class="swatch" style="background:{colour}"></i>{escape(row["name"])}</span>'
        for row, colour in zip(done, _COLOURS, strict=False)
    )
    if len(done) > len(_COLOURS):
        legend += f'<span class="key"><i class="swatch faintkey"></i>{len(done) - len(_COLOURS)} others</span>'
    reading = "Lower is better. Means over seeds, best router first; the first quarter may leave the frame."
    return figure("Validation loss", reading, f'<div class="legend">{legend}</div>{drawn}')


def _loads(done: list[dict[str, Any]]) -> str:
    panels = ""
    for row in done:
        load = row["load"]
        if not load:
            continue
        rows = [heat.encode(_fair_share(np.array(load_E, dtype=float))) for load_E in load]
        widest = max(len(line) for line in rows)
        rows = [line + "." * (widest - len(line)) for line in rows]
        experts = len(load[0])
        title = f"{row['name']}, {plural(experts, 'expert')}"
        frame = Frame(
            title, "expert" if experts <= _WIDEST else "experts, in groups", "layer", PANEL_WIDTH, 72 + 20 * len(rows)
        )
        ticks = expert_ticks(widest, 8) if experts <= _WIDEST else []
        drawn = heat.heat_map(rows, frame, ticks, [(i + 0.5, str(i)) for i in range(len(rows))], kind="")
        panels += figure(row["name"], shorten(row["title"], 90), drawn, css="panel")
    return scale_legend() + f'<div class="grid3">{panels}</div>'


def _fair_share(load_E: np.ndarray) -> np.ndarray:
    if len(load_E) > _WIDEST:
        load_E = np.array([part.mean() for part in np.array_split(load_E, _WIDEST)])
    total = load_E.sum()
    return load_E / total * len(load_E) if total else np.full(len(load_E), np.nan)


def _troubles(results: Mapping[str, Any]) -> str:
    lines = [
        f"<li><b>{escape(row['name'])}</b>, seed {escape(seed)}: {escape(shorten(words, 400))}</li>"
        for row in results["routers"]
        for seed, words in row["failed"].items()
    ]
    lines += [f"<li><b>{escape(name)}</b> {escape(words)}</li>" for name, words in results["refused"].items()]
    return f"<ul class='details'>{''.join(lines)}</ul>" if lines else ""


def _hero(results: Mapping[str, Any], done: list[dict[str, Any]], name: str) -> str:
    details = []
    if not done:
        headline = "No router has finished yet."
    else:
        best = done[0]
        headline = f"{best['name']} has the lowest loss: {shown(best['val_loss'], '{:.3f}')} nats per token."
        # Against the first router, or the best of the others where that is the best itself.
        rival = next((row for row in done if row["difference"] is not None), None)
        if rival is not None:
            difference, other = rival["difference"], results["baseline"]
            against = f"{rival['name']} is at {signed(difference['mean'])} against {other}"
            if difference["interval"] is None:
                details.append(f"{against}, from one seed: another seed may reverse it.")
            else:
                sure = abs(difference["mean"]) > difference["interval"]
                word = "more than chance explains" if sure else "no more than chance explains"
                details.append(f"{against} ± {difference['interval']:.3f} over the same seeds: {word}.")
        quick = [row for row in done if row["tokens_per_s"]]
        if quick:
            fastest = max(quick, key=lambda row: row["tokens_per_s"]["mean"])
            details.append(f"Fastest: {fastest['name']}, {fastest['tokens_per_s']['mean']:,.0f} tokens/s.")
        unused = [row["name"] for row in done if row["dead"] and row["dead"]["mean"] >= 1]
        if unused:
            details.append(f"With dead experts at the end: {', '.join(unused)}.")
        rising = [row["name"] for row in done if not row["falls"]]
        if rising:
            details.append(f"Training loss did not fall: {', '.join(rising)}.")
    waiting = [row["name"] for row in results["routers"] if row["runs"] < len(results["seeds"])]
    if waiting:
        details.append(f"Not all runs are there: {', '.join(waiting)}.")
    points = "".join(f"<li>{escape(sentence)}</li>" for sentence in details)
    return (
        f'<header class="hero"><p class="eyebrow">Comparison of routers</p><h1>{name}</h1>'
        f'<p class="verdict">{escape(headline)}</p><ul class="details">{points}</ul></header>'
    )
