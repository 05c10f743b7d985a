"""What a run may change when it is resumed, and what it takes over from its last checkpoint.

>>> changed = check_run(wanted, folder)     # ConfigError for a change that needs a new run
>>> corpus = load_corpus(wanted.data, wanted.seed, tokenizer=saved_tokenizer(folder))

Model, text, seed, batches and arithmetic make a run what it is: changed half-way, its record would describe a run that never
took place. Length, optimiser and everything that only watches may change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moesaic.checkpoint.atomic import verify_folder
from moesaic.config import from_dict, to_dict
from moesaic.errors import CheckpointError, ConfigError
from moesaic.tokenizer import load_tokenizer
from moesaic.train.config import TrainConfig
from moesaic.train.snapshot import newest_first

_TOKENIZER = "tokenizer.json"
_FIXED = ("model", "data", "seed", "seq_len", "batch_size", "accumulate", "dtype")
# Where the same tokens lie and how they are fetched; that they are the same is checked by their fingerprint, or that of
# their shards, when the run is restored.
_FREE = ("data.cache_dir", "data.sources", "data.prefetch", "data.retries")


def load_run_config(folder: str | Path) -> TrainConfig:
    """The config a run was started with. Raises ``CheckpointError`` if the folder is no run."""
    path = Path(folder) / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a training run: it has no config.json.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}.") from None
    if isinstance(data, dict) and "format" in data:
        raise CheckpointError(f"{folder} is a model directory, not a training run; name the folder of a run.")
    return from_dict(TrainConfig, data, where=f"{path}: config")


def check_run(wanted: TrainConfig, folder: str | Path) -> list[str]:
    """The changes of ``wanted`` against the config saved in the run ``folder``, such as "steps from 100 to 200".

    Empty for a folder without config or checkpoints: nothing was trained there that a change could falsify. Raises
    ``ConfigError`` for the first change that a run in progress cannot make.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists() or not any((folder / "checkpoints").glob("step-*")):
        return []
    changes = list(_differences(to_dict(load_run_config(folder)), to_dict(wanted)))
    for name, old, new in changes:
        if name.split(".")[0] in _FIXED and name not in _FREE:
            raise ConfigError(
                f"{name} cannot change from {_show(old)} to {_show(new)} when {folder} is resumed; "
                "start a new run in another folder for that."
            )
    return [f"{name} from {_show(old)} to {_show(new)}" for name, old, new in changes]


def saved_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer in the newest whole checkpoint of the run in ``folder``; None where there is none."""
    for found in newest_first(Path(folder) / "checkpoints"):
        try:  # of the rest the sizes: all its bytes are read, and damage reported, when the run itself is restored
            verify_folder(found, only=(_TOKENIZER,))
        except CheckpointError:
            continue
        return load_tokenizer(found) if (found / _TOKENIZER).exists() else None
    return None


def _differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield where, old, new
        return
    for key in dict.fromkeys((*old, *new)):
        yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)


def _show(value: Any) -> str:
    text = json.dumps(value)
    return "unset" if value is None else text if len(text) <= 60 else text[:57] + "..."
