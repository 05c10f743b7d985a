"""``moesaic doctor``: what this machine can do."""

from __future__ import annotations

from typing import Annotated

from rich.console import Console
from tyro.conf import arg

from moesaic.commands.output import Json, print_json
from moesaic.cost.devices import doctor as examine
from moesaic.cost.devices import format_doctor


def doctor(
    deep: Annotated[bool, arg(help="Also compile a small function (half a minute).")] = False,
    json: Json = False,
) -> int:
    """Say what this machine can do: torch, threads, instruction sets, GPU, distributed back ends, speed, advice.

    Examples:
      moesaic doctor
      moesaic doctor --json
    """
    found = examine(deep=deep)
    if json:
        print_json(found.to_dict())
    else:
        Console(highlight=False).print(format_doctor(found), markup=False, soft_wrap=True)
    return 0
