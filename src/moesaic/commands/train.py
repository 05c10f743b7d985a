"""``moesaic train``: one run, or a sparse run and its dense twin."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from moesaic.commands.options import whole_number
from moesaic.commands.output import Json, Overrides, console_for, print_json, sayer
from moesaic.config import load_config_file, to_dict
from moesaic.data.corpus import load_corpus
from moesaic.errors import ConfigError
from moesaic.quickstart import show_comparison
from moesaic.report.page import write_report
from moesaic.settings import merge, override, refuse_taken, saved_run
from moesaic.train.loop import fit_vocabulary, run_training
from moesaic.train.recipes import RECIPES
from moesaic.train.resume import check_run, saved_tokenizer
from moesaic.train.stop import StopRequest
from moesaic.twins import run_twins

_WHENCE = "of --config, the recipe, or the run resumed"


def train(
    data: Annotated[tuple[str, ...], arg(help='Files, folders, globs, hf://owner/name; or "stdlib".')] = (),
    out: Annotated[Path, arg(help="Run folder.")] = Path("runs/latest"),
    config: Annotated[
        Path | None,
        arg(metavar="PATH", help="A .json or .toml file with any of the settings.", help_behavior_hint="(optional)"),
    ] = None,
    recipe: Annotated[
        Literal["small", "quickstart", "compare"], arg(help="Where settings not given come from.")
    ] = "small",
    steps: Annotated[int | None, whole_number("Optimiser steps.", _WHENCE)] = None,
    seed: Annotated[int | None, whole_number("Seed of initialisation, data order and noise.", _WHENCE)] = None,
    set_: Overrides = (),
    twin: Annotated[bool, arg(help="Also train the dense twin on the same tokens and compare.")] = False,
    resume: Annotated[bool, arg(help="Go on with the run in --out from its last checkpoint.")] = False,
    json: Json = False,
) -> int:
    """Train a model on your text.

    Examples:
      moesaic train --data books/ --out runs/books
      moesaic train --data 'corpus/*.jsonl' --set data.label_field=lang model.moe.num_experts=32
      moesaic train --data a.txt b.txt --config run.toml --steps 5000
      moesaic train --data stdlib --twin --out runs/twins
      moesaic train --resume --out runs/books
    """
    say = sayer(console_for(json))
    saved = out / "sparse" if twin else out
    settings = to_dict(saved_run(out, twin=twin) if resume else RECIPES[recipe]())
    given = {} if config is None else load_config_file(config)
    settings = merge(settings, given)
    if data and isinstance(settings["data"], dict):
        settings["data"]["sources"] = list(data)
    run = override(settings, set_, steps=steps, seed=seed)
    if not run.data.sources:
        raise ConfigError(
            "There is no text to train on; name it with --data, for example --data books/ or --data stdlib."
        )
    refuse_taken(out, resume=resume, twin=twin)
    if resume:
        check_run(run, saved)
    corpus = load_corpus(run.data, run.seed, say, tokenizer=saved_tokenizer(saved) if resume else None)
    fixed = resume or "vocab_size" in given.get("model", {}) or any(s.startswith("model.vocab_size=") for s in set_)
    run = fit_vocabulary(run, corpus, explicit=fixed)
    again = f"moesaic train --resume --out {shlex.quote(str(out))}"
    if twin:
        with StopRequest(say, resume_with=f"{again} --twin") as stop:
            comparison = run_twins(run, corpus, out, resume=resume, say=say, stop=stop)
        show_comparison(comparison, console_for(json), resume_with=f"{again} --twin")
        if json:
            print_json({"folder": str(out), "report": str(comparison.report), **comparison.summary})
        return 0 if comparison.finished else 130
    with StopRequest(say, resume_with=again) as stop:
        result = run_training(run, corpus, out, resume=resume, say=say, stop=stop)
    report_path = write_report(out)
    if result.reason == "interrupted":
        say(f"Stopped at step {result.step} of {run.steps}. Go on with: {again}")
    else:
        loss = "not measured" if result.val_loss is None else f"{result.val_loss:.4f} nats per token"
        rate = f"{result.tokens_per_s:,.0f} tokens/s"
        say(f"Done: {result.step} steps, {result.tokens:,} tokens at {rate}, validation loss {loss}.")
    say(f"Report: {report_path.resolve()}")
    if json:
        print_json({**result.record(), "report": str(report_path)})
    return 0 if result.reason == "done" else 130
