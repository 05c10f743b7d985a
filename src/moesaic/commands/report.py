"""``moesaic report``: the page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from moesaic.commands.output import Json, print_json
from moesaic.report.page import write_report


def report(
    folder: Annotated[Positional[Path], arg(metavar="FOLDER", help="A run or comparison folder.")],
    out: Annotated[
        Path | None,
        arg(metavar="PATH", help="Where to write the page.", help_behavior_hint="(default: report.html in the folder)"),
    ] = None,
    json: Json = False,
) -> int:
    """Write one self-contained page about a run: losses, load, entropy, drops, domains per expert, a sample.

    Examples:
      moesaic report runs/books
      moesaic report quickstart --out page.html
    """
    path = write_report(folder, out)
    if json:
        print_json({"report": str(path)})
    else:
        print(path.resolve())
    return 0
