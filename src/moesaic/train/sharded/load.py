"""Load a sharded checkpoint into whatever layout there is now.

>>> extra = load_sharded("runs/a/checkpoints/step-00000100", tensors, group=saving_group(range(world), rank))

Nothing depends on how the ranks that saved it shared the model: each rank reads the regions it holds now from whatever pieces
have some of them. All is read beside the model, and compared with the fingerprints, before the first element of the model
changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.distributed.checkpoint.state_dict_loader import load

from moesaic.errors import CheckpointError
from moesaic.parallel.comm import Group
from moesaic.parallel.held import Ranges
from moesaic.train.sharded.agree import as_one, together
from moesaic.train.sharded.checkpoint import ShardedCheckpoint, open_sharded
from moesaic.train.sharded.entries import Entry, Tensors, entries_of
from moesaic.train.sharded.fingerprint import add, fingerprint
from moesaic.train.sharded.plan import RegionLoadPlanner, share_out
from moesaic.train.sharded.storage import ShardedReader


def load_sharded(
    folder: str | os.PathLike[str],
    tensors: Tensors,
    *,
    group: Group,
    skip: Sequence[str] = (),
    verify: bool = True,
) -> dict[str, Any]:
    """Fill ``tensors`` in place, on every rank what it holds, and return the ``extra`` that was saved.

    Args:
        skip: beginnings of names in the checkpoint that may stay unread ("optimizer/").
        verify: hash every file first, shared over the ranks; the fingerprints of what was read are compared in any case.

    Every tensor asked for must be there, of this shape and dtype, and every tensor that is there must be asked for by a rank.
    Needs main memory for what this rank holds once more, until it is copied. Raises ``CheckpointError`` with the same sentence
    on all ranks, naming the file, tensor or expert; nothing has changed then.
    """
    share = (group.index, group.size) if verify else None
    checkpoint = together(group, "checkpoint: open", lambda: open_sharded(folder, share))
    fill_from(checkpoint, tensors, group=group, skip=skip)
    return checkpoint.extra


def fill_from(checkpoint: ShardedCheckpoint, tensors: Tensors, *, group: Group, skip: Sequence[str] = ()) -> None:
    """``load_sharded`` of a checkpoint that was opened."""
    planner = together(group, "checkpoint: open", lambda: RegionLoadPlanner(entries_of(tensors), skip))
    _read(planner, ShardedReader(checkpoint.shards), group)
    mine = together(group, "checkpoint: check", planner.fingerprints)
    found = _added(group.values(mine, what="checkpoint: check"))
    for name, number in found.items():
        if number != checkpoint.fingerprints.get(name, number):
            raise CheckpointError(
                f"{name} of {checkpoint.folder} is not what was saved: its fingerprint is {number:016x} and was "
                f"{checkpoint.fingerprints[name]:016x}. Use an older or another copy."
            )
    planner.commit()


def fingerprints(tensors: Tensors, group: Group) -> dict[str, int]:
    """Of every entry that the ranks hold together, each region counted once: the same under every layout."""
    entries = entries_of(tensors)
    regions = {name: [region for region, _ in entry.parts] for name, entry in entries.items()}
    everyone = group.values(regions, what="fingerprints")
    return _added(group.values(_counted(entries, everyone, group.index), what="fingerprints"))


def _counted(entries: Mapping[str, Entry], everyone: Sequence[Mapping[str, Any]], index: int) -> dict[str, int]:
    sums = {}
    for name, entry in entries.items():
        ranks: dict[Ranges, list[int]] = {}
        for rank, theirs in enumerate(everyone):
            for region in theirs.get(name, ()):
                ranks.setdefault(tuple((start, stop) for start, stop in region), []).append(rank)
        mine = [part.region for part in share_out(ranks, entry.shape) if part.ranks[0] == index]
        sums[name] = add(fingerprint(entry.view(region), region, entry.shape) for region in mine)
    return sums


def _added(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    sums: dict[str, list[int]] = {}
    for theirs in parts:
        for name, number in theirs.items():
            sums.setdefault(name, []).append(number)
    return {name: add(numbers) for name, numbers in sums.items()}


def _read(planner: RegionLoadPlanner, reader: ShardedReader, group: Group) -> None:
    if group.size > 1:
        with as_one(group, "checkpoint: read"):
            load({}, storage_reader=reader, planner=planner, process_group=group.handle)
        return
    # The same steps alone. torch's load would do them too, with a warning that it is alone.
    metadata = reader.read_metadata()
    planner.set_up_planner({}, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])[0]
    reader.read_data(planner.finish_plan(plan), planner).wait()
