"""Assemble the report: one HTML file that needs no network, safe to open whatever text the model wrote.

write_report(Path("runs/first"))        # a run folder (holds metrics.jsonl)
write_report(Path("quickstart-out"))    # a comparison (holds sparse/ and dense/ run folders)
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from moesaic.errors import DataError
from moesaic.report import charts, text
from moesaic.report.domains import domain_loss, domain_section
from moesaic.report.figures import Data, loss_section, run_layer, section
from moesaic.report.layers import load_section, panel_section
from moesaic.report.processes import process_section
from moesaic.report.runs import Run, read_run
from moesaic.report.shell import assemble, write_page
from moesaic.report.text import big, escape

SAMPLE_CHARACTERS = 1500


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of the run or comparison in ``folder`` to ``out`` (default ``folder/report.html``), atomically.

    Returns the path written. Errors: DataError for a missing or empty folder, MoesaicError for a broken log line
    (naming ``file:line``) or a place that cannot be written to.
    """
    folder = Path(folder)
    runs, summary = read_folder(folder)
    out = Path(out) if out is not None else folder / "report.html"
    write_page(render(runs, summary, title=folder.resolve().name), out)
    return out


def read_folder(folder: Path) -> tuple[dict[str, Run], dict[str, Any]]:
    """The runs of ``folder`` by colour class, "sparse" first, and what summary.json says (empty without one)."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}: give the folder of a run or of a sparse/dense comparison.")
    if (folder / "metrics.jsonl").is_file():
        run = read_run(folder)
        return {"sparse" if run.layers else "dense": run}, {}
    parts = {css: folder / css for css in ("sparse", "dense") if (folder / css / "metrics.jsonl").is_file()}
    if not parts:
        raise DataError(
            f"{folder} holds no metrics.jsonl, and no sparse/ or dense/ run folder either: "
            "give the folder that `moesaic train` or `moesaic quickstart` wrote."
        )
    summary = folder / "summary.json"
    found: object = {}
    if summary.is_file():
        try:
            found = json.loads(summary.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{summary} is not readable JSON ({error}); delete it to do without.") from error
    return {css: read_run(part) for css, part in parts.items()}, found if isinstance(found, dict) else {}


def render(runs: dict[str, Run], summary: dict[str, Any], title: str) -> str:
    """The whole page as a string."""
    data: Data = {"charts": {}}
    parts: list[tuple[str, str, str]] = []  # anchor, name in the page's navigation, html
    main = next(iter(runs.values()))
    sparse = next((run for run in runs.values() if run.layers), None)
    if any(run.step or run.vals for run in runs.values()):
        parts.append(("loss", "Loss", section("loss", "Loss", "", loss_section(runs, data))))
    if sparse and sparse.windows:
        lead = "How evenly the routers share the work. A good router uses all its experts without forcing them equal."
        parts.append(("load", "Load", section("load", "Load per expert", lead, load_section(sparse, data))))
        lead = "The vital signs of the routers, per layer. Pick a layer above to single it out."
        parts.append(("routers", "Routers", section("routers", "Router health", lead, panel_section(sparse, data))))
    shared = next((run for run in runs.values() if run.final_ranks()), None)
    if shared:
        parts.append(("processes", "Processes", process_section(shared, data)))
    if sparse and sparse.domain_load:
        parts.append(
            ("experts", "Experts", section("experts", "Domains and experts", "", domain_section(sparse, data)))
        )
    by_domain = domain_loss(runs)
    if by_domain:
        parts.append(("domains", "Domains", section("domains", "Loss by domain", "", by_domain)))
    samples = sample_section(runs)
    if samples:
        parts.append(("samples", "Samples", samples))
    parts.append(("config", "Configuration", config_section(runs, summary)))
    parts.append(("glossary", "Glossary", glossary_section(text.PROCESS_TERMS if shared else ())))
    name = escape(title if len(runs) > 1 else main.name or title)
    sources = ", ".join(f"{r.folder.name}/metrics.jsonl" for r in runs.values())
    return assemble(name, hero(runs, summary, name), parts, data, sources, layer_picker(sparse))


def layer_picker(run: Run | None) -> str:
    """The selector in the top bar; nothing for a run with fewer than two MoE layers."""
    if run is None or len(run.layers) < 2:
        return ""
    options = "".join(
        f'<option value="{i}">Layer {run_layer(run, i)} · {text.plural(count, "expert")}</option>'
        for i, count in enumerate(run.num_experts)
    )
    return (
        f'<label class="pick"><span>Show </span><select id="layer" aria-label="Layer shown">{options}</select></label>'
    )


def hero(runs: dict[str, Run], summary: dict[str, Any], name: str) -> str:
    """Title, verdict sentence, what keeps it honest, headline numbers."""
    verdict = text.compare(runs["sparse"], runs["dense"]) if len(runs) == 2 else None
    single = next(iter(runs.values()))
    if verdict:
        headline, details = verdict.headline, list(verdict.details)
    else:
        headline = text.single_headline(single)
        details = []
        if len(runs) == 2:
            details.append("There is no verdict yet: one of the two runs has logged no loss.")
        elif single.layers:
            details.append("There is no dense twin to compare with here.")
        details += [
            f"Status of {run.folder.name}: {text.status(run)}." for run in runs.values() if run.end_reason != "done"
        ]
    details += [
        f"The last line of {run.folder.name}/metrics.jsonl was cut short and is left out."
        for run in runs.values()
        if run.cut_line
    ]
    tiles = "".join(
        f'<div class="tile{" main" if i == 0 else ""}"><dt>{escape(label)}</dt><dd>{escape(value)}</dd>'
        f"<p>{escape(below)}</p></div>"
        for i, (label, value, below) in enumerate(_tiles(runs, verdict))
    )
    said = summary.get("verdict")
    if said == headline:
        said = None  # the page says it already
    quote = f'<p class="said">summary.json says: <q>{escape(text.shorten(said, 600))}</q></p>' if said else ""
    points = "".join(f"<li>{escape(sentence)}</li>" for sentence in details)
    return (
        f'<header class="hero {verdict.winner if verdict else ""}"><p class="eyebrow">Training report</p><h1>{name}</h1>'
        f'<p class="verdict">{escape(headline)}</p><ul class="details">{points}</ul>{quote}'
        f'<dl class="tiles">{tiles}</dl></header>'
    )


def _tiles(runs: dict[str, Run], verdict: text.Verdict | None) -> list[tuple[str, str, str]]:
    first = next(iter(runs.values()))
    tiles: list[tuple[str, str, str]] = []
    if verdict:
        name = verdict.kind.capitalize()
        at = f"at {big(verdict.tokens)} tokens each"
        tiles.append((f"{name} loss, sparse", text.loss(verdict.sparse), f"dense twin {text.loss(verdict.dense)}"))
        tiles.append(("Sparse − dense", text.signed(verdict.gap), f"nats, {at}"))
        ahead, behind = ("sparse", "dense") if verdict.gap <= 0 else ("dense", "sparse")
        ratio, clock, cost = verdict.token_ratio, verdict.time_ratio, verdict.cost_ratio
        shown = text.times(ratio) if ratio else "–"
        tiles.append(
            ("Steps ratio", shown, f"{behind} ÷ {ahead}: tokens to the same loss" if ratio else "no clear lead")
        )
        shown = text.times(clock) if clock else "–"
        tiles.append(
            ("Wall-clock ratio", shown, f"{behind} ÷ {ahead}: time to the same loss" if clock else "no clear lead")
        )
        tiles.append(("Time per token", text.times(cost) if cost else "–", "sparse ÷ dense"))
    else:
        val, train = text.validation_curve(first), text.training_curve(first)
        if val:
            best = min(val.loss)
            tiles.append(("Validation loss", text.loss(val.loss[-1]), f"best {text.loss(best)}"))
        if train:
            tiles.append(("Training loss", text.loss(train.loss[-1]), "mean of the last steps"))
            speeds = sorted(charts.finite(first.tokens_per_s))
            tokens = f"{big(first.tokens[-1])} tokens"
            tiles.append(("Steps", f"{first.step[-1]:,}", tokens))
            below = f"{big(speeds[len(speeds) // 2])} tokens/s" if speeds else ""
            tiles.append(("Wall-clock time", text.duration(first.time_s[-1]), below))
    shown_run = next((run for run in runs.values() if run.layers), first)
    if shown_run.params_active:
        total = big(shown_run.params_total)
        tiles.append(("Active parameters", big(shown_run.params_active), f"of {total} in total"))
    if shown_run.layers and shown_run.windows:
        tiles += _balance_tiles(shown_run)
    return tiles


def _balance_tiles(run: Run) -> list[tuple[str, str, str]]:
    last = run.windows[-1].mean_ML
    worst = charts.finite(last[0].tolist())
    unused, final_X = 0, run.final_load()
    for start, stop in pairwise(run.starts):
        unused += int((final_X[start:stop] == 0).sum())
    tiles = []
    if worst:
        layer = run_layer(run, int(last[0].tolist().index(max(worst))))
        tiles.append(("Worst MaxVio at the end", f"{max(worst):.2f}", f"in layer {layer}; 0 is perfect balance"))
    tiles.append(("Unused experts", f"{unused}", f"of {len(final_X)}, in the last tenth of the run"))
    return tiles


def sample_section(runs: dict[str, Run]) -> str:
    """What the models wrote, as text: nothing in it is ever markup."""
    columns = ""
    for css, run in runs.items():
        cards = ""
        for sample in reversed(run.samples):
            prompt, written = str(sample.get("prompt") or ""), str(sample.get("text") or "")
            body = written.removeprefix(prompt)
            left = len(body) - SAMPLE_CHARACTERS
            more = f'<span class="note"> … {left:,} more characters</span>' if left > 0 else ""
            step = escape(sample.get("step", "?"))
            cards += (
                f'<article class="sample {css}"><h3>{css if len(runs) > 1 else "Sample"} <span>step {step}</span></h3>'
                f"<pre><b>{escape(text.shorten(prompt, SAMPLE_CHARACTERS))}</b>{escape(body[:SAMPLE_CHARACTERS])}{more}</pre>"
                "</article>"
            )
        columns += f"<div>{cards}</div>" if cards else ""
    if not columns:
        return ""
    lead = "The prompt is in bold, what follows was written by the model. Newest first."
    return section("samples", "Sample text", lead, f'<div class="samples">{columns}</div>')


def config_section(runs: dict[str, Run], summary: dict[str, Any]) -> str:
    """Every setting of each run, side by side; rows that differ are marked."""
    tables = {css: dict(_flat(run.config)) for css, run in runs.items()}
    for css, run in runs.items():
        facts = {
            "parameters, total": run.params_total,
            "parameters, active": run.params_active,
            "processes": run.layout if run.processes > 1 else None,
            "status": text.status(run),
        }
        tables[css] = {**{key: str(value) for key, value in facts.items() if value is not None}, **tables[css]}
    said = summary.get("runs") if isinstance(summary.get("runs"), dict) else {}
    for css in tables:
        tables[css] |= {f"summary.{key}": value for key, value in _flat((said or {}).get(css) or {})}
    keys = list(dict.fromkeys(key for table in tables.values() for key in table))
    rows = ""
    for key in keys:
        values = [table.get(key, "–") for table in tables.values()]
        mark = ' class="differs"' if len(set(values)) > 1 else ""
        cells = "".join(f"<td>{escape(text.shorten(value, 300))}</td>" for value in values)
        rows += f"<tr{mark}><th>{escape(text.shorten(key, 120))}</th>{cells}</tr>"
    head = "".join(f"<th>{css}</th>" for css in tables)
    note = "<p class='note'>Marked rows differ between the two runs.</p>" if len(tables) > 1 else ""
    body = (
        f"<details><summary>{text.plural(len(keys), 'setting')}</summary>{note}"
        f'<div class="scroll"><table class="config"><thead><tr><th>setting</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )
    return section("config", "Configuration", "", body)


def _flat(value: object, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [row for key, inner in value.items() for row in _flat(inner, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix or "value", value if isinstance(value, str) else json.dumps(value))] if prefix else []


def glossary_section(more: tuple[tuple[str, str], ...] = ()) -> str:
    """Every term of the page in one line each, ``more`` at the end."""
    terms = "".join(
        f"<div><dt>{escape(term)}</dt><dd>{escape(words)}</dd></div>" for term, words in (*text.GLOSSARY, *more)
    )
    return section("glossary", "Glossary", "", f'<dl class="glossary">{terms}</dl>')
