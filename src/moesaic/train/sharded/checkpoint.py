"""A sharded checkpoint on the disk: what is in it, checked before anything of it is used.

    step-00000100/                      a model directory but for its weights
      rank-00000.safetensors            pieces of tensors, each written by one of the ranks that held it
      .metadata                         torch's pickled list of pieces (metadata.py)
      sharded.json                      logical tensors, the fingerprint of each and of every expert, the layout
      training.json                     the caller's own state
      config.json, tokenizer.json, ...  what the caller adds
      manifest.json                     bytes and sha256 of all these; written last

>>> checkpoint = open_sharded("runs/a/checkpoints/step-00000100")
>>> checkpoint.tensors["blocks.0.ffn.experts.w_in"]           # Whole(shape=(8, 64, 256), dtype=torch.float32, experts=True)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.checkpoint.atomic import settle, verify_folder
from moesaic.checkpoint.parts import FILE
from moesaic.checkpoint.shards import TensorInfo
from moesaic.checkpoint.stream import DTYPES
from moesaic.checkpoint.untrusted import read_json, safe_member, show
from moesaic.errors import CheckpointError
from moesaic.train.sharded.entries import Whole
from moesaic.train.sharded.metadata import Stored, read_metadata
from moesaic.train.sharded.storage import Shards

EXTRA = "training.json"
VERSION = 1
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ShardedCheckpoint:
    """What lies in ``folder``; no tensor has been read.

    Attributes:
        world, layout: how many ranks wrote it, and the words for how they shared the model.
        tensors: logical name -> shape, dtype, whether it is stacked experts.
        fingerprints: of every entry; of a single-file checkpoint there are none.
        shards: where each entry lies, and how it is read.
        extra: the caller's state.
    """

    folder: Path
    world: int
    layout: str
    tensors: dict[str, Whole]
    fingerprints: dict[str, int]
    shards: Shards
    extra: dict[str, Any]

    @property
    def entries(self) -> Mapping[str, Stored]:
        """Where each entry lies."""
        return self.shards.stored

    @property
    def model(self) -> dict[str, TensorInfo]:
        """The model's tensors, without training state, as headers would tell them; they lie whole in no file."""
        file = self.folder / FILE
        return {
            name: TensorInfo(whole.dtype, whole.shape, file, 0)
            for name, whole in self.tensors.items()
            if "/" not in name
        }


def open_sharded(folder: str | os.PathLike[str], share: tuple[int, int] | None = (0, 1)) -> ShardedCheckpoint:
    """Check the files and what they say of each other. ``share``: see ``verify_folder``; None compares sizes only.

    Raises ``CheckpointError`` naming what is missing, damaged, unexpected or hostile.
    """
    folder = settle(folder)
    if folder.is_dir() and not os.path.lexists(folder / FILE):
        raise CheckpointError(f"{folder} is no sharded checkpoint: it has no {FILE}.")
    files = verify_folder(folder, quick=share is None, share=share or (0, 1))
    for name in (FILE, EXTRA):
        if name not in files:
            raise CheckpointError(f"{folder / name} is not in the manifest of its checkpoint; refused.")
    path = safe_member(folder, FILE)
    record = read_json(path)
    if record.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of version {show(record.get('version'))}; this moesaic reads {VERSION}. Update moesaic."
        )
    try:
        world, layout = int(record["world"]), str(record["layout"])
        tensors, fingerprints = _read_table(record["tensors"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} was not written by moesaic: its fields do not fit ({error}).") from error
    entries = read_metadata(folder, files)
    for name, whole in tensors.items():
        for entry in whole.entries(name):
            found = entries.get(entry)
            if found is None or found.shape != whole.entry_shape or found.dtype != whole.dtype:
                raise CheckpointError(f"{path} describes {show(entry)} otherwise than the metadata beside it; refused.")
    if entries.keys() != fingerprints.keys():
        odd = sorted(entries.keys() ^ fingerprints.keys())[0]
        raise CheckpointError(f"{path} and the metadata beside it do not hold the same tensors: {show(odd)}; refused.")
    extra = read_json(safe_member(folder, EXTRA))
    return ShardedCheckpoint(folder, world, layout, tensors, fingerprints, Shards(folder, entries), extra)


def row_of(whole: Whole) -> dict[str, Any]:
    """A logical tensor as JSON."""
    return {"dtype": _NAMES[whole.dtype], "shape": list(whole.shape), "experts": whole.experts}


def describe(rows: Mapping[str, dict[str, Any]], fingerprints: Mapping[str, int], world: int, layout: str) -> str:
    """The content of ``sharded.json``. Raises ``CheckpointError`` for an expert that no rank held."""
    entries = {name: _whole(row).entries(name) for name, row in rows.items()}
    odd = {entry for parts in entries.values() for entry in parts} ^ fingerprints.keys()
    if odd:
        raise CheckpointError(
            f"No rank holds {show(min(odd))}, or not all of them as one of experts, so it cannot be saved whole."
        )
    table = {
        name: {**row, "fingerprints": [f"{fingerprints[entry]:016x}" for entry in entries[name]]}
        for name, row in rows.items()
    }
    return json.dumps({"version": VERSION, "world": world, "layout": layout, "tensors": table}, indent=1)


def _whole(row: dict[str, Any]) -> Whole:
    shape = tuple(row["shape"])
    if not all(type(size) is int and size >= 0 for size in shape) or (row["experts"] and not shape):
        raise ValueError(f"the shape {show(row['shape'])}")
    return Whole(shape, DTYPES[row["dtype"]], bool(row["experts"]))


def _read_table(table: dict[str, Any]) -> tuple[dict[str, Whole], dict[str, int]]:
    tensors, fingerprints = {}, {}
    for name, row in table.items():
        whole = _whole(row)
        if whole.experts and whole.shape[0] != len(row["fingerprints"]):
            raise ValueError(
                f"{show(name)} has {len(row['fingerprints'])} fingerprints"
            )  # before its experts are listed
        for entry, number in zip(whole.entries(name), row["fingerprints"], strict=True):
            fingerprints[entry] = int(number, 16)
        tensors[name] = whole
    return tensors, fingerprints
