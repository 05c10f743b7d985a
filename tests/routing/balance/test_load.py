"""Losses on load, and the simple ones on logits: worked by hand, and against dense fp64 formulations of their own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moesaic.plan import CapacityRule, RoutingPlan
from moesaic.plan.read import cv_squared, max_violation
from moesaic.routing import LOSSES, LossContext, balance_loss
from tests.routing.gates import identity_router, padded, route

PLAIN = LossContext()


def _value(plan: RoutingPlan, name: str, ctx: LossContext = PLAIN) -> float:
    return float(balance_loss(plan, {name: 1.0}, ctx)[0].detach())


# ---- hand-worked ---------------------------------------------------------------------------------------------------


def test_uniform_scores() -> None:
    for k in (1, 2):
        plan = route(torch.zeros(12, 8), k, normalize="none")  # ties: everything to the first experts
        assert _value(plan, "switch") == pytest.approx(1.0)  # P is uniform, so f does not matter
    assert _value(route(torch.zeros(5, 64), 2), "z") == pytest.approx(math.log(64) ** 2)
    assert math.log(64) ** 2 == pytest.approx(17.296, abs=1e-3)
    assert _value(route(torch.full((5, 64), -math.log(64)), 2), "z") == pytest.approx(0.0, abs=1e-9)
    assert _value(route(torch.full((5, 4), 3.0), 2), "logit_l2") == pytest.approx(9.0)
    everyone = route(torch.zeros(6, 4), 4)
    assert _value(everyone, "importance") == pytest.approx(0.0, abs=1e-9)


def test_collapse_on_one_expert() -> None:
    logits_TE = torch.zeros(12, 8)
    logits_TE[:, 3] = 60.0
    plan = route(logits_TE, 1, normalize="none")
    assert _value(plan, "switch") == pytest.approx(8.0)
    assert _value(plan, "importance") == pytest.approx(7.0)
    assert _value(plan, "load") == pytest.approx(7.0)
    assert float(max_violation(plan.choice_counts_E)) == pytest.approx(7.0)  # E/k - 1
    two = route(logits_TE, 2)
    assert float(max_violation(two.choice_counts_E)) == pytest.approx(3.0)


def test_hugging_face_counts_slots() -> None:
    """Mixtral's code divides counts by tokens, so its value at balance is k; with its option the Switch loss is that."""
    for k in (1, 2, 3):
        plan = route(torch.randn(12, 6), k, normalize="none")
        assert plan.gate is not None
        mask_TE = torch.zeros(12, 6).scatter(1, plan.choice_TK, 1.0)
        by_hand = float(6 * (mask_TE.mean(0) * plan.gate.probs_TE.mean(0)).sum())
        for scope in ("micro_batch", "sequence", "global_batch"):
            share = _value(plan, "switch", LossContext(1, scope))
            slots = balance_loss(plan, {"switch": 1.0}, LossContext(1, scope), {"switch": {"normalize": "slots"}})[0]
            assert float(slots) == pytest.approx(k * share)
            assert float(slots) == pytest.approx(by_hand)
    assert float(LOSSES["switch"](route(torch.zeros(12, 8), 2), normalize="slots")) == pytest.approx(2.0)


def test_importance_of_scores_is_v_moes() -> None:
    # Clean softmax summed over tokens: .9 + .7 and .1 + .3; mean 1, variance .36. The weights of top-1 instead: 1.6 and 0.
    p = torch.tensor([[0.9, 0.1], [0.7, 0.3]])
    plan = route(p.log(), 1, normalize="none")
    assert float(LOSSES["importance"](plan, of="scores")) == pytest.approx(0.36)
    assert float(LOSSES["importance"](plan)) == pytest.approx(1.0)
    noisy = identity_router("noisy_topk", 4, 2, variant="vmoe").train()
    logits_TE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    clean = cv_squared(logits_TE.softmax(1).sum(0))
    torch.testing.assert_close(LOSSES["importance"](noisy(logits_TE), of="scores"), clean)


