"""The files of a sharded checkpoint: each rank's pieces in safetensors, written and read for PyTorch's distributed checkpoint.

PyTorch's own writer has a safetensors form that its reader cannot read, and in which two pieces of one tensor in one file
overwrite each other; its usual form is a pickle per tensor. So the files are ours; planning, gathering and ``.metadata`` are
PyTorch's. A piece is called as its tensor, with its region if it is not all of it: ``blocks.0.attention.q.weight[0:8,0:64]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from moesaic.checkpoint.atomic import sha256_of
from moesaic.checkpoint.shards import MAX_SHARD_BYTES, TensorInfo, header_of, read_tensor
from moesaic.checkpoint.stream import ShardWriter, Slot, plan_shards
from moesaic.checkpoint.untrusted import safe_member, show
from moesaic.errors import CheckpointError, disk_errors
from moesaic.parallel.held import Ranges
from moesaic.train.sharded.fingerprint import add, fingerprint
from moesaic.train.sharded.metadata import SUFFIX, Stored, as_dcp, piece_key, region_of
from moesaic.train.sharded.regions import slices, volume


class ShardedWriter(FileSystemWriter):
    """Writes this rank's pieces into ``folder``, which ``final`` is the name of for people.

    Attributes:
        digests: file name -> sha256 of what this rank wrote.
        fingerprints: of every entry; on the first rank, once all are done.
    """

    def __init__(self, folder: Path, final: Path) -> None:
        super().__init__(folder)
        self.final = final
        self.digests: dict[str, str] = {}
        self.fingerprints: dict[str, int] = {}

    def storage_meta(self) -> StorageMeta:
        """Nothing; torch would note the path of this machine."""
        return StorageMeta()

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Names of files: by the place in the group."""
        return [replace(plan, storage_data=f"rank-{i:05d}") for i, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and flush the items, with a fingerprint of each. Raises ``MoesaicError`` where the disk refuses."""
        items = {}
        for item in plan.items:
            assert item.tensor_data is not None
            region, shape = region_of(item.tensor_data.chunk), tuple(item.tensor_data.size)
            items[piece_key(item.index.fqn, region, shape)] = item, region, shape
        slots = [
            Slot(key, item.tensor_data.properties.dtype, tuple(stop - start for start, stop in region))
            for key, (item, region, _) in items.items()
            if item.tensor_data is not None
        ]
        shards = plan_shards(slots, plan.storage_data, MAX_SHARD_BYTES) if slots else []
        place = {key: (shard.file, start) for shard in shards for key, (_, start) in shard.places.items()}
        results = []
        with disk_errors(self.final), ShardWriter(Path(self.path), shards, finished=self._finished) as writer:
            for key, (item, region, shape) in items.items():
                x = planner.resolve_data(item)
                assert isinstance(x, Tensor)
                writer.write(key, x)
                info = _StorageInfo(*place[key], x.nbytes)
                results.append(WriteResult(item.index, x.nbytes, (info, fingerprint(x, region, shape))))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _finished(self, path: Path) -> None:
        self.digests[path.name] = sha256_of(path)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Add up the fingerprints of all ranks and write ``.metadata``."""
        parts: dict[str, list[int]] = {}
        for result in (result for rank in results for result in rank):
            parts.setdefault(result.index.fqn, []).append(result.storage_data[1])
        self.fingerprints = {name: add(sums) for name, sums in parts.items()}
        plain = [[replace(result, storage_data=result.storage_data[0]) for result in rank] for rank in results]
        with disk_errors(self.final):
            super().finish(metadata, plain)


class Shards:
    """The files of a checkpoint on the disk, read piece by piece.

    Args:
        stored: what its metadata says.
        infos: where each entry lies whole, if the files are not ours (``single.py``).
    """

    def __init__(
        self, folder: Path, stored: Mapping[str, Stored], infos: Mapping[str, TensorInfo] | None = None
    ) -> None:
        self.folder, self.stored, self.infos = folder, stored, infos
        self._headers: dict[str, dict[str, TensorInfo]] = {}

    def find(self, name: str, region: Ranges, file: str) -> TensorInfo:
        """Where a piece lies. Raises ``CheckpointError`` where the file has no such piece."""
        if self.infos is not None:
            return self.infos[name]
        entry = self.stored[name]
        key = piece_key(name, region, entry.shape)
        if file not in self._headers:
            self._headers[file] = header_of(safe_member(self.folder, file, SUFFIX))
        info = self._headers[file].get(key)
        if info is None or info.dtype != entry.dtype or info.shape != tuple(stop - start for start, stop in region):
            raise CheckpointError(
                f"{self.folder / file} has no {show(key)} of the dtype and shape that the metadata gives it."
            )
        return info

    def read(self, name: str) -> Tensor:
        """All of an entry, in memory of its own."""
        entry = self.stored[name]
        # Before memory is asked for: what the metadata promises must lie in files.
        found = [(region, self.find(name, region, file)) for region, file in entry.pieces]
        if len(found) == 1:
            return read_tensor(found[0][1])
        x = torch.empty(entry.shape, dtype=entry.dtype)
        for region, info in found:
            if volume(region):
                x[slices(region)] = read_tensor(info)
        return x


def read_part(info: TensorInfo, inside: Ranges) -> Tensor:
    """A region of a stored tensor; only its rows along the first dimension are read from the disk."""
    if not inside:
        return read_tensor(info)
    first, last = inside[0]
    row_bytes = info.nbytes // info.shape[0]
    rows = replace(info, shape=(last - first, *info.shape[1:]), start=info.start + first * row_bytes)
    return read_tensor(rows)[(slice(None), *slices(inside[1:]))]


class ShardedReader(FileSystemReader):
    """Reads what a load planner asks for from ``shards``."""

    def __init__(self, shards: Shards) -> None:
        super().__init__(shards.folder)
        self.shards = shards

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What was read and checked before; torch would unpickle the file."""
        return as_dcp(self.shards.stored)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every item's region into the planner's room. Raises ``CheckpointError`` naming a damaged file."""
        pieces = {
            MetadataIndex(name, [start for start, _ in region]): (name, region, file)
            for name, entry in self.shards.stored.items()
            for region, file in entry.pieces
        }
        for item in plan.items:
            name, region, file = pieces[item.storage_index]
            ends = zip(item.storage_offsets, item.lengths, strict=True)
            inside = tuple((start, start + length) for start, length in ends)
            target = planner.resolve_tensor(item)
            target.copy_(read_part(self.shards.find(name, region, file), inside))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done
