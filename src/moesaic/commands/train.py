"""``moesaic train``: one run, or a sparse run and its dense twin."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from moesaic.commands.options import whole_number
from moesaic.commands.output import Json, Overrides, console_for, print_json, sayer
from moesaic.config import load_config_file, to_dict
from moesaic.cost.check_layout import check_layout
from moesaic.data.corpus import Corpus, load_corpus
from moesaic.errors import ConfigError, MoesaicError
from moesaic.parallel.start import Started, start_processes
from moesaic.parallel.torchrun import tell_torchrun
from moesaic.quickstart import show_comparison
from moesaic.report.page import write_report
from moesaic.settings import merge, override, refuse_taken, saved_run
from moesaic.train.config import TrainConfig
from moesaic.train.loop import TrainResult, fit_vocabulary, run_training
from moesaic.train.recipes import RECIPES
from moesaic.train.resume import check_run, saved_tokenizer
from moesaic.train.sharded.agree import first_says
from moesaic.train.sharded.finish import consolidate_run
from moesaic.train.stop import StopRequest
from moesaic.train.team import everyone_of, in_turn
from moesaic.twins import run_twins

_WHENCE = "of --config, the recipe, or the run resumed"


def train(
    data: Annotated[
        tuple[str, ...], arg(help='Files, folders, globs, hf://owner/name; or "stdlib". Streams also read addresses.')
    ] = (),
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
    ep: Annotated[int | None, whole_number("Parts that the experts of a layer are spread over.", _WHENCE)] = None,
    tp: Annotated[int | None, whole_number("Slices of attention heads and widths.", _WHENCE)] = None,
    pp: Annotated[int | None, whole_number("Pipeline stages.", _WHENCE)] = None,
    fsdp: Annotated[bool, arg(help="Shard parameters and optimiser state over the data-parallel processes.")] = False,
    twin: Annotated[bool, arg(help="Also train the dense twin on the same tokens and compare.")] = False,
    resume: Annotated[bool, arg(help="Go on with the run in --out from its last checkpoint.")] = False,
    json: Json = False,
) -> int:
    """Train a model on your text.

    Examples:
      moesaic train --data books/ --out runs/books
      moesaic train --data 'corpus/*.jsonl' --set data.label_field=lang model.moe.num_experts=32
      moesaic train --data a.txt b.txt --config run.toml --steps 5000
      moesaic train --data 's3://pages/*.parquet' hf://owner/name --set data.stream=true data.lanes=32
      moesaic train --data stdlib --twin --out runs/twins
      moesaic train --resume --out runs/books
      torchrun --nproc-per-node=4 -m moesaic train --data books/ --ep 2 --tp 2 --out runs/four

    Under torchrun the processes share the model and every batch; the result is that of one process. What is left after dp =
    processes / (pp * tp) parts of the batch follows from their number; more of it in --set parallel.NAME=VALUE, checked
    beforehand by moesaic plan-layout. A run that torchrun starts again goes on from its last checkpoint. At its end the newest
    and the best checkpoint, written in parts, become whole (--set parallel.consolidate=false leaves them to moesaic convert).
    """
    axes = {"ep": ep, "tp": tp, "pp": pp, "fsdp": fsdp or None}
    overrides = (*set_, *(f"parallel.{name}={to_text(value)}" for name, value in axes.items() if value is not None))
    asked = _Asked(data, out, config, recipe, steps, seed, overrides, twin)
    try:
        run, _ = asked.settle(resume)
        if twin and "WORLD_SIZE" in os.environ and os.environ["WORLD_SIZE"] != "1":
            raise ConfigError("--twin trains two models for a comparison in one process; leave it out under torchrun.")
    except MoesaicError as error:
        tell_torchrun(str(error))
        error.told = os.environ.get("LOCAL_RANK", "0") != "0"  # the processes of a node were asked the same
        raise
    with start_processes(run.parallel.timeout_s) as here:
        everyone = everyone_of(here)
        started_again = max(everyone.values(here.restarts, what="restarts"))
        there = first_says(everyone, "the run folder", lambda: (asked.saved / "config.json").exists())
        if started_again and there and not resume:
            resume = True
            run, _ = asked.settle(resume)
        console = console_for(json)
        say = sayer(console) if here.rank == 0 else _silent
        status = _train(asked, resume, json, here, say)
    if here.rank == 0 and run.parallel.consolidate and not twin:  # the others have left, and no collective waits
        consolidate_run(out, say)
    return status


@dataclass(frozen=True)
class _Asked:
    """What the command line asked for."""

    data: tuple[str, ...]
    out: Path
    config: Path | None
    recipe: Literal["small", "quickstart", "compare"]
    steps: int | None
    seed: int | None
    overrides: tuple[str, ...]
    twin: bool

    @property
    def saved(self) -> Path:
        """The folder whose config a resumed run goes by."""
        return self.out / "sparse" if self.twin else self.out

    def settle(self, resume: bool) -> tuple[TrainConfig, bool]:
        """The settings of the run, checked, and whether its vocabulary is fixed."""
        settings = to_dict(saved_run(self.out, twin=self.twin) if resume else RECIPES[self.recipe]())
        given = {} if self.config is None else load_config_file(self.config)
        settings = merge(settings, given)
        if self.data and isinstance(settings["data"], dict):
            settings["data"]["sources"] = list(self.data)
        run = override(settings, self.overrides, steps=self.steps, seed=self.seed)
        if not run.data.sources:
            raise ConfigError(
                "There is no text to train on; name it with --data, for example --data books/ or --data stdlib."
            )
        explicit = any(text.startswith("model.vocab_size=") for text in self.overrides)
        return run, resume or explicit or "vocab_size" in given.get("model", {})


def _train(asked: _Asked, resume: bool, json: bool, here: Started, say: Callable[[str], None]) -> int:
    out, twin, everyone = asked.out, asked.twin, everyone_of(here)
    run, fixed = asked.settle(resume)

    def check() -> None:
        """Before any text is read or memory taken."""
        refuse_taken(out, resume=resume, twin=twin)
        check_layout(run.model, run.parallel, here.world, batch_size=run.batch_size, accumulate=run.accumulate)

    first_says(everyone, "the run folder and the layout", check)
    if resume:
        check_run(run, asked.saved)

    def read() -> Corpus:
        return load_corpus(run.data, run.seed, say, tokenizer=saved_tokenizer(asked.saved) if resume else None)

    corpus = in_turn(everyone, read, "the text")
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
        result = run_training(run, corpus, out, resume=resume, say=say, stop=stop, here=here)
    if here.rank == 0:
        _tell(result, run, out, again, json, say)
    # torchrun takes any status but 0 for a failure, and would start again what was asked to stop.
    return 0 if result.reason == "done" or here.store is not None else 130


def _tell(result: TrainResult, run: TrainConfig, out: Path, again: str, json: bool, say: Callable[[str], None]) -> None:
    """How it ended, and the report."""
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


def to_text(value: object) -> str:
    """A value as ``--set`` reads it."""
    return dumps(value)


def _silent(_: str) -> None:
    """What the other processes of a run say."""
