"""The processes that hold the other parts of a batch, as much of them as routing has to know.

A loss that counts load, a capacity and a mean over tokens are about the whole batch. Where several processes hold a part
each, whoever computes such a thing asks its ``Peers`` for sums over all parts; alone, a sum is itself. So one formula serves
one process and many, and the number of processes never changes what is trained.

>>> ALONE.total(counts_E)                      # counts_E
>>> peers.total(probs_TE.sum(dim=0))           # over the tokens of all parts; every part gets the same

Legend: P parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _itself(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, eq=False)
class Peers:
    """How to ask about all parts of a batch. All parts must ask the same questions in the same order.

    Attributes:
        count: P, this part included.
        total: the sum of a tensor over all parts, any dtype. Its gradient passes back unchanged: every part computes the same
            whole value from it and adds only its own share of the gradient; gradients of parameters are then summed.
        most: the maximum of a tensor over all parts, without gradient.
        index: which part this is, from 0; parts are consecutive tokens of the batch, in this order.
    """

    count: int = 1
    total: Callable[[Tensor], Tensor] = _itself
    most: Callable[[Tensor], Tensor] = _itself
    index: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Peers:
        return self  # a copied model has the same peers; process groups cannot be copied

    def each(self, x: Tensor) -> Tensor:
        """(P, ...): what every part says, without gradient. All must say tensors of one shape and dtype."""
        table = x.new_zeros(self.count, *x.shape)
        table[self.index] = x.detach()
        return self.total(table)

    def first(self, x: Tensor) -> Tensor:
        """What the first part says, without gradient: for random draws that are about the whole batch."""
        return self.total(x.detach() if self.index == 0 else torch.zeros_like(x))

    def pooled(self, x: Tensor) -> Tensor:
        """``total`` of what every part then makes terms of its own from, to be summed in turn (a mean vector that each token is
        compared with). A part's share acts on the terms of all parts, so here the gradient is theirs too: it is summed in
        backward, which all parts must come to.
        """
        if self.count == 1:
            return x
        pooled: Tensor = _Pooled.apply(x, self)
        return pooled


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return peers.total(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.peers.total(grad), None


ALONE = Peers()
