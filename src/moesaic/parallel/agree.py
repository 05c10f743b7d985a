"""Decisions that every rank must take alike, once per step: to stop, because one of them was asked to; to refuse the step,
because it is not finite somewhere.

>>> agreement = Agreement(world.everyone, device, stop=lambda: signals.requested)
>>> if not agreement.finite(math.isfinite(loss)): ...      # one small all-reduce, for both decisions
>>> if agreement.stopping: save and leave                  # after the same step everywhere

A rank that decided alone would leave the others waiting in the next collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moesaic.parallel.comm import Group


class Agreement:
    """What the ranks of a group decide together. Without a group, what one process decides.

    Args:
        device: where collectives find their tensors. stop: whether this rank was asked to stop.

    Attributes:
        stopping: whether any rank had been asked to stop when ``finite`` was last called.
    """

    def __init__(
        self, group: Group | None = None, device: torch.device | str = "cpu", stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._group, self._device, self._stop = group, device, stop
        self.stopping = False

    def finite(self, mine: bool) -> bool:
        """Once per step: whether all ranks say so. Carries the wish to stop as well."""
        if self._group is None:
            self.stopping = self._stop()
            return mine
        told = torch.tensor([int(self._stop()), int(not mine)], device=self._device)
        stopping, broken = self._group.all_reduce(told, "max", what="stop and step guard").tolist()
        self.stopping = bool(stopping)
        return not broken

    def first(self, found: tuple[Sequence[int], str] | None) -> str | None:
        """What was found at the smallest place, and on which ranks, the same words on all; None where nobody found anything.

        Args:
            found: place and words; places are compared number by number.
        """
        if self._group is None:
            return None if found is None else found[1]
        mine = None if found is None else [list(found[0]), found[1]]
        said = self._group.values(mine, what="where the step broke", device=self._device)
        if all(place is None for place in said):
            return None
        least = min(place for place in said if place is not None)
        ranks = [str(rank) for rank, place in zip(self._group.ranks, said, strict=True) if place == least]
        where = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"
        return f"on {'every rank' if len(ranks) == len(said) else where}, {least[1]}"
