"""moesaic: Mixture-of-Experts Transformers, from building and training to running and understanding them.

>>> import moesaic as mo
>>> layer = mo.MoE(dim=512, hidden=1024, experts=64, k=8, router="topk")   # y, plan = layer(x)
>>> model = mo.load("runs/first")               # out = model(ids): out.logits, out.plans, out.cache
>>> text = mo.generate(model, "Once upon", max_new_tokens=50)
>>> with mo.trace(model) as t: model(ids)       # t.plans by layer
>>> with mo.edit(model, layer=3, knockout=[5]): model(ids)
>>> mo.save(model, "folder")

Everything else is reachable by its folder, for example ``moesaic.plan``, ``moesaic.routing``, ``moesaic.train``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.native import load_model, save_model
from moesaic.convert.companions import read_companions
from moesaic.convert.read import is_foreign, read_model
from moesaic.convert.write import write_hf
from moesaic.errors import ConfigError, MoesaicError, one_of
from moesaic.experts import MoE
from moesaic.infer.generate import generate
from moesaic.lens import edit, trace
from moesaic.models import Decoder, ModelConfig, MoEConfig, Output, RouterConfig, build_model, dense_twin
from moesaic.plan import RoutingPlan, SoftPlan
from moesaic.tokenizer import load_tokenizer
from moesaic.train.snapshot import resolve_model_folder

__version__ = "0.1.0"

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
        path: a model directory, a Hugging Face folder of a known family (``moesaic.convert.families``), a run folder (its best
            checkpoint) or a comparison folder (its sparse run).
        dtype: dtype of the parameters; routers stay fp32. None keeps the saved one.

    Raises ``CheckpointError`` for a missing, damaged or foreign folder, ``ConfigError`` for a config that is not understood.
    """
    folder = Path(path)
    if is_foreign(folder):
        model = read_model(folder, dtype, device)
    else:
        folder = resolve_model_folder(path)
        model = load_model(folder, dtype=dtype, device=device)
        model.eval()
    model.tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    model.companions = read_companions(folder)
    return model


def save(model: Any, folder: str | Path, format: str = "moesaic") -> None:
    """Write a model directory atomically, with the tokenizer and what else came with the model.

    Args:
        format: "moesaic" holds everything; "hf" is the checkpoint of a Hugging Face family, which needs no moesaic to load.

    Raises ``ConfigError`` for an unknown format or a model no family can hold, ``MoesaicError`` if the disk refuses.
    """
    one_of("format", format, ("moesaic", "hf"))
    companions = dict(model.companions)
    if model.tokenizer is not None:
        companions["tokenizer.json"] = model.tokenizer.to_str().encode()
    if format == "hf":
        write_hf(model, Path(folder), companions=companions)
    else:
        companions.pop("tokenizer.json", None)
        save_model(model, folder, tokenizer=model.tokenizer, extra_files=companions)
