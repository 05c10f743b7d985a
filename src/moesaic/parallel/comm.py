"""The collectives of one group of ranks, by name: all of moesaic's own pass through here, where they are counted and watched.

A group of one rank does nothing. ``what`` names a call in figures and failures ("dispatch", "load of the step").
Legend: N rows, D width, P ranks of the group.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moesaic.parallel.watch import Watch

Op = Literal["sum", "max", "min"]
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@dataclass(eq=False)
class Flight:
    """Rows on their way. ``sent`` is held until they have left."""

    group: Group
    what: str
    sent: Tensor
    out: Tensor
    work: Any
    away: int

    def wait(self) -> Tensor:
        """The rows received."""
        if self.work is not None:
            with self.group.watch.collective(self.what, self.group.axis, self.group.ranks, self.away):
                self.work.wait()
            self.work = None
        return self.out


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

    def reduce(self, x: Tensor, target: int = 0, *, what: str) -> Tensor:
        """The sum over the group, in place on its rank number ``target``; elsewhere ``x`` is no more what it was."""
        if self.size > 1:
            sent = _bytes(x) if self.index != target else 0
            with self.watch.collective(what, self.axis, self.ranks, sent):
                dist.reduce(x, self.ranks[target], group=self.handle)
        return x

    def all_to_all(self, x_ND: Tensor, send: Sequence[int], receive: Sequence[int], *, what: str) -> Tensor:
        """Rows to their ranks: the first ``send[0]`` rows to rank 0, and so on; ``receive[p]`` rows come from rank p.

        Rows in the order of their sources. Without gradient; see ``exchange.py``. A rank with nothing to send still calls.
        """
        return self.start_all_to_all(x_ND, send, receive, what=what).wait()

    def start_all_to_all(self, x_ND: Tensor, send: Sequence[int], receive: Sequence[int], *, what: str) -> Flight:
        """``all_to_all`` that goes on while the caller computes; the rows are there after ``wait``."""
        if sum(send) != x_ND.shape[0] or len(send) != self.size or len(receive) != self.size or min(receive) < 0:
            # gloo would abort the process.
            raise ValueError(f"{what}: {list(send)} rows to send for {x_ND.shape[0]} rows and {self.size} ranks")
        if self.size == 1:
            return Flight(self, what, x_ND, x_ND.clone(), None, 0)
        x_ND, out_ND = x_ND.contiguous(), x_ND.new_empty(sum(receive), *x_ND.shape[1:])
        away = (x_ND.shape[0] - send[self.index]) * math.prod(x_ND.shape[1:]) * x_ND.element_size()
        # Watched while somebody waits for it: that is when it can fail or hang.
        work = dist.all_to_all_single(out_ND, x_ND, list(receive), list(send), group=self.handle, async_op=True)
        return Flight(self, what, x_ND, out_ND, work, away)

    def values(self, value: Any, *, what: str, device: torch.device | str = "cpu") -> list[Any]:
        """Every rank's plain JSON value; for rare small things (errors, names), never in a step."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
        sizes = self.all_gather(torch.tensor([len(text)], device=device), what=f"{what}: sizes")
        longest = max(int(size) for size in sizes)
        parts = self.all_gather(F.pad(text, (0, longest - len(text))), what=what)
        return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]

    def barrier(self, *, what: str) -> None:
        """Wait for all."""
        if self.size > 1:
            with self.watch.collective(what, self.axis, self.ranks, 0):
                dist.barrier(group=self.handle)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
