"""``moesaic quickstart``: the sparse model, its dense twin and the page, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from moesaic.commands.options import whole_number
from moesaic.commands.output import Json, Overrides, console_for, print_json
from moesaic.config import to_dict
from moesaic.quickstart import run_quickstart
from moesaic.settings import override, refuse_taken, saved_run
from moesaic.train.recipes import RECIPES
from moesaic.train.resume import check_run

_WHENCE = "of the recipe, or of the run resumed"


def quickstart(
    out: Annotated[Path, arg(help="Folder for both runs and the report.")] = Path("quickstart"),
    steps: Annotated[int | None, whole_number("Optimiser steps of each model.", _WHENCE)] = None,
    seed: Annotated[int | None, whole_number("Seed of initialisation and data order.", _WHENCE)] = None,
    set_: Overrides = (),
    resume: Annotated[bool, arg(help="Go on with an interrupted quickstart.")] = False,
    json: Json = False,
) -> int:
    """Train a sparse model and its dense twin on text already on this machine, and report.

    Examples:
      moesaic quickstart
      moesaic quickstart --out try --steps 50
      moesaic quickstart --set model.moe.num_experts=32 model.moe.k=4 optim.lr=2e-3
    """
    start = saved_run(out, twin=True) if resume else RECIPES["quickstart"]()
    config = override(to_dict(start), set_, steps=steps, seed=seed)
    refuse_taken(out, resume=resume, twin=True)
    if resume:
        check_run(config, out / "sparse")
    comparison = run_quickstart(config, out, resume=resume, console=console_for(json))
    if json:
        print_json({"folder": str(out), "report": str(comparison.report), **comparison.summary})
    return 0 if comparison.finished else 130
