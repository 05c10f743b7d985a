"""The figures about domains: which experts serve which kind of text, and how well each kind is predicted.

Every domain counts equally here, however much text of it was validated on.
"""

from __future__ import annotations

import math

import numpy as np

from moesaic.report import charts, heat, text
from moesaic.report.charts import Frame
from moesaic.report.figures import (
    MAX_DOMAINS,
    WIDE,
    Data,
    both,
    figure,
    keep,
    layer_line,
    layer_name,
    run_layer,
    sized,
)
from moesaic.report.layers import expert_ticks, scale_legend
from moesaic.report.runs import Run
from moesaic.report.text import escape


def domain_section(run: Run, data: Data) -> str:
    """Heat map of domain by expert, each expert's mix of domains, and specialisation in bits."""
    names, loads = _limited(run)
    layers: list[Data] = []
    for index, count in enumerate(run.num_experts):
        load_DE = np.stack([rows[index] for rows in loads]).astype(float)
        total_D1 = load_DE.sum(1, keepdims=True)
        share_DE = np.divide(load_DE, total_D1, out=np.full_like(load_DE, np.nan), where=total_D1 > 0)
        layers.append({"h": heat.encode(share_DE * count), "p": thousandths(np.nan_to_num(share_DE))})
    data["domain"] = {"names": [text.clean(name) for name in names], "layers": layers}
    count = run.num_experts[0]
    rows = [layers[0]["h"][d * count : (d + 1) * count] for d in range(len(names))]
    mix = layers[0]["p"]
    frame = Frame("Experts chosen by each domain, selected layer", "expert", "domain", chart_id="domain")
    left = min(170, 30 + 7 * max(len(name) for name in names))
    domain_heat = both(
        lambda w: heat.heat_map(
            rows,
            sized(frame, w, 72 + 34 * len(names)),
            expert_ticks(count, 32 if w == WIDE else 8),
            [(d + 0.5, name) for d, name in enumerate(names)],
            kind="domain",
            left=left if w == WIDE else min(left, 120),
        )
    )
    stack_frame = Frame(
        "Domains served by each expert, selected layer", "expert", "share of its tokens", chart_id="stack"
    )
    stack = both(
        lambda w: heat.stacked_bars(mix, sized(stack_frame, w, 280), expert_ticks(count, 32 if w == WIDE else 10))
    )
    key = "".join(f'<span class="key"><i class="swatch d{i}"></i>{escape(n)}</span>' for i, n in enumerate(names))
    return (
        _information(run, data)
        + figure(
            "Which experts each domain uses",
            "Neutral: the domain sends this expert its fair share, 1/E of its tokens. Orange: a favourite. Blue: avoided.",
            layer_name(run) + scale_legend() + domain_heat,
        )
        + figure(
            "What each expert is used for",
            f"Equal bands mean the expert serves all {len(names)} domains alike; a tall band is a speciality."
            if len(names) > 1
            else "With a single domain every bar has one colour.",
            layer_name(run) + f'<div class="legend">{key}</div>' + stack,
            "Domains weighted equally. From the last validation.",
        )
    )


def thousandths(share_DE: np.ndarray) -> list[list[int]]:
    """Each expert's mix of domains in thousandths that add up to 1000 (or to 0 without tokens)."""
    total_E = share_DE.sum(0)
    edges_DE = np.round(np.cumsum(share_DE, 0) / np.where(total_E > 0, total_E, 1) * 1000).astype(int)
    mix: list[list[int]] = np.diff(edges_DE, axis=0, prepend=0).tolist()
    return mix


def _limited(run: Run) -> tuple[list[str], list[list[np.ndarray]]]:
    """The domains with most tokens; the rest are added up as one."""
    order = [name for name in run.domains if name in run.domain_load]
    order += [name for name in run.domain_load if name not in order]
    if len(order) <= MAX_DOMAINS:
        return order, [run.domain_load[name] for name in order]
    by_size = sorted(order, key=lambda name: -sum(int(row.sum()) for row in run.domain_load[name]))
    kept, rest = by_size[: MAX_DOMAINS - 1], by_size[MAX_DOMAINS - 1 :]
    rest_load = [sum((run.domain_load[n][i] for n in rest), np.zeros(e, int)) for i, e in enumerate(run.num_experts)]
    return [*kept, f"{len(rest)} others"], [*(run.domain_load[name] for name in kept), rest_load]


