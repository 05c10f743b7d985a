"""Experts moved between ranks while a model is trained: weights and the optimiser's moments, between two steps.

>>> moved = move_experts(spread, optimizer, layer=3, new=improve(spread.placements[3], load_E))      # on all ranks alike

One all-to-all for each parameter of the layer's experts carries its rows and those of its moments from old to new slots. What
arrives waits until all has arrived; only then it is put in place, so a failure on the way leaves everything as it was. Ranks
that share an expert's numbers (its slices, FSDP's shards) each move their part among the ranks that have the same part.

| slots per rank | parameters |
|---|---|
| as many as before | the same objects, written in place: whoever holds them need not know |
| others | new ones, which take their places in the module and the optimiser; not under FSDP, which keeps the old ones |

Legend: L slots of this rank, M moves to this rank, K tensors of one parameter (itself and moments).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic.errors import ConfigError
from moesaic.experts.special import WithSpecialExperts
from moesaic.parallel.apply import Spread, make_path
from moesaic.parallel.comm import Group
from moesaic.parallel.dispatch import inside
from moesaic.parallel.experts import stack_name, stack_of
from moesaic.parallel.gradients import local
from moesaic.parallel.held import other_rows
from moesaic.plan.migration import Move, migration, migration_bytes
from moesaic.plan.placement import Placement

WHAT = "migration"  # the name of its messages among a watch's figures


@dataclass(frozen=True)
class Moved:
    """What moving one layer's experts did.

    Attributes:
        moves: slots filled anew, on all ranks of the layer. slot_bytes: of a slot on one rank, moments included.
        sent_bytes: by each rank of the ep group to others.
    """

    moves: tuple[Move, ...]
    slot_bytes: int
    sent_bytes: tuple[int, ...]


def move_experts(spread: Spread, optimizer: torch.optim.Optimizer, layer: int, new: Placement) -> Moved:
    """Lay the experts of ``layer`` out as ``new`` says. Between two steps, and by all ranks that have the layer.

    Raises ``ConfigError`` for a placement of other experts or ranks, for other numbers of slots under FSDP, and for an
    optimiser whose state cannot be told to experts; ``ValueError`` while gradients are held.
    """
    old = spread.placements.get(layer)
    if old is None:
        raise ConfigError(
            f"Layer {layer} has no experts on other ranks here, so none of them can move; set parallel.ep."
        )
    group, moe = spread.world["ep"], spread.model.moe_layers()[layer]
    stack, prefix = stack_of(moe), stack_name(moe, f"blocks.{layer}.ffn")
    nodes = spread.world.two_levels
    moves = migration(old, new, None if nodes is None else nodes[0].size)
    parts = [_Part(f"{prefix}.{name}", name, p, _state(optimizer, p)) for name, p in stack.named_parameters()]
    _check(layer, old, new, parts)
    mine = [move for move in moves if move.to_rank == group.index]
    to_slots, order = _index(stack.w_in, [move.to_slot for move in mine]), new.slots[group.index]
    held = {part.full_name: other_rows(spread.held[part.full_name], order) for part in parts}
    in_place = old.slots_per_rank == new.slots_per_rank
    with torch.no_grad():
        # All of this reads, and changes nothing.
        arrived = [_exchange(group, moves, part.tensors) for part in parts]
        if not in_place:
            stay = _index(stack.w_in, [slot for slot in range(len(order)) if slot not in {m.to_slot for m in mine}])
            grown = [
                [_grown(t, len(order), stay, to_slots, rows_M) for t, rows_M in zip(part.tensors, rows, strict=True)]
                for part, rows in zip(parts, arrived, strict=True)
            ]
            for part, tensors in zip(parts, grown, strict=True):
                _replace(stack, optimizer, part, tensors)
            special = moe.experts.num_experts - stack.num_experts
            stack.num_experts = len(order)
            if isinstance(moe.experts, WithSpecialExperts):
                moe.experts.num_experts = len(order) + special
        else:
            for part, rows in zip(parts, arrived, strict=True):
                for tensor, rows_M in zip(part.tensors, rows, strict=True):
                    tensor.index_copy_(0, to_slots, rows_M)
    spread.held.update(held)
    spread.placements[layer] = new
    exchange = inside(moe.dispatcher)
    assert exchange is not None
    exchange.placement, exchange.path = new, make_path(spread.world, new)
    slot_bytes = sum(t.shape[1:].numel() * t.element_size() for part in parts for t in part.tensors)
    return Moved(tuple(moves), slot_bytes, tuple(migration_bytes(moves, slot_bytes, group.size)))


@dataclass(frozen=True, eq=False)
class _Part:
    """One parameter of the experts and what the optimiser keeps for it, by slots."""

    full_name: str
    name: str
    parameter: nn.Parameter
    moments: dict[str, Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """(L, ...) each, sharing memory: this rank's numbers of the parameter, then its moments."""
        return [local(self.parameter).detach(), *(local(moment).detach() for moment in self.moments.values())]


