"""The ``.metadata`` of PyTorch's distributed checkpoints, read as the hostile file it may be.

It is a pickle. PyTorch opens it with ``pickle.load``, which runs any code that is in it. Here the ten names that an honest file
uses stand for inert records made for this one reading; any other name ends it. What comes out is checked piece by piece and
copied into values of our own, and only these are trusted.

>>> stored = read_metadata(folder, files)             # entry name -> Stored
>>> dcp = as_dcp(stored)                              # what planners and readers of torch expect, built anew
"""

from __future__ import annotations

import pickle
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from moesaic.checkpoint.stream import DTYPES
from moesaic.checkpoint.untrusted import safe_member, show
from moesaic.errors import CheckpointError
from moesaic.parallel.held import Ranges
from moesaic.train.sharded.regions import all_of, disjoint, volume, within

FILE = ".metadata"
SUFFIX = ".safetensors"
_MAX_BYTES = 2**31
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}
_PASSED_ON = (
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
# Whatever a damaged or hostile pickle can make the unpickler raise.
_UNREADABLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Stored:
    """One entry of a checkpoint on the disk.

    Attributes:
        shape, dtype: of the whole tensor.
        pieces: (region, file in the folder) in the order of the metadata: without overlap, together all of it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[Ranges, str], ...]


def piece_key(name: str, region: Ranges, shape: tuple[int, ...]) -> str:
    """What a piece is called in its safetensors file: ``NAME``, or ``NAME[0:8,32:64]`` if it is not all of the tensor."""
    return name if region == all_of(shape) else f"{name}[{','.join(f'{start}:{stop}' for start, stop in region)}]"


def read_metadata(folder: Path, files: Collection[str]) -> dict[str, Stored]:
    """Every entry of the sharded checkpoint ``folder`` whose manifest lists ``files``.

    Raises ``CheckpointError`` unless the metadata is a plain description of tensors: allowed names only, every region inside
    its tensor, all of it covered, nothing twice, every file a listed safetensors file inside the folder.
    """
    path = safe_member(folder, FILE)
    if FILE not in files:
        raise CheckpointError(f"{path} is not in the manifest of its checkpoint; refused.")
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} is no plain file of a size that metadata has; refused.")
        with open(path, "rb") as f:
            data = _Reader(f).load()
    except _Forbidden as error:
        raise CheckpointError(
            f"{path} asks for {show(str(error))}, which no description of tensors needs and which could run code; refused."
        ) from None
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} while reading it.") from None
    try:
        return _checked(data, folder, files)
    except _Wrong as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None


def as_dcp(stored: Mapping[str, Stored]) -> Metadata:
    """The same in the classes of torch's planners. Where in its file a piece lies is read from the file's own header."""
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, entry in stored.items():
        chunks = [chunk_of(region) for region, _ in entry.pieces]
        tensors[name] = TensorStorageMetadata(TensorProperties(entry.dtype), torch.Size(entry.shape), chunks)
        for (_, file), chunk in zip(entry.pieces, chunks, strict=True):
            places[MetadataIndex(name, chunk.offsets)] = _StorageInfo(file, 0, 0)
    return Metadata(tensors, storage_data=places)


def chunk_of(region: Ranges) -> ChunkStorageMetadata:
    """A region as torch describes it."""
    sizes = torch.Size([stop - start for start, stop in region])
    return ChunkStorageMetadata(torch.Size([start for start, _ in region]), sizes)


def region_of(chunk: ChunkStorageMetadata) -> Ranges:
    """The region that torch describes so."""
    return tuple((start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


class _Forbidden(Exception):
    """A name outside the allow-list."""


class _Wrong(Exception):
    """A value that no writer of ours wrote."""


class _Reader(pickle.Unpickler):
    """Knows the names below and nothing else; none of them is the class or function that it is for ``pickle.load``."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        # Made anew for every reading: a pickle can also set attributes of the classes it names.
        self._known: dict[tuple[str, str], Any] = {
            (module, name): type(name, (_Record,), {}) for module, names in _RECORDS.items() for name in names
        }
        self._known |= {("torch", name): dtype for name, dtype in _DTYPES.items()}
        for module, name in _PASSED_ON:
            self._known[module, name] = lambda value: value

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise _Forbidden(f"{module}.{name}") from None


class _Record:
    """An object by its class's name, with the state it was saved with."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _checked(data: Any, folder: Path, files: Collection[str]) -> dict[str, Stored]:
    tensors = _field(data, "Metadata", "state_dict_metadata", dict)
    places = _places(_field(data, "Metadata", "storage_data", dict), folder, files)
    stored = {}
    for name, record in tensors.items():
        if type(name) is not str or not name or not name.isprintable():
            raise _Wrong(f"a tensor is called {show(name)}")
        shape = _sizes(_field(record, "TensorStorageMetadata", "size", tuple), name)
        properties = getattr(_field(record, "TensorStorageMetadata", "properties", object), "state", None)
        dtype = properties[0] if type(properties) is tuple and properties else None
        if not isinstance(dtype, torch.dtype):
            raise _Wrong(f"{show(name)} has no dtype")
        pieces = []
        for chunk in _field(record, "TensorStorageMetadata", "chunks", list):
            offsets = _sizes(_field(chunk, "ChunkStorageMetadata", "offsets", tuple), name)
            sizes = _sizes(_field(chunk, "ChunkStorageMetadata", "sizes", tuple), name)
            if not len(offsets) == len(sizes) == len(shape):
                raise _Wrong(f"a part of {show(name)} has another number of dimensions")
            region = tuple((offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
            if not within(region, all_of(shape)):
                raise _Wrong(f"a part of {show(name)} lies outside it")
            file = places.pop((name, offsets), None)
            if file is None:
                raise _Wrong(f"a part of {show(name)} lies in no file, or in one that holds it twice")
            pieces.append((region, file))
        regions = [region for region, _ in pieces]
        covered = sum(volume(region) for region, _ in disjoint(regions))
        if not regions or covered != volume(all_of(shape)) or covered != sum(map(volume, regions)):
            raise _Wrong(f"the parts of {show(name)} overlap or are not all of it")
        stored[name] = Stored(shape, dtype, tuple(pieces))
    if places:
        raise _Wrong(f"a file holds a part of {show(next(iter(places))[0])} that the tensor has not")
    return stored


def _places(data: dict[Any, Any], folder: Path, files: Collection[str]) -> dict[tuple[str, tuple[int, ...]], str]:
    """(entry, first element of the piece) -> file."""
    places: dict[tuple[str, tuple[int, ...]], str] = {}
    found: set[str] = set()
    for index, info in data.items():
        name = _field(index, "MetadataIndex", "fqn", str)
        offsets = _sizes(_field(index, "MetadataIndex", "offset", tuple), name)
        file = _field(info, "_StorageInfo", "relative_path", object)
        if not isinstance(file, str) or file not in found:
            safe_member(folder, file, SUFFIX)
            if file not in files:
                raise _Wrong(f"it places {show(name)} in {show(file)}, which the manifest does not list")
            found.add(file)
        if places.setdefault((name, offsets), file) != file:
            raise _Wrong(f"it places a part of {show(name)} in two files")
    return places


def _field(record: Any, kind: str, name: str, of: type) -> Any:
    state = record.state if isinstance(record, _Record) and type(record).__name__ == kind else None
    value = state.get(name) if type(state) is dict else None
    if value is None or (of is not object and type(value) is not of):
        raise _Wrong(f"a {kind} has no {name}")
    return value


def _sizes(values: tuple[Any, ...], name: str) -> tuple[int, ...]:
    if not all(type(value) is int and 0 <= value < 2**62 for value in values):
        raise _Wrong(f"{show(name)} has a size or place that is no number of elements")
    return values
