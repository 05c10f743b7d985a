"""The snapshot of one process, read by many: every rank takes its boxes of each tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.shards import find_tensors, read_tensors
from moesaic.checkpoint.untrusted import read_json, safe_member, show
from moesaic.errors import CheckpointError
from moesaic.parallel.comm import Group
from moesaic.parallel.gradients import local
from moesaic.parallel.held import Held
from moesaic.train.sharded.agree import together
from moesaic.train.sharded.entries import Tensors
from moesaic.train.snapshot import VERSION


def restore_whole(
    folder: Path, tensors: Tensors, trained: Tensors, optimizer: torch.optim.Optimizer, group: Group
) -> dict[str, Any]:
    """Fill ``tensors`` and the state of ``optimizer`` from the snapshot ``folder``; returns the caller's state with "step".

    Args:
        tensors, trained: see ``restore_sharded_snapshot``. group: of all ranks, which succeed or fail together.

    Raises ``CheckpointError`` where something is missing or of another shape or dtype; nothing has changed then.
    """

    def read() -> tuple[dict[str, Tensor], dict[Tensor, dict[str, Any]], dict[str, Any]]:
        path = safe_member(folder, "training.json")
        training = read_json(path)
        if training.get("version") != VERSION:
            raise CheckpointError(
                f"{path} is of version {show(training.get('version'))}; this moesaic reads {VERSION}. Update moesaic."
            )
        found = dict(read_tensors(find_tensors(folder, "model")))
        moments = dict(read_tensors(find_tensors(folder, "training")))
        cut = {name: _part(found, name, held, x, folder) for name, (held, x) in tensors.items()}
        state: dict[Tensor, dict[str, Any]] = {}
        try:
            packed = training["optimizer"]
            if packed["kind"] != type(optimizer).__name__:
                raise CheckpointError(
                    f"{path} holds the state of {show(packed['kind'])}, but this run uses {type(optimizer).__name__}."
                )
            for name, (held, x) in trained.items():
                for key, entry in packed["state"].get(name, {}).items():
                    value = moments[entry["tensor"]] if "tensor" in entry else entry["value"]
                    if isinstance(value, Tensor) and value.shape == held.shape and value.dim():
                        value = _like(x, _boxes(value, held))
                    state.setdefault(x, {})[key] = value
            return cut, state, {**training["state"], "step": training["step"]}
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} was not written by moesaic: its fields do not fit ({error}).") from error

    cut, state, saved = together(group, "checkpoint: read", read)
    with torch.no_grad():
        for name, (_, x) in tensors.items():
            local(x).copy_(cut[name])
    optimizer.state.clear()
    for x, entry in state.items():
        optimizer.state[x].update(entry)
    return saved


def _part(found: dict[str, Tensor], name: str, held: Held, x: Tensor, folder: Path) -> Tensor:
    tensor = found.get(name)
    if tensor is None:
        raise CheckpointError(
            f"{folder} has no tensor {name}, which this model needs; it may be of another architecture."
        )
    if tuple(tensor.shape) != held.shape or tensor.dtype != x.dtype:
        raise CheckpointError(
            f"{folder}: {name} is {list(tensor.shape)} of {tensor.dtype}, and this model's is {list(held.shape)} of {x.dtype}; "
            "resume with the model it was trained as."
        )
    return _boxes(tensor, held)


def _boxes(tensor: Tensor, held: Held) -> Tensor:
    """What is held of a logical tensor, in the shape it is held in."""
    part = tensor.new_zeros(held.local)
    for box in held.boxes:
        part[box.local_slices] = tensor[box.logical_slices]
    return part


def _like(parameter: Tensor, part: Tensor) -> Tensor:
    """The local values as state of a parameter, sharded as it is."""
    state = torch.zeros_like(parameter, requires_grad=False)
    local(state).copy_(part)
    return state
