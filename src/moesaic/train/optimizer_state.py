"""An optimizer as plain data, keyed by parameter name: JSON for numbers, a dict of tensors for the rest, no pickle.

>>> tensors = {}
>>> packed = pack_optimizer(model, optimizer, tensors)     # packed is JSON; tensors go to a safetensors file
>>> check_optimizer(packed, model, optimizer, "training.json")
>>> unpack_optimizer(packed, tensors, model, optimizer)    # bit for bit, on whatever device each parameter is now
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moesaic.checkpoint.shards import memory_of
from moesaic.checkpoint.untrusted import show
from moesaic.errors import CheckpointError


def pack_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """The optimizer as JSON by parameter name, its tensors moved into ``tensors``.

    torch's own ``state_dict`` counts parameters, so that a reordered model would silently take over foreign moments,
    and on loading casts them to the parameter's dtype, which is not the saved one for bf16 weights with fp32 moments.
    """
    names = _names(model)
    keys: dict[Any, str] = {}

    def pack(value: Any, key: str) -> Any:
        if not isinstance(value, torch.Tensor):
            return {"value": value}
        if (
            value.numel()
        ):  # a learning rate may be one tensor shared by all groups: it is stored, and comes back, as one
            key = keys.setdefault(memory_of(value), key)
        tensors[key] = value
        return {"tensor": key}

    groups = []
    for i, group in enumerate(optimizer.param_groups):
        settings = {k: pack(v, f"group/{i}/{k}") for k, v in group.items() if k not in ("params", "param_names")}
        groups.append({"names": [names[p] for p in group["params"]], "settings": settings})
    moments = {
        names[p]: {k: pack(v, f"state/{names[p]}/{k}") for k, v in entry.items()}
        for p, entry in optimizer.state.items()
    }
    return {"kind": type(optimizer).__name__, "groups": groups, "state": moments}


def unpack_optimizer(
    packed: dict[str, Any], tensors: dict[str, torch.Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put what ``pack_optimizer`` returned, and its tensors, back into ``optimizer``: same values, same dtypes."""
    params = {name: p for p, name in _names(model).items()}

    def unpack(entry: dict[str, Any]) -> Any:
        return tensors[entry["tensor"]] if "tensor" in entry else entry["value"]

    for saved, group in zip(packed["groups"], optimizer.param_groups, strict=True):
        for key, entry in saved["settings"].items():
            value = unpack(entry)
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    by_param = {p: group for group in optimizer.param_groups for p in group["params"]}
    optimizer.state.clear()
    for name, entries in packed["state"].items():
        p = params[name]
        on_device = by_param[p].get("capturable") or by_param[p].get("fused")
        for key, entry in entries.items():
            value = unpack(entry)
            # torch keeps its step counters on the CPU unless the kernel reads them itself.
            if isinstance(value, torch.Tensor) and (key != "step" or on_device):
                value = value.to(p.device)
            optimizer.state[p][key] = value


def check_optimizer(packed: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, source: str) -> None:
    """Raise ``CheckpointError`` unless ``packed`` (from ``source``) is of this kind of optimizer over these groups."""
    names = _names(model)
    kind = packed["kind"]
    if kind != type(optimizer).__name__:
        raise CheckpointError(
            f"{source} holds the state of {show(kind)}, but this run uses {type(optimizer).__name__}."
        )
    theirs = [group["names"] for group in packed["groups"]]
    ours = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    if len(theirs) != len(ours):
        raise CheckpointError(f"{source} holds {len(theirs)} optimizer groups, but this run has {len(ours)}.")
    for i, (there, here) in enumerate(zip(theirs, ours, strict=True)):
        if there != here:
            odd = sorted(set(there) ^ set(here))
            what = f"differ in {show(odd[0])}" if odd else "hold the same parameters in another order"
            raise CheckpointError(f"The optimizer groups {i} of {source} and of this run {what}.")


def _names(model: nn.Module) -> dict[torch.Tensor, str]:
    return {p: name for name, p in model.named_parameters()}
