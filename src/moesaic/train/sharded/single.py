"""A single-file checkpoint of one process, seen as a sharded one, so that many ranks can go on with it.

>>> checkpoint = open_single(folder, experts={"blocks.0.ffn.experts.w_in"})
>>> fill_from(checkpoint, tensors, group=group)          # each rank reads only the rows it holds

Nothing is written: an expert is a run of bytes inside its stacked tensor.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from moesaic.checkpoint.atomic import settle, verify_folder
from moesaic.checkpoint.shards import TensorInfo, find_tensors
from moesaic.checkpoint.untrusted import read_json, safe_member
from moesaic.errors import CheckpointError
from moesaic.train.sharded.checkpoint import EXTRA, ShardedCheckpoint
from moesaic.train.sharded.entries import Whole
from moesaic.train.sharded.metadata import Stored
from moesaic.train.sharded.optimizer import PREFIX
from moesaic.train.sharded.regions import all_of
from moesaic.train.sharded.storage import Shards


def open_single(
    folder: str | os.PathLike[str], experts: Collection[str], share: tuple[int, int] | None = (0, 1)
) -> ShardedCheckpoint:
    """The snapshot ``folder`` (``train/snapshot.py``) as the same state in sharded form.

    ``experts``: names of the parameters that are stacked experts, which files do not tell; their moments are, too. ``share``:
    see ``verify_folder``. Raises ``CheckpointError`` naming what is missing or damaged.
    """
    folder = settle(folder)
    verify_folder(folder, quick=share is None, share=share or (0, 1))
    found = find_tensors(folder, "model")
    found |= {_sharded_name(name): info for name, info in find_tensors(folder, "training").items()}
    tensors, stored, infos = {}, {}, {}
    for name, info in found.items():
        parameter = name.rpartition("/")[2]
        stacked = parameter in experts and parameter in found and info.shape == found[parameter].shape
        whole = Whole(info.shape, info.dtype, stacked and bool(info.shape))
        tensors[name] = whole
        for i, entry in enumerate(whole.entries(name)):
            infos[entry] = _expert(info, i) if whole.experts else info
            pieces = ((all_of(whole.entry_shape), info.file.name),)
            stored[entry] = Stored(whole.entry_shape, whole.dtype, pieces)
    path = safe_member(folder, EXTRA)
    extra = read_json(path)
    try:
        extra["optimizer"] = _unpacked(extra["optimizer"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} was not written by moesaic: its fields do not fit ({error}).") from error
    return ShardedCheckpoint(folder, 1, "one file", tensors, {}, Shards(folder, stored, infos), extra)


def _expert(info: TensorInfo, expert: int) -> TensorInfo:
    one = replace(info, shape=info.shape[1:])
    return replace(one, start=info.start + expert * one.nbytes)


def _sharded_name(name: str) -> str:
    """The inverse of what ``consolidate`` calls a moment."""
    if not name.startswith("state/"):
        return name
    parameter, _, key = name.removeprefix("state/").rpartition("/")
    return f"{PREFIX}{key}/{parameter}"


def _unpacked(packed: dict[str, Any]) -> dict[str, Any]:
    """``train/optimizer_state.py``'s record as ``merge_optimizers`` makes it."""
    groups = []
    for group in packed["groups"]:
        settings = {key: entry["value"] for key, entry in group["settings"].items()}
        groups.append({"names": group["names"], "settings": settings})
    values = {
        f"{key}/{name}": entry["value"]
        for name, entries in packed["state"].items()
        for key, entry in entries.items()
        if "tensor" not in entry
    }
    return {"kind": packed["kind"], "groups": groups, "values": values}
