"""``from_pretrained`` and ``save_pretrained`` on model directories: moesaic's own strict reading and writing behind both.

Hugging Face's loader fills a tensor it does not find with random numbers and warns; ours raises ``CheckpointError``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from moesaic.checkpoint.aside import open_aside
from moesaic.checkpoint.atomic import MANIFEST, atomic_folder
from moesaic.checkpoint.native import fill_model_folder, load_model
from moesaic.checkpoint.shards import MAX_SHARD_BYTES
from moesaic.convert.companions import read_companions
from moesaic.convert.hub import UNWANTED, WANTED
from moesaic.errors import ConfigError, DataError, MoesaicError, disk_errors, nearest
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder
from moesaic.tokenizer import eos_id, load_tokenizer, pad_id

# Arguments of Hugging Face's loader: those that change nothing here, and those that only these values are allowed of.
_NO_MATTER = {
    "trust_remote_code", "low_cpu_mem_usage", "weights_only", "_from_auto", "_from_pipeline", "_fast_init", "adapter_kwargs",
    "max_memory", "offload_folder", "offload_buffers", "disable_mmap", "tqdm_class", "_commit_hash", "code_revision",
    "allow_all_kernels", "adapter_name", "proxies",
}  # fmt: skip
_ONLY: dict[str, tuple[Any, ...]] = {
    "use_safetensors": (None, True),
    "ignore_mismatched_sizes": (None, False),
    "attn_implementation": (None, "sdpa"),
    "experts_implementation": (None,),
    "quantization_config": (None,),
    "state_dict": (None,),
    "gguf_file": (None,),
    "variant": (None,),
    "key_mapping": (None,),
    "tp_plan": (None,),
    "tp_size": (None,),
    "device_mesh": (None,),
    "distributed_config": (None,),
    "fusion_config": (None,),
    "use_kernels": (None, False),
    "kernel_config": (None,),
}
HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse, in words, what Hugging Face's ``from_pretrained`` has and a model directory has not."""
    for name, value in arguments.items():
        if name in _ONLY and value not in _ONLY[name]:
            allowed = " or ".join(map(repr, _ONLY[name]))
            raise ConfigError(
                f"from_pretrained({name}={_short(value)}) does not go with a moesaic model; only {allowed} does."
            )
        if name not in _ONLY and name not in _NO_MATTER:
            known = [
                *_ONLY,
                *_NO_MATTER,
                *HUB,
                "dtype",
                "device_map",
                "verify",
                "balance",
                "expert_views",
                "subfolder",
            ]
            raise ConfigError(
                f"from_pretrained has no argument {name!r} for a moesaic model, whose shape its folder alone says."
                f"{nearest(name, known)}"
            )


def _short(value: Any) -> str:
    """For a sentence: not a whole state dict."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"<{type(value).__name__}>"


def place_of(name: str | os.PathLike[str], subfolder: str, hub: Mapping[str, Any]) -> Path:
    """The folder ``name`` means: itself, or the snapshot of a repository on the hub (``hub``: as ``snapshot_download`` has)."""
    folder = Path(name)
    if not folder.exists() and isinstance(name, str) and name.count("/") == 1:
        from huggingface_hub import snapshot_download

        given = {key: value for key, value in hub.items() if value is not None}
        folder = Path(snapshot_download(name, allow_patterns=[*WANTED, MANIFEST], ignore_patterns=UNWANTED, **given))
    return folder / subfolder if subfolder else folder


def device_of(device_map: Any) -> torch.device:
    """The one device a ``device_map`` says. Raises ``ConfigError`` for a split model, which this loader has not."""
    if isinstance(device_map, Mapping):
        places = set(map(str, device_map.values()))
        if len(places) != 1:
            raise ConfigError(
                f"device_map spreads this model over {', '.join(sorted(places)) or 'nothing'}; a moesaic model is loaded onto "
                'one device: give one, such as "cpu" or "cuda:0".'
            )
        device_map = next(iter(device_map.values()))
    if device_map is None:
        return torch.device("cpu")
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device_map={device_map!r} is no device; give one, such as 'cpu' or 'cuda:0'.") from error


def dtype_of(dtype: Any) -> torch.dtype | None:
    """A floating dtype, or None for the saved ones (``None`` and "auto")."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            f'dtype={dtype!r} is no floating dtype; give one such as "bfloat16", or "auto" for the saved ones.'
        )
    return found


