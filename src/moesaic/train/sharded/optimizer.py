"""An optimizer's state as tensors of a checkpoint and JSON, by the names that its parameters have in a model of one process.

>>> packed, moments = pack_optimizer(optimizer, held)          # "optimizer/exp_avg/NAME" -> (Held, moment)
>>> whole = merge_optimizers([packed of every rank])
>>> room = optimizer_room(checkpoint, optimizer, held)         # zeros to load into; the optimizer is as it was
>>> unpack_optimizer(whole, room, optimizer, held)

``held``: name -> (``Held``, the parameter object) of all that the optimizer trains here. A moment lies on ranks as its
parameter does; counters ("step") are equal on all that have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.untrusted import show
from moesaic.errors import CheckpointError
from moesaic.parallel.held import whole
from moesaic.train.sharded.checkpoint import EXTRA, ShardedCheckpoint
from moesaic.train.sharded.entries import Tensors, local_of

PREFIX = "optimizer/"


def pack_optimizer(optimizer: torch.optim.Optimizer, held: Tensors) -> tuple[dict[str, Any], Tensors]:
    """The settings of this rank's groups as JSON, and its state as tensors. Nothing is copied."""
    names = {id(p): name for name, (_, p) in held.items()}
    groups, values, tensors = [], {}, {}
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for key, value in settings.items():
            if isinstance(value, Tensor):
                raise ValueError(f"the optimizer's {key} is a tensor; sharded checkpoints keep numbers")
        groups.append({"names": [names[id(p)] for p in group["params"]], "settings": settings})
    for p, entry in optimizer.state.items():
        name = names[id(p)]
        for key, value in entry.items():
            if not isinstance(value, Tensor):
                values[f"{key}/{name}"] = value
            elif local_of(value).shape == local_of(p).shape:
                tensors[f"{PREFIX}{key}/{name}"] = held[name][0], value
            elif not value.dim():
                tensors[f"{PREFIX}{key}/{name}"] = whole(name, (), "dense"), value
            else:
                raise ValueError(
                    f"{key} of {name} is {list(value.shape)}, neither of its parameter's shape nor a number"
                )
    return {"kind": type(optimizer).__name__, "groups": groups, "values": values}, tensors


def merge_optimizers(packed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One optimizer out of what all ranks have of it. Raises ``CheckpointError`` where they differ in more than parameters.

    Groups belong together by their "name", else by their place; a rank that has no parameter of a group may lack it.
    """
    groups: dict[str, dict[str, Any]] = {}
    place: dict[str, int] = {}
    values: dict[str, Any] = {}
    for rank, theirs in enumerate(packed):
        if theirs["kind"] != packed[0]["kind"]:
            raise CheckpointError(f"Rank 0 trains with {packed[0]['kind']} and rank {rank} with {theirs['kind']}.")
        for i, group in enumerate(theirs["groups"]):
            label = _label(group["settings"], i)
            found = groups.setdefault(label, {"names": [], "settings": group["settings"]})
            if found["settings"] != group["settings"]:
                raise CheckpointError(f"The ranks disagree on the settings of the optimizer group {show(label)}.")
            found["names"] += [name for name in group["names"] if name not in found["names"]]
            place[label] = max(place.get(label, 0), i)
        values |= theirs["values"]
    ordered = sorted(groups, key=lambda label: place[label])
    return {"kind": packed[0]["kind"], "groups": [groups[label] for label in ordered], "values": values}


def optimizer_room(checkpoint: ShardedCheckpoint, optimizer: torch.optim.Optimizer, held: Tensors) -> Tensors:
    """Zeros for all that the checkpoint has of this rank's parameters.

    Raises ``CheckpointError`` unless it is of this kind of optimizer with these parameters in these groups.
    """
    packed, where = _checked(checkpoint), checkpoint.folder
    if packed.get("kind") != type(optimizer).__name__:
        raise CheckpointError(
            f"{where} holds the state of {show(packed.get('kind'))}, but this run uses {type(optimizer).__name__}."
        )
    saved = {_label(group["settings"], i): group["names"] for i, group in enumerate(packed["groups"])}
    names = {id(p): name for name, (_, p) in held.items()}
    on_device = {}
    for i, group in enumerate(optimizer.param_groups):
        label = _label(group, i)
        for p in group["params"]:
            if names[id(p)] not in saved.get(label, ()):
                raise CheckpointError(f"{where} does not have {names[id(p)]} in the optimizer group {show(label)}.")
            # torch keeps its counters on the CPU unless the kernel reads them itself.
            on_device[names[id(p)]] = bool(group.get("capturable") or group.get("fused"))
    room: dict[str, Any] = {}
    for stored, tensor in checkpoint.tensors.items():
        key, _, name = stored.removeprefix(PREFIX).partition("/")
        if not stored.startswith(PREFIX) or name not in on_device:
            continue
        mine, p = held[name]
        if tensor.shape == mine.shape:
            room[stored] = mine, torch.zeros_like(p, dtype=tensor.dtype, requires_grad=False)
        elif not tensor.shape:
            device = p.device if on_device[name] or key != "step" else "cpu"
            room[stored] = whole(name, (), "dense"), torch.zeros((), dtype=tensor.dtype, device=device)
        else:
            raise CheckpointError(f"{where}: {stored} is {list(tensor.shape)}, which no state of {name} is.")
    return room


def unpack_optimizer(packed: dict[str, Any], room: Tensors, optimizer: torch.optim.Optimizer, held: Tensors) -> None:
    """Give the optimizer the settings in ``packed`` and the tensors of ``room``, which are its own from then on."""
    saved = {_label(group["settings"], i): group["settings"] for i, group in enumerate(packed["groups"])}
    for i, group in enumerate(optimizer.param_groups):
        for key, value in saved[_label(group, i)].items():
            if key != "params":
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    values = {f"{PREFIX}{key}": value for key, value in packed["values"].items()}
    parameters = {name: p for name, (_, p) in held.items()}
    optimizer.state.clear()
    for stored, value in [*((stored, x) for stored, (_, x) in room.items()), *values.items()]:
        key, _, name = stored.removeprefix(PREFIX).partition("/")
        if name in parameters:
            optimizer.state[parameters[name]][key] = value


def _checked(checkpoint: ShardedCheckpoint) -> dict[str, Any]:
    """What ``merge_optimizers`` made, out of a file that anybody may have written."""
    try:
        packed: dict[str, Any] = checkpoint.extra["optimizer"]
        tables = [packed, packed["values"], *(group["settings"] for group in packed["groups"])]
        lists = [group["names"] for group in packed["groups"]]
        if all(isinstance(table, dict) for table in tables) and all(isinstance(names, list) for names in lists):
            return packed
    except (KeyError, TypeError):
        pass
    raise CheckpointError(f"{checkpoint.folder / EXTRA} holds no optimizer as moesaic writes it.")


def _label(settings: dict[str, Any], place: int) -> str:
    name = settings.get("name")
    return name if isinstance(name, str) else str(place)
