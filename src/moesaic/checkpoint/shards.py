"""Named tensors in safetensors files: one file, or numbered shards with an index, written and read strictly.

>>> write_tensors(model.state_dict(), folder, "model", max_shard_bytes=5 * 10**9)
>>> files = find_tensors(folder, "model")            # name -> TensorInfo(dtype, shape, file), from the headers alone
>>> for name, tensor_ in read_tensors(files): ...      # owned memory, in file order

No other format is read: pickle files can run code when opened. A tensor name is never used as a file name.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moesaic.checkpoint.stream import DTYPES, Slot, plan_shards, write_shards
from moesaic.checkpoint.untrusted import parse_json, read_json, safe_member, show
from moesaic.errors import CheckpointError

MAX_SHARD_BYTES = 5 * 10**9
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_TRAINER_STATE = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor, and the file that holds it, from which byte on."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        """Bytes of the data (the header not counted)."""
        return self.numel * self.dtype.itemsize


def write_tensors(
    tensors: Mapping[str, torch.Tensor], folder: Path, stem: str, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Write ``stem.safetensors``, or shards of at most ``max_shard_bytes`` and ``stem.safetensors.index.json``.

    Tensors that are one and the same memory (tied weights) are written once, under the first of their names. A tensor
    larger than a shard gets a shard of its own. Returns the file names. Raises ``OSError`` where the disk refuses.
    """
    kept, seen = {}, set()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise RuntimeError(f"the tensor {name} is on the meta device: there is nothing to save")
        if tensor.numel():
            memory = memory_of(tensor)
            if memory in seen:
                continue
            seen.add(memory)
        kept[name] = tensor
    shards = plan_shards((Slot(n, t.dtype, tuple(t.shape)) for n, t in kept.items()), stem, max_shard_bytes)
    write_shards(folder, stem, shards, kept.items())
    return [shard.file for shard in shards]


def memory_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two (not empty) tensors exactly if they are one and the same memory read in the same way."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def find_tensors(folder: Path, stem: str) -> dict[str, TensorInfo]:
    """Every tensor of ``stem`` in ``folder``, from the headers alone; ``CheckpointError`` names a bad file."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if os.path.lexists(single) and os.path.lexists(index):
        raise CheckpointError(f"{folder} holds both {single.name} and {index.name}, so which is meant is unclear.")
    if not os.path.lexists(index):
        if not os.path.lexists(single):
            raise CheckpointError(f"{single} is missing.")
        return header_of(safe_member(folder, single.name, ".safetensors"))
    weight_map = read_json(safe_member(folder, index.name)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index} is damaged: it has no "weight_map".')
    found: dict[str, TensorInfo] = {}
    names = {show(file): file for file in weight_map.values()}  # distinct, whatever JSON values they are
    for file in names.values():
        for name, info in header_of(safe_member(folder, file, ".safetensors")).items():
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{info.file} holds the tensor {show(name)}, which {index.name} does not place there."
                )
            found[name] = info
    for name, file in weight_map.items():
        if name not in found:
            raise CheckpointError(f"{folder / file} lacks the tensor {show(name)} that {index.name} places there.")
    return found


def header_of(file: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes in one safetensors file; no tensor data is read."""
    refuse_pickle(file)
    with _reading(file):
        if not stat.S_ISREG(file.stat().st_mode):  # a folder; or a pipe, which would block the read for ever
            raise CheckpointError(f"{file} is not a plain file; refused.")
        with safe_open(file, "numpy"):
            pass  # the library has checked the header: sizes, no overlap, no hole
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = parse_json(f.read(length), file)
    infos = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(f"{file}: the tensor {show(name)} has the unknown type {entry['dtype']}.")
        infos[name] = TensorInfo(dtype, tuple(entry["shape"]), file, 8 + length + entry["data_offsets"][0])
    return infos


def read_tensors(infos: Mapping[str, TensorInfo], device: str | torch.device = "cpu") -> Iterator[tuple[str, Any]]:
    """The tensors themselves, file by file, in memory of their own (see ``read_tensor``)."""
    for file in dict.fromkeys(info.file for info in infos.values()):
        for name, info in infos.items():
            if info.file == file:
                yield name, read_tensor(info).to(device)


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """One tensor, read into memory of its own.

    Views of a mapped file would be cheaper and treacherous: were it truncated or rewritten later (a copy over it, a network
    disk), using one would kill the process (SIGBUS) or change the weights silently. Raises ``CheckpointError``.
    """
    buffer = torch.empty(info.nbytes, dtype=torch.uint8)
    with _reading(info.file), open(info.file, "rb", buffering=0) as f:
        f.seek(info.start)
        left = memoryview(buffer.numpy())  # type: ignore[arg-type]
        while len(left):
            got = f.readinto(left)
            if not got:
                raise CheckpointError(f"{info.file} is damaged: it ends {len(left)} bytes before a tensor does.")
            left = left[got:]
    return buffer.view(info.dtype).view(info.shape)


def refuse_pickle(path: Path) -> None:
    """Raise ``CheckpointError`` if ``path`` is a pickle file by its name, or a folder that holds one.

    What Hugging Face's Trainer leaves beside a model (its own state, no weights) is passed over, and never opened.
    """
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.suffix.lower() in PICKLE_SUFFIXES and (file is path or not _TRAINER_STATE.fullmatch(file.name)):
            raise CheckpointError(
                f"{file} is refused: {file.suffix} files are pickles, which can run any code when they are opened. "
                "moesaic reads safetensors only; convert it where it comes from, or move it away."
            )


def names_in_words(names: Iterable[str], most: int = 3) -> str:
    """``"a", "b", "c" and 4 more``: the first few of a list of tensor names."""
    names = list(names)
    text = ", ".join(map(show, names[:most]))
    return f"{text} and {len(names) - most} more" if len(names) > most else text


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}.") from error
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error.strerror or error}.") from error
