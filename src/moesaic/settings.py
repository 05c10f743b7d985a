"""From a command line to the settings of a run: what is merged, what overrides what, and what an output folder allows.

Later wins: recipe or saved run, ``--config`` file, ``--set``, then the options with a name of their own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesaic.config import apply_overrides, from_dict, load_config_file, to_dict
from moesaic.errors import ConfigError
from moesaic.models import Decoder, ModelConfig, build_model
from moesaic.train.config import TrainConfig
from moesaic.train.recipes import RECIPES
from moesaic.train.resume import load_run_config

_WHOLE = (
    "options",
    "losses",
    "loss_options",
)  # tables whose entries belong together: given anew, the old ones are gone


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the entries of ``over``; tables are merged, everything else replaced, and so are options and losses."""
    merged = dict(base)
    for key, value in over.items():
        mine = merged.get(key)
        both = isinstance(mine, dict) and isinstance(value, dict)
        merged[key] = merge(mine, value) if both and key not in _WHOLE else value  # type: ignore[arg-type]
    return merged


def override(settings: dict[str, Any], overrides: Sequence[str], *, steps: int | None, seed: int | None) -> TrainConfig:
    """The checked config of ``settings`` with ``--set`` overrides, and the options that have a name of their own, applied.

    Raises ``ConfigError`` for an unknown or impossible setting, the shape of the model included.
    """
    settings = apply_overrides(settings, overrides)
    if steps is not None:
        settings["steps"] = steps
    if seed is not None:
        settings["seed"] = seed
    config = from_dict(TrainConfig, settings)
    shape(config.model)
    return config


def shape(config: ModelConfig) -> Decoder:
    """The model without memory. Raises ``ConfigError`` for whatever cannot be built, before any text is read."""
    try:
        return build_model(config, device="meta")
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise ConfigError(f"No memory can hold this model ({str(error).splitlines()[0]}); lower its sizes.") from None


def refuse_taken(out: Path, *, resume: bool, twin: bool) -> None:
    """Stop before any text is read if ``out`` holds something that a new run would damage or be mixed up with."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"Cannot write to {out}: {there} is no folder you may write to; choose another --out.")
    parts = [out / "sparse", out / "dense"] if twin else [out]
    if not resume and any((part / "checkpoints").exists() for part in parts):
        raise ConfigError(
            f"{out} already holds a training run; add --resume to go on with it, or choose another --out."
        )
    if (out / "manifest.json").exists():
        raise ConfigError(f"{out} is a model directory, which a run would overwrite; choose another --out.")
    if twin and (out / "checkpoints").exists():
        raise ConfigError(f"{out} holds a single run, not a comparison; choose another --out.")
    if not twin and (out / "sparse" / "checkpoints").exists():
        raise ConfigError(f"{out} holds a comparison (sparse/ and dense/); add --twin, or choose another --out.")


def saved_run(out: Path, *, twin: bool) -> TrainConfig:
    """The settings of the run to resume, of the sparse one of a comparison. Raises ``ConfigError`` if there is none."""
    saved = out / "sparse" if twin else out
    if not (saved / "config.json").exists():
        refuse_taken(out, resume=True, twin=twin)
        raise ConfigError(f"There is no run in {out} to resume; leave out --resume to start one.")
    return load_run_config(saved)


def named_settings(name: str) -> dict[str, Any]:
    """The settings named: of a recipe, a config file laid over the default recipe, or a folder's ``config.json``."""
    path = Path(name)
    if name in RECIPES and not path.exists():
        recipe: dict[str, Any] = to_dict(RECIPES[name]())
        return recipe
    if path.is_dir():
        path = next(
            (p for p in (path / "config.json", path / "sparse" / "config.json") if p.exists()), path / "config.json"
        )
    data = load_config_file(path)
    if "format" in data and "model" in data:  # a model directory: no batches
        return {"model": data["model"]}
    if "model" not in data and "dim" in data:
        return {"model": data}
    if not isinstance(data.get("model", {}), dict):
        raise ConfigError(f"{path} is not a config: its model is no table of settings.")
    return merge(to_dict(RECIPES["small"]()), data)
