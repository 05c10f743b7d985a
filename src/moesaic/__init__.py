"""moesaic: Mixture-of-Experts Transformers, from building and training to running and understanding them.

>>> import moesaic as mo
>>> layer = mo.MoE(dim=512, hidden=1024, experts=64, k=8, router="topk")   # y, plan = layer(x)
>>> model = mo.load("runs/first")               # out = model(ids): out.logits, out.plans, out.cache
>>> text = mo.generate(model, "Once upon", max_new_tokens=50)
>>> with mo.trace(model) as t: model(ids)       # t.plans by layer
>>> with mo.edit(model, layer=3, knockout=[5]): model(ids)
>>> mo.save(model, "folder")                    # format="hf" or "gguf" for other people's programs

Everything else is reachable by its folder, for example ``moesaic.plan``, ``moesaic.routing``, ``moesaic.train``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.native import empty_model, load_model, save_model
from moesaic.convert.companions import read_companions, tokenizer_settings
from moesaic.convert.hub import resolve
from moesaic.convert.read import is_foreign, read_model
from moesaic.convert.write import write_hf
from moesaic.errors import ConfigError, MoesaicError, one_of
from moesaic.experts import MoE
from moesaic.infer.generate import generate
from moesaic.integrations.hook import install
from moesaic.lens import edit, trace
from moesaic.models import Decoder, ModelConfig, MoEConfig, Output, RouterConfig, build_model, dense_twin
from moesaic.plan import RoutingPlan, SoftPlan
from moesaic.tokenizer import load_tokenizer
from moesaic.train.snapshot import resolve_model_folder

__version__ = "0.1.0"

install()  # Hugging Face's Auto classes read our folders, whenever transformers is imported

__all__ = [
    "ConfigError",
    "Decoder",
    "MoE",
    "MoEConfig",
    "ModelConfig",
    "MoesaicError",
    "Output",
    "RouterConfig",
    "RoutingPlan",
    "SoftPlan",
    "build_model",
    "dense_twin",
    "edit",
    "generate",
    "load",
    "save",
    "trace",
]


def load(path: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Any:
    """A model with its tokenizer (``model.tokenizer``, None if the folder has none), in evaluation mode.

    Args:
        path: a model directory, a run folder (its best checkpoint), a comparison folder (its sparse run), a Hugging Face folder
            of a known family (``moesaic.convert.families``), or as a string "owner/name[@revision]" on the Hugging Face hub.
        dtype: dtype of the parameters; routers stay fp32. None keeps the saved one.

    Raises ``CheckpointError`` for a folder that is missing, damaged, foreign or in parts, ``ConfigError`` for a config that is
    not understood.
    """
    folder = resolve(path)
    if is_foreign(folder):
        model = read_model(folder, dtype, device)
    else:
        folder = resolve_model_folder(folder)
        model = load_model(folder, dtype=dtype, device=device)
        model.eval()
    model.tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    model.companions = read_companions(folder)
    return model


def save(model: Any, folder: str | Path, format: str = "moesaic", kind: str = "f16") -> None:
    """Write a model atomically, with the tokenizer and what else came with it.

    Args:
        folder: of "gguf" the file.
        format: "moesaic" holds everything; "hf" is the checkpoint of a Hugging Face family, which needs no moesaic to load;
            "gguf" is a file for llama.cpp.
        kind: number type of a GGUF file: f32, f16, bf16, q8_0, q4_0 or mxfp4.

    Raises ``ConfigError`` for an unknown format or a model it cannot hold, ``MoesaicError`` if the disk refuses.
    """
    one_of("format", format, ("moesaic", "hf", "gguf"))
    model = _whole(model)
    companions = dict(model.companions)
    if model.tokenizer is not None:
        companions = {**tokenizer_settings(model.tokenizer), **companions}
        companions["tokenizer.json"] = model.tokenizer.to_str().encode()
    if format == "hf":
        write_hf(model, Path(folder), companions=companions)
    elif format == "gguf":
        _save_gguf(model, Path(folder), kind, companions)
    else:
        companions.pop("tokenizer.json", None)
        save_model(model, folder, tokenizer=model.tokenizer, extra_files=companions)


def _whole(model: Any) -> Decoder:
    """The decoder, out of Hugging Face's wrapper of it. Raises ``ConfigError`` unless it has its tensors and no others."""
    inner = model if isinstance(model, Decoder) else getattr(model, "model", None)
    if not isinstance(inner, Decoder):
        raise ConfigError(
            f"save takes a moesaic model, not {type(model).__name__}; of an adapted one merge the adapters first."
        )
    strangers = sorted(inner.state_dict().keys() ^ empty_model(inner.config, Path("model")).state_dict().keys())
    if strangers:
        raise ConfigError(
            f"This model has or lacks tensors its config knows nothing of ({strangers[0]}); merge its adapters first "
            "(model = peft_model.merge_and_unload())."
        )
    return inner


def _save_gguf(model: Any, file: Path, kind: Any, companions: dict[str, bytes]) -> None:
    from moesaic.convert.gguf import export_gguf  # an optional package behind it

    with tempfile.TemporaryDirectory() as words:
        for name, content in companions.items():
            if "/" not in name:
                (Path(words) / name).write_bytes(content)
        has_words = "tokenizer.json" in companions
        export_gguf(model, file, kind=kind, tokenizer_folder=Path(words) if has_words else None)
