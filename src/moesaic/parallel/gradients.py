"""Gradients of one step over all ranks: summed, never averaged, and their norm with every parameter counted once.

Losses are divided by what the whole batch holds, so a gradient is a plain sum over ranks (fieldguide 4.5: "per-token loss").
Dense parameters sum over dp. Rows of a whole ep group have come to an expert already, so experts sum over edp alone; dividing
those by anything, or summing them over dp, are the errors other systems shipped. Copies of one expert sum among themselves.
Where FSDP shards, it sums; what is left is done here, in buckets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic.layout import Axis
from moesaic.parallel.comm import Group
from moesaic.parallel.held import Held
from moesaic.parallel.world import World
from moesaic.plan.placement import Placement

BUCKET = 64 << 20  # bytes

GRID: dict[str, tuple[Axis, ...]] = {"dense": ("dp", "tp"), "experts": ("edp", "ep", "etp")}
SUMS_OVER: dict[str, Axis] = {"dense": "dp", "experts": "edp"}


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor that FSDP may have sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def sum_gradients(
    parameters: Mapping[str, nn.Parameter],
    held: Mapping[str, Held],
    world: World,
    placements: Mapping[str, Placement],
) -> None:
    """Give every rank the gradient of the whole batch for what it holds. A parameter without gradient gets zeros first.

    Args:
        placements: by name of an expert parameter, those with copies; none for others.
    """
    by_axis: dict[Axis, list[Tensor]] = {}
    for name, parameter in parameters.items():
        if parameter.grad is None:  # no rank may be missing from a sum
            parameter.grad = torch.zeros_like(parameter)
        axis = SUMS_OVER[held[name].kind]
        if axis not in held[name].cut:
            by_axis.setdefault(axis, []).append(local(parameter.grad))
    for axis, grads in by_axis.items():
        sum_in_buckets(grads, world[axis], what=f"gradients over {axis}")
    for name, placement in placements.items():
        if placement.replicated:
            grad = parameters[name].grad
            assert grad is not None
            sum_copies(local(grad), placement, world["ep"])


def sum_in_buckets(grads: Iterable[Tensor], group: Group, *, what: str) -> None:
    """All-reduce in place, small tensors together."""
    if group.size == 1:
        return
    bucket: list[Tensor] = []
    for grad in [*grads, None]:
        size = sum(g.numel() * g.element_size() for g in bucket)
        if bucket and (grad is None or grad.dtype != bucket[0].dtype or size + grad.nbytes > BUCKET):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                group.all_reduce(bucket[0], what=what)
            else:
                flat = torch.cat([g.reshape(-1) for g in bucket])
                group.all_reduce(flat, what=what)
                for g, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    g.copy_(summed.view_as(g))
            bucket = []
        if grad is not None and grad.numel():
            bucket.append(grad)


def sum_copies(grad_L: Tensor, placement: Placement, group: Group) -> None:
    """The gradient of an expert with several slots is that of all of them; every slot gets it. Dimension 0 is slots."""
    several = [e for e, slots in enumerate(placement.slots_of_expert) if len(slots) > 1]
    mine = placement.slots[group.index]
    total = grad_L.new_zeros(len(several), *grad_L.shape[1:])
    for i, expert in enumerate(several):
        for place, held in enumerate(mine):
            if held == expert:
                total[i] += grad_L[place]
    group.all_reduce(total, what="gradients of copies")
    for i, expert in enumerate(several):
        for place, held in enumerate(mine):
            if held == expert:
                grad_L[place] = total[i]


def gradient_norm(
    parameters: Mapping[str, nn.Parameter],
    held: Mapping[str, Held],
    world: World,
    placements: Mapping[str, Placement],
) -> Tensor:
    """fp64 scalar, the same on every rank: the norm over all parameters of the model, each number counted once.

    A number that several ranks hold is counted by the first of them on each axis they share, a copied expert at its first slot.
    """
    device = next(iter(parameters.values())).device
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for name, parameter in parameters.items():
        record = held[name]
        if parameter.grad is None or any(world.at[axis] for axis in GRID[record.kind] if axis not in record.cut):
            continue
        grad = local(parameter.grad)
        if name in placements and placements[name].replicated:
            grad = grad[first_slots(placements[name], world["ep"].index, grad.device)]
        squares += torch.linalg.vector_norm(grad, dtype=torch.float64).square()
    return world.everyone.all_reduce(squares, what="gradient norm").sqrt()


def first_slots(placement: Placement, rank: int, device: torch.device) -> Tensor:
    """bool (L,): slots of this rank that are the first of their expert."""
    start, stop = placement.first_slots[rank], placement.first_slots[rank + 1]
    firsts = {slots[0] for slots in placement.slots_of_expert}
    return torch.tensor([slot in firsts for slot in range(start, stop)], dtype=torch.bool, device=device)
