"""After a run of many processes: its newest and its best checkpoint become whole, for everything that reads models.

>>> with start_processes(timeout_s) as here: run_training(...)
>>> if here.rank == 0: consolidate_run("runs/a", print)           # the others have left, and wait for nothing
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from moesaic.checkpoint.parts import is_sharded, to_make_whole
from moesaic.errors import MoesaicError
from moesaic.train.sharded.consolidate import consolidate
from moesaic.train.snapshot import best_snapshot, latest_snapshot


def consolidate_run(run_folder: str | os.PathLike[str], say: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Make the newest and the best checkpoint of a run whole, in their places, where they lie in parts; returns which were.

    One that cannot be made whole stays as it was: the run has all it needs, so that this is a warning and no error.
    """
    newest, best = latest_snapshot(run_folder, quick=True), best_snapshot(run_folder, quick=True)
    made = []
    for folder in dict.fromkeys(folder for folder in (newest, best) if folder is not None):
        if not is_sharded(folder):
            continue
        say(f"Making checkpoint {folder.name} whole ...")
        try:
            made.append(consolidate(folder, folder))
        except MoesaicError as error:
            warnings.warn(
                f"The checkpoint {folder} stays in parts; make it one with `{to_make_whole(folder)}`. {error}",
                stacklevel=2,
            )
    return made