def test_one_expert_is_always_balanced() -> None:
    plan = route(torch.randn(5, 1), 1)
    assert _value(plan, "importance") == 0.0
    assert _value(plan, "load") == 0.0
    assert _value(plan, "switch") == pytest.approx(1.0)


def test_sequence_scope_by_hand() -> None:
    # Two sequences of two tokens, two experts, k=1. Sequence 0 sends both to expert 0, sequence 1 one to each.
    p = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
    plan = route(p.log(), 1, normalize="none")
    # 2 * (1 * .8) and 2 * (.5 * .4 + .5 * .6), averaged.
    assert _value(plan, "switch", LossContext(2, "sequence")) == pytest.approx((1.6 + 1.0) / 2)
    # Over the micro-batch: f = 3/4, 1/4; P = .6, .4.
    assert _value(plan, "switch") == pytest.approx(2 * (0.75 * 0.6 + 0.25 * 0.4))
    # Over the whole step: counts 5, 5.
    ctx = LossContext(2, "global_batch", torch.tensor([5, 5]))
    assert _value(plan, "switch", ctx) == pytest.approx(2 * (0.5 * 0.6 + 0.5 * 0.4))
    ctx = LossContext(2, "global_batch", torch.tensor([9, 1]))
    assert _value(plan, "switch", ctx) == pytest.approx(2 * (0.9 * 0.6 + 0.1 * 0.4))
    # Without counts of the step there is only this micro-batch.
    assert _value(plan, "switch", LossContext(2, "global_batch")) == _value(plan, "switch")


def test_sequence_scope_leaves_out_padding_and_empty_sequences() -> None:
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5], [0.5, 0.5]])
    router = identity_router("topk", 2, 1, normalize="none")
    plan = router(p.log(), padded([1, 0, 1, 1, 0, 0]))
    # Sequence 0: only token 0, 2 * (1 * .9). Sequence 1: as above, 1. Sequence 2 is all padding and does not count.
    assert _value(plan, "switch", LossContext(3, "sequence")) == pytest.approx((1.8 + 1.0) / 2)


def test_sigmoid_scores_are_normalised_per_token() -> None:
    logits = torch.tensor([[0.0, 0.0, math.log(3)]])  # s = .5 .5 .75, s' = 2/7 2/7 3/7
    plan = route(logits, 1, score="sigmoid", normalize="none")
    assert _value(plan, "switch") == pytest.approx(3 * 3 / 7)
    assert _value(plan, "switch", LossContext(1, "sequence")) == pytest.approx(3 * 3 / 7)


# ---- gradients against a dense formulation -------------------------------------------------------------------------


def _dense_importance(z_TE: Tensor, mask_TE: Tensor) -> Tensor:
    gates_TE = torch.where(mask_TE, z_TE.exp(), 0.0)
    gates_TE = gates_TE / gates_TE.sum(1, keepdim=True)
    sums = [gates_TE[:, e].sum() for e in range(z_TE.shape[1])]
    mean = sum(sums) / len(sums)
    return sum((s - mean) ** 2 for s in sums) / len(sums) / (mean**2 + 1e-10)


def _dense_switch(z_TE: Tensor, mask_TE: Tensor) -> Tensor:
    T, E = z_TE.shape
    p_TE = z_TE.exp() / z_TE.exp().sum(1, keepdim=True)
    return E * sum(float(mask_TE[:, e].sum()) / float(mask_TE.sum()) * p_TE[:, e].sum() / T for e in range(E))


def _dense_z(z_TE: Tensor, mask_TE: Tensor) -> Tensor:
    return (z_TE.exp().sum(1).log() ** 2).mean()


def _dense_l2(z_TE: Tensor, mask_TE: Tensor) -> Tensor:
    return (z_TE**2).mean()


DENSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "importance": _dense_importance,
    "switch": _dense_switch,
    "z": _dense_z,
    "logit_l2": _dense_l2,
}  # "load" stands in test_noisy.py


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_value_and_gradient(name: str, padding: bool) -> None:
    z_TE = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 1] if padding else [1] * 9, dtype=torch.bool)
    plan = identity_router("topk", 6, 2).double()(z_TE, padded(valid.tolist()) if padding else padded([1] * 9))
    loss, values = balance_loss(plan, {name: 0.3})
    mask_TE = torch.zeros(9, 6, dtype=torch.bool).scatter(1, z_TE.topk(2, dim=1).indices, True)
    expected = DENSE[name](z_TE[valid], mask_TE[valid])
    torch.testing.assert_close(values[name], expected.detach(), atol=1e-12, rtol=0)
    assert not values[name].requires_grad
    (got,) = torch.autograd.grad(loss, z_TE)
    (want,) = torch.autograd.grad(0.3 * expected, z_TE)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert float(got[valid].abs().sum()) > 0
    assert float(got[~valid].abs().sum()) == 0.0


def test_sequence_scope_gradient_is_the_mean_of_the_sequences() -> None:
    z_TE = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    router = identity_router("topk", 4, 2).double()
    loss, _ = balance_loss(router(z_TE), {"switch": 1.0}, LossContext(2, "sequence"))
    apart = sum(balance_loss(router(z_TE[rows]), {"switch": 1.0})[0] for rows in (slice(0, 4), slice(4, 8))) / 2
    torch.testing.assert_close(loss, apart)
    torch.testing.assert_close(torch.autograd.grad(loss, z_TE), torch.autograd.grad(apart, z_TE))


def test_sequence_is_the_switch_loss_per_sequence() -> None:
    z_TE = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    router = identity_router("topk", 5, 2, score="sigmoid").double()
    plan = router(z_TE, padded([1, 1, 0, 1] + [1] * 4 + [0] * 4))
    named, _ = balance_loss(plan, {"sequence": 1.0}, LossContext(3, "global_batch"))
    scoped, _ = balance_loss(plan, {"switch": 1.0}, LossContext(3, "sequence"))
    assert torch.equal(named, scoped)
    # DeepSeek-V3 by hand: f_i = E / (K T) counts, P_i the mean of s / sum(s), one sequence at a time.
    total = torch.zeros((), dtype=torch.float64)
    for rows in ([0, 1, 3], [4, 5, 6, 7]):
        s_TE = z_TE[rows].sigmoid()
        f_E = torch.zeros(5, dtype=torch.float64)
        for row in s_TE.topk(2, dim=1).indices.tolist():
            for e in row:
                f_E[e] += 5 / (2 * len(rows))
        total = total + (f_E * (s_TE / s_TE.sum(1, keepdim=True)).mean(0)).sum() / 2
    torch.testing.assert_close(named, total)
    (got,), (want,) = torch.autograd.grad(named, z_TE), torch.autograd.grad(total, z_TE)
    torch.testing.assert_close(got, want)
    uniform = route(torch.zeros(8, 4), 2)
    assert _value(uniform, "sequence", LossContext(2)) == pytest.approx(1.0)
    collapsed = route(torch.tensor([[60.0, 0, 0, 0]]).repeat(8, 1), 2)  # f = 1/2 of the rows, P = 1
    assert _value(collapsed, "sequence", LossContext(2)) == pytest.approx(4 / 2)


def test_counts_are_of_choices_before_capacity() -> None:
    plan = route(torch.randn(32, 4) + torch.tensor([3.0, 0.0, 0.0, 0.0]), 1, normalize="none")
    capped = CapacityRule(factor=1.0, minimum=0).apply(plan, training=True)
    assert int(capped.dropped) > 0
    assert _value(capped, "switch") == _value(plan, "switch")
    assert _value(capped, "load") == _value(plan, "load")


def test_cv_squared_has_a_gradient_at_perfect_balance() -> None:
    sums_E = torch.full((4,), 2.0, requires_grad=True)
    (grad,) = torch.autograd.grad(cv_squared(sums_E), sums_E)
    assert grad.tolist() == [0.0] * 4
