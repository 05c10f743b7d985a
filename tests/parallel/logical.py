"""From what ranks hold back to logical tensors: the inverse of every cut, for tests."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.parallel.held import Held
from moesaic.parallel.world import World


def gather_logical(held: Held, local: Tensor, world: World) -> Tensor:
    """The logical tensor that the ranks' ``local`` ones are boxes of.

    Fails unless every number is held somewhere and all ranks that hold one hold the same bits.
    """
    parts: list[tuple[Held, Tensor]] = [(held, local)] * world.everyone.size
    if world.everyone.size > 1:
        dist.all_gather_object(parts, (held, local.detach()))
    logical = torch.zeros(held.shape, dtype=local.dtype)
    known = torch.zeros(held.shape, dtype=torch.bool)
    for theirs, tensor in parts:
        assert (theirs.name, theirs.shape, theirs.local) == (held.name, held.shape, tuple(tensor.shape))
        for box in theirs.boxes:
            place, value = box.logical_slices, tensor[box.local_slices]
            assert torch.equal(logical[place][known[place]], value[known[place]]), f"ranks differ in {held.name}"
            logical[place], known[place] = value, True
    assert bool(known.all()), f"nobody holds a part of {held.name}"
    return logical


def cut_out(held: Held, logical: Tensor) -> Tensor:
    """The local tensor that ``held`` says lies here."""
    local = torch.full(held.local, float("nan"), dtype=logical.dtype)
    for box in held.boxes:
        local[box.local_slices] = logical[box.logical_slices]
    return local
