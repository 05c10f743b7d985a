"""Sharded checkpoints of a training run, in the same folders and the same order as those of one process.

>>> group = saving_group(range(world), rank)                    # background.py
>>> packed, moments = pack_optimizer(optimizer, trained)
>>> save_sharded_snapshot(run, 100, {**model, **moments}, {"best_loss": 3.1}, optimizer=packed, group=group, files=files)
>>> folder = newest_checkpoint(run, group)                     # of either form; damaged ones are passed over
>>> state = restore_sharded_snapshot(folder, model, optimizer, trained, group=group)

``run/checkpoints/step-00000100`` beside those of ``train/snapshot.py``: a serial number in ``training.json`` orders both kinds.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesaic.checkpoint.aside import Aside
from moesaic.checkpoint.atomic import sweep, verify_folder
from moesaic.checkpoint.native import Tokenizer, config_record
from moesaic.checkpoint.parts import is_sharded
from moesaic.config import to_dict
from moesaic.errors import CheckpointError, disk_errors
from moesaic.parallel.comm import Group
from moesaic.train.sharded.agree import first_says, together
from moesaic.train.sharded.checkpoint import EXTRA, ShardedCheckpoint, open_sharded
from moesaic.train.sharded.entries import Tensors
from moesaic.train.sharded.load import fill_from
from moesaic.train.sharded.optimizer import merge_optimizers, optimizer_room, unpack_optimizer
from moesaic.train.sharded.save import save_sharded
from moesaic.train.sharded.single import open_single
from moesaic.train.snapshot import VERSION, checked_state, newest_first, next_serial, take_over


def save_sharded_snapshot(
    run_folder: str | os.PathLike[str],
    step: int,
    tensors: Tensors,
    state: dict[str, Any],
    *,
    optimizer: dict[str, Any],
    group: Group,
    files: Mapping[str, bytes | Mapping[str, Any]] | None = None,
    layout: str = "",
    aside: Aside | None = None,
    keep_last: int = 3,
    is_best: bool = False,
) -> Path:
    """As ``save_snapshot`` of one process, by all ranks: the new checkpoint is read back before an old one is deleted.

    Args:
        tensors: parameters, buffers, ``pack_optimizer``'s moments and random states that this rank holds; "random/cpu" (the
            same on all ranks) is what a run of one process goes on with.
        state: JSON data; the first rank's counts. optimizer: of every rank, what ``pack_optimizer`` gave.
        files: ``model_files``. layout, aside: see ``save_sharded``.
    """
    parent = Path(run_folder) / "checkpoints"

    def number() -> int:
        if keep_last < 1:
            raise CheckpointError(f"keep_last is {keep_last}; at least 1 snapshot must be kept.")
        checked_state(state)
        sweep(parent)
        return next_serial(parent)

    serial = first_says(group, "checkpoint: number", number)
    merged = merge_optimizers(group.values(optimizer, what="checkpoint: optimizer"))
    training = {
        "version": VERSION,
        "serial": serial,
        "best": is_best,
        "step": step,
        "optimizer": merged,
        "state": state,
    }
    final = save_sharded(
        parent / f"step-{step:08d}", tensors, training, group=group, files=files, layout=layout, aside=aside
    )
    _verify(final, group, "checkpoint: read back")

    def settle() -> None:
        with disk_errors(parent):
            take_over(final, is_best, keep_last)

    first_says(group, "checkpoint: clear up", settle)
    return final


def model_files(model: nn.Module, tokenizer: Tokenizer | None = None) -> dict[str, bytes | Mapping[str, Any]]:
    """The files that make a checkpoint's folder a model directory, but for its weights."""
    files: dict[str, bytes | Mapping[str, Any]] = {
        "config.json": config_record(to_dict(model.config), getattr(model, "source", None))
    }
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer.to_str().encode()
    return files


def newest_checkpoint(run_folder: str | os.PathLike[str], group: Group) -> Path | None:
    """The newest checkpoint of a run that verifies, sharded or not, the same on all ranks; None where there is none.

    The ranks share the reading. The first one warns about each damaged newer checkpoint.
    """
    parent = Path(run_folder) / "checkpoints"
    for name in first_says(group, "checkpoint: look", lambda: [folder.name for folder in newest_first(parent)]):
        try:
            _verify(parent / name, group, "checkpoint: look")
        except CheckpointError as error:
            if group.index == 0:
                warnings.warn(f"Passing over the damaged snapshot {name}: {error}", stacklevel=2)
            continue
        return parent / name
    return None


def _verify(folder: Path, group: Group, what: str) -> None:
    together(group, what, lambda: verify_folder(folder, share=(group.index, group.size)))


def restore_sharded_snapshot(
    folder: str | os.PathLike[str],
    tensors: Tensors,
    optimizer: torch.optim.Optimizer,
    trained: Tensors,
    *,
    group: Group,
    skip: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Fill ``tensors`` and the state of ``optimizer`` and return the caller's ``state`` with ``"step"`` added.

    ``folder`` may also be a snapshot of one process. ``tensors``: all but the optimizer's state that this rank holds.
    ``trained``: those of them that the optimizer trains, the parameter objects themselves. ``skip``: see ``load_sharded``.
    Random states come into ``tensors`` as everything else; the caller sets them. Raises ``CheckpointError`` as
    ``load_sharded``; nothing has changed then.
    """
    stacked = [name for name, (held, _) in tensors.items() if held.kind == "experts"]
    experts = {name for theirs in group.values(stacked, what="checkpoint: experts") for name in theirs}

    def look() -> tuple[ShardedCheckpoint, Tensors, dict[str, Any], int]:
        share = (group.index, group.size)
        sharded = is_sharded(folder)
        checkpoint = open_sharded(folder, share) if sharded else open_single(folder, experts, share)
        state, step = checkpoint.extra.get("state"), checkpoint.extra.get("step")
        if checkpoint.extra.get("version") != VERSION or not isinstance(state, dict) or not isinstance(step, int):
            raise CheckpointError(f"{checkpoint.folder / EXTRA} is not that of a training run, or of another version.")
        return checkpoint, optimizer_room(checkpoint, optimizer, trained), state, step

    checkpoint, room, state, step = together(group, "checkpoint: open", look)
    fill_from(checkpoint, {**tensors, **room}, group=group, skip=skip)
    unpack_optimizer(checkpoint.extra["optimizer"], room, optimizer, trained)
    return {**state, "step": step}
