"""The collectives of one group of ranks, by name: all of moesaic's own pass through here, where they are counted and watched.

A group of one rank does nothing. ``what`` names a call in figures and failures ("dispatch", "load of the step").
Legend: N rows, D width, P ranks of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.parallel.watch import Watch

Op = Literal["sum", "max", "min"]
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Group:
    """Ranks along one axis of a layout.

    Attributes:
        axis: its name. ranks: global ranks in order. index: this process's place among them. handle: of torch, None alone.
    """

    def __init__(
        self, axis: str, ranks: Sequence[int], rank: int, handle: dist.ProcessGroup | None, watch: Watch
    ) -> None:
        self.axis, self.ranks, self.handle, self.watch = axis, tuple(ranks), handle, watch
        self.index = self.ranks.index(rank)

    @property
    def size(self) -> int:
        """P."""
        return len(self.ranks)

    def all_reduce(self, x: Tensor, op: Op = "sum", *, what: str) -> Tensor:
        """``x`` reduced over the group, in place; every rank gets the same bits."""
        if self.size > 1:
            # A ring passes everything round twice, but for each rank's own part.
            with self.watch.collective(what, self.axis, self.ranks, 2 * _bytes(x) * (self.size - 1) // self.size):
                dist.all_reduce(x, _OPS[op], group=self.handle)
        return x

    def all_gather(self, x: Tensor, *, what: str) -> list[Tensor]:
        """Every rank's ``x`` (all of one shape), in the order of the group."""
        if self.size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in self.ranks]
        with self.watch.collective(what, self.axis, self.ranks, _bytes(x) * (self.size - 1)):
            dist.all_gather(parts, x.contiguous(), group=self.handle)
        return parts

    def broadcast(self, x: Tensor, source: int = 0, *, what: str) -> Tensor:
        """``x`` of the group's rank number ``source``, in place."""
        if self.size > 1:
            sent = _bytes(x) * (self.size - 1) if self.index == source else 0
            with self.watch.collective(what, self.axis, self.ranks, sent):
                dist.broadcast(x, self.ranks[source], group=self.handle)
        return x

    def all_to_all(self, x_ND: Tensor, send: Sequence[int], receive: Sequence[int], *, what: str) -> Tensor:
        """Rows to their ranks: the first ``send[0]`` rows to rank 0, and so on; ``receive[p]`` rows come from rank p.

        Rows in the order of their sources. Without gradient; see ``exchange.py``. A rank with nothing to send still calls.
        """
        if sum(send) != x_ND.shape[0] or len(send) != self.size or len(receive) != self.size:
            # gloo would abort the process.
            raise ValueError(f"{what}: {list(send)} rows to send for {x_ND.shape[0]} rows and {self.size} ranks")
        if self.size == 1:
            return x_ND.clone()
        out = x_ND.new_empty(sum(receive), *x_ND.shape[1:])
        away = x_ND.shape[0] - send[self.index]
        with self.watch.collective(what, self.axis, self.ranks, away * _bytes(x_ND[:1].new_empty(x_ND.shape[1:]))):
            dist.all_to_all_single(out, x_ND.contiguous(), list(receive), list(send), group=self.handle)
        return out

    def objects(self, value: Any, *, what: str) -> list[Any]:
        """Every rank's plain value; for rare small things (errors, names), never in a step."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.watch.collective(what, self.axis, self.ranks, 0):
            dist.all_gather_object(values, value, group=self.handle)
        return values

    def barrier(self, *, what: str) -> None:
        """Wait for all."""
        if self.size > 1:
            with self.watch.collective(what, self.axis, self.ranks, 0):
                dist.barrier(group=self.handle)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
