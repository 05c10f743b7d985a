"""What ``moesaic plan-layout`` is asked for: the settings of a preset, config or folder with options laid over them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.config import apply_overrides, from_dict, to_dict
from moesaic.cost.forecast import Training
from moesaic.cost.precision import PRECISIONS
from moesaic.errors import ConfigError, nearest
from moesaic.layout import ParallelConfig
from moesaic.models import ModelConfig
from moesaic.models.presets import PRESETS, preset
from moesaic.settings import named_settings, shape
from moesaic.train.recipes import RECIPES

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Asked:
    """What is to be laid out: settings of a training run, as far as they matter here."""

    model: ModelConfig
    parallel: ParallelConfig
    world: int
    training: Training


def asked_for(target: str, overrides: list[str], world: int, dtype: str, precision: str, zero: bool) -> Asked:
    """The settings of ``target`` with the options laid over them; what nobody said is filled in for this layout."""
    settings = apply_overrides(_settings(target), overrides)
    if isinstance(table := settings.get("model"), dict) and "vocab_size" not in table:
        table["vocab_size"] = settings.get("data", {}).get("vocab_size", 32000)
    model = from_dict(ModelConfig, settings.get("model"), where="model")
    parallel = from_dict(ParallelConfig, settings.get("parallel", {}), where="parallel")
    shape(model)  # refuses what cannot be built, before any layout of it is blamed
    numbers = {
        "batch_size": settings.get("batch_size", max(1, world // (parallel.pp * parallel.tp))),
        "accumulate": settings.get("accumulate", 4 * parallel.pp if parallel.pp > 1 else 1),
        "seq_len": settings.get("seq_len", min(4096, model.max_seq_len)),
    }
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}.")
    if numbers["seq_len"] > model.max_seq_len:
        raise ConfigError(f"seq_len={numbers['seq_len']} is longer than the {model.max_seq_len} tokens of this model.")
    training = Training(
        **numbers,
        dtype=settings.get("dtype", "bf16") if dtype == "auto" else dtype,  # type: ignore[arg-type]
        recompute=bool(settings.get("recompute", False)),
        precision=PRECISIONS[precision],
        sharded="optimizer" if zero else None,
    )
    return Asked(model, parallel, world, training)


def _settings(target: str) -> dict[str, Any]:
    path = Path(target)
    if target in PRESETS and not path.exists():
        return {"model": to_dict(preset(target))}
    if not path.exists() and target not in RECIPES:
        hint = nearest(target, [*PRESETS, *RECIPES])
        raise ConfigError(
            f'There is no preset, recipe, config file or folder "{target}".{hint} moesaic info --list shows the presets.'
        )
    from moesaic.convert.read import config_of, is_foreign  # here: presets need no converters

    if path.exists() and (path.is_dir() or path.name == "config.json"):
        folder = path if path.is_dir() else path.parent
        if is_foreign(folder):
            return {"model": to_dict(config_of(folder))}
    return named_settings(target)


def memory_size(text: str) -> int:
    """Bytes of "80GB", "79.6GiB" or "8e10". Raises ``ConfigError`` for anything else."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?I?)B?\s*", text.upper().replace("E", "e"))
    try:
        size = 0.0 if found is None else float(found[1]) * _UNITS[found[2]]
    except (KeyError, ValueError):
        size = 0.0
    if not 1 <= size < 2**63:
        raise ConfigError(f'"{text}" is no size of memory; write it as 80GB or 80GiB.')
    return int(size)
