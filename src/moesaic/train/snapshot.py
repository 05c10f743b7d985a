"""Training checkpoints: a model directory plus everything a run needs to go on as if it had never stopped.

>>> save_snapshot(run, step=100, model=model, optimizer=optimizer, state={"best_loss": 3.1}, is_best=True)
>>> folder = latest_snapshot(run)                          # the newest that verifies; warns about damaged newer ones
>>> state = restore_snapshot(folder, model, optimizer)     # parameters, optimizer, random generators: bit for bit
>>> load_model(resolve_model_folder(run))                  # the best, else the latest

``run/checkpoints/step-00000100/`` is a model directory with ``training.safetensors`` (optimizer tensors by parameter
name, random generator states) and ``training.json`` (numbers, the caller's state). The files ``latest`` and ``best``
beside it name a folder for people and other programs; reading goes by the folders themselves, so that a kill between
writing a folder and moving a pointer loses nothing. Snapshots are ordered by a serial number, not by step: after going
back to step 100, a new step 150 is newer than the step 200 of the abandoned attempt.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesaic.checkpoint.atomic import (
    atomic_file,
    atomic_folder,
    remove_folder,
    settle,
    sweep,
    verify_folder,
)
from moesaic.checkpoint.native import Tokenizer, fill_model_folder, load_into
from moesaic.checkpoint.parts import refuse_sharded
from moesaic.checkpoint.shards import find_tensors, read_tensors, write_tensors
from moesaic.checkpoint.untrusted import read_json, safe_member, show
from moesaic.errors import CheckpointError
from moesaic.train.optimizer_state import check_optimizer, pack_optimizer, unpack_optimizer

VERSION = 1
_STEP = re.compile(r"step-\d+")
_HIDDEN = re.compile(r"\.(step-\d+)\.replaced-\d+")


def save_snapshot(
    run_folder: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    keep_last: int = 3,
    is_best: bool = False,
) -> Path:
    """Write ``run_folder/checkpoints/step-XXXXXXXX`` and return it; then move the pointers and delete old snapshots.

    ``state`` is JSON data (text keys; numbers come back exactly, tuples as lists, infinities and NaN allowed). Kept are
    the newest ``keep_last`` whole snapshots and the newest one saved with ``is_best``; nothing is deleted before the
    new one was read back and verified. Raises ``MoesaicError`` where the disk refuses; older snapshots are then intact.
    """
    if keep_last < 1:
        raise CheckpointError(f"keep_last is {keep_last}; at least 1 snapshot must be kept.")
    parent = Path(run_folder) / "checkpoints"
    sweep(parent)
    serial = next_serial(parent)
    tensors: dict[str, torch.Tensor] = {}
    training = {
        "version": VERSION,
        "serial": serial,
        "best": is_best,
        "step": step,
        "optimizer": pack_optimizer(model, optimizer, tensors),
        "state": checked_state(state),
    }
    tensors |= random_states()
    final = parent / f"step-{step:08d}"
    with atomic_folder(final, overwrite=True) as partial:  # a damaged or abandoned snapshot of this step makes way
        fill_model_folder(partial, model, tokenizer, {"training.json": training})
        write_tensors(tensors, partial, "training", max_shard_bytes=2**62)
    verify_folder(final)
    take_over(final, is_best, keep_last)
    return final


def latest_snapshot(run_folder: str | os.PathLike[str], quick: bool = False) -> Path | None:
    """The newest snapshot that verifies, or None; each damaged newer one is reported through ``warnings.warn``.

    ``quick``: see ``verify_folder``.
    """
    return next(_verified(Path(run_folder) / "checkpoints", only_best=False, quick=quick), None)


def best_snapshot(run_folder: str | os.PathLike[str], quick: bool = False) -> Path | None:
    """The newest snapshot saved with ``is_best`` that verifies, or None; damaged ones are warned about."""
    return next(_verified(Path(run_folder) / "checkpoints", only_best=True, quick=quick), None)


def newest_snapshots(run_folder: str | os.PathLike[str], count: int) -> list[Path]:
    """The ``count`` newest snapshots that verify, newest first; damaged ones are warned about."""
    return list(islice(_verified(Path(run_folder) / "checkpoints", only_best=False, quick=False), count))


def resolve_model_folder(path: str | os.PathLike[str]) -> Path:
    """The model directory meant by ``path``: one itself, a run (its best snapshot, else its latest), or a comparison
    folder (its sparse run). Raises ``CheckpointError`` where there is none, or it lies in parts.
    """
    folder = find_model_folder(path)
    refuse_sharded(folder)
    return folder


def find_model_folder(path: str | os.PathLike[str]) -> Path:
    """As ``resolve_model_folder``, for those who also read one that lies in parts."""
    path = settle(path)
    if not path.exists():
        raise CheckpointError(f"There is nothing at {path}; give a model directory or the folder of a training run.")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the model directory or training run that holds it.")
    if path.name == "checkpoints" and not (path / "checkpoints").is_dir():
        path = path.parent
    if (path / "checkpoints").is_dir():
        found = best_snapshot(path) or latest_snapshot(path)
        if found is None:
            raise CheckpointError(f"The training run {path} has no complete checkpoint yet.")
        return found
    if (path / "sparse").is_dir():
        return find_model_folder(path / "sparse")
    if (path / "metrics.jsonl").exists():
        raise CheckpointError(f"The training run {path} has no checkpoint yet.")
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"{path} is no model directory (it has no config.json), no training run (no checkpoints) and no comparison "
            "(no sparse run)."
        )
    return path


def restore_snapshot(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put everything saved in ``folder`` back into ``model``, ``optimizer`` and torch's random generators.

    Returns the caller's ``state`` with ``"step"`` added. Parameters are filled in place. All files, the architecture
    and the optimizer's groups are checked before anything changes. Raises ``CheckpointError`` saying what differs.
    """
    folder = settle(folder)
    refuse_sharded(folder)
    verify_folder(folder)
    path = safe_member(folder, "training.json")
    training = read_json(path)
    if training.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of version {show(training.get('version'))}; this moesaic reads {VERSION}. Update moesaic."
        )
    tensors = dict(read_tensors(find_tensors(folder, "training")))
    if "random/cpu" not in tensors:
        raise CheckpointError(
            f"{path.with_suffix('.safetensors')} holds no random state, so the run cannot go on as it was."
        )
    try:
        packed, state, step = training["optimizer"], training["state"], training["step"]
        check_optimizer(packed, model, optimizer, str(path))
        load_into(model, folder)
        unpack_optimizer(packed, tensors, model, optimizer)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} was not written by moesaic: its fields do not fit ({error}).") from error
    set_random_states(tensors)
    return {**state, "step": step}


