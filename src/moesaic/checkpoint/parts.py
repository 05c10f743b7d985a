"""A checkpoint that many processes wrote lies in parts (``train/sharded``). What reads whole ones says so in one sentence.

>>> refuse_sharded(folder)            # CheckpointError naming the command that makes it whole
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from moesaic.checkpoint.untrusted import read_json, safe_member
from moesaic.errors import CheckpointError

FILE = "sharded.json"


def is_sharded(folder: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint lies in parts."""
    return (Path(folder) / FILE).is_file()


def refuse_sharded(folder: str | os.PathLike[str]) -> None:
    """Raise ``CheckpointError`` for a checkpoint that lies in parts, saying how many and what to do."""
    if is_sharded(folder):
        raise CheckpointError(
            f"{folder} lies in parts of {_processes(Path(folder))}; make it one with `{to_make_whole(folder)}`."
        )


def to_make_whole(folder: str | os.PathLike[str]) -> str:
    """The command that does it."""
    return f"moesaic convert {shlex.quote(str(folder))} OUT"


def _processes(folder: Path) -> str:
    try:
        world = read_json(safe_member(folder, FILE)).get("world")
    except CheckpointError:  # what is wrong with it is said by the command that reads it all
        world = None
    if type(world) is not int or world < 1:
        return "several processes"
    return f"{world} process{'es' * (world > 1)}"