def read_folder(folder: Path, dtype: torch.dtype | None, device: torch.device, verify: bool) -> Decoder:
    """The decoder of a model directory with its tokenizer and companions. Raises ``CheckpointError``."""
    model = load_model(folder, dtype, device, verify)
    model.tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    model.companions = read_companions(folder)
    return model


def generation_config(decoder: Decoder) -> GenerationConfig:
    """How moesaic itself generates: until the tokenizer's end of text."""
    try:
        end, padding = eos_id(decoder.tokenizer), pad_id(decoder.tokenizer)
    except (DataError, AttributeError):  # no tokenizer, or one without control tokens
        return GenerationConfig()
    return GenerationConfig(eos_token_id=end, pad_token_id=padding)


class Stored:
    """What ``fill_model_folder`` reads of a model: its config and its tensors under the decoder's names."""

    def __init__(self, model: Decoder, tensors: Mapping[str, Tensor]) -> None:
        self._model = model
        self.config: ModelConfig = model.config
        self.source = model.source
        self.aside = model.aside
        self._tensors = dict(tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """Name to tensor."""
        return self._tensors

    def moved_to(self, folder: Path) -> None:
        """What is kept aside lies in ``folder`` now, where that was the one it was read from."""
        if self.aside is not None and self.aside.lies_in(folder):
            self._model.aside = open_aside(folder)


def write_folder(folder: Path, stored: Stored, extra_files: Mapping[str, bytes], max_shard_size: int | str) -> None:
    """Save a model directory as ``folder``: at once where everything in it is a model's of ours, else beside what is there.

    A Trainer saves into folders that hold its own files, and its checkpoints; those stay. There the old manifest goes first and
    the new one comes last, so that a folder caught half-way is refused by every reader.
    """
    bytes_each = _bytes(max_shard_size)
    saved: Any = stored
    try:
        with atomic_folder(folder) as partial:
            fill_model_folder(partial, saved, extra_files=extra_files, max_shard_bytes=bytes_each)
        stored.moved_to(folder)
        return
    except MoesaicError:
        if not folder.is_dir() or not any(folder.iterdir()):
            raise
    with _working_folder(folder) as inside, disk_errors(folder):
        fresh = inside / "model"
        with atomic_folder(fresh) as partial:
            fill_model_folder(partial, saved, extra_files=extra_files, max_shard_bytes=bytes_each)
        (folder / MANIFEST).unlink(missing_ok=True)
        for old in folder.glob("model*.safetensors*"):  # shards and their index: another number of them may follow
            old.unlink()
        for old in folder.glob("aside*.safetensors*"):
            old.unlink()
        for file in sorted(fresh.iterdir(), key=lambda file: file.name == MANIFEST):
            os.replace(file, folder / file.name)
    stored.moved_to(folder)


@contextmanager
def _working_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder inside ``folder``, on the same disk."""
    with disk_errors(folder):
        inside = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield inside
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def _bytes(size: int | str) -> int:
    """5000000, "5MB", "5GiB" and the like."""
    if isinstance(size, int):
        return size
    units = {
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
        "KIB": 2**10,
        "MIB": 2**20,
        "GIB": 2**30,
        "TIB": 2**40,
    }
    number = size.upper().rstrip("KMGTIB ")
    unit = size.upper().removeprefix(number).strip()
    if unit not in units or not number.strip().isdigit():
        raise ConfigError(
            f'max_shard_size={size!r} is no size; write one such as "5GB", or {MAX_SHARD_BYTES} for bytes.'
        )
    return int(number) * units[unit]
