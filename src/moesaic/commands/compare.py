"""``moesaic compare``: which router is worth it on this text."""

from __future__ import annotations

import json as json_module
import shlex
from pathlib import Path
from typing import Annotated, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import arg

from moesaic.checkpoint.atomic import atomic_file
from moesaic.commands.output import Json, Overrides, console_for, print_json, sayer
from moesaic.compare.runner import Settings, make_entries, prepare, run_trials
from moesaic.compare.summary import COLUMNS, summarise
from moesaic.compare.variants import VARIANTS, named
from moesaic.compare.watch import Watch
from moesaic.config import load_config_file, to_dict
from moesaic.errors import ConfigError
from moesaic.report.compare import write_comparison
from moesaic.report.text import signed
from moesaic.settings import merge, override
from moesaic.terminal import visible
from moesaic.train.log import finite
from moesaic.train.recipes import RECIPES


def compare(
    data: Annotated[tuple[str, ...], arg(help='Files, folders, globs, hf://owner/name; or "stdlib".')] = ("stdlib",),
    routers: Annotated[
        tuple[str, ...],
        arg(help='Names (see `moesaic routers`), or "all"; the first one is what others are compared with.'),
    ] = ("topk", "sigmoid_bias", "switch", "relu", "hash_balanced", "random"),
    variant: Annotated[
        tuple[str, ...],
        arg(metavar="'NAME: SETTING=VALUE ...'", help="A router given by settings of the base run, each one quoted."),
    ] = (),
    seeds: Annotated[int, arg(help="Runs per router, seeds 0, 1, ...")] = 3,
    steps: Annotated[
        int | None, arg(metavar="INT", help="Optimiser steps of each run.", help_behavior_hint="(of the recipe)")
    ] = None,
    out: Annotated[Path, arg(help="Folder for all runs, results.json and report.html.")] = Path("runs/compare"),
    config: Annotated[
        Path | None,
        arg(
            metavar="PATH", help="A .json or .toml file with settings of the base run.", help_behavior_hint="(optional)"
        ),
    ] = None,
    set_: Overrides = (),
    jobs: Annotated[
        int, arg(help="Runs side by side; more than 1 shares the processor, so speeds are worth less.")
    ] = 1,
    resume: Annotated[
        bool, arg(help="Go on with the comparison in --out; finished runs are kept, failed ones tried again.")
    ] = False,
    json: Json = False,
) -> int:
    """Train routers on the same tokens with equal active compute, seeds repeated, and compare.

    Examples:
      moesaic compare --data books/ --routers topk relu expert_choice --seeds 3
      moesaic compare --routers all --seeds 1 --steps 60 --jobs 2 --out runs/all
      moesaic compare --routers topk --variant 'k4: model.moe.k=4 model.moe.hidden=64' --out runs/k4
      moesaic compare --resume --routers topk relu expert_choice --data books/
    """
    console = console_for(json)
    say = sayer(console)
    if seeds < 1 or jobs < 1:
        raise ConfigError(f"--seeds and --jobs must be at least 1, not {min(seeds, jobs)}.")
    settings = to_dict(RECIPES["compare"]() if steps is None or steps < 1 else RECIPES["compare"](steps))
    settings = merge(settings, {} if config is None else load_config_file(config))
    settings["data"]["sources"] = list(data)
    base = override(settings, set_, steps=steps, seed=0)
    names = list(VARIANTS) if "all" in routers else list(dict.fromkeys(routers))
    entries, refused = make_entries(base, {name: named(name) for name in names}, _overrides(variant))
    if not entries:
        why = f" {next(iter(refused.values()))}" if refused else ""
        raise ConfigError(f"There is nothing to compare.{why} Name routers with --routers or give a --variant.")
    for name, words in refused.items():
        say(f"{name} is left out: {words}")
    wanted = Settings(base, entries, tuple(range(seeds)), jobs)
    trials = prepare(wanted, out, resume=resume, say=say)
    say(f"{len(trials)} runs: {len(entries)} routers, {seeds} seeds, {base.steps} steps each.")
    watch = Watch(base.steps, console)
    try:
        complete = run_trials(trials, jobs, say=say, show=watch)
    finally:
        watch.close()
    results = finite(summarise(wanted, trials, refused))
    atomic_file(out / "results.json", json_module.dumps(results, indent=1) + "\n")
    page = write_comparison(results, COLUMNS, out / "report.html")
    if json:
        print_json({"folder": str(out), "report": str(page), "complete": complete, **results})
    else:
        _show(results, console)
        say(f"Report (open in a browser): {page.resolve()}")
    if not complete:
        again = ["moesaic", "compare", "--resume", "--out", str(out), "--routers", *routers, "--seeds", str(seeds)]
        say(f"Stopped. Go on with the same command and --resume, for example: {shlex.join(again)} ...")
        return 130
    return 1 if any(row["failed"] for row in results["routers"]) else 0


