"""Experts spread anew by their load: replicas for the busiest, ranks evenly filled (EPLB), never worse than what there is.

EPLB is DeepSeek's published algorithm (github.com/deepseek-ai/EPLB, ``eplb.py``; fieldguide 4.8): groups of experts are packed
onto nodes, within a node the busiest expert gets one more replica until its slots are used up, then slots are packed onto
ranks. The load of a rank is the sum of load / replicas over its slots, which is what ``Placement.choose`` makes of it where
replicas lie on different ranks and tokens are many and alike everywhere.

>>> average = LoadAverage(num_experts=64)
>>> average.update(counts_E)                                   # each step
>>> new = improve(current, average.load_E.tolist())            # the same object if nothing better was found

All of it is plain arithmetic on the host, the same on every rank that is given the same numbers.

Legend: L layers, E experts, P ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import CheckpointError, ConfigError
from moesaic.plan.placement import Placement
from moesaic.plan.settle import exchanged, settled


def eplb(
    weights_LE: Sequence[Sequence[float]], slots: int, groups: int, nodes: int, ranks: int
) -> tuple[Placement, ...]:
    """DeepSeek's placements of all layers; every rank has slots / ranks slots.

    Its ``phys_to_log`` is ``expert_of_slot``, its ``log_to_phys`` ``slots_of_expert``, its counts ``replicas_E``.

    Args:
        weights_LE: tokens of each expert. slots: physical experts, a multiple of ``ranks`` and at least E. groups: of experts
            that should share a node (those that group-limited routing chooses together); where ``nodes`` does not divide
            them, nodes are ignored. ranks: a multiple of ``nodes``.

    Raises ``ConfigError`` where these do not fit.
    """
    E = len(weights_LE[0]) if weights_LE else 0
    if ranks < 1 or slots % ranks or slots < E:
        raise ConfigError(
            f"EPLB needs a multiple of {ranks} ranks as slots, at least one per expert ({E}), not {slots}."
        )
    if groups < 1 or E % groups or nodes < 1 or ranks % nodes:
        raise ConfigError(
            f"EPLB needs equal groups of experts and equal nodes; {groups} groups of {E} experts or {nodes} nodes of {ranks} "
            "ranks are not."
        )
    if groups % nodes:
        groups, nodes = 1, 1
    room = [slots // ranks] * ranks
    return tuple(Placement(_arrange(_checked(load_E, E), room, groups, nodes), E) for load_E in weights_LE)


def initial(num_experts: int, ranks: int, replicas: int = 0) -> Placement:
    """Where experts lie before any load is known: evenly, and ``replicas`` spare slots hold copies on other ranks."""
    even = Placement.even(num_experts, ranks)
    return improve(even, [1.0] * num_experts, slots=num_experts + replicas)


def improve(
    current: Placement,
    load_E: Sequence[float],
    *,
    slots: int | None = None,
    groups: int = 1,
    nodes: int = 1,
    slack: float = 0.02,
    least_gain: float = 0.0,
) -> Placement:
    """A placement whose busiest rank has less of this load than now; else ``current`` itself.

    Slots of the busiest ranks are exchanged until the load is within ``slack`` of what EPLB finds; where that does not get
    there, it is EPLB's placement, its ranks named so that experts stay where they can. Replicas come to lie on different ranks
    where room allows. Experts that stay on their rank keep their slots.

    Args:
        load_E: tokens of each expert, at least 0. slots: None keeps every rank's number of slots; a number is spread over the
            ranks evenly, and if that changes any rank's the answer has them so whatever its load. groups, nodes: see ``eplb``;
            ignored where experts, ranks or groups do not divide evenly.
        slack: share of load to spare moves for. least_gain: the share by which the busiest rank's load has to fall to be worth
            moving for.

    Raises ``ConfigError`` for loads that are none or fewer slots than experts.
    """
    E, P = current.num_experts, current.num_ranks
    load_E = _checked(load_E, E)
    room = list(current.slots_per_rank)
    if slots is not None:
        room = [(r + 1) * slots // P - r * slots // P for r in range(P)]
        if slots < E:
            raise ConfigError(f"{slots} slots cannot hold {E} experts; give at least {E}.")
    if groups < 1 or nodes < 1:
        raise ConfigError(f"There is at least one group of experts and one node, not {groups} and {nodes}.")
    if not _fit(E, room, groups, nodes):
        groups, nodes = 1, 1
    found = Placement(settled(_arrange(load_E, room, groups, nodes, apart=True), current.slots, nodes), E)
    if tuple(room) != current.slots_per_rank:
        return found
    goal = max(rank_loads(found, load_E)) * (1 + slack)
    near = Placement(exchanged(current.slots, load_E, goal, nodes), E)
    if max(rank_loads(near, load_E)) <= goal:
        found = near
    now, then = max(rank_loads(current, load_E)), max(rank_loads(found, load_E))
    return found if then < now * (1 - least_gain) else current


def rank_loads(placement: Placement, load_E: Sequence[float]) -> list[float]:
    """The load of every rank if replicas share evenly, (P,)."""
    copies_E = placement.replicas_E
    return [math.fsum(load_E[e] / copies_E[e] for e in rank) for rank in placement.slots]


# ---- the parts of EPLB -------------------------------------------------------------------------------------------


def balanced_packing(
    weights: Sequence[float], room: Sequence[int], kinds: Sequence[int] | None = None
) -> list[list[int]]:
    """Items into packs, heaviest first, each into the lightest pack that has room: per pack its items in that order.

    Args:
        weights: of the items; ties keep their order. room: how many items each pack takes, as many together as there are.
            With one each, item i goes into pack i, as in EPLB. kinds: items of one kind go into different packs where room
            allows; not in EPLB, which may lay two replicas on one rank, where they share nothing.
    """
    if all(n == 1 for n in room):
        return [[item] for item in range(len(weights))]
    packs: list[list[int]] = [[] for _ in room]
    inside: list[set[int]] = [set() for _ in room]
    totals = [0.0] * len(room)
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        kind = -1 if kinds is None else kinds[item]
        open_packs = [p for p in range(len(room)) if len(packs[p]) < room[p]]
        pack = min(open_packs, key=lambda p: (kind in inside[p], totals[p]))
        packs[pack].append(item)
        if kinds is not None:
            inside[pack].add(kind)
        totals[pack] += weights[item]
    return packs


def replicate(load_E: Sequence[float], slots: int) -> list[int]:
    """The expert of each slot: every expert once, then again and again the one with the most load per replica."""
    copies_E = [1] * len(load_E)
    experts = list(range(len(load_E)))
    for _ in range(slots - len(load_E)):
        busiest = max(range(len(load_E)), key=lambda e: load_E[e] / copies_E[e])
        experts.append(busiest)
        copies_E[busiest] += 1
    return experts


def _arrange(
    load_E: Sequence[float], room: Sequence[int], groups: int, nodes: int, *, apart: bool = False
) -> tuple[tuple[int, ...], ...]:
    """The experts of each rank, for one layer. ``apart``: replicas on different ranks where room allows."""
    width, size = len(load_E) // groups, len(room) // nodes
    group_loads = [sum(load_E[g * width : (g + 1) * width]) for g in range(groups)]
    ranks: list[tuple[int, ...]] = []
    for node, chosen in enumerate(balanced_packing(group_loads, [groups // nodes] * nodes)):
        here = [e for g in chosen for e in range(g * width, (g + 1) * width)]
        loads = [load_E[e] for e in here]
        node_room = room[node * size : (node + 1) * size]
        local = replicate(loads, sum(node_room))
        copies = Counter(local)
        packs = balanced_packing([loads[i] / copies[i] for i in local], node_room, local if apart else None)
        ranks += [tuple(here[local[slot]] for slot in pack) for pack in packs]
    return tuple(ranks)


def _fit(num_experts: int, room: Sequence[int], groups: int, nodes: int) -> bool:
    """Whether groups can be packed onto nodes."""
    if groups % nodes or num_experts % groups or len(room) % nodes:
        return False
    size = len(room) // nodes
    return all(sum(room[n * size : (n + 1) * size]) >= num_experts // nodes for n in range(nodes))


# ---- load over time ------------------------------------------------------------------------------------------------


class LoadAverage:
    """Exponential moving average of the rows of each expert, without a start at zero (as in Adam).

    The same on all ranks if the counts are those of the whole batch.

    Args:
        num_experts: E. decay: share of the average that a step keeps; 0 is the last step alone.
    """

    def __init__(self, num_experts: int, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"The load's decay must be at least 0 and below 1, not {decay}.")
        self.decay = decay
        self._sum_E = torch.zeros(num_experts, dtype=torch.float64)
        self._weight = 0.0

    def update(self, counts_E: Tensor) -> None:
        """Add the rows of one step, (E,) of any dtype and device."""
        self._sum_E = self.decay * self._sum_E + (1 - self.decay) * counts_E.detach().to("cpu", torch.float64)
        self._weight = self.decay * self._weight + 1 - self.decay

    @property
    def load_E(self) -> Tensor:
        """fp64 (E,): rows per step; zeros before the first."""
        return self._sum_E / self._weight if self._weight else self._sum_E.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """fp64 tensors: the running sums and their weight."""
        return {"sum": self._sum_E.clone(), "weight": torch.tensor(self._weight, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``. Raises ``CheckpointError`` if it is that of another number of experts, or none."""
        sum_E, weight = state.get("sum"), state.get("weight")
        if not isinstance(sum_E, Tensor) or not isinstance(weight, Tensor) or weight.numel() != 1:
            raise CheckpointError('The state of a load average has tensors "sum" and "weight", and this one does not.')
        if sum_E.shape != self._sum_E.shape:
            raise CheckpointError(
                f"The saved load average is of shape {tuple(sum_E.shape)}, not of {len(self._sum_E)} experts."
            )
        self._sum_E, self._weight = sum_E.to("cpu", torch.float64).clone(), float(weight)


def _checked(load_E: Sequence[float], num_experts: int) -> list[float]:
    """The load as floats."""
    loads = [float(load) for load in load_E]
    if len(loads) != num_experts or not all(math.isfinite(load) and load >= 0 for load in loads):
        raise ConfigError(
            f"A load is a finite number of at least 0 for each of {num_experts} experts, not {list(load_E)!r:.80}."
        )
    return loads
