"""safetensors files written tensor by tensor, in any order, with one tensor in memory.

>>> shards = plan_shards([Slot("a", torch.bfloat16, (4, 8))], "model", max_shard_bytes=5 * 10**9)
>>> with ShardWriter(folder, shards) as writer:         # headers and places are known before the first tensor is
...     writer.write("a", tensor)                          # to its place in its file
>>> (folder / "model.safetensors.index.json").write_text(index_of(shards))   # where there are several

A file has its own name only once all its tensors are in it, it is on the disk, and the safetensors library has read its header;
before that it ends in ``.part``. In a file wider types come first, then names are sorted, as the library does it: 4-byte
numbers are aligned beside 2-byte ones, and the bytes are those ``safetensors.torch.save_file`` would have written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesaic.errors import CheckpointError

# In the order of the library, narrow first: it lays tensors out by it.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_RANK = {dtype: (rank, name) for rank, (name, dtype) in enumerate(DTYPES.items())}
PART = ".part"


@dataclass(frozen=True)
class Slot:
    """A tensor to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A file to come.

    Attributes:
        header: its first bytes, up to the data.
        places: tensor name -> its slot and the byte of the file where its data starts.
        nbytes: length of the whole file.
        data_bytes: of all its tensors.
    """

    file: str
    header: bytes
    places: dict[str, tuple[Slot, int]]
    nbytes: int

    @property
    def data_bytes(self) -> int:
        """Bytes of its tensors."""
        return self.nbytes - len(self.header)


def plan_shards(slots: Iterable[Slot], stem: str, max_shard_bytes: int) -> list[Shard]:
    """``stem.safetensors``, or files of at most ``max_shard_bytes`` of data, filled in the given order.

    A tensor larger than that gets a file of its own. Raises ``ValueError`` for a name given twice.
    """
    groups: list[list[Slot]] = [[]]
    names: set[str] = set()
    size = 0
    for slot in slots:
        if slot.name in names or slot.name == "__metadata__":
            raise ValueError(f"a tensor cannot be called {slot.name!r} here")
        names.add(slot.name)
        if groups[-1] and size + slot.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(slot)
        size += slot.nbytes
    if len(groups) == 1:
        return [_shard(f"{stem}.safetensors", groups[0])]
    return [_shard(f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _shard(file: str, slots: list[Slot]) -> Shard:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    starts = []
    for slot in sorted(slots, key=lambda s: (-_RANK[s.dtype][0], s.name.encode())):
        end = at + slot.nbytes
        header[slot.name] = {"dtype": _RANK[slot.dtype][1], "shape": list(slot.shape), "data_offsets": [at, end]}
        starts.append((slot, at))
        at = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return Shard(file, first, {slot.name: (slot, len(first) + start) for slot, start in starts}, len(first) + at)


def index_of(shards: Collection[Shard]) -> str:
    """The content of ``stem.safetensors.index.json``."""
    weight_map = {name: shard.file for shard in shards for name in shard.places}
    return json.dumps(
        {"metadata": {"total_size": sum(s.data_bytes for s in shards)}, "weight_map": weight_map}, indent=1
    )


def write_shards(folder: Path, stem: str, shards: Collection[Shard], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """All files of ``shards`` and their index. ``tensors`` is asked for one at a time. Raises ``OSError``."""
    with ShardWriter(folder, shards) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)
    if len(shards) > 1:
        (folder / f"{stem}.safetensors.index.json").write_text(index_of(shards), encoding="utf-8")


class ShardWriter:
    """Fills the files of ``shards`` in ``folder``; leaving it without an error says that all are whole.

    Args:
        done: names of files that are there already; their tensors are not wanted again.
        finished: called with each file that got its name.
    """

    def __init__(
        self,
        folder: Path,
        shards: Iterable[Shard],
        done: Collection[str] = (),
        finished: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.folder, self.finished = folder, finished
        self._shards = [shard for shard in shards if shard.file not in done]
        self._shard_of = {name: shard for shard in self._shards for name in shard.places}
        self._left = {shard.file: set(shard.places) for shard in self._shards}
        self._open: dict[str, BinaryIO] = {}

    def wants(self, name: str) -> bool:
        """Whether the tensor is still missing."""
        shard = self._shard_of.get(name)
        return shard is not None and name in self._left[shard.file]

    def write(self, name: str, tensor: Tensor) -> None:
        """Put ``tensor`` in its place. Raises ``RuntimeError`` unless it was planned so, ``OSError`` where the disk refuses."""
        if not self.wants(name):
            raise RuntimeError(f"the tensor {name} was not planned or is there already")
        shard = self._shard_of[name]
        slot, start = shard.places[name]
        if tensor.dtype != slot.dtype or tuple(tensor.shape) != slot.shape or tensor.is_meta:
            raise RuntimeError(f"{name} is {tensor.dtype} {list(tensor.shape)}, planned was {slot}")
        file = self._open.get(shard.file) or self._begin(shard)
        file.seek(start)
        _write_all(file, _bytes_of(tensor))
        left = self._left[shard.file]
        left.remove(name)
        if not left:
            self._finish(shard)

    def _begin(self, shard: Shard) -> BinaryIO:
        file = self._open[shard.file] = open(self.folder / (shard.file + PART), "w+b", buffering=0)  # noqa: SIM115
        _write_all(file, memoryview(shard.header))
        file.truncate(shard.nbytes)
        return file

    def _finish(self, shard: Shard) -> None:
        file = self._open.pop(shard.file)
        os.fsync(file.fileno())
        file.close()
        part, path = self.folder / (shard.file + PART), self.folder / shard.file
        try:
            with safe_open(part, "numpy") as found:
                if set(found.keys()) != shard.places.keys():
                    raise RuntimeError(f"{part} holds other tensors than were planned")
        except SafetensorError as error:  # what was just written is not what is there
            raise CheckpointError(
                f"{part} is damaged right after it was written: {error}. Is the disk sound?"
            ) from error
        os.replace(part, path)
        self.finished(path)

    def __enter__(self) -> ShardWriter:
        for shard in self._shards:
            if not shard.places:  # a file without tensors is whole already
                self._begin(shard)
                self._finish(shard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open.values():
            file.close()
        missing = sorted(name for left in self._left.values() for name in left)
        if kind is None and missing:
            raise RuntimeError(f"{len(missing)} planned tensors were not written, first {missing[0]}")


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data[: 2**30]) :]  # one call writes at most 2 GiB
