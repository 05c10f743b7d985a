"""A tiny Mixtral checkpoint as Hugging Face lays it out, made without transformers, and ways to look at and to spoil it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moesaic.convert.family import Layout
from moesaic.convert.write import write_hf
from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig, MoEConfig, RouterConfig

CONFIG = ModelConfig(
    vocab_size=40,
    dim=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    max_seq_len=32,
    tie_embeddings=False,
    moe=MoEConfig(num_experts=3, k=2, hidden=12, router=RouterConfig("topk", {"normalize": "chosen"})),
)
COMPANIONS = {
    "tokenizer_config.json": b'{"a":  1}\r\n',
    "chat_template.jinja": "{{ 'é' }}\n".encode(),
    "additional_chat_templates/tools.jinja": b"{{ x }}",
    "generation_config.json": b'{"eos_token_id": 2}',
    "tokenizer.model": bytes(range(256)),
}


def make_hf(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 10**9,
    layout: Layout | None = None,
    **changes: Any,
) -> Path:
    """A Hugging Face folder of a random model, as an outsider would give it: without our manifest."""
    model = build_model(replace(CONFIG, **changes), seed=0).to(dtype)
    write_hf(model, folder, layout=layout, companions=COMPANIONS, max_shard_bytes=max_shard_bytes)
    (folder / "manifest.json").unlink()
    return folder


def tensors_of(folder: Path, stem: str = "model") -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files whose names start with ``stem``, read by the library."""
    found = {}
    for path in sorted(folder.glob(f"{stem}*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(
        t.dtype == other[name].dtype and t.shape == other[name].shape and _bytes(t) == _bytes(other[name])
        for name, t in one.items()
    )


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tree(folder: Path) -> dict[str, str]:
    """Every path below ``folder``, hidden ones included, and what its content hashes to."""
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of ``config.json``; a value of ``...`` takes the key out."""
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite ``model.safetensors`` after ``change`` has had its way with the tensors."""
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def split_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    """A file with this header, saying that it has ``length`` bytes."""
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
