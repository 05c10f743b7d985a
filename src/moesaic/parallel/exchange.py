"""Rows to the ranks that hold their experts and back: paths of one or two all-to-alls, differentiable.

A path takes rows sorted by slot (physical places of experts in the order of ranks) and gives this rank's slots their rows,
sorted by slot, those of one slot in the order of their source ranks; ``back`` undoes it. ``FlatPath`` is one all-to-all.
``TwoLevelPath`` first collects within a node what is for the same place of any node, then sends it on between nodes: P - 1
messages become (G - 1) + (P/G - 1), bytes between nodes stay (fieldguide 4.3). Both give the same bits.

The backward of an all-to-all is the all-to-all with splits exchanged (fairseq's All2All). Numbers of rows must be known on the
host, which costs one wait for the device per layer. Every message of counts carries a serial number: ranks that got out of
step end in words, where gloo would abort the process.

Legend: N rows, D width, P ranks, L slots of this rank, S slots of all, G ranks of a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moesaic.parallel.comm import Flight, Group
from moesaic.parallel.orders import by_slot, reorder
from moesaic.parallel.watch import CollectiveError


class Trip(Protocol):
    """One exchange whose numbers of rows are known."""

    counts_L: list[int]

    def there(self, x_ND: Tensor) -> Tensor:
        """Rows sorted by slot (S slots) to this rank's rows sorted by slot (L slots)."""
        ...

    def back(self, y_MD: Tensor) -> Tensor:
        """The inverse, for what the experts made of them."""
        ...


class FlatPath:
    """One all-to-all over the whole group.

    Args:
        group: the ranks, in the order of the placement. slots: how many each rank has.
    """

    def __init__(self, group: Group, slots: Sequence[int]) -> None:
        self.group, self.slots = group, list(slots)
        self._serial = 0

    def trip(self, counts_S: Tensor, *, equal: int | None = None) -> FlatTrip:
        """Learn what the others send. ``equal``: every rank sends so many rows to every slot, and nothing is asked."""
        self._serial += 1
        mine = self.slots[self.group.index]
        if equal is not None:
            return FlatTrip(self.group, [equal * n for n in self.slots], [[equal] * mine] * self.group.size)
        received_PL = exchange_counts(self.group, counts_S, self.slots, self._serial)
        send = [int(part.sum()) for part in counts_S.cpu().split(self.slots)]
        return FlatTrip(self.group, send, received_PL)


class FlatTrip:
    """See ``Trip``. ``begin`` and ``end`` are the two halves of ``there``: something may be computed in between."""

    def __init__(self, group: Group, send: list[int], received_PL: list[list[int]]) -> None:
        self.group, self.send = group, send
        self.receive = [sum(row) for row in received_PL]
        self.counts_L = [sum(column) for column in zip(*received_PL, strict=True)]
        self._order = by_slot(received_PL)

    def there(self, x_ND: Tensor) -> Tensor:
        rows: Tensor = _AllToAll.apply(x_ND, self.group, self.send, self.receive, "dispatch")
        return self._order.apply(rows)

    def begin(self, x_ND: Tensor) -> tuple[Tensor, _Journey]:
        journey = _Journey(self.group, self.send, self.receive, "dispatch")
        return _Start.apply(x_ND, journey), journey

    def end(self, flying_MD: Tensor, journey: _Journey) -> Tensor:
        return self._order.apply(_Finish.apply(flying_MD, journey))

    def back(self, y_MD: Tensor) -> Tensor:
        rows: Tensor = _AllToAll.apply(self._order.undo(y_MD), self.group, self.receive, self.send, "combine")
        return rows


class TwoLevelPath:
    """Within nodes, then between them.

    Args:
        inside: the ranks of this node. between: the ranks at this one's place in every node. slots: of every rank of the whole
            group, whose order is node by node.
    """

    def __init__(self, inside: Group, between: Group, slots: Sequence[int]) -> None:
        self.inside, self.between = inside, between
        G, nodes = inside.size, between.size
        # by_place[g][n]: slots of the rank at place g of node n
        self.by_place = [[slots[n * G + g] for n in range(nodes)] for g in range(G)]
        starts = [0]
        for n in slots:
            starts.append(starts[-1] + n)
        self._blocks = [[(starts[n * G + g], starts[n * G + g + 1]) for n in range(nodes)] for g in range(G)]
        self._serial = 0

    def trip(self, counts_S: Tensor, *, equal: int | None = None) -> TwoLevelTrip:
        """Learn what comes in both stages."""
        self._serial += 1
        counts_S = counts_S.cpu()
        if equal is not None:
            counts_S = torch.full_like(counts_S, equal)
        # Rows in the order of stage one: by place, then node, then slot.
        order = [slot for place in self._blocks for first, last in place for slot in range(first, last)]
        sizes = [sum(place) for place in self.by_place]
        first = exchange_counts(
            self.inside, counts_S[torch.tensor(order)], sizes, self._serial
        )  # [source g][node, slot]
        mine = self.by_place[self.inside.index]
        # What this rank passes on: for every node, of every source of this node, every slot.
        onward = torch.tensor(first).split(mine, dim=1)  # per node (G, slots)
        second = exchange_counts(
            self.between, torch.cat([part.reshape(-1) for part in onward]), [self.inside.size * n for n in mine],
            self._serial,
        )  # fmt: skip
        return TwoLevelTrip(self, counts_S, order, sizes, first, onward, second)


