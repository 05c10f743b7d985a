"""``moesaic quickstart``: from nothing to a trained sparse model, its dense twin, a verdict, a sample and a report.

Uses the text that every Python installation carries (sources, tests, documentation, data tables), so nothing is downloaded.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from moesaic.data.corpus import load_corpus
from moesaic.terminal import visible
from moesaic.train.config import TrainConfig
from moesaic.train.loop import fit_vocabulary
from moesaic.train.resume import saved_tokenizer
from moesaic.train.stop import StopRequest
from moesaic.twins import Comparison, run_twins


def run_quickstart(config: TrainConfig, out: Path, *, resume: bool, console: Console) -> Comparison:
    """Train both models and print what came of it. Raises ``MoesaicError`` in words."""

    def say(sentence: str) -> None:
        console.print(visible(sentence), markup=False, highlight=False, soft_wrap=True)

    again = f"moesaic quickstart --resume --out {shlex.quote(str(out))}"
    tokenizer = saved_tokenizer(out / "sparse") if resume else None
    corpus = load_corpus(config.data, config.seed, say, tokenizer=tokenizer)
    with StopRequest(say, resume_with=again) as stop:
        comparison = run_twins(fit_vocabulary(config, corpus), corpus, out, resume=resume, say=say, stop=stop)
    show_comparison(comparison, console, resume_with=again)
    return comparison


def show_comparison(comparison: Comparison, console: Console, resume_with: str) -> None:
    """The table, the verdict, the sample and where to look next; ``resume_with`` is the command if it was stopped."""
    rows = comparison.summary["runs"]
    table = Table(
        title="Sparse and dense twin, same tokens, same active parameters", title_justify="left", pad_edge=False
    )
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")

    def line(label: str, key: str, form: str = "{:,}") -> None:
        values = [row.get(key) for row in rows.values()]
        table.add_row(label, *["-" if value is None else form.format(value) for value in values])

    line("validation loss (nats/token)", "val_loss", "{:.4f}")
    line("perplexity", "perplexity", "{:.2f}")
    line("parameters in all", "params_total")
    line("parameters used per token", "params_active")
    line("training tokens", "tokens")
    line("tokens/s", "tokens_per_s", "{:,.0f}")
    line("training time (s)", "seconds", "{:.0f}")
    line("balance: worst layer's MaxVio", "max_vio", "{:.2f}")
    for domain in sorted({d for row in rows.values() for d in row["by_domain"]}):
        values = [row["by_domain"].get(domain) for row in rows.values()]
        table.add_row(escape(visible(f"loss on {domain}")), *["-" if v is None else f"{v:.4f}" for v in values])
    console.print()
    console.print(table)
    verdict = comparison.verdict
    if verdict is not None:
        console.print()
        console.print(f"[bold]{escape(verdict.headline)}[/bold]", highlight=False, soft_wrap=True)
        for sentence in verdict.details:
            console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    sample = comparison.folder / "sparse" / "sample.txt"
    if sample.exists():
        console.print("\n[bold]What the sparse model writes[/bold]")
        text = visible(sample.read_text("utf-8"))
        console.print(Padding(escape(text.strip()), (0, 2)), highlight=False)
    console.print(
        f"\nReport (open in a browser): {comparison.report.resolve()}", markup=False, highlight=False, soft_wrap=True
    )
    last = f"Stopped. Go on with: {resume_with}"
    if comparison.finished:
        last = f"Write with it: moesaic generate {shlex.quote(str(comparison.folder))} --prompt 'def main('"
    console.print(last, markup=False, highlight=False, soft_wrap=True)
