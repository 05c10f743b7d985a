"""Named tensors in safetensors files: one file, or numbered shards with an index, written and read strictly.

>>> write_tensors(model.state_dict(), folder, "model", max_shard_bytes=5 * 10**9)
>>> files = find_tensors(folder, "model")            # name -> TensorInfo(dtype, shape, file), from the headers alone
>>> for name, tensor_ in read_tensors(files): ...      # owned memory, in file order

No other format is read: pickle files can run code when opened. A tensor name is never used as a file name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moesaic.checkpoint.untrusted import read_json, safe_member, show
from moesaic.errors import CheckpointError

MAX_SHARD_BYTES = 5 * 10**9
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


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
    shards: list[dict[str, torch.Tensor]] = [{}]
    sizes, seen = [0], set()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise RuntimeError(f"the tensor {name} is on the meta device: there is nothing to save")
        if tensor.numel():
            memory = memory_of(tensor)
            if memory in seen:
                continue
            seen.add(memory)
        if shards[-1] and sizes[-1] + tensor.nbytes > max_shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tensor
        sizes[-1] += tensor.nbytes
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    else:
        files = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        # Moved to the CPU shard by shard, so that a model on a GPU never has a second whole copy in memory.
        _save_file({name: _own_memory(tensor) for name, tensor in shard.items()}, folder / file)
    if len(files) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return files


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
        with safe_open(file, "numpy"):
            pass  # the library has checked the header: sizes, no overlap, no hole, no name twice
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
    infos = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = _DTYPES.get(entry["dtype"])
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
    """Raise ``CheckpointError`` if ``path`` is a pickle file by its name, or a folder that holds one."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.suffix.lower() in PICKLE_SUFFIXES:
            raise CheckpointError(
                f"{file} is refused: {file.suffix} files are pickles, which can run any code when they are opened. "
                "moesaic reads safetensors only; convert it where it comes from, or move it away."
            )


def names_in_words(names: Iterable[str], most: int = 3) -> str:
    """``"a", "b", "c" and 4 more``: the first few of a list of tensor names."""
    names = list(names)
    text = ", ".join(map(show, names[:most]))
    return f"{text} and {len(names) - most} more" if len(names) > most else text


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU and contiguous; a part of a larger memory is copied out (the library refuses overlapping parts)."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library wraps the system's error in a text: "... No space left on device (os error 28)".
        code = re.search(r"\(os error (\d+)\)", str(error))
        if not code:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


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
