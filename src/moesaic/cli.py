"""The command line: a dict of command -> plain function. ``moesaic COMMAND --help`` shows each one's options and examples.

Results go to standard output (as one JSON object with ``--json``), progress to standard error. A mistake of the user's is
one sentence on standard error and exit status 2; an interrupted run exits with 130.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import moesaic
from moesaic.commands.compare import compare
from moesaic.commands.convert import convert
from moesaic.commands.doctor import doctor
from moesaic.commands.evaluate import evaluate_command
from moesaic.commands.generate import generate
from moesaic.commands.info import info
from moesaic.commands.lint import lint
from moesaic.commands.plan_layout import plan_layout
from moesaic.commands.profile import profile
from moesaic.commands.quickstart import quickstart
from moesaic.commands.report import report
from moesaic.commands.routers import routers
from moesaic.commands.train import train
from moesaic.commands.upcycle import densify_command, upcycle_command
from moesaic.errors import ConfigError, nearest
from moesaic.terminal import guarded, parse, visible

COMMANDS: dict[str, Callable[..., int]] = {
    "quickstart": quickstart,
    "train": train,
    "compare": compare,
    "routers": routers,
    "eval": evaluate_command,
    "generate": generate,
    "lint": lint,
    "report": report,
    "info": info,
    "convert": convert,
    "upcycle": upcycle_command,
    "densify": densify_command,
    "profile": profile,
    "plan-layout": plan_layout,
    "doctor": doctor,
}


def help_text() -> str:
    """What ``moesaic --help`` prints."""
    lines = [
        "usage: moesaic COMMAND [options]",
        "",
        "Mixture-of-Experts Transformers: train, convert, upcycle, look inside, understand.",
        "",
    ]
    lines += [f"  {name:<12}{summary(function)}" for name, function in COMMANDS.items()]
    lines += [
        "",
        "moesaic COMMAND --help shows options and examples; moesaic --version.",
    ]
    return "\n".join(lines)


def summary(function: Callable[..., int]) -> str:
    """First line of a command's docstring."""
    return (inspect.getdoc(function) or "").splitlines()[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``moesaic`` and ``python -m moesaic``; ends the process with the command's exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    sys.exit(guarded(lambda: _run(args), json="--json" in args))


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(f"moesaic {moesaic.__version__}")
        return 0
    name, *rest = args
    if name not in COMMANDS:
        raise ConfigError(f'There is no command "{name}".{nearest(name, COMMANDS)} Commands: {", ".join(COMMANDS)}.')
    warnings.showwarning = _show_warning
    return parse(COMMANDS[name], name, rest)()


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"moesaic: warning: {visible(str(message))}", file=sys.stderr)
