"""``moesaic lint``: what a config will make go wrong, before it costs a run."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from tyro.conf import Positional, arg

from moesaic.commands.output import Json, Overrides, console_for, print_json, sayer
from moesaic.config import apply_overrides, from_dict
from moesaic.models.config import ModelConfig
from moesaic.settings import named_settings
from moesaic.train.config import TrainConfig
from moesaic.train.lint import lint_model, lint_run


def lint(
    config: Annotated[
        Positional[str],
        arg(metavar="CONFIG", help="A .json or .toml config, a run or model folder, or the name of a recipe."),
    ],
    set_: Overrides = (),
    json: Json = False,
) -> int:
    """Find gates that cannot learn, loads that will not balance, settings without effect.

    Ends with status 1 if there is an error or a warning.

    Examples:
      moesaic lint run.toml
      moesaic lint quickstart --set model.moe.k=1
      moesaic lint runs/books --json
    """
    settings = apply_overrides(named_settings(config), set_)
    if "steps" in settings or "batch_size" in settings:
        found = lint_run(from_dict(TrainConfig, settings))
    else:
        found = lint_model(from_dict(ModelConfig, settings["model"], where="model"))
    counts = Counter(finding.severity for finding in found)
    if json:
        rows = [{"severity": f.severity, "where": f.where, "what": f.what, "instead": f.instead} for f in found]
        print_json(
            {"findings": rows, "errors": counts["error"], "warnings": counts["warning"], "notes": counts["note"]}
        )
    else:
        say = sayer(console_for(json))
        for finding in found:
            say(str(finding))
        say(
            "Nothing to find fault with."
            if not found
            else f"{counts['error']} errors, {counts['warning']} warnings, {counts['note']} notes."
        )
    return 1 if counts["error"] or counts["warning"] else 0
