"""Whether a target is there already: nothing is written over a folder, and the same result is recognised to the last bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.atomic import MANIFEST, refuse_foreign, settle, verify_folder
from moesaic.checkpoint.stream import Shard
from moesaic.checkpoint.untrusted import safe_member
from moesaic.errors import CheckpointError, MoesaicError

_CHUNK = 2**24


def stands(target: Path) -> bool:
    """Whether there is something of that name (an empty folder is nothing). Raises ``MoesaicError`` for what we never saved."""
    target = settle(target)
    refuse_foreign(target)
    return target.is_dir() and any(target.iterdir())


def refused(target: Path) -> MoesaicError:
    """The error for a target that stands and is something else."""
    return MoesaicError(
        f"{target} exists already and is not what this conversion makes; choose another folder, or remove it."
    )


def looks_the_same(target: Path, shards: Collection[Shard], files: Mapping[str, bytes]) -> bool:
    """Whether ``target`` holds these files: the small ones byte for byte, of the others header and length."""
    there = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    if there != {MANIFEST, *files, *(shard.file for shard in shards)}:
        return False
    try:
        verify_folder(target, quick=True)
        if any(safe_member(target, name).read_bytes() != content for name, content in files.items()):
            return False
        for shard in shards:
            path = safe_member(target, shard.file)
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size != shard.nbytes or file.read(len(shard.header)) != shard.header:
                    return False
    except (OSError, CheckpointError):
        return False
    return True


def holds(
    target: Path,
    shards: Iterable[Shard],
    tensors: Iterable[tuple[str, Tensor]],
    progress: Callable[[int], None],
) -> bool:
    """Whether the files, which look the same, hold just these tensors; ends at the first that differs.

    ``progress``: called with the bytes of each tensor compared.
    """
    places = {name: (target / shard.file, start) for shard in shards for name, (_, start) in shard.places.items()}
    for name, tensor in tensors:
        path, start = places.pop(name)
        if not _equal(path, start, tensor):
            return False
        progress(tensor.nbytes)
        del tensor  # before the next is made
    return not places


def _equal(path: Path, start: int, tensor: Tensor) -> bool:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
    with open(path, "rb") as file:
        file.seek(start)
        for first in range(0, len(content), _CHUNK):
            part = content[first : first + _CHUNK]
            if file.read(len(part)) != part:
                return False
    return True
