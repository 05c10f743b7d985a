"""The routing trace on disk: the plans of a run as safetensors, one file a step, readable by any tool.

>>> save_trace("trace/step-00000010.safetensors", {0: plan0, 1: plan1}, {"step": 10})
>>> plans, info = load_trace("trace/step-00000010.safetensors")

A tensor is named ``layer/field``; the header's metadata hold one JSON text with the static numbers of each plan and the
caller's ``info``. Expert ids are stored in the smallest integer that holds them, weights in fp32; ``token_N`` of per-token
plans and choices equal to the experts are not stored. Scores (``gate``) are kept on request only: they are E/K times larger.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from moesaic.errors import CheckpointError, ConfigError, disk_errors
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan

_FORMAT = "moesaic-trace-1"


def save_trace(
    path: str | Path,
    plans: Mapping[int, RoutingPlan | SoftPlan],
    info: Mapping[str, Any] | None = None,
    *,
    keep_gate: bool = False,
) -> None:
    """Write the plans of one forward, by layer, atomically. ``info`` is any JSON-able table (step, file, prompt, ...)."""
    tensors: dict[str, Tensor] = {}
    headers: dict[str, dict[str, Any]] = {}
    for layer, plan in plans.items():
        plan = plan.detach()
        headers[str(layer)] = _header(plan)
        for name, tensor in _fields(plan, keep_gate).items():
            # A copy: layers share valid_T, and safetensors refuses tensors that share memory.
            tensors[f"{layer}/{name}"] = tensor.detach().cpu().contiguous().clone()
    text = json.dumps({"plans": headers, "info": dict(info or {})})
    path = Path(path)
    partial = path.with_name(f".{path.name}.incomplete-{os.getpid()}")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(save(tensors, metadata={"format": _FORMAT, "trace": text}))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def load_trace(path: str | Path) -> tuple[dict[int, RoutingPlan | SoftPlan], dict[str, Any]]:
    """Read what ``save_trace`` wrote. Raises ``CheckpointError`` if the file is missing, damaged or something else."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no routing trace {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a routing trace: {error}.") from None
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is a safetensors file but not a routing trace of this version ({_FORMAT}).")
    plans: dict[int, RoutingPlan | SoftPlan] = {}
    try:
        trace = json.loads(metadata["trace"])
        for layer, header in trace["plans"].items():
            prefix = f"{layer}/"
            fields = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
            plans[int(layer)] = _rebuild(header, fields)
        info: dict[str, Any] = trace["info"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is a routing trace with a damaged header: {error!r}.") from None
    return plans, info


class TraceWriter:
    """Keeps every n-th forward's plans of a run in a folder.

    >>> writer = TraceWriter("run/trace", every=100)
    >>> writer.add(step, output.plans)
    """

    def __init__(self, folder: str | Path, every: int = 1, keep_gate: bool = False) -> None:
        if every < 1:
            raise ConfigError(f"every={every} must be at least 1: plans are kept every n-th step.")
        self.folder, self.every, self.keep_gate = Path(folder), every, keep_gate

    def add(self, step: int, plans: Mapping[int, RoutingPlan | SoftPlan], **info: Any) -> bool:
        """Store the plans of this step if its turn has come; returns whether it did."""
        if step % self.every:
            return False
        path = self.folder / f"step-{step:08d}.safetensors"
        save_trace(path, plans, {"step": step, **info}, keep_gate=self.keep_gate)
        return True


def _header(plan: RoutingPlan | SoftPlan) -> dict[str, Any]:
    if isinstance(plan, SoftPlan):
        return {"kind": "soft", "num_experts": plan.num_experts}
    return {
        "kind": "rows",
        "num_tokens": plan.num_tokens,
        "num_experts": plan.num_experts,
        "per_token": plan.per_token,
    }


def _fields(plan: RoutingPlan | SoftPlan, keep_gate: bool) -> dict[str, Tensor]:
    fields: dict[str, Tensor] = {}
    if isinstance(plan, SoftPlan):
        fields.update(dispatch=plan.dispatch_GTS, combine=plan.combine_GTS)
    else:
        small = torch.uint8 if plan.num_experts < 256 else torch.int16 if plan.num_experts < 32768 else torch.int32
        fields.update(expert=plan.expert_N.to(small), weight=plan.weight_N)
        if plan.per_token is None:
            fields["token"] = plan.token_N.to(torch.int32)
        if not torch.equal(plan.choice_N, plan.expert_N):
            fields["choice"] = plan.choice_N.to(small)
        if plan.input_weight_N is not None:
            fields["input_weight"] = plan.input_weight_N
    if plan.valid_T is not None:
        fields["valid"] = plan.valid_T
    if keep_gate and plan.gate is not None:
        fields.update(logits=plan.gate.logits_TE, probs=plan.gate.probs_TE)
    return fields


def _rebuild(header: dict[str, Any], fields: dict[str, Tensor]) -> RoutingPlan | SoftPlan:
    gate = Gate(fields["logits"], fields["probs"]) if "logits" in fields else None
    valid_T = fields.get("valid")
    if header["kind"] == "soft":
        return SoftPlan(fields["dispatch"], fields["combine"], header["num_experts"], valid_T, gate)
    expert_N = fields["expert"].long()
    k = header["per_token"]
    token_N = fields["token"].long() if k is None else torch.arange(header["num_tokens"]).repeat_interleave(k)
    choice_N = fields["choice"].long() if "choice" in fields else expert_N
    for name, tensor_N in (("weight", fields["weight"]), ("token", token_N), ("choice", choice_N)):
        if tensor_N.shape != expert_N.shape:
            raise ValueError(f"{len(expert_N)} rows of experts but {len(tensor_N)} of {name}")
    for name, ids_N, last in (
        ("expert", expert_N, header["num_experts"]),
        ("token", token_N, header["num_tokens"] - 1),
    ):
        if len(ids_N) and not 0 <= int(ids_N.min()) <= int(ids_N.max()) <= last:
            raise ValueError(f"{name} ids outside 0 to {last}")
    return RoutingPlan(
        token_N,
        expert_N,
        fields["weight"],
        choice_N,
        header["num_tokens"],
        header["num_experts"],
        k,
        fields.get("input_weight"),
        valid_T,
        gate,
    )
