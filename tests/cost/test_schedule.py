"""Micro-batches kept at once and the bubble, against torch's own order of operations and by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, _ComputationType

from moesaic.cost.schedule import bubble, even_stages, kept_at_once, stages_of


def torch_keeps(P: int, rank: int, M: int, V: int) -> int:
    """The most forwards without their backward in the order that torch gives a rank."""
    schedule = ScheduleInterleaved1F1B.__new__(ScheduleInterleaved1F1B)
    schedule.pp_group_size, schedule.n_local_stages, schedule._n_microbatches = P, V, M
    schedule.number_of_rounds = max(1, M // P)
    schedule.microbatches_per_round = M // schedule.number_of_rounds
    kept = most = 0
    for action in schedule._calculate_single_rank_operations(rank):
        if action is None:
            continue
        kept += 1 if action.computation_type == _ComputationType.FORWARD else 0
        kept -= 1 if action.computation_type == _ComputationType.FULL_BACKWARD else 0
        most = max(most, kept)
    assert kept == 0
    return most


@pytest.mark.parametrize(("P", "M", "V"), [(2, 2, 2), (2, 8, 2), (4, 8, 2), (4, 4, 3), (3, 9, 4), (8, 16, 2)])
def test_interleaved_keeps_what_torch_keeps(P: int, M: int, V: int) -> None:
    for rank in range(P):
        assert kept_at_once("interleaved", P, rank, M, V) == torch_keeps(P, rank, M, V)


def test_1f1b_by_hand() -> None:
    """Rank r runs ahead of the last by P - 1 - r forwards; with too few micro-batches all forwards come first."""
    assert [kept_at_once("1f1b", 4, rank, 8) for rank in range(4)] == [4, 3, 2, 1]
    assert [kept_at_once("1f1b", 4, rank, 3) for rank in range(4)] == [3, 3, 3, 3]
    assert kept_at_once("1f1b", 1, 0, 5) == 1


def test_dualpipe_is_that_of_the_report() -> None:
    """Table 2 of DeepSeek-V3's report: P + 1 activations, two copies of parameters, (P/2 - 1)(F&B + B - 3W) of bubble."""
    assert kept_at_once("dualpipe", 16, 3, 120) == 17
    ranks = stages_of(even_stages(8, 4), 4, 10, "dualpipe")
    assert [[stage.number for stage in stages] for stages in ranks] == [[0, 3], [1, 2], [2, 1], [3, 0]]
    assert ranks[0][0].kept == Fraction(5, 2)
    assert ranks[0][0].micro_batches == 5  # of ten; the other five enter at the other end
    # F = 1, B = 2, W = 1, F&B = 3: idle 7 * 2 of 120 * 3 + 14.
    assert bubble("dualpipe", 16, 120) == pytest.approx(14 / 374)


def test_bubble_by_hand() -> None:
    """Two stages and two micro-batches: a rank computes four of six slots, (P - 1) / (M + P - 1) = 1/3 are idle."""
    assert bubble("1f1b", 1, 4) == 0
    assert bubble("1f1b", 2, 2) == pytest.approx(1 / 3)
    assert bubble("1f1b", 4, 8) == pytest.approx(3 / 11)
    assert bubble("interleaved", 4, 8, 2) == pytest.approx(3 / 19)


def test_stages_of_a_rank() -> None:
    (first, second), (third, last) = stages_of(even_stages(8, 4), 2, 4, "interleaved")
    assert (first.layers, second.layers, third.layers, last.layers) == (range(2), range(4, 6), range(2, 4), range(6, 8))
    assert (first.first, second.first, third.last, last.last) == (True, False, False, True)
    # Rank 0 runs ahead by one round of 2 and 2 * 1 forwards, and holds one more: 5 over two stages.
    assert first.kept == Fraction(5, 2)
    assert third.kept == Fraction(3, 2)
