"""``moesaic info``: what a model is made of."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from moesaic.checkpoint.native import load_config
from moesaic.commands.output import Json, print_json
from moesaic.config import from_dict, load_config_file, to_dict
from moesaic.cost.count import count_parameters
from moesaic.models import ModelConfig
from moesaic.settings import shape
from moesaic.train.snapshot import resolve_model_folder

_OTHER_EXPERTS = ("zero", "copy", "constant", "shared")


def info(
    model: Annotated[Positional[Path], arg(metavar="MODEL", help="Model directory, run folder, or a config file.")],
    json: Json = False,
) -> int:
    """Parameters in all and per token, by part; layers, experts and routers. Nothing is allocated.

    Examples:
      moesaic info quickstart
      moesaic info run.toml --json
    """
    config = _model_config(model)
    counts = count_parameters(shape(config))
    moe = config.moe
    facts = {
        "layers": config.num_layers,
        "sparse_layers": list(config.moe_layers),
        "dim": config.dim,
        "heads": config.num_heads,
        "kv_heads": config.kv_heads,
        "context": config.max_seq_len,
        "vocabulary": config.vocab_size,
        "experts": None if moe is None else to_dict(moe.num_experts),
        "experts_per_token": None if moe is None else to_dict(moe.k),
        **{f"{kind}_experts": None if moe is None else getattr(moe, kind) for kind in _OTHER_EXPERTS},
        "expert_width": None if moe is None else to_dict(moe.hidden),
        "router": None if moe is None else {"name": moe.router.name, **moe.router.options},
        "depth_layers": list(config.depth_layers) or None,
        "depth": None if config.depth is None else {"name": config.depth.router, "capacity": config.depth.capacity},
    }
    if json:
        parts = {p: {"total": n, "active": counts.active_parts[p]} for p, n in counts.parts.items()}
        print_json({"total": counts.total, "active": counts.active, "parts": parts, **facts, "config": to_dict(config)})
        return 0
    # How many of its k experts compute anything is the router's choice, token by token.
    free = 0 if moe is None else moe.zero + moe.copy + moe.constant
    at_most = "at most " if free else ""
    share = f"{counts.active / counts.total:.0%}"
    print(f"{counts.total:,} parameters, {at_most}{counts.active:,} of them used per token ({share})\n")
    print(f"{'part':<16}{'parameters':>16}{'per token':>16}")
    for part, number in sorted(counts.parts.items(), key=lambda item: -item[1]):
        if number:
            print(f"{part:<16}{number:>16,}{counts.active_parts[part]:>16,}")
    print()
    for name, value in facts.items():
        if value is not None and not (name.removesuffix("_experts") in _OTHER_EXPERTS and not value):
            label = "feed-forward experts" if name == "experts" and free else name.replace("_", " ")
            more = f", chosen among all, the {free} zero-computation experts included" * (name == "experts_per_token")
            print(f"{label:<22}{_plain(value)}{more if free else ''}")
    return 0


def _model_config(path: Path) -> ModelConfig:
    if path.is_file():
        data = load_config_file(path)
        return from_dict(ModelConfig, data.get("model", data), where="model")
    return load_config(resolve_model_folder(path))


def _plain(value: Any) -> str:
    return json_module.dumps(value) if isinstance(value, dict | list) else str(value)