def _state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimiser keeps for every number of a parameter; counters stay as they are."""
    found = {}
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if value.shape == parameter.shape:
            found[key] = value
        elif value.dim():
            raise ConfigError(
                f"The optimiser keeps {key} of shape {list(value.shape)} for experts of shape {list(parameter.shape)}: "
                "which of it belongs to which expert is not known, so experts cannot move. Set parallel.rebalance_every=0, "
                "or use AdamW."
            )
    return found


def _check(layer: int, old: Placement, new: Placement, parts: Sequence[_Part]) -> None:
    for part in parts:
        if part.parameter.grad is not None:
            raise ValueError(
                f"{part.full_name} holds a gradient, which is that of the old slots; move experts after a step"
            )
        if not isinstance(part.parameter, DTensor):
            continue
        if old.slots_per_rank != new.slots_per_rank:
            raise ConfigError(
                f"Under FSDP every rank keeps its number of expert slots, {list(old.slots_per_rank)} in layer {layer}, and the "
                f"new placement has {list(new.slots_per_rank)}; keep them, or set parallel.fsdp=false."
            )
        (placed,) = part.parameter.placements
        if placed.is_shard(0):  # type: ignore[misc]
            raise ConfigError(
                f"FSDP shards {part.full_name} by experts, because its next dimension, {part.parameter.shape[1]}, is no "
                f"multiple of the {part.parameter.device_mesh.size()} ranks with the same experts, and then they cannot move; "
                "set parallel.rebalance_every=0, parallel.fsdp=false, or another ep."
            )


def _exchange(group: Group, moves: Sequence[Move], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of each tensor (L, ...) the rows (M, ...) for the slots this rank has to fill, in the order of its moves."""
    me, x = group.index, tensors[0]
    leaving = [move for move in moves if move.from_rank == me and not move.local]  # by target, as moves are
    mine = [move for move in moves if move.to_rank == me]
    coming = sorted((i for i, move in enumerate(mine) if not move.local), key=lambda i: mine[i].from_rank)
    here = [i for i, move in enumerate(mine) if move.local]
    send = [sum(move.to_rank == rank for move in leaving) for rank in range(group.size)]
    receive = [sum(mine[i].from_rank == rank for i in coming) for rank in range(group.size)]
    leave_N, come_N = _index(x, [move.from_slot for move in leaving]), _index(x, coming)
    here_N, from_N = _index(x, here), _index(x, [mine[i].from_slot for i in here])
    found: list[Tensor] = [tensor.new_empty(len(mine), *tensor.shape[1:]) for tensor in tensors]
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # moments may be kept in another one
        alike = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        rows_NK = torch.stack([tensors[i].index_select(0, leave_N) for i in alike], dim=1)
        arrived_NK = group.all_to_all(rows_NK, send, receive, what=WHAT)
        for k, i in enumerate(alike):
            found[i].index_copy_(0, come_N, arrived_NK[:, k])
            found[i].index_copy_(0, here_N, tensors[i].index_select(0, from_N))
    return found


def _grown(tensor: Tensor, slots: int, stay: Tensor, to_slots: Tensor, rows_M: Tensor) -> Tensor:
    """(L, ...) with another number of slots: those that ``stay``, and ``rows_M`` in ``to_slots``."""
    grown = tensor.new_empty(slots, *tensor.shape[1:])
    grown.index_copy_(0, stay, tensor.index_select(0, stay))
    return grown.index_copy_(0, to_slots, rows_M)


def _replace(stack: nn.Module, optimizer: torch.optim.Optimizer, part: _Part, tensors: Sequence[Tensor]) -> None:
    """Another parameter and its moments in the place of ``part``, in the module and in the optimiser."""
    parameter = nn.Parameter(tensors[0], requires_grad=part.parameter.requires_grad)
    setattr(stack, part.name, parameter)
    for param_group in optimizer.param_groups:
        param_group["params"] = [parameter if p is part.parameter else p for p in param_group["params"]]
    state = optimizer.state.pop(part.parameter, None)
    if state is not None:
        optimizer.state[parameter] = {**state, **dict(zip(part.moments, tensors[1:], strict=True))}


def _index(like: Tensor, places: Sequence[int]) -> Tensor:
    return torch.tensor(places, dtype=torch.int64, device=like.device)
