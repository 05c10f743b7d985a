"""The dispatcher of expert parallelism: ``(x_TD, plan, experts) -> y_TD`` with experts on many ranks.

Rows are grouped by slot as ``dispatch_local`` groups them by expert, travel to the ranks of their slots, are computed by the
experts there and travel back; weights are applied where the tokens are (d * k of traffic each way, fieldguide 4.1). The experts
module of a rank holds its own slots only, then the special experts, which every rank has and no row travels for.

>>> layer.dispatcher = ExchangeDispatch(FlatPath(ep, placement.slots_per_rank), placement, ep.index)

Legend: T tokens, N rows, D width, S slots of all ranks, L of this one, Z special experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moesaic.experts.dispatch import Experts
from moesaic.ops.permute import combine_rows, gather_rows, group_rows
from moesaic.ops.phases import phase
from moesaic.parallel.comm import Group
from moesaic.parallel.exchange import FlatPath, FlatTrip, Trip, TwoLevelPath
from moesaic.plan.placement import Placement
from moesaic.plan.plan import RoutingPlan, SoftPlan


class ExchangeDispatch:
    """Experts behind an exchange.

    Args:
        path: the way of rows. placement: which slot holds which expert. rank: this process's place in the group.
        chunks: pieces by slots: the rows of the next piece travel while this one is computed. A piece holds all rows of its
            experts, so results keep their bits.
        padded: ranks of the exchange, over which the fullest expert's rows are found; every slot then gets that many rows from
            every rank, zeros where there are fewer. None sends as many rows as there are.

    Attributes:
        computed: rows that came to this rank's slots in training's forwards, repeated ones included, for whoever sets it back.
    """

    overlaps = True  # takes ``beside``

    def __init__(
        self,
        path: FlatPath | TwoLevelPath,
        placement: Placement,
        rank: int,
        *,
        chunks: int = 1,
        padded: Group | None = None,
    ) -> None:
        self.path, self.placement, self.rank = path, placement, rank
        self.chunks, self.padded = chunks, padded
        self.computed = 0

    def __call__(
        self,
        x_TD: Tensor,
        plan: RoutingPlan | SoftPlan,
        experts: Experts,
        beside: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """(T, D) to (T, D) in ``x``'s dtype. ``beside`` (shared experts) is computed while rows travel, and added."""
        if isinstance(plan, SoftPlan):
            y_TD, other_TD = self._soft(x_TD, plan, experts, beside)
        else:
            y_TD, other_TD = self._rows(x_TD, plan, experts, beside)
        return y_TD if other_TD is None else y_TD + other_TD

    def slots_of(self, plan: RoutingPlan) -> Tensor:
        """int64 (N,): slot of every row; special experts are S and up, nowhere is S + Z."""
        E, S = self.placement.num_experts, self.placement.num_slots
        if plan.num_experts == E:
            return self.placement.choose(plan.expert_N, plan.token_N, self.rank)
        slot_N = self.placement.choose(plan.expert_N.clamp(max=E), plan.token_N, self.rank)
        return torch.where(plan.expert_N < E, slot_N, plan.expert_N - E + S)

    def _rows(
        self, x_TD: Tensor, plan: RoutingPlan, experts: Experts, beside: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        special = plan.num_experts - self.placement.num_experts
        with phase("grouping"):
            grouping = group_rows(self.slots_of(plan), self.placement.num_slots + special)
        x_ND = gather_rows(x_TD, plan.token_N, grouping, plan.per_token)
        if plan.input_weight_N is not None:
            x_ND = (x_ND * plan.input_weight_N[grouping.order_N][:, None]).to(x_TD.dtype)
        y_ND, other_TD = self.travel(x_ND, grouping.counts_E, special, experts, beside and (lambda: beside(x_TD)))
        weight_N = torch.where(plan.kept_N, plan.weight_N, 0.0)
        y_TD = combine_rows(y_ND, weight_N, plan.token_N, grouping, plan.num_tokens, plan.per_token)
        return y_TD, other_TD

    def _soft(
        self, x_TD: Tensor, plan: SoftPlan, experts: Experts, beside: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        x_ND = plan.gather(x_TD)
        expert_N = torch.repeat_interleave(torch.arange(plan.num_experts, device=x_ND.device), plan.counts_E)
        row_N = torch.arange(len(expert_N), device=x_ND.device)
        grouping = group_rows(self.placement.choose(expert_N, row_N, self.rank), self.placement.num_slots)
        x_ND = gather_rows(x_ND, row_N, grouping, 1)
        y_ND, other_TD = self.travel(x_ND, grouping.counts_E, 0, experts, beside and (lambda: beside(x_TD)))
        y_ND = gather_rows(y_ND, row_N, type(grouping)(grouping.inverse_N, grouping.order_N, grouping.counts_E), 1)
        return plan.combine(y_ND), other_TD

    def travel(
        self,
        x_ND: Tensor,
        counts_X: Tensor,
        special: int,
        experts: Experts,
        beside: Callable[[], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows grouped by slot, then by special expert, then those that go nowhere: their outputs in the same order.

        Args:
            counts_X: rows of each slot and special expert. beside: computed on the way.
        """
        S = self.placement.num_slots
        counts = counts_X.cpu()  # the one wait for the device
        away, kept = int(counts[:S].sum()), int(counts.sum())
        if self.padded is not None:
            y_ND, other = self._padded(x_ND[:away], counts[:S], experts, beside)
            own_ND = self._special(x_ND[away:kept], counts[S:], experts) if special else x_ND[:0]
        elif self.chunks > 1 and isinstance(self.path, FlatPath):
            y_ND, other = self._in_chunks(x_ND[:away], counts[:S], experts, beside)
            own_ND = self._special(x_ND[away:kept], counts[S:], experts) if special else x_ND[:0]
        else:
            trip = self.path.trip(counts[:S])
            self._count(trip)
            arrived_MD, other = self._there(trip, x_ND[:away], beside)
            local = torch.tensor([*trip.counts_L, *counts[S:].tolist()], device=x_ND.device)
            out = experts(torch.cat([arrived_MD, x_ND[away:kept]]) if special else arrived_MD, local)
            M = arrived_MD.shape[0]
            y_ND, own_ND = trip.back(out[:M]), out[M:]
        nowhere_ND = x_ND.new_zeros(x_ND.shape[0] - kept, x_ND.shape[1])
        return torch.cat([y_ND, own_ND, nowhere_ND]), other

    def _count(self, *trips: Trip) -> None:
        if torch.is_grad_enabled():  # not in evaluation
            self.computed += sum(sum(trip.counts_L) for trip in trips)

    def _there(self, trip: Trip, x_ND: Tensor, beside: Callable[[], Tensor] | None) -> tuple[Tensor, Tensor | None]:
        if beside is None:
            return trip.there(x_ND), None
        if not isinstance(trip, FlatTrip):
            return trip.there(x_ND), beside()
        flying, journey = trip.begin(x_ND)
        other = beside()
        return trip.end(flying, journey), other

    def _special(self, x_ND: Tensor, counts_Z: Tensor, experts: Experts) -> Tensor:
        """Rows of special experts, which stay here."""
        mine = torch.zeros(self.placement.slots_per_rank[self.rank], dtype=torch.int64)
        return experts(x_ND, torch.cat([mine, counts_Z]).to(x_ND.device))

    def _in_chunks(
        self, x_ND: Tensor, counts_S: Tensor, experts: Experts, beside: Callable[[], Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Piece c holds the c-th part of every rank's slots."""
        assert isinstance(self.path, FlatPath)
        per_rank, starts = self.placement.slots_per_rank, self.placement.first_slots
        pieces = []
        chunks = min(self.chunks, max(per_rank))  # more would be empty
        piece_S = torch.zeros_like(counts_S)
        for c in range(chunks):
            for rank, n in enumerate(per_rank):
                piece_S[starts[rank] + c * n // chunks : starts[rank] + (c + 1) * n // chunks] = c
        row_piece_N = torch.repeat_interleave(piece_S, counts_S).to(x_ND.device)
        order = torch.argsort(row_piece_N, stable=True)
        sizes = torch.zeros(chunks, dtype=torch.int64).index_add(0, piece_S, counts_S).tolist()
        parts = _permuted(x_ND, order).split(sizes)
        trips = [self.path.trip(torch.where(piece_S == c, counts_S, 0)) for c in range(chunks)]
        self._count(*trips)
        other = None
        flying = trips[0].begin(parts[0])
        for c, trip in enumerate(trips):
            following = trips[c + 1].begin(parts[c + 1]) if c + 1 < chunks else None
            if c == 0 and beside is not None:
                other = beside()
            arrived_MD = trip.end(*flying)
            local = torch.tensor(trip.counts_L, device=x_ND.device)
            Z = getattr(experts, "num_experts", len(local)) - len(local)
            out = experts(arrived_MD, torch.cat([local, local.new_zeros(max(Z, 0))]))
            pieces.append(trip.back(out))
            if following is not None:
                flying = following
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return _permuted(torch.cat(pieces), inverse), other

    def _padded(
        self, x_ND: Tensor, counts_S: Tensor, experts: Experts, beside: Callable[[], Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """As many rows for every slot from everywhere as the fullest slot has anywhere."""
        assert self.padded is not None
        S, device = len(counts_S), x_ND.device
        fullest = counts_S.max().reshape(1).to(device)
        C = int(self.padded.all_reduce(fullest, "max", what="rows of the fullest expert"))
        starts_S = counts_S.cumsum(0) - counts_S
        slot_N = torch.repeat_interleave(torch.arange(S), counts_S)
        place_N = (torch.arange(len(slot_N)) - starts_S[slot_N] + slot_N * C).to(device)
        padded_ND = x_ND.new_zeros(S * C, x_ND.shape[1]).index_copy(0, place_N, x_ND)
        trip = self.path.trip(counts_S, equal=C)
        self._count(trip)
        arrived_MD, other = self._there(trip, padded_ND, beside)
        local = torch.tensor(trip.counts_L, device=device)
        Z = getattr(experts, "num_experts", len(local)) - len(local)
        out = trip.back(experts(arrived_MD, torch.cat([local, local.new_zeros(max(Z, 0))])))
        return out.index_select(0, place_N), other


def _permuted(x_ND: Tensor, index_N: Tensor) -> Tensor:
    return x_ND.index_select(0, index_N)


def inside(dispatcher: Any) -> ExchangeDispatch | None:
    """The exchange within dispatchers that wrap one another."""
    while dispatcher is not None and not isinstance(dispatcher, ExchangeDispatch):
        dispatcher = getattr(dispatcher, "inner", None)
    return dispatcher
