"""``moesaic routers``: every router and what it promises, read off the code."""

from __future__ import annotations

from typing import Annotated

from rich import box
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from moesaic.commands.output import Json, console_for, print_json
from moesaic.compare.describe import Description, describe, describe_all, markdown
from moesaic.compare.variants import named
from moesaic.routing import router_options

_SHOWN = ("router", "causal", "batch-invariant", "balance", "experts", "drops", "gradient", "needs")


def routers(
    name: Annotated[Positional[str], arg(metavar="NAME", help="One router, in full; without it, all.")] = "",
    markdown_: Annotated[bool, arg(name="markdown", help="Print docs/routers.md.")] = False,
    json: Json = False,
) -> int:
    """List every router and what it promises: causal, batch-invariant, balance, experts per token, cost.

    Examples:
      moesaic routers
      moesaic routers expert_choice
      moesaic routers --json
    """
    if name:
        named(name)
    rows = [describe(name)] if name else describe_all()
    if json:
        print_json({"routers": [{**row.cells(), "rows_per_token": row.rows_per_token} for row in rows]})
    elif markdown_:
        print(markdown(rows), end="")
    elif name:
        _show_one(rows[0], console_for(json))
    else:
        _show_all(rows, console_for(json))
    return 0


def _show_all(rows: list[Description], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in _SHOWN:
        table.add_column(name, no_wrap=name == "router")
    for row in rows:
        cells = {
            key: value.replace(", inference ", " / ").replace("training ", "") for key, value in row.cells().items()
        }
        table.add_row(*[cells[column] for column in _SHOWN])
    wide = Console(file=console.file, width=max(console.width, 125), highlight=False)
    wide.print(table)
    wide.print(
        "yes / no: in training / at inference. More about one: moesaic routers NAME. To try them: moesaic compare."
    )


def _show_one(row: Description, console: Console) -> None:
    for name, value in row.cells().items():
        console.print(f"{name:<16} {value}", markup=False, soft_wrap=True)
    console.print(f"{'rows per token':<16} {row.rows_per_token:g}", markup=False)
    if row.router != "mixture_of_depths":
        options = ", ".join(router_options(row.router)) or "none"
        console.print(f"{'options':<16} model.moe.router.options: {options}", markup=False, soft_wrap=True)