def random_states() -> dict[str, torch.Tensor]:
    """Of all generators that training draws from, by name."""
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"random/cuda/{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_states(tensors: dict[str, torch.Tensor]) -> None:
    """Go on from what ``random_states`` gave."""
    torch.set_rng_state(tensors["random/cpu"])
    cuda = [key for key in tensors if key.startswith("random/cuda/")]
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(min(len(cuda), here)):
        torch.cuda.set_rng_state(tensors[f"random/cuda/{i}"], i)
    if len(cuda) != here:
        warnings.warn(
            f"The snapshot was saved with {len(cuda)} GPUs and this machine has {here}: random numbers drawn on GPUs "
            "(dropout, noise) will differ from an uninterrupted run.",
            stacklevel=3,
        )


def checked_state(state: dict[str, Any]) -> dict[str, Any]:
    """``state`` if it is JSON that comes back the same; ``TypeError`` says what in it is not."""

    def check(value: Any, where: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str):  # json would turn 3 into "3" and the resumed run would miss it
                    raise TypeError(f"{where} has the key {key!r}; snapshot state needs text keys")
                check(inner, f"{where}.{key}")
        elif isinstance(value, list | tuple):
            for inner in value:
                check(inner, where)

    check(state, "state")
    json.dumps(state)  # before anything is written: a value that is no JSON is the caller's TypeError
    return state


def newest_first(parent: Path) -> list[Path]:
    """Every snapshot folder, whole or not; one whose serial cannot be read counts as newest, so that it is reported."""
    try:
        children = list(parent.iterdir())
    except OSError:
        return []
    names = {p.name for p in children if _STEP.fullmatch(p.name)}
    names |= {match[1] for p in children if (match := _HIDDEN.fullmatch(p.name))}
    folders = [settle(parent / name) for name in names]
    return sorted(folders, key=lambda f: (_serial(f) or 2**62, f.name), reverse=True)


def next_serial(parent: Path) -> int:
    """A number above that of every snapshot in ``parent``."""
    return max((_serial(folder) for folder in newest_first(parent)), default=0) + 1


def take_over(final: Path, is_best: bool, keep_last: int) -> None:
    """Let the pointers name the new snapshot ``final`` and delete those that ``keep_last`` has no room for."""
    parent = final.parent
    atomic_file(parent / "latest", final.name + "\n")
    if is_best:
        atomic_file(parent / "best", final.name + "\n")
    _purge(parent, final, keep_last)


def _serial(folder: Path) -> int:
    serial = _training(folder).get("serial")
    return serial if isinstance(serial, int) else 0


def _training(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "training.json")
    except CheckpointError:
        return {}


def _verified(parent: Path, only_best: bool, quick: bool) -> Iterator[Path]:
    for folder in newest_first(parent):
        if only_best and _training(folder).get("best") is not True:
            continue
        try:
            verify_folder(folder, quick)
        except CheckpointError as error:
            warnings.warn(f"Passing over the damaged snapshot {folder.name}: {error}", stacklevel=3)
            continue
        yield folder


def _purge(parent: Path, new: Path, keep_last: int) -> None:
    kept, best = 0, False
    for folder in newest_first(parent):
        try:
            verify_folder(folder, quick=True)
        except CheckpointError:
            whole = False
        else:
            whole = True
        is_best = whole and not best and _training(folder).get("best") is True
        best = best or is_best
        if kept >= keep_last and not is_best and folder.name != new.name:
            remove_folder(folder)
        kept += whole