class TwoLevelTrip:
    """See ``Trip``."""

    def __init__(
        self,
        path: TwoLevelPath,
        counts_S: Tensor,
        order: list[int],
        sizes: list[int],
        first: list[list[int]],
        onward: tuple[Tensor, ...],
        second: list[list[int]],
    ) -> None:
        self.path = path
        counts = counts_S.tolist()
        self._leave = reorder(counts, order)
        by_order = [counts[slot] for slot in order]
        self._send1 = [sum(part) for part in _split(by_order, sizes)]
        self._receive1 = [sum(row) for row in first]
        # Received: source g, node, slot. Sent on: node, source g, slot.
        nodes, G, L = path.between.size, path.inside.size, path.by_place[path.inside.index]
        width = sum(L)
        starts = [sum(L[:n]) for n in range(nodes)]
        flat = [count for row in first for count in row]
        self._turn = reorder(
            flat, [g * width + starts[n] + i for n in range(nodes) for g in range(G) for i in range(L[n])]
        )
        self._send2 = [int(part.sum()) for part in onward]
        self._receive2 = [sum(row) for row in second]
        mine = L[path.between.index]
        received_PL = [part for row in second for part in _split(row, [mine] * G)]
        self.counts_L = [sum(column) for column in zip(*received_PL, strict=True)]
        self._order = by_slot(received_PL)

    def there(self, x_ND: Tensor) -> Tensor:
        inside, between = self.path.inside, self.path.between
        x_ND = self._leave.apply(x_ND)
        x_ND = _AllToAll.apply(x_ND, inside, self._send1, self._receive1, "dispatch within nodes")
        x_ND = self._turn.apply(x_ND)
        x_ND = _AllToAll.apply(x_ND, between, self._send2, self._receive2, "dispatch between nodes")
        return self._order.apply(x_ND)

    def back(self, y_MD: Tensor) -> Tensor:
        inside, between = self.path.inside, self.path.between
        y_MD = self._order.undo(y_MD)
        y_MD = _AllToAll.apply(y_MD, between, self._receive2, self._send2, "combine between nodes")
        y_MD = self._turn.undo(y_MD)
        y_MD = _AllToAll.apply(y_MD, inside, self._receive1, self._send1, "combine within nodes")
        return self._leave.undo(y_MD)


def exchange_counts(group: Group, counts_S: Tensor, slots: Sequence[int], serial: int) -> list[list[int]]:
    """What every rank of the group will send to each slot of this one, [source][slot].

    Raises ``CollectiveError`` where ranks are not at the same exchange, or hold placements that do not fit together.
    """
    counts_S = counts_S.to(torch.int64)
    width = slots[group.index]
    head = counts_S.new_tensor([serial, sum(slots), 0])
    parts = []
    for n, part in zip(slots, counts_S.split(list(slots)), strict=True):
        head[2] = n
        parts += [head.clone(), part]
    sent = torch.cat(parts)
    try:
        got = group.all_to_all(sent, [n + 3 for n in slots], [width + 3] * group.size, what="counts")
    except CollectiveError:
        raise
    received = [part.tolist() for part in got.view(group.size, width + 3)]
    for rank, (theirs, total, room, *_) in zip(group.ranks, received, strict=True):
        if (theirs, total, room) != (serial, sum(slots), width):
            raise CollectiveError(
                f"Rank {group.watch.rank}: rank {rank} is at exchange {theirs} of a layer with {total} slots, {room} of them "
                f"here, while this rank is at exchange {serial} of one with {sum(slots)}, {width} here. The ranks run "
                "different models or batches; start them all with the same command."
            )
    return [row[3:] for row in received]


def _split(values: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    found, place = [], 0
    for size in sizes:
        found.append(list(values[place : place + size]))
        place += size
    return found


class _AllToAll(torch.autograd.Function):
    """Rows to ranks; gradients go the same way back."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, group: Group, send: list[int], receive: list[int], what: str) -> Tensor:
        ctx.trip = group, send, receive, what
        return group.all_to_all(x_ND, send, receive, what=what)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        group, send, receive, what = ctx.trip
        return group.all_to_all(grad_MD, receive, send, what=f"{what} backward"), None, None, None, None


class _Journey:
    """An all-to-all in two halves; in the backward the halves change places."""

    def __init__(self, group: Group, send: list[int], receive: list[int], what: str) -> None:
        self.group, self.send, self.receive, self.what = group, send, receive, what
        self.flight: Flight | None = None


class _Start(torch.autograd.Function):
    """Begin to send; what is returned may be read after ``_Finish``."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        journey.flight = journey.group.start_all_to_all(x_ND, journey.send, journey.receive, what=journey.what)
        return journey.flight.out

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor, None]:
        flight, ctx.journey.flight = ctx.journey.flight, None
        return flight.wait(), None


class _Finish(torch.autograd.Function):
    """Wait for the rows. Backward runs first of the two: it begins to send the gradient, and ``_Start`` waits for it."""

    @staticmethod
    def forward(ctx: Any, flying_MD: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        assert journey.flight is not None
        journey.flight.wait()
        journey.flight = None
        return flying_MD.view_as(flying_MD)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:
        journey = ctx.journey
        what = f"{journey.what} backward"
        journey.flight = journey.group.start_all_to_all(grad_MD, journey.receive, journey.send, what=what)
        return grad_MD, None  # a placeholder of the right shape; ``_Start`` returns what was received
