"""Which rank of an expert-parallel group holds which expert, as plain data; an expert may have several slots (replicas).

Slots are numbered through in the order of ranks: rank 0's slots come first. Plans speak of experts; only the exchange asks
which slot of an expert computes a row.

>>> Placement.even(num_experts=5, ranks=2).slots        # ((0, 1), (2, 3, 4))
>>> placement = Placement(((0, 1), (2, 0)), num_experts=3)        # expert 0 on both ranks
>>> placement.choose(expert_N, token_N, rank=1)         # expert 0 -> slot 3, expert 1 -> slot 1, nowhere (3) -> 4

Legend: N rows, E experts, M most slots of one expert.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from moesaic.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """Slots of every rank. Equal placements compare and hash equal.

    Attributes:
        slots: per rank of the group the experts in its slots, in order; ranks may hold different numbers, or none.
        num_experts: E.

    Raises ``ConfigError`` unless every expert from 0 to E - 1, and no other, has a slot.
    """

    slots: tuple[tuple[int, ...], ...]
    num_experts: int
    _tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.slots or self.num_experts < 1:
            raise ConfigError(
                f"A placement needs at least one rank and one expert, not {len(self.slots)} and {self.num_experts}."
            )
        held = set(self.expert_of_slot)
        unknown = sorted(held - set(range(self.num_experts)))
        if unknown:
            raise ConfigError(
                f"The placement names expert {unknown[0]}, but experts go from 0 to {self.num_experts - 1}; "
                "it may be that of another model."
            )
        missing = [e for e in range(self.num_experts) if e not in held]
        if missing:
            raise ConfigError(
                f"The placement has no slot for expert {missing[0]} of {self.num_experts}; every expert needs at least one."
            )

    @classmethod
    def even(cls, num_experts: int, ranks: int) -> Placement:
        """Every expert once, in order: rank r holds experts r*E//P to (r+1)*E//P - 1. With E < P some ranks hold none."""
        ends = [r * num_experts // max(ranks, 1) for r in range(ranks + 1)]
        return cls(tuple(tuple(range(ends[r], ends[r + 1])) for r in range(ranks)), num_experts)

    @classmethod
    def from_list(cls, lists: object, num_experts: int) -> Placement:
        """What ``to_list`` gave, read back from JSON. Raises ``ConfigError`` for anything else."""
        if not isinstance(lists, list) or not all(isinstance(rank, list) for rank in lists):
            raise ConfigError(f"A placement is a list with a list of experts for every rank, not {lists!r:.80}.")
        for expert in (expert for rank in lists for expert in rank):
            if type(expert) is not int:  # True is an int
                raise ConfigError(f"A placement lists experts by number, and {expert!r:.80} is none.")
        return cls(tuple(map(tuple, lists)), num_experts)

    def to_list(self) -> list[list[int]]:
        """For JSON: per rank the experts in its slots."""
        return [list(rank) for rank in self.slots]

    # ---- readings ------------------------------------------------------------------------------------------------

    @property
    def num_ranks(self) -> int:
        """P, ranks of the expert-parallel group."""
        return len(self.slots)

    @property
    def slots_per_rank(self) -> tuple[int, ...]:
        """How many slots each rank has."""
        return tuple(len(rank) for rank in self.slots)

    @cached_property
    def num_slots(self) -> int:
        """Slots of all ranks together, at least E."""
        return sum(self.slots_per_rank)

    @cached_property
    def first_slots(self) -> tuple[int, ...]:
        """The number of each rank's first slot, and at the end ``num_slots``."""
        return (0, *accumulate(self.slots_per_rank))

    @cached_property
    def expert_of_slot(self) -> list[int]:
        """The expert of every slot, in the order of ranks."""
        return [expert for rank in self.slots for expert in rank]

    @cached_property
    def slots_of_expert(self) -> tuple[tuple[int, ...], ...]:
        """The slots of every expert, ascending."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.expert_of_slot):
            found[expert].append(slot)
        return tuple(map(tuple, found))

    @property
    def replicas_E(self) -> tuple[int, ...]:
        """Slots of every expert."""
        return tuple(map(len, self.slots_of_expert))

    @property
    def replicated(self) -> bool:
        """Whether some expert has more than one slot."""
        return self.num_slots > self.num_experts

    def home(self, slot: int) -> int:
        """The rank that a slot belongs to."""
        if not 0 <= slot < self.num_slots:
            raise ConfigError(f"There is no slot {slot} among {self.num_slots}.")
        return bisect_right(self.first_slots, slot) - 1

    # ---- rows to slots -------------------------------------------------------------------------------------------

    def choose(self, expert_N: Tensor, token_N: Tensor, rank: int) -> Tensor:
        """The slot that computes each row, int64 (N,); rows that go nowhere (expert E) get ``num_slots``.

        Of an expert with slots on ``rank``, the rank the rows come from, those; of others all. Among them token t takes the
        one numbered t modulo their count: the same for the same token always, and even over many tokens. Never waits for the
        device, but for the first call there.

        Args:
            expert_N: int64 in [0, E]. token_N: int64, numbers of the tokens on ``rank``. rank: within the group.
        """
        if self._in_order:
            return expert_N
        key = (rank, expert_N.device)
        if key not in self._tables:
            self._tables[key] = self._table(rank, expert_N.device)
        slot_EM, count_E = self._tables[key]
        if slot_EM.shape[1] == 1:
            return slot_EM[:, 0][expert_N]
        return slot_EM[expert_N, token_N % count_E[expert_N]]

    @cached_property
    def _in_order(self) -> bool:
        """Whether slots are experts."""
        return self.expert_of_slot == list(range(self.num_experts))

    def _table(self, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """int64 (E + 1, M) slots that rows from ``rank`` may take, and (E + 1,) how many; the last row is nowhere."""
        here = range(self.first_slots[rank], self.first_slots[rank + 1])
        options = [[s for s in slots if s in here] or list(slots) for slots in self.slots_of_expert]
        options.append([self.num_slots])
        most = max(map(len, options))
        padded = [slots + slots[:1] * (most - len(slots)) for slots in options]
        return torch.tensor(padded, device=device), torch.tensor([len(slots) for slots in options], device=device)
