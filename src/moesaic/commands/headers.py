"""What the files of a checkpoint hold, from their headers alone, beside what its config asks for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.aside import find_aside
from moesaic.checkpoint.native import read_header
from moesaic.checkpoint.shards import TensorInfo, find_tensors, refuse_pickle
from moesaic.checkpoint.untrusted import read_json
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
    saved_by: str = ""

    @property
    def matches(self) -> bool:
        """Whether there is as much as the config asks for."""
        return self.numbers == self.expected

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


def foreign_infos(folder: Path, config: ModelConfig) -> dict[str, TensorInfo]:
    """The headers of a Hugging Face folder."""
    return _enough(find_tensors(folder, "model"), folder, config)


def native_headers(folder: Path, infos: dict[str, TensorInfo], model: Decoder) -> Headers:
    """Of a folder of ours."""
    aside = find_aside(folder)
    return _headers(
        folder,
        infos,
        sum(i.numel for i in infos.values()),
        sum(i.numel for i in aside.values()),
        stored_elements(model),
    )


def sharded_headers(parts: ShardedCheckpoint, model: Decoder) -> Headers:
    """Of a checkpoint in parts; training state is not counted."""
    entries = [entry for name in parts.model for entry in parts.tensors[name].entries(name)]
    files = {file for entry in entries for _, file in parts.entries[entry].pieces}
    found = native_headers(parts.folder, parts.model, model)
    return replace(found, files=len(files), saved_by=parts.layout or f"{parts.world} processes")


def foreign_headers(folder: Path, infos: dict[str, TensorInfo], model: Decoder) -> Headers:
    """Of a Hugging Face folder of a known family."""
    from moesaic.convert.families import FAMILIES  # here: other targets need no converters
    from moesaic.convert.keys import Keys
    from moesaic.convert.storage import stored_tensors

    data = read_json(folder / "config.json")
    family, keys = FAMILIES[data["model_type"]], Keys(data, str(folder / "config.json"))
    config = family.read(keys)
    stored = stored_tensors(infos, data.get("quantization_config"))
    sizes = {
        name: torch.Size(tensor.shape).numel()
        for name, tensor in stored.items()
        if not family.ignored.fullmatch(name) and not (config.tie_embeddings and name == "lm_head.weight")
    }
    aside = [name for name in sizes if family.aside(name, config, keys.carried)]
    kept = sum(sizes[name] for name in aside)
    out = {raw for name in aside for raw in stored[name].raw}
    mine = {name: info for name, info in infos.items() if name not in out}
    return _headers(folder, mine, sum(sizes.values()) - kept, kept, stored_elements(model))


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
