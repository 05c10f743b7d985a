"""Orders of rows: blocks of rows laid out anew, and back.

Legend: N rows, D width, P ranks, L slots of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Order:
    """A permutation of rows and its inverse, on the device of what it is applied to."""

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self.identity = bool((index.diff() == 1).all()) and (index.numel() == 0 or int(index[0]) == 0)
        self.inverse = torch.empty_like(index).scatter_(0, index, torch.arange(len(index)))

    def apply(self, x_ND: Tensor) -> Tensor:
        """x[index]."""
        return self._moved(x_ND, self.index, self.inverse)

    def undo(self, x_ND: Tensor) -> Tensor:
        """The inverse."""
        return self._moved(x_ND, self.inverse, self.index)

    def _moved(self, x_ND: Tensor, there: Tensor, back: Tensor) -> Tensor:
        if self.identity:
            return x_ND
        moved: Tensor = _Permute.apply(x_ND, there.to(x_ND.device), back.to(x_ND.device))
        return moved


def reorder(counts: Sequence[int], order: Sequence[int]) -> Order:
    """Blocks of ``counts`` rows laid out in ``order``."""
    sizes = torch.tensor(counts, dtype=torch.int64)
    starts = sizes.cumsum(0) - sizes
    chosen = torch.tensor(order, dtype=torch.int64)
    lengths = sizes[chosen]
    offsets = lengths.cumsum(0) - lengths
    shift = torch.repeat_interleave(starts[chosen] - offsets, lengths)
    return Order(torch.arange(len(shift)) + shift)


def by_slot(received_PL: list[list[int]]) -> Order:
    """From (source, slot) to (slot, source)."""
    P, L = len(received_PL), len(received_PL[0])
    flat = [count for row in received_PL for count in row]
    return reorder(flat, [p * L + slot for slot in range(L) for p in range(P)])


class _Permute(torch.autograd.Function):
    """x[index]; the gradient is the inverse gather."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x_ND.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return grad_ND.index_select(0, back), None, None
