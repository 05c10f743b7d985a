"""From what ranks hold back to logical tensors: the inverse of every cut, for tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.parallel.held import Held
from moesaic.parallel.world import World


def gather_logical(held: Mapping[str, Held], local: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """The logical tensors that the ranks' ``local`` ones are boxes of, by name.

    Fails unless every number is held somewhere and all ranks that hold one hold the same bits.
    """
    mine = {name: (held[name], tensor.detach()) for name, tensor in local.items()}
    parts = [mine] * world.everyone.size
    if world.everyone.size > 1:
        dist.all_gather_object(parts, mine)
    return {name: _put_together([part[name] for part in parts]) for name in mine}


def _put_together(parts: list[tuple[Held, Tensor]]) -> Tensor:
    first, example = parts[0]
    logical = torch.zeros(first.shape, dtype=example.dtype)
    known = torch.zeros(first.shape, dtype=torch.bool)
    for held, tensor in parts:
        assert (held.name, held.shape, held.local) == (first.name, first.shape, tuple(tensor.shape))
        for box in held.boxes:
            place, value = box.logical_slices, tensor[box.local_slices]
            assert torch.equal(logical[place][known[place]], value[known[place]]), f"ranks differ in {held.name}"
            logical[place], known[place] = value, True
    assert bool(known.all()), f"nobody holds a part of {first.name}"
    return logical


def cut_out(held: Held, logical: Tensor) -> Tensor:
    """The local tensor that ``held`` says lies here."""
    local = torch.full(held.local, float("nan"), dtype=logical.dtype)
    for box in held.boxes:
        local[box.local_slices] = logical[box.logical_slices]
    return local