def _overrides(variant: tuple[str, ...]) -> dict[str, list[str]]:
    """``"k4: model.moe.k=4 model.moe.hidden=64"`` as name -> settings."""
    found: dict[str, list[str]] = {}
    for text in variant:
        name, colon, changes = text.partition(":")
        name = name.strip()
        if not colon or not changes.split() or not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(
                f"--variant {text!r} is not NAME: SETTING=VALUE ...; write for example 'k4: model.moe.k=4'."
            )
        if name in VARIANTS or name in found:
            raise ConfigError(f'The name "{name}" of a --variant is taken already; choose another.')
        try:
            found[name] = shlex.split(changes)
        except ValueError as error:
            raise ConfigError(f"--variant {text!r} cannot be read: {error}.") from None
    return found


def _show(results: dict[str, Any], console: Console) -> None:
    """The table for people: the page has the rest."""
    base = results["baseline"]
    table = Table(
        title="Routers, best loss first", title_justify="left", pad_edge=False, box=box.SIMPLE_HEAD, padding=(0, 1)
    )
    table.add_column("router", no_wrap=True)
    for label in (
        "loss",
        f"- {base}",
        "± 95%",
        *[label for name, (label, _, _) in COLUMNS.items() if name != "val_loss"],
    ):
        table.add_column(label, justify="right", no_wrap=True)
    table.add_column("compute", justify="right", no_wrap=True)
    for row in results["routers"]:
        difference = row["difference"] or {"mean": None, "interval": None}
        cells = [_cell(row["val_loss"], "{:.3f}")]
        cells.append("" if difference["mean"] is None else signed(difference["mean"]))
        cells.append("" if difference["interval"] is None else f"{difference['interval']:.3f}")
        cells += [_cell(row[name], form) for name, (_, form, _) in COLUMNS.items() if name != "val_loss"]
        cells.append("–" if row["compute"] is None else f"{row['compute']:.2f}")
        runs = "" if row["runs"] == len(results["seeds"]) else f" ({row['runs']} of {len(results['seeds'])} runs)"
        table.add_row(escape(visible(row["name"] + ("*" if row["sees"] else "") + runs)), *cells)
    # Wide enough for every figure; a narrow terminal wraps lines rather than losing columns.
    wide = Console(file=console.file, width=max(console.width, 120), highlight=False)
    wide.print()
    wide.print(table)
    starred = {row["sees"] for row in results["routers"] if row["sees"]}
    if starred:
        wide.print(f"* {'; '.join(sorted(starred))}: see the page.", markup=False)
    for row in results["routers"]:
        for seed, words in row["failed"].items():
            console.print(visible(f"{row['name']}, seed {seed}, failed: {words}"), markup=False, soft_wrap=True)


def _cell(value: dict[str, Any] | None, form: str) -> str:
    return "–" if value is None else form.format(value["mean"])
