"""What a placement makes of a step: rows from every rank to every rank, the busiest rank, experts worth a shadow.

>>> rows_RR = rows_between(placement, [(plan.expert_N, plan.token_N) for plan in plans])      # plans[r]: of source rank r
>>> critical_rows(rows_RR)                                   # expert rows of the busiest rank: what the step waits for

Exact where the rows themselves are known, an estimate where only their numbers are. Special experts (numbers of E and up) and
rows that go nowhere travel nowhere.

Legend: N rows, E experts, R ranks of the expert-parallel group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan.placement import Placement
from moesaic.plan.plan import count_experts


def rows_between(placement: Placement, routed: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows that rank [r] sends to rank [c] in a dispatch, its own included: int64 (R, R) on the CPU, exact.

    Args:
        routed: for every rank of the group the rows of its part of the batch, (expert_N, token_N) of its plan.
    """
    _one_per_rank(placement, len(routed))
    rows = []
    for rank, (expert_N, token_N) in enumerate(routed):
        slot_N = placement.choose(expert_N.clamp(max=placement.num_experts), token_N, rank)
        counts_S = count_experts(slot_N, placement.num_slots).cpu()
        rows.append(torch.stack([part.sum() for part in counts_S.split(list(placement.slots_per_rank))]))
    return torch.stack(rows)


def expected_rows_between(placement: Placement, counts_RE: Tensor) -> Tensor:
    """The same from numbers of rows alone, fp64 (R, R): replicas that share an expert's rows share them evenly.

    Exact without replicas on other ranks; with them, as close as tokens' numbers are spread evenly over their remainders.

    Args:
        counts_RE: (R, E) rows of each source rank for each expert, any dtype.
    """
    _one_per_rank(placement, counts_RE.shape[0])
    counts_RE, homes_ER = counts_RE.cpu().double(), _homes(placement)
    stay_RE = torch.where(homes_ER.T > 0, counts_RE, 0.0)
    away_RE = counts_RE - stay_RE
    return torch.diag(stay_RE.sum(dim=1)) + away_RE @ (homes_ER / homes_ER.sum(dim=1, keepdim=True))


def critical_rows(rows_RR: Tensor) -> float:
    """Expert rows of the busiest rank: the largest column sum of ``rows_between`` or its estimate."""
    return float(rows_RR.sum(dim=0).max())


def shadows(
    counts_RE: Tensor,
    placement: Placement,
    *,
    dim: int,
    element_bytes: int,
    expert_bytes: int,
    seconds_per_row: float = 0.0,
    bytes_per_s: float | None = None,
    copies: int = 1,
) -> tuple[int, ...]:
    """Experts to hold on every rank for this step alone (FasterMoE, He et al. 2022; fieldguide 4.8), busiest first.

    A shadow spares the link of the expert's rank 4 * (rows - rows from there) * dim * element_bytes, dispatch and combine,
    forward and backward, and spares the step what the busiest rank computes less. It costs 2 * expert_bytes: weights there,
    gradients back. Each expert is decided on in the order of its rows, with the shadows before it in place; one that does not
    pay does not end the search, as the next may have fewer rows of its own rank.

    Args:
        counts_RE: (R, E) rows of each source rank for each expert.
        expert_bytes: of one expert's weights as they are sent.
        seconds_per_row, bytes_per_s: time of one expert row, forward and backward, and bandwidth of a rank; both or neither,
            and without them only bytes count.
        copies: times the weights pass the busiest link: 1 in a pipelined broadcast, R - 1 where their rank sends to each.

    Raises ``ConfigError`` where only one of the two rates is given, or the counts are not of these ranks.
    """
    if (seconds_per_row > 0) != (bytes_per_s is not None):
        raise ConfigError(
            "Shadows weigh computing against sending with both seconds_per_row and bytes_per_s, or with neither; got "
            f"{seconds_per_row} and {bytes_per_s}."
        )
    _one_per_rank(placement, counts_RE.shape[0])
    counts_ER, homes_ER = counts_RE.cpu().double().T, _homes(placement)
    stay_ER = torch.where(homes_ER > 0, counts_ER, 0.0)
    away_E = (counts_ER - stay_ER).sum(dim=1)
    computed_ER = stay_ER + away_E[:, None] * homes_ER / homes_ER.sum(dim=1, keepdim=True)
    moved_ER = counts_ER - computed_ER  # what a shadow adds to every rank's rows
    rows_R = computed_ER.sum(dim=0)
    totals, away = counts_ER.sum(dim=1).tolist(), away_E.tolist()
    sent, computed = (
        4 * dim * element_bytes,
        seconds_per_row * (bytes_per_s or 0.0),
    )  # bytes of a row, or worth of its time
    cost = 2 * expert_bytes * copies
    chosen = []
    for expert in sorted(range(placement.num_experts), key=lambda e: -totals[e]):
        if totals[expert] * (sent + computed) <= cost:
            break  # not even if all of its rows were spared, and the rest have fewer
        after_R = rows_R + moved_ER[expert]
        spared_rows = float(rows_R.max() - after_R.max())
        if away[expert] * sent + spared_rows * computed > cost:
            chosen.append(expert)
            rows_R = after_R
    return tuple(chosen)


def _homes(placement: Placement) -> Tensor:
    """fp64 (E, R): slots of each expert on each rank."""
    homes_ER = torch.zeros(placement.num_experts, placement.num_ranks, dtype=torch.float64)
    for rank, experts in enumerate(placement.slots):
        for expert in experts:
            homes_ER[expert, rank] += 1
    return homes_ER


def _one_per_rank(placement: Placement, given: int) -> None:
    if given != placement.num_ranks:
        raise ConfigError(f"The placement is of {placement.num_ranks} ranks, and rows of {given} were given.")
