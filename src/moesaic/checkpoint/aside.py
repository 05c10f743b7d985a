"""Tensors that came with a model and are no part of it, left where they are on the disk until the model is saved.

>>> model.aside = Aside({"model.layers.61.eh_proj.weight": kept})     # 14 billion numbers of DeepSeek-V3, none in memory
>>> write_aside(partial, model.aside, MAX_SHARD_BYTES)                   # as aside.safetensors beside model.safetensors
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moesaic.checkpoint.shards import TensorInfo, find_tensors, read_tensor
from moesaic.checkpoint.stream import Slot, plan_shards, write_shards
from moesaic.errors import CheckpointError

STEM = "aside"


class Kept(Protocol):
    """A tensor that can be read."""

    @property
    def dtype(self) -> torch.dtype:
        """As it will be read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As it will be read."""

    @property
    def load(self) -> Callable[[], Tensor]:
        """Reads it."""


@dataclass(frozen=True)
class _InFile:
    dtype: torch.dtype
    shape: tuple[int, ...]
    info: TensorInfo

    def load(self) -> Tensor:
        return read_tensor(self.info)


class Aside:
    """Named tensors on the disk.

    Attributes:
        kept: by name.
        files: what they are read from; each must stay as it is until they have been saved elsewhere.
    """

    def __init__(self, kept: Mapping[str, Kept], files: Iterable[Path]) -> None:
        self.kept = dict(kept)
        self.files = {path: _facts(path) for path in sorted(set(files))}

    @classmethod
    def of(cls, infos: Mapping[str, TensorInfo]) -> Aside | None:
        """Tensors as their headers describe them; None for none."""
        kept = {name: _InFile(info.dtype, info.shape, info) for name, info in infos.items()}
        return cls(kept, {info.file for info in infos.values()}) if kept else None

    def lies_in(self, folder: Path) -> bool:
        """Whether any of it is read from ``folder``, so that replacing that folder moves it."""
        return any(os.path.realpath(path.parent) == os.path.realpath(folder) for path in self.files)

    @property
    def slots(self) -> list[Slot]:
        """What there is."""
        return [Slot(name, kept.dtype, tuple(kept.shape)) for name, kept in self.kept.items()]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """One at a time. Raises ``CheckpointError`` where a file is not the one that was opened."""
        for name, kept in self.kept.items():
            for path, facts in self.files.items():
                if not path.is_file() or _facts(path) != facts:
                    raise CheckpointError(
                        f"{path} changed since the model was loaded, so {name}, which is kept aside there, cannot be saved; "
                        "load the model again, or set model.aside = None to leave such tensors out."
                    )
            yield name, kept.load()


def _facts(path: Path) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def find_aside(folder: Path) -> dict[str, TensorInfo]:
    """The headers of ``aside.safetensors`` (or its shards); nothing where there is none."""
    paths = (folder / f"{STEM}.safetensors", folder / f"{STEM}.safetensors.index.json")
    return find_tensors(folder, STEM) if any(os.path.lexists(path) for path in paths) else {}


def open_aside(folder: Path) -> Aside | None:
    """What a model directory keeps aside."""
    return Aside.of(find_aside(folder))


def write_aside(folder: Path, aside: Aside, max_shard_bytes: int) -> None:
    """Write all of it, one tensor in memory. Raises ``OSError``, and ``CheckpointError`` as ``Aside.tensors``."""
    write_shards(folder, STEM, plan_shards(aside.slots, STEM, max_shard_bytes), aside.tensors())
