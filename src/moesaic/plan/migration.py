"""From one placement to another: which slot has to be filled from which, and what that sends.

All moves are of one moment: sources are slots of the old placement, targets of the new one. Whoever carries them out reads
every source before it overwrites any slot. Whatever an expert owns (weights, moments of the optimiser) moves alike.

>>> for move in migration(old, new):
...     stack_of[move.to_rank][move.to_slot] = old_stack_of[move.from_rank][move.from_slot]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesaic.errors import ConfigError
from moesaic.plan.placement import Placement


@dataclass(frozen=True)
class Move:
    """One slot to fill. Ranks are of the expert-parallel group; slots are counted within their rank."""

    expert: int
    from_rank: int
    from_slot: int
    to_rank: int
    to_slot: int

    @property
    def local(self) -> bool:
        """Whether nothing is sent."""
        return self.from_rank == self.to_rank


def migration(old: Placement, new: Placement, ranks_per_node: int | None = None) -> list[Move]:
    """What fills the slots of ``new`` that hold another expert than in ``old``, by target rank and slot.

    The source of a move is a slot on the target's own rank if there is one, then on its node, then any; among equals the rank
    that sends least so far. A slot that keeps its expert is left alone.

    Args:
        ranks_per_node: None takes all ranks for equally near.

    Raises ``ConfigError`` unless both are of the same experts and ranks.
    """
    if (old.num_experts, old.num_ranks) != (new.num_experts, new.num_ranks):
        raise ConfigError(
            f"Experts move between placements of the same experts and ranks, not from {old.num_experts} experts on "
            f"{old.num_ranks} ranks to {new.num_experts} on {new.num_ranks}."
        )
    size = ranks_per_node or new.num_ranks
    sent = [0] * old.num_ranks
    moves = []
    for rank, experts in enumerate(new.slots):
        for slot, expert in enumerate(experts):
            if old.slots[rank][slot : slot + 1] == (expert,):
                continue
            homes = [old.home(s) for s in old.slots_of_expert[expert]]
            source = min(homes, key=lambda r: (r != rank, r // size != rank // size, sent[r]))
            sent[source] += source != rank
            moves.append(Move(expert, source, old.slots[source].index(expert), rank, slot))
    return moves


def migration_bytes(moves: Sequence[Move], expert_bytes: int, ranks: int) -> list[int]:
    """Bytes that each of ``ranks`` ranks sends to others, ``expert_bytes`` for every move that leaves it."""
    sent = [0] * ranks
    for move in moves:
        if not move.local:
            sent[move.from_rank] += expert_bytes
    return sent
