"""The processes that hold the other parts of a batch, as much of them as routing has to know.

A loss that counts load, a capacity and a mean over tokens are about the whole batch. Where several processes hold a part
each, whoever computes such a thing asks its ``Peers`` for sums over all parts; alone, a sum is itself. So one formula serves
one process and many, and the number of processes never changes what is trained.

>>> ALONE.total(counts_E)                      # counts_E
>>> peers.total(probs_TE.sum(dim=0))           # over the tokens of all parts; every part gets the same
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def _itself(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, eq=False)
class Peers:
    """How to ask about all parts of a batch. All parts must ask the same questions in the same order.

    Attributes:
        count: parts, this one included.
        total: the sum of a tensor over all parts, any dtype. Its gradient passes back unchanged: every part computes the same
            whole value from it and adds only its own share of the gradient; gradients of parameters are then summed.
        most: the maximum of a tensor over all parts, without gradient.
    """

    count: int = 1
    total: Callable[[Tensor], Tensor] = _itself
    most: Callable[[Tensor], Tensor] = _itself


ALONE = Peers()
