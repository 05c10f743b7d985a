"""How commands speak: words for people on a console, results as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import arg

from moesaic.terminal import visible
from moesaic.train.log import finite

Overrides = Annotated[tuple[str, ...], arg(name="set", metavar="NAME=VALUE ...", help="Settings by dotted name.")]
Json = Annotated[bool, arg(name="json", help="Print the result as one JSON object on standard output.")]


def console_for(json: bool) -> Console:
    """Where words for people go: standard output, or standard error when that is kept for JSON."""
    return Console(stderr=json, highlight=False)


def sayer(console: Console) -> Callable[[str], None]:
    """A function that prints sentences there."""

    def say(sentence: str) -> None:
        console.print(visible(sentence), markup=False, highlight=False, soft_wrap=True)

    return say


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on standard output; NaN and infinity become null."""
    print(json.dumps(finite(value), default=str, allow_nan=False))
