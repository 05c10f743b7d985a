"""Rows between ranks by hand, estimates against exact counts, the busiest rank, shadows on both sides of their threshold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan.placement import Placement
from moesaic.plan.predict import critical_rows, expected_rows_between, rows_between, shadows
from moesaic.plan.rebalance import improve, rank_loads

# Expert 0 on ranks 0 and 1; experts 1 and 2 on one each.
WORKED = Placement(((0, 1), (2, 0), ()), 3)


def _rows(*experts: int) -> tuple[Tensor, Tensor]:
    """One row per token."""
    return torch.tensor(experts, dtype=torch.int64), torch.arange(len(experts))


def test_rows_by_hand() -> None:
    routed = [
        _rows(0, 0, 2, 3),  # expert 0 stays, 2 goes to rank 1, 3 is nowhere
        _rows(1, 0, 4),  # 1 goes to rank 0, 0 stays; 4 is a special expert beyond the placement's
        _rows(0, 0, 0, 2),  # tokens 0 and 2 to rank 0, token 1 to rank 1; 2 to rank 1
    ]
    rows_RR = rows_between(WORKED, routed)
    assert rows_RR.tolist() == [[2, 1, 0], [1, 1, 0], [2, 2, 0]]
    assert critical_rows(rows_RR) == 5
    counts_RE = torch.tensor([[2, 0, 1], [1, 1, 0], [3, 0, 1]])
    assert expected_rows_between(WORKED, counts_RE).tolist() == [[2, 1, 0], [1, 1, 0], [1.5, 2.5, 0]]
    assert critical_rows(expected_rows_between(WORKED, counts_RE)) == 4.5


def test_a_part_for_every_rank() -> None:
    with pytest.raises(ConfigError, match="of 3 ranks, and rows of 2 were given"):
        rows_between(WORKED, [_rows(0), _rows(1)])
    with pytest.raises(ConfigError, match="of 3 ranks, and rows of 4 were given"):
        expected_rows_between(WORKED, torch.ones(4, 3))


def test_counts_are_exact_without_replicas_and_close_with_them() -> None:
    torch.manual_seed(0)
    E, P, T, k = 12, 4, 600, 2
    share_E = 1 / torch.arange(1, E + 1)
    routed = []
    for _ in range(P):
        expert_TK = torch.multinomial(share_E.expand(T, E), k)
        routed.append((expert_TK.flatten(), torch.arange(T).repeat_interleave(k)))
    counts_RE = torch.stack([torch.bincount(expert_N, minlength=E) for expert_N, _ in routed])
    single = Placement.even(E, P)
    assert torch.equal(rows_between(single, routed).double(), expected_rows_between(single, counts_RE))
    load = counts_RE.sum(0).tolist()
    twice = improve(single, load, slots=16)
    exact, estimate = rows_between(twice, routed), expected_rows_between(twice, counts_RE)
    assert torch.equal(exact.sum(1).double(), estimate.sum(1))
    assert (exact - estimate).abs().max() < 0.05 * T * k
    # What the plan promised on the load is what the rows do: the busiest rank falls by the ratio foreseen.
    foreseen = max(rank_loads(twice, load)) / max(rank_loads(single, load))
    measured = critical_rows(exact) / critical_rows(rows_between(single, routed))
    assert foreseen < 0.75
    assert measured == pytest.approx(foreseen, rel=0.03)


# ---- shadows -------------------------------------------------------------------------------------------------------

TWO = Placement.even(2, 2)
LOPSIDED = torch.tensor([[2, 1], [10, 3]])  # expert 0 on rank 0 has 12 rows, 10 from rank 1; expert 1 one from rank 0
BYTES = {"dim": 4, "element_bytes": 2}  # a row's four journeys: 4 * 4 * 2 = 32 bytes
RATES: dict[str, Any] = {"seconds_per_row": 0.125, "bytes_per_s": 80.0}  # computing a row is worth sending 10 bytes


@pytest.mark.parametrize(
    ("expert_bytes", "copies", "chosen"),
    [
        (160, 1, ()),  # 10 rows * 32 = 320 is not more than 2 * 160
        (159, 1, (0,)),
        (16, 1, (0,)),  # expert 1: 32 is not more than 2 * 16
        (15, 1, (0, 1)),
        (80, 2, ()),
        (79, 2, (0,)),
    ],
)
def test_shadows_by_bytes(expert_bytes: int, copies: int, chosen: tuple[int, ...]) -> None:
    assert shadows(LOPSIDED, TWO, expert_bytes=expert_bytes, copies=copies, **BYTES) == chosen


@pytest.mark.parametrize(("expert_bytes", "chosen"), [(150, ()), (149, (0,))])
def test_computing_elsewhere_can_count_against_a_shadow(expert_bytes: int, chosen: tuple[int, ...]) -> None:
    """Rank 0 computes 12 rows and rank 1 four; with expert 0 on both 2 and 14. Two rows of 10 bytes' worth: 320 - 20."""
    assert shadows(LOPSIDED, TWO, expert_bytes=expert_bytes, **RATES, **BYTES) == chosen


