"""Better placements in few moves: exchange slots of the busiest rank one by one, or name the ranks of a new placement well.

A placement made from nothing (``plan/rebalance.py``) moves almost every expert; its weights and optimiser state would travel.
Measured on Zipf loads of 64 experts in 72 slots of 8 ranks whose load drifts by a third: exchanges come within 2 % of EPLB's
busiest rank with 7 moves for its 48.

Legend: E experts, P ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

Ranks = Sequence[tuple[int, ...]]  # the experts of each rank, slot by slot


def exchanged(ranks: Ranks, load_E: Sequence[float], goal: float, nodes: int = 1) -> tuple[tuple[int, ...], ...]:
    """Step by step the busiest rank swaps an expert for one of another rank, or shares one there with a replica.

    A replica takes the slot of an expert that has others. Each step is the one that leaves the ranks it touches with the least
    load at most; steps end at ``goal``, where none helps, or after as many as there are slots.

    Args:
        load_E: tokens of each expert, shared evenly by its replicas. nodes: exchange only within nodes of P / nodes ranks.
    """
    slots = [list(rank) for rank in ranks]
    for _ in range(sum(map(len, slots))):
        copies = Counter(expert for rank in slots for expert in rank)
        share_E = [load / max(copies[expert], 1) for expert, load in enumerate(load_E)]
        totals = [sum(share_E[expert] for expert in rank) for rank in slots]
        busiest = max(range(len(slots)), key=totals.__getitem__)
        if totals[busiest] <= goal:
            break
        # The margin keeps rounding from turning in circles.
        least, step = totals[busiest] * (1 - 1e-9), None
        size = len(slots) // nodes
        first = busiest // size * size
        for i, expert in enumerate(slots[busiest]):
            for other in range(first, first + size):
                if expert in slots[other]:
                    continue
                for j, theirs in enumerate(slots[other]):
                    if theirs not in slots[busiest]:
                        gain = share_E[expert] - share_E[theirs]
                        worst = max(totals[busiest] - gain, totals[other] + gain)
                        if worst < least:
                            least, step = worst, (i, other, j, theirs)
                    if copies[theirs] > 1:
                        worst = _with_replica(slots, totals, load_E, copies, expert, other, theirs)
                        if worst < least:
                            least, step = worst, (i, other, j, expert)
        if step is None:
            break
        i, other, j, here = step
        slots[busiest][i], slots[other][j] = here, slots[busiest][i]
    return tuple(map(tuple, slots))


def _with_replica(
    slots: Sequence[list[int]],
    totals: Sequence[float],
    load_E: Sequence[float],
    copies: Counter[int],
    expert: int,
    rank: int,
    instead: int,
) -> float:
    """The most load of any rank touched if a slot of ``instead`` on ``rank`` became one of ``expert``."""
    less, more = load_E[expert] / (copies[expert] + 1), load_E[instead] / (copies[instead] - 1)
    fall, rise = load_E[expert] / copies[expert] - less, more - load_E[instead] / copies[instead]
    worst = 0.0
    for r, rank_slots in enumerate(slots):
        ours, theirs = rank_slots.count(expert), rank_slots.count(instead)
        if ours or theirs:
            change = rise * theirs - fall * ours + (less - more if r == rank else 0.0)
            worst = max(worst, totals[r] + change)
    return worst


def settled(ranks: Ranks, before: Ranks, nodes: int = 1) -> tuple[tuple[int, ...], ...]:
    """The same sets of experts, given to those ranks of the same room that hold most of them already, in their old slots.

    Nodes are matched first, then the ranks within them: which experts share a node does not change. Greedy.
    """
    size = len(ranks) // nodes
    new_nodes = [ranks[n * size : (n + 1) * size] for n in range(nodes)]
    old_nodes = [before[n * size : (n + 1) * size] for n in range(nodes)]
    found: list[tuple[int, ...]] = []
    for node, old in zip(_matched(new_nodes, old_nodes), old_nodes, strict=True):
        found += [_in_old_slots(mine, theirs) for mine, theirs in zip(_matched(node, old), old, strict=True)]
    return tuple(found)


def _matched(new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
    """``new`` in another order: the pair with most experts in common first; only items of one shape change places."""
    new_held, old_held = ([Counter(_experts(item)) for item in side] for side in (new, old))
    shapes = [_shape(item) for item in new]
    pairs = [(i, j) for i in range(len(new)) for j in range(len(old)) if shapes[i] == shapes[j]]
    common = {(i, j): (new_held[i] & old_held[j]).total() for i, j in pairs}
    at: dict[int, int] = {}
    taken: set[int] = set()
    for i, j in sorted(pairs, key=lambda pair: -common[pair]):
        if i not in taken and j not in at:
            at[j] = i
            taken.add(i)
    return [new[at[j]] for j in range(len(old))]


def _experts(item: Sequence[Any]) -> list[int]:
    """Those of a rank (numbers) or a node (ranks)."""
    return [expert for part in item for expert in (part if isinstance(part, tuple) else (part,))]


def _shape(item: Sequence[Any]) -> tuple[int, ...]:
    """Slots of a rank, or of every rank of a node."""
    return tuple(len(part) for part in item) if item and isinstance(item[0], tuple) else (len(item),)


def _in_old_slots(new: Sequence[int], old: Sequence[int]) -> tuple[int, ...]:
    """The experts ``new`` in an order in which as many as possible lie where ``old`` has them."""
    left = Counter(new)
    placed: list[int | None] = [None] * len(new)
    for slot, expert in enumerate(old[: len(new)]):
        if left[expert]:
            placed[slot] = expert
            left[expert] -= 1
    coming = iter([expert for expert in new if _take(left, expert)])
    return tuple(next(coming) if expert is None else expert for expert in placed)


def _take(left: Counter[int], expert: int) -> bool:
    """Take one of ``expert`` if any is left."""
    if not left[expert]:
        return False
    left[expert] -= 1
    return True
