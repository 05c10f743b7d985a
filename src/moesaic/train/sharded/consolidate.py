"""Make a sharded checkpoint a single-file one again, in one process and without torch.distributed.

>>> consolidate("runs/a/checkpoints/step-00000100", "my-model")              # a model directory, ready for ``moesaic convert``
>>> consolidate(folder, folder)                                              # in its own place: a run of one process resumes

Tensor by tensor: in memory are the largest one, its experts together, and a piece of it. What is written was compared with its
fingerprint, and is the same as one process would have saved.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.atomic import MANIFEST, atomic_folder, verify_folder
from moesaic.checkpoint.native import open_model
from moesaic.checkpoint.parts import FILE
from moesaic.checkpoint.shards import MAX_SHARD_BYTES
from moesaic.checkpoint.stream import Slot, plan_shards, write_shards
from moesaic.checkpoint.untrusted import safe_member
from moesaic.errors import CheckpointError
from moesaic.models.decoder import Decoder
from moesaic.train.sharded.checkpoint import EXTRA, ShardedCheckpoint, open_sharded
from moesaic.train.sharded.fingerprint import fingerprint
from moesaic.train.sharded.metadata import FILE as METADATA
from moesaic.train.sharded.optimizer import PREFIX
from moesaic.train.sharded.regions import all_of


def consolidate(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Write the sharded checkpoint ``folder`` as the model directory ``out``, which may be ``folder`` itself.

    With its training state, where there is one: ``out`` is then also a snapshot that ``restore_snapshot`` reads. Raises
    ``CheckpointError`` where a file is damaged, a tensor is not what was saved, or the tensors do not fit the config;
    ``MoesaicError`` where the disk refuses or ``out`` holds files that are not ours. ``out`` is as before then.
    """
    checkpoint = open_sharded(folder)
    folder, out = checkpoint.folder, Path(out)
    opened = open_model(folder, infos=checkpoint.model)
    infos, order = opened.infos, list(opened.groups)
    with atomic_folder(out) as partial:
        for name in _other_files(checkpoint):
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(safe_member(folder, name), path)
        shards = plan_shards((Slot(n, infos[n].dtype, infos[n].shape) for n in order), "model", max_shard_bytes)
        write_shards(partial, "model", shards, stream_tensors(checkpoint, order))
        if "optimizer" in checkpoint.extra:
            names = {name: _snapshot_name(name) for name in checkpoint.tensors if "/" in name}
            slots = (Slot(names[n], checkpoint.tensors[n].dtype, checkpoint.tensors[n].shape) for n in names)
            tensors = ((names[name], x) for name, x in stream_tensors(checkpoint, names))
            write_shards(partial, "training", plan_shards(slots, "training", 2**62), tensors)
            training = {**checkpoint.extra, "optimizer": _pack(checkpoint, opened.model)}
            (partial / EXTRA).write_text(json.dumps(training, indent=1), encoding="utf-8")
    return out


def stream_tensors(checkpoint: ShardedCheckpoint, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The logical tensors ``names``, one in memory at a time, experts stacked in their order.

    Raises ``CheckpointError`` naming the tensor or expert that is not what was saved.
    """
    shards = checkpoint.shards
    for name in names:
        whole = checkpoint.tensors[name]
        entries = whole.entries(name)
        x = torch.empty(whole.shape, dtype=whole.dtype) if whole.experts else None
        for expert, entry in enumerate(entries):
            part = shards.read(entry)
            number = fingerprint(part, all_of(part.shape), part.shape)
            if number != checkpoint.fingerprints[entry]:
                raise CheckpointError(
                    f"{entry} of {checkpoint.folder} is not what was saved: its fingerprint is {number:016x} and was "
                    f"{checkpoint.fingerprints[entry]:016x}. Use an older or another copy."
                )
            if x is None:
                x = part
            else:
                x[expert] = part
        assert x is not None
        yield name, x


def _other_files(checkpoint: ShardedCheckpoint) -> list[str]:
    """What is copied as it is: config, tokenizer, tensors kept aside."""
    taken = {file for stored in checkpoint.entries.values() for _, file in stored.pieces}
    listed = verify_folder(checkpoint.folder, quick=True)
    return sorted(listed - taken - {FILE, EXTRA, METADATA, MANIFEST})


def _snapshot_name(name: str) -> str:
    """How ``train/optimizer_state.py`` calls a moment; other training state keeps its name."""
    if not name.startswith(PREFIX):
        return name
    key, _, parameter = name.removeprefix(PREFIX).partition("/")
    return f"state/{parameter}/{key}"


def _pack(checkpoint: ShardedCheckpoint, model: Decoder) -> dict[str, Any]:
    """The optimizer as ``train/optimizer_state.py`` packs it, parameters in the order of a model of one process."""
    packed = checkpoint.extra["optimizer"]
    order = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    state: dict[str, dict[str, Any]] = {}
    for name in checkpoint.tensors:
        if name.startswith(PREFIX):
            key, _, parameter = name.removeprefix(PREFIX).partition("/")
            state.setdefault(parameter, {})[key] = {"tensor": _snapshot_name(name)}
    try:
        for name, value in packed["values"].items():
            key, _, parameter = name.partition("/")
            state.setdefault(parameter, {})[key] = {"value": value}
        groups = [
            {
                "names": sorted(group["names"], key=lambda name: order[name]),
                "settings": {key: {"value": value} for key, value in group["settings"].items()},
            }
            for group in packed["groups"]
        ]
        return {"kind": packed["kind"], "groups": groups, "state": state}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint.folder / EXTRA} does not fit the model beside it: {type(error).__name__} {error}."
        ) from error