@pytest.mark.parametrize(("expert_bytes", "chosen"), [(232, ()), (231, (0,))])
def test_a_straggler_spared_counts_for_it(expert_bytes: int, chosen: tuple[int, ...]) -> None:
    """16 rows on rank 0 and 4 on each other; with the shadow 8 at most. 12 rows * 32 + 8 rows * 10 = 464."""
    counts_RE = torch.tensor([[4, 1, 1, 1]] * 4)
    assert shadows(counts_RE, Placement.even(4, 4), expert_bytes=expert_bytes, **RATES, **BYTES) == chosen


def test_the_busiest_expert_may_not_pay_and_the_next_may() -> None:
    counts_RE = torch.tensor([[20, 9], [0, 0]])  # expert 0 gets its rows from its own rank, expert 1 none of them
    assert shadows(counts_RE, TWO, expert_bytes=143, **BYTES) == (1,)
    assert shadows(counts_RE, TWO, expert_bytes=144, **BYTES) == ()
    everywhere = Placement(((0, 1), (0, 1)), 2)
    assert shadows(counts_RE, everywhere, expert_bytes=1, **BYTES) == ()


def test_shadows_against_a_plain_loop() -> None:
    """The early end and the sums by matrix change nothing."""
    torch.manual_seed(0)
    placement = Placement(((0, 1, 2), (3, 4, 0), (5, 6, 7)), 8)
    seen = set()
    for expert_bytes in range(50, 1050, 50):
        counts_RE = torch.randint(0, 30, (3, 8)) * (torch.rand(3, 8) < 0.7)
        found = shadows(counts_RE, placement, expert_bytes=expert_bytes, **RATES, **BYTES)
        assert found == _by_loop(counts_RE, placement, expert_bytes)
        seen.add(len(found))
    assert len(seen) > 3


def _by_loop(counts_RE: Tensor, placement: Placement, expert_bytes: int) -> tuple[int, ...]:
    chosen: list[int] = []

    def busiest(shadowed: list[int]) -> float:
        far = counts_RE.clone()
        far[:, shadowed] = 0
        here = counts_RE[:, shadowed].sum(dim=1)
        return float((expected_rows_between(placement, far).sum(dim=0) + here).max())

    for expert in counts_RE.sum(dim=0).argsort(descending=True, stable=True).tolist():
        homes = [rank for rank in range(3) if expert in placement.slots[rank]]
        away = int(counts_RE[:, expert].sum() - counts_RE[homes, expert].sum())
        spared_rows = busiest(chosen) - busiest([*chosen, expert])
        if away * 32 + spared_rows * 10 > 2 * expert_bytes:
            chosen.append(expert)
    return tuple(chosen)


def test_half_of_the_rates_is_refused() -> None:
    with pytest.raises(ConfigError, match="both seconds_per_row and bytes_per_s, or with neither; got 1.0 and None"):
        shadows(LOPSIDED, TWO, expert_bytes=1, seconds_per_row=1.0, **BYTES)