def chance_bits(run: Run, layer: int) -> float:
    """Bits that random routing would show from counting noise alone (first-order bias of the plug-in estimate)."""
    totals = [int(rows[layer].sum()) for rows in run.domain_load.values()]
    inverse = [1 / total for total in totals if total]
    count = len(inverse)
    if not count:
        return 0.0
    return (run.num_experts[layer] - 1) / (2 * math.log(2)) * (1 - 1 / count) / count * sum(inverse)


def _information(run: Run, data: Data) -> str:
    last = next((v.information_L for v in reversed(run.vals) if v.information_L), [])
    count = len(run.domain_load)
    if count < 2:
        return '<p class="lead">Only one domain was validated, so there is no specialisation to measure.</p>'
    last = last or [None] * len(run.layers)
    known = charts.finite(last)
    most = min(math.log2(count), math.log2(max(run.num_experts)))
    noise = max(chance_bits(run, i) for i in range(len(run.num_experts)))
    mean = sum(known) / len(known) if known else 0.0
    sentence = (
        f"Specialisation is the mutual information between a token's domain and its expert: how many bits knowing the "
        f"expert tells about the domain. The mean over layers is {mean:.3f} bits, of at most {most:.2f}; "
        f"random routing would show about {noise:.1g} from counting noise alone."
    )
    labels = [run_layer(run, i) for i in range(len(run.layers))]
    bars = Frame(
        "Specialisation by layer",
        "layer",
        "bits",
        440,
        250,
        x_format=lambda v: f"{v:.2f}" if max(known, default=0) >= 0.1 else f"{v:.3f}",
        y_format=lambda v: f"{v:.2g}",
    )
    by_layer = charts.bar_chart(labels, last, bars)
    frame = Frame(
        "Specialisation over time",
        "training tokens",
        "bits",
        440,
        250,
        chart_id="information",
        y_range=(0.0, max([*(b for v in run.vals for b in charts.finite(v.information_L)), 0.01]) * 1.1),
        y_format=lambda v: f"{v:.2g}",
    )
    vals = [v for v in run.vals if v.information_L]
    tokens = [v.tokens for v in vals]
    series = [layer_line(run, i, tokens, [v.information_L[i] for v in vals]) for i in range(len(run.layers))]
    keep(data, frame, series, "tokens", 3, " bits")
    over_time = charts.line_chart(series, frame)
    return (
        f'<p class="lead">{escape(sentence)}</p><div class="grid2">'
        + figure(
            "Specialisation by layer", "At the last validation; taller means more specialised.", by_layer, css="panel"
        )
        + figure("Specialisation over time", "One line per layer, coloured as above.", over_time, css="panel")
        + "</div>"
    )


def domain_loss(runs: dict[str, Run]) -> str:
    """Last validation loss of each domain, one dot per run, and the same as a table."""
    last = {css: next((v.by_domain for v in reversed(run.vals) if v.by_domain), {}) for css, run in runs.items()}
    names = list(dict.fromkeys(name for by_domain in last.values() for name in by_domain))
    if not names:
        return ""
    columns = [(css, [by_domain.get(name) for name in names]) for css, by_domain in last.items() if by_domain]
    frame = Frame("Validation loss by domain", "loss (nats per token)", "", x_format=lambda v: f"{v:.3g}")
    drawn = both(lambda w: charts.dot_rows(names, columns, sized(frame, w, 0)))
    legend = "".join(f'<span class="key"><i class="swatch disc {c}"></i>{c}</span>' for c, _ in columns)
    pair = len(columns) == 2
    head = "".join(f"<th>{css}</th>" for css, _ in columns) + ("<th>sparse − dense</th>" if pair else "")
    body = ""
    for i, name in enumerate(names):
        values = [column[i] for _, column in columns]
        cells = "".join(f"<td>{text.loss(v)}</td>" for v in values)
        if pair:
            a, b = values
            cells += f"<td>{text.signed(a - b) if a is not None and b is not None else '–'}</td>"
        body += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    table = f'<table class="numbers"><thead><tr><th>domain</th>{head}</tr></thead><tbody>{body}</tbody></table>'
    reading = "Further left is better." + (" A long bar is a domain where the two models differ." if pair else "")
    return figure("Validation loss by domain", reading, f'<div class="legend">{legend}</div>{drawn}{table}')
