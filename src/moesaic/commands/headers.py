"""What the files of a checkpoint hold, from their headers alone, beside what its config asks for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.aside import find_aside
from moesaic.checkpoint.native import read_header, tied_names
from moesaic.checkpoint.shards import TensorInfo, refuse_pickle
from moesaic.cost.count import stored_elements
from moesaic.errors import CheckpointError
from moesaic.models import Decoder, ModelConfig
from moesaic.train.sharded.checkpoint import ShardedCheckpoint, open_sharded

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}


@dataclass(frozen=True)
class Held:
    """Tensors of one dtype."""

    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class Headers:
    """The headers of a checkpoint.

    Attributes:
        folder: where.
        files, tensors, bytes: of the model as they lie there, quantised or not.
        dtypes: dtype -> tensors of it, the largest first.
        numbers: the model's, quantised ones counted as what they stand for, a tied head once.
        expected: what the config asks for, buffers that are saved included.
        aside: numbers that are no part of the model (multi-token prediction).
        missing, unexpected, wrong: tensors the config asks for that are not there, those it has no place for, and those of
            another shape than it says.
        leftovers: files named like parts of the model that are none.
        repeated: tensors stored beside the one the config ties them to; whether they are equal, headers do not say.
        saved_by: of a checkpoint in parts the processes that wrote it, else empty.
    """

    folder: Path
    files: int
    tensors: int
    bytes: int
    dtypes: dict[str, Held]
    numbers: int
    expected: int
    aside: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    saved_by: str = ""

    @property
    def matches(self) -> bool:
        """Whether just the tensors the config asks for are there, by name and shape, and no file of another save."""
        differ = self.missing or self.unexpected or self.wrong or self.leftovers
        return self.numbers == self.expected and not differ

    @property
    def wide(self) -> bool:
        """Whether most of it is fp32."""
        return next(iter(self.dtypes), "") == "fp32"

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "folder": str(self.folder),
            "files": self.files,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "dtypes": {name: vars(held) for name, held in self.dtypes.items()},
            "numbers": self.numbers,
            "expected": self.expected,
            "aside": self.aside,
            "matches": self.matches,
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "wrong": list(self.wrong),
            "leftovers": list(self.leftovers),
            "repeated": list(self.repeated),
            "saved_by": self.saved_by or None,
        }


def has_weights(folder: Path) -> bool:
    """Whether there is a safetensors file or an index of some. Raises ``CheckpointError`` for pickles."""
    found = any(os.path.lexists(folder / f"model.safetensors{end}") for end in ("", ".index.json"))
    if not found:
        refuse_pickle(folder)  # beside safetensors they are never opened
    return found


def native_infos(folder: Path, config: ModelConfig) -> dict[str, TensorInfo]:
    """The headers of a folder of ours."""
    return _enough(read_header(folder), folder, config)


def sharded_parts(folder: Path, config: ModelConfig) -> ShardedCheckpoint:
    """The table of a checkpoint in parts."""
    parts = open_sharded(folder, None)
    _enough(parts.model, folder, config)
    return parts


def native_headers(folder: Path, infos: dict[str, TensorInfo], model: Decoder) -> Headers:
    """Of a folder of ours."""
    from moesaic.convert.read import leftovers  # here: other targets need no converters

    aside = find_aside(folder)
    found = _headers(
        folder,
        infos,
        sum(i.numel for i in infos.values()),
        sum(i.numel for i in aside.values()),
        stored_elements(model),
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Of a tied tensor any one of its names is stored, and no other.
    stored = {next((name for name in names if name in infos), names[0]) for names in tied_names(model)}
    return replace(
        found,
        missing=tuple(name for name in shapes if name in stored and name not in infos),
        unexpected=tuple(name for name in infos if name not in stored),
        wrong=tuple(name for name, info in infos.items() if name in stored and info.shape != shapes[name]),
        leftovers=tuple(path.name for path in leftovers(folder, {info.file.name for info in infos.values()})),
    )


def sharded_headers(parts: ShardedCheckpoint, model: Decoder) -> Headers:
    """Of a checkpoint in parts; training state is not counted."""
    entries = [entry for name in parts.model for entry in parts.tensors[name].entries(name)]
    files = {file for entry in entries for _, file in parts.entries[entry].pieces}
    found = native_headers(parts.folder, parts.model, model)
    return replace(found, files=len(files), leftovers=(), saved_by=parts.layout or f"{parts.world} processes")


def foreign_headers(folder: Path) -> Headers:
    """Of a Hugging Face folder of a known family."""
    from moesaic.convert.read import survey  # here: other targets need no converters

    found = survey(folder)
    differ, apart = found.differences(), {*found.aside, *found.repeated}
    out = {raw for name in found.aside for raw in found.stored[name].raw}
    numbers = {name: torch.Size(tensor.shape).numel() for name, tensor in found.stored.items()}
    return replace(
        _headers(
            folder,
            {name: info for name, info in found.infos.items() if name not in out},
            sum(number for name, number in numbers.items() if name not in apart),
            sum(numbers[name] for name in found.aside),
            stored_elements(found.model),
        ),
        missing=tuple(differ.missing),
        unexpected=tuple(differ.unexpected),
        wrong=tuple(differ.wrong),
        leftovers=tuple(path.name for path in found.leftovers()),
        repeated=tuple(found.repeated),
    )


def _enough(infos: dict[str, TensorInfo], folder: Path, config: ModelConfig) -> dict[str, TensorInfo]:
    if config.num_layers > len(infos):  # before building thousands of empty layers
        raise CheckpointError(
            f"{folder} has {len(infos)} tensors, too few for the {config.num_layers} layers of its config."
        )
    return infos


def _headers(folder: Path, infos: dict[str, TensorInfo], numbers: int, aside: int, expected: int) -> Headers:
    return Headers(
        folder,
        len({info.file for info in infos.values()}),
        len(infos),
        sum(info.nbytes for info in infos.values()),
        _by_dtype(infos.values()),
        numbers,
        expected,
        aside,
    )


def _by_dtype(infos: Iterable[TensorInfo]) -> dict[str, Held]:
    found: dict[str, list[TensorInfo]] = {}
    for info in infos:
        found.setdefault(_NAMES.get(info.dtype, str(info.dtype).removeprefix("torch.")), []).append(info)
    held = {
        name: Held(len(some), sum(i.numel for i in some), sum(i.nbytes for i in some)) for name, some in found.items()
    }
    return dict(sorted(held.items(), key=lambda item: -item[1].bytes))
