"""Who writes what, and who reads what: the planners that PyTorch's distributed checkpoint asks.

Saving: every rank offers the regions it holds; the first rank cuts them so that none overlap, checks that they are all of every
tensor, and gives each to one rank that holds it, the one with the fewest bytes so far. Loading: every rank reads the regions it
needs from whatever pieces there are into room of its own; the model changes only when all ranks have all of it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moesaic.checkpoint.shards import names_in_words
from moesaic.checkpoint.untrusted import show
from moesaic.errors import CheckpointError
from moesaic.parallel.held import Ranges
from moesaic.train.sharded.entries import Entry
from moesaic.train.sharded.fingerprint import add, fingerprint
from moesaic.train.sharded.metadata import chunk_of, region_of
from moesaic.train.sharded.regions import all_of, disjoint, shift, slices, volume, within


@dataclass(frozen=True)
class _Owned:
    """A region and the ranks (places in the group) that hold all of it."""

    region: Ranges
    ranks: tuple[int, ...]


def share_out(offers: Mapping[Ranges, Sequence[int]], shape: Sequence[int]) -> list[_Owned]:
    """The regions in ``offers`` (with the ranks that hold each) cut so that none overlap."""
    boxes = list(offers)
    # Of a tensor without elements there is one region, and it has to be somewhere.
    cut = disjoint(boxes) or [(box, i) for i, box in enumerate(boxes) if box == all_of(shape)]
    return [_Owned(region, tuple(offers[boxes[i]])) for region, i in cut]


class RegionSavePlanner(SavePlanner):
    """Plans the saving of ``entries``, what this rank holds."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing: the entries came with the planner."""

    def create_local_plan(self) -> SavePlan:
        """Everything that is here."""
        return SavePlan(
            [
                _write_item(entry.name, region, entry.shape, entry.dtype)
                for entry in self.entries.values()
                for region in dict.fromkeys(region for region, _ in entry.parts)
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Each region once. Raises ``CheckpointError`` where ranks disagree on a tensor or hold only some of it."""
        facts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        offers: dict[str, dict[Ranges, list[int]]] = {}
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                data, name = item.tensor_data, item.index.fqn
                assert data is not None
                fact = tuple(data.size), data.properties.dtype
                if facts.setdefault(name, fact) != fact:
                    raise CheckpointError(f"The ranks disagree on {show(name)}: {facts[name]} or {fact}.")
                offers.setdefault(name, {}).setdefault(region_of(data.chunk), []).append(rank)
        tensors: dict[str, Any] = {}
        parts: list[tuple[str, _Owned]] = []
        for name, (shape, dtype) in facts.items():
            owned = share_out(offers[name], shape)
            held, wanted = sum(volume(part.region) for part in owned), volume(all_of(shape))
            if held != wanted:
                raise CheckpointError(
                    f"The ranks hold {held} of the {wanted} elements of {show(name)}, so it cannot be saved whole."
                )
            tensors[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), [])
            tensors[name].chunks.extend(chunk_of(part.region) for part in owned)
            parts += [(name, part) for part in owned]
        items: list[list[WriteItem]] = [[] for _ in all_plans]
        load = [0] * len(all_plans)
        for name, part in sorted(parts, key=lambda found: len(found[1].ranks)):  # what one rank alone holds comes first
            shape, dtype = facts[name]
            writer = min(part.ranks, key=lambda rank: load[rank])
            load[writer] += volume(part.region) * dtype.itemsize
            items[writer].append(_write_item(name, part.region, shape, dtype))
        return [replace(plan, items=mine) for plan, mine in zip(all_plans, items, strict=True)], Metadata(tensors)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """As decided."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The memory that holds an item, wherever it lies."""
        assert write_item.tensor_data is not None
        return self.entries[write_item.index.fqn].view(region_of(write_item.tensor_data.chunk))


def _write_item(name: str, region: Ranges, shape: Sequence[int], dtype: torch.dtype) -> WriteItem:
    chunk = chunk_of(region)
    data = TensorWriteData(chunk, TensorProperties(dtype), torch.Size(shape))
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class RegionLoadPlanner(LoadPlanner):
    """Plans the loading of ``entries``, the memory to fill on this rank.

    Args:
        skip: beginnings of names that may stay unread.
    """

    def __init__(self, entries: Mapping[str, Entry], skip: Sequence[str] = ()) -> None:
        self.entries, self.skip = entries, tuple(skip)
        self.metadata: Metadata | None = None
        # Regions of an entry that this rank needs, without overlap, and room for each.
        self.room: dict[str, dict[Ranges, Tensor]] = {}
        self._counted: list[tuple[str, Ranges]] = []

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """What there is to read."""
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """What this rank needs. Raises ``CheckpointError`` where the checkpoint has not that, or another shape or dtype."""
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata
        missing = [name for name in self.entries if name not in stored]
        if missing:
            raise CheckpointError(f"The checkpoint lacks {names_in_words(missing)}.")
        items: list[ReadItem] = []
        for name, entry in self.entries.items():
            there = stored[name]
            assert isinstance(there, TensorStorageMetadata)
            if tuple(there.size) != entry.shape:
                raise CheckpointError(f"{name} is {list(there.size)} in the checkpoint and {list(entry.shape)} here.")
            if there.properties.dtype != entry.dtype:
                raise CheckpointError(
                    f"{name} is {there.properties.dtype} in the checkpoint and {entry.dtype} here; "
                    "resume with the precision it was trained in."
                )
            self.room[name] = {
                region: torch.empty([stop - start for start, stop in region], dtype=entry.dtype)
                for region, _ in disjoint([region for region, _ in entry.parts])
            }
            chunks = [chunk_of(region) for region in self.room[name]]
            items += create_read_items_for_chunk_list(name, there, chunks)
        # For the first rank: every entry asked for, those without elements as well.
        return LoadPlan(items, planner_data={name: list(regions) for name, regions in self.room.items()})

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Checks that all is read, and gives every region to one rank that counts it in the fingerprint."""
        assert self.metadata is not None
        wanted: dict[str, dict[Ranges, list[int]]] = {}
        for rank, plan in enumerate(global_plan):
            for name, regions in plan.planner_data.items():
                offers = wanted.setdefault(name, {})
                for region in regions:
                    offers.setdefault(region, []).append(rank)
        unread = [n for n in self.metadata.state_dict_metadata if n not in wanted and not n.startswith(self.skip)]
        if unread:
            raise CheckpointError(f"The checkpoint holds {names_in_words(unread)}, which nothing here reads.")
        counted: list[list[tuple[str, Ranges]]] = [[] for _ in global_plan]
        for name, offers in wanted.items():
            there = self.metadata.state_dict_metadata[name]
            assert isinstance(there, TensorStorageMetadata)
            owned = share_out(offers, there.size)
            elements, all_elements = sum(volume(part.region) for part in owned), there.size.numel()
            if elements != all_elements:
                raise CheckpointError(f"Only {elements} of the {all_elements} elements of {name} are read by any rank.")
            for part in owned:
                counted[part.ranks[0]].append((name, part.region))
        return [replace(plan, planner_data=mine) for plan, mine in zip(global_plan, counted, strict=True)]

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """As decided."""
        self._counted = central_plan.planner_data
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """There are no objects in our checkpoints."""
        raise CheckpointError(f"The checkpoint holds {show(read_item.dest_index.fqn)}, which is no tensor; refused.")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The room for what an item reads."""
        offsets = read_item.dest_index.offset
        assert offsets is not None
        for region, room in self.room[read_item.dest_index.fqn].items():
            if tuple(start for start, _ in region) == tuple(offsets):
                ends = zip(read_item.dest_offsets, read_item.lengths, strict=True)
                return room[tuple(slice(start, start + length) for start, length in ends)]
        raise ValueError(f"no room for {read_item.dest_index}")

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: it was copied into its room."""

    def fingerprints(self) -> dict[str, int]:
        """Of what this rank counts, by entry; those of all ranks add up to the entries' own."""
        sums: dict[str, list[int]] = {}
        for name, counted in self._counted:
            shape = self.entries[name].shape
            region, room = next((r, x) for r, x in self.room[name].items() if within(counted, r))
            inside = slices(shift(counted, [start for start, _ in region]))
            sums.setdefault(name, []).append(fingerprint(room[inside], counted, shape))
        return {name: add(parts) for name, parts in sums.items()}

    def commit(self) -> None:
        """Copy what was read into the memory of the entries."""
        for name in list(self.room):
            for region, room in self.room.pop(name).items():
                self.entries[name].fill(region, room)
