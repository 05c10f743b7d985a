"""What a conversion reads from: a Hugging Face folder or one of ours, opened and checked, its tensors had one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moesaic.checkpoint.aside import find_aside
from moesaic.checkpoint.atomic import settle
from moesaic.checkpoint.native import Opened, open_model, target_dtypes, tied_names
from moesaic.checkpoint.shards import read_tensor
from moesaic.config import to_dict
from moesaic.convert.companions import read_companions
from moesaic.convert.coverage import Coverage, Share
from moesaic.convert.pieces import Shape
from moesaic.convert.read import is_foreign, open_folder
from moesaic.convert.storage import Stored
from moesaic.cost.count import stored_elements
from moesaic.errors import CheckpointError
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder

_SMALL = 2**24  # files up to this size are told apart by their content


@dataclass(frozen=True)
class Source:
    """A checkpoint that fits its config to the last tensor; no tensor has been read.

    Attributes:
        remembered: the family it came from and the config keys kept for it (``model.source``).
        model: without memory.
        held: our name -> dtype as stored.
        aside: tensors that are no part of the model, by the names their family has for them.
        companions: tokenizer, templates, generation settings: name -> content.
        load: our name, dtype -> the tensor, in memory of its own.
    """

    kind: Literal["hf", "moesaic"]
    folder: Path
    config: ModelConfig
    remembered: dict[str, Any] | None
    model: Decoder
    shapes: dict[str, Shape]
    held: dict[str, torch.dtype]
    aside: dict[str, Stored]
    companions: dict[str, bytes]
    coverage: Coverage
    load: Callable[[str, torch.dtype], Tensor]

    def dtypes(self, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        """Our name -> dtype in the target: as held (None) or ``dtype``; routers stay fp32."""
        return target_dtypes(self.model, self.held, dtype)

    def fingerprint(self) -> list[tuple[Any, ...]]:
        """Name, size, time and content (of a large file its header) of every file: of a changed source it differs."""
        return [_fingerprint(self.folder, path) for path in sorted(_files(self.folder))]


def open_source(folder: Path, verify: bool = True) -> Source:
    """Open either kind; ``verify`` hashes the files of one of ours against its manifest (somebody else's has none).

    Raises ``CheckpointError`` or ``ConfigError`` naming the file, tensor or key that does not fit.
    """
    folder = settle(folder)
    if not folder.is_dir():
        what = "is a file; give the folder that holds it" if folder.exists() else "does not exist"
        raise CheckpointError(f"The folder {folder} {what}.")
    return _foreign(folder) if is_foreign(folder) else _native(folder, verify)


def _foreign(folder: Path) -> Source:
    found = open_folder(folder)
    found.check_repeated()
    entries = {entry.ours: entry for entry in found.table}
    return Source(
        kind="hf",
        folder=folder,
        config=found.config,
        remembered=found.source,
        model=found.model,
        shapes={names[0]: tuple(found.shapes[names[0]]) for names in tied_names(found.model)},
        held=found.held(),
        aside={name: found.stored[name] for name in found.aside},
        companions=read_companions(folder),
        coverage=found.coverage(),
        load=lambda name, dtype: found.load(entries[name], dtype),
    )


def _native(folder: Path, verify: bool) -> Source:
    opened = open_model(folder, verify)
    return native_source(opened, lambda name: read_tensor(opened.infos[name]))


def native_source(opened: Opened, load: Callable[[str], Tensor]) -> Source:
    """A model directory of ours, or what is to be read as one. ``load``: stored name -> tensor, in memory of its own."""
    folder = opened.folder
    stored = {names[0]: name for name, names in opened.groups.items()}
    # A tied tensor counts under the first of its names, as tables do; in the order of the model, as from any other source.
    infos = {names[0]: opened.infos[stored[names[0]]] for names in tied_names(opened.model)}
    aside = find_aside(folder)
    remembered = opened.model.source
    carried = (remembered or {}).get("config")
    keys = tuple(to_dict(opened.model.config))
    experts = sum(layer.router.num_experts for layer in opened.model.moe_layers().values())
    tensors, numbers = len(infos), sum(info.numel for info in infos.values())
    size = sum(info.nbytes for info in infos.values())
    notes = tuple(carried) if isinstance(carried, dict) else ()
    return Source(
        kind="moesaic",
        folder=folder,
        config=opened.model.config,
        remembered=remembered,
        model=opened.model,
        shapes={name: info.shape for name, info in infos.items()},
        held={name: info.dtype for name, info in infos.items()},
        aside={
            name: Stored(info.dtype, info.shape, (name,), partial(read_tensor, info)) for name, info in aside.items()
        },
        companions=read_companions(folder),
        coverage=Coverage(  # opening has refused whatever is missing, unexpected or unknown
            tensors=Share(tensors, len(opened.infos)),
            parameters=Share(numbers, stored_elements(opened.model)),
            bytes=Share(size, size),
            experts=Share(experts, experts),
            config_keys=Share(len(keys) + len(notes), len(keys) + len(notes)),
            mapped=keys,
            carried=notes,
            aside=tuple(aside),
            aside_parameters=sum(info.numel for info in aside.values()),
        ),
        load=lambda name, dtype: load(stored[name]).to(dtype),
    )


def aside_tensors(aside: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """What is kept aside, one at a time."""
    for name, stored in aside.items():
        yield name, stored.load()


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.suffix in (".safetensors", ".json", ".jinja", ".txt", ".model") and path.is_file():
            yield path


def _fingerprint(folder: Path, path: Path) -> tuple[Any, ...]:
    facts = path.stat()
    with open(path, "rb") as f:
        if path.suffix == ".safetensors":
            start = f.read(8)
            content = start + f.read(min(int.from_bytes(start, "little"), _SMALL))
        else:
            content = f.read(_SMALL)
    return path.relative_to(folder).as_posix(), facts.st_size, facts.st_mtime_ns, hashlib.sha256(content).hexdigest()
