"""Readings of plans, each worked by hand, padding excluded."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.plan import Gate, RoutingPlan, SoftPlan, drop_over_capacity, from_rows, from_topk, read

NAN = float("nan")


def _topk(
    experts: list[list[int]], E: int, valid: list[int] | None = None, probs: list[list[float]] | None = None
) -> RoutingPlan:
    gate = None if probs is None else Gate(torch.tensor(probs).log(), torch.tensor(probs))
    valid_T = None if valid is None else torch.tensor(valid, dtype=torch.bool)
    expert_TK = torch.tensor(experts)
    return from_topk(expert_TK, torch.ones(expert_TK.shape), E, valid_T=valid_T, gate=gate)


def test_max_violation() -> None:
    assert float(read.max_violation(torch.tensor([5, 5, 5, 5]))) == 0.0
    assert float(read.max_violation(torch.tensor([10, 0, 5, 5]))) == 1.0
    assert float(read.max_violation(torch.tensor([20, 0, 0, 0]))) == 3.0  # E - 1 for k = 1
    assert float(read.max_violation(torch.tensor([10, 10, 0, 0]))) == 1.0  # E/k - 1 for k = 2
    assert float(read.max_violation(torch.tensor([0, 0, 0]))) == 0.0
    by_layer = read.max_violation(torch.tensor([[4, 0], [2, 2]]))
    assert by_layer.tolist() == [1.0, 0.0]


def test_cv_squared_is_of_the_population() -> None:
    assert float(read.cv_squared(torch.tensor([8.0, 0, 0, 0]))) == pytest.approx(3.0)  # E - 1
    assert float(read.cv_squared(torch.tensor([1.0, 3.0]))) == pytest.approx(0.25)
    assert float(read.cv_squared(torch.tensor([2.0, 2.0, 2.0]))) == 0.0
    assert float(read.cv_squared(torch.tensor([7.0]))) == 0.0
    assert float(read.cv_squared(torch.zeros(3))) == 0.0


def test_entropies() -> None:
    assert float(read.load_entropy(torch.tensor([3, 3, 3, 3]))) == pytest.approx(math.log(4))
    assert float(read.load_entropy(torch.tensor([9, 0, 0]))) == 0.0
    assert float(read.load_entropy(torch.tensor([1, 3]))) == pytest.approx(0.5623351)
    assert float(read.load_entropy(torch.tensor([0, 0]))) == 0.0
    plan = _topk([[0], [0], [0]], 2, [1, 1, 0], [[0.5, 0.5], [1.0, 0.0], [NAN, NAN]])
    assert float(read.router_entropy(plan)) == pytest.approx(math.log(2) / 2)
    assert math.isnan(float(read.router_entropy(_topk([[0]], 2))))


def test_margin() -> None:
    plan = _topk([[0], [1], [0]], 3, [1, 1, 0], [[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [NAN] * 3])
    assert float(read.margin(plan)) == pytest.approx((0.5 + 0.3) / 2)
    # Sigmoid scores are made a distribution first: .8 and .2 of a sum of 1.6.
    assert float(read.margin(_topk([[0]], 3, probs=[[0.8, 0.2, 0.6]]))) == pytest.approx(0.2 / 1.6)
    assert math.isnan(float(read.margin(_topk([[0]], 1, probs=[[1.0]]))))
    assert math.isnan(float(read.margin(_topk([[0]], 2))))


def test_drop_rate_counts_choices_not_padding() -> None:
    plan = _topk([[0, 1], [0, 1], [0, 2], [0, 1]], 3, [1, 1, 1, 0])
    assert float(read.drop_rate(plan)) == 0.0
    capped = drop_over_capacity(plan, 1)
    assert float(read.drop_rate(capped)) == pytest.approx(3 / 6)
    assert read.load(capped).tolist() == [3, 2, 1]  # before capacity
    assert capped.counts_E.tolist() == [1, 1, 1]
    nothing = _topk([[0, 1]], 3, [0])
    assert float(read.drop_rate(nothing)) == 0.0


def test_dead_experts() -> None:
    assert int(read.dead_experts(torch.tensor([0, 3, 0, 1]))) == 2
    assert read.dead_experts(torch.tensor([[0, 3], [1, 1]])).tolist() == [1, 0]


def test_overlap() -> None:
    a = _topk([[0, 1], [0, 1], [0, 1], [2, 3]], 4, [1, 1, 1, 0])
    b = _topk([[1, 0], [1, 2], [2, 3], [0, 1]], 4, [1, 1, 1, 0])
    assert float(read.overlap(a, b)) == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert float(read.overlap(a, a)) == 1.0
    nowhere = a.send(torch.full((8,), 4))
    assert float(read.overlap(nowhere, nowhere)) == 1.0
    assert float(read.overlap(a, nowhere)) == 0.0


def test_co_activation_rows_sum_to_k_minus_1() -> None:
    plan = _topk([[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]], 5, [1, 1, 1, 0])
    pairs_EE = read.co_activation(plan)
    expected = (
        torch.tensor(
            [[0, 2, 2, 2, 0], [2, 0, 1, 1, 0], [2, 1, 0, 1, 0], [2, 1, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.float64
        )
        / torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0])[:, None]
    )
    torch.testing.assert_close(pairs_EE, expected)
    assert pairs_EE.sum(1).tolist() == pytest.approx([2, 2, 2, 2, 0])
    random = from_topk(torch.rand(50, 9).argsort(1)[:, :4], torch.rand(50, 4), 9)
    torch.testing.assert_close(read.co_activation(random).sum(1), torch.full((9,), 3.0, dtype=torch.float64))


def test_load_by_label() -> None:
    plan = _topk([[0, 1], [0, 2], [1, 2], [0, 1]], 3, [1, 1, 1, 0])
    by_label = read.load_by_label(plan, torch.tensor([1, 0, -1, 0]), 3)
    assert by_label.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]


def test_loose_rows_and_soft_plans_can_be_read() -> None:
    plan = from_rows(torch.tensor([0, 0, 2]), torch.tensor([1, 0, 1]), torch.ones(3), 3, 2)
    assert read.load(plan).tolist() == [1, 2]
    torch.testing.assert_close(read.co_activation(plan), torch.tensor([[0, 1], [0.5, 0]], dtype=torch.float64))
    logits_TS = torch.zeros(3, 4)
    soft = SoftPlan(
        logits_TS.softmax(0)[None], logits_TS.softmax(1)[None], 2, gate=Gate(logits_TS, logits_TS.softmax(1))
    )
    assert read.load(soft).tolist() == [2, 2]
    assert float(read.drop_rate(soft)) == 0.0
    assert float(read.router_entropy(soft)) == pytest.approx(math.log(4))


def test_no_tokens_no_nan() -> None:
    plan = _topk([[0, 1]], 2, [0], [[NAN, NAN]])
    for value in (read.router_entropy(plan), read.margin(plan), read.drop_rate(plan), read.overlap(plan, plan)):
        assert math.isfinite(float(value))


def test_very_many_loads_are_logged_in_groups_of_neighbours() -> None:
    counts_E = torch.arange(10_000)
    logged = read.logged_load(counts_E)
    assert len(logged) == read.num_logged(10_000) == 3334  # groups of 3
    assert logged[:2].tolist() == [0 + 1 + 2, 3 + 4 + 5]
    assert int(logged.sum()) == int(counts_E.sum())
    assert read.num_logged(16) == 16
    assert torch.equal(read.logged_load(counts_E[:16]), counts_E[:16])
