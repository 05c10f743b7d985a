"""Balancing: each loss against a dense fp64 formulation of its own, scopes, padding, and the bias rule."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan import CapacityRule, RoutingPlan
from moesaic.plan.read import cv_squared, max_violation
from moesaic.routing import (
    LOSSES,
    Facts,
    LossContext,
    NoisyTopK,
    StepStats,
    TopK,
    balance_loss,
    bias_step,
    check_losses,
)
from tests.routing.gates import identity_router, padded, route

PLAIN = LossContext()


def _value(plan: RoutingPlan, name: str, ctx: LossContext = PLAIN) -> float:
    return float(balance_loss(plan, {name: 1.0}, ctx)[0].detach())


# ---- hand-worked ---------------------------------------------------------------------------------------------------


def test_uniform_scores() -> None:
    for k in (1, 2):
        plan = route(torch.zeros(12, 8), k, normalize="none")  # ties: everything to the first experts
        assert _value(plan, "switch") == pytest.approx(1.0)  # P is uniform, so f does not matter
        # Hugging Face's Mixtral counts f over the k slots without dividing by k: k times as much.
        f_E = plan.choice_counts_E / 12
        assert float(8 * (f_E * plan.gate.probs_TE.mean(0)).sum()) == pytest.approx(k)
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


def test_every_loss_is_held_against_something() -> None:
    assert set(DENSE) | {"load"} == set(LOSSES)


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


def test_losses_add_up_with_their_coefficients() -> None:
    plan = route(torch.randn(9, 4), 2)
    total, values = balance_loss(plan, {"switch": 0.01, "z": 0.001})
    assert float(total) == pytest.approx(0.01 * float(values["switch"]) + 0.001 * float(values["z"]))
    none, empty = balance_loss(plan, {})
    assert float(none) == 0.0
    assert empty == {}


def test_counts_are_of_choices_before_capacity() -> None:
    plan = route(torch.randn(32, 4) + torch.tensor([3.0, 0.0, 0.0, 0.0]), 1, normalize="none")
    capped = CapacityRule(factor=1.0, minimum=0).apply(plan, training=True)
    assert int(capped.dropped) > 0
    assert _value(capped, "switch") == _value(plan, "switch")
    assert _value(capped, "load") == _value(plan, "load")


def test_no_loss_is_nan_without_valid_tokens() -> None:
    for plan in (
        identity_router("topk", 4, 2)(torch.randn(3, 4), padded([0, 0, 0])),
        identity_router("topk", 4, 2)(torch.randn(0, 4)),
    ):
        for name in LOSSES:
            for scope in ("micro_batch", "sequence", "global_batch"):
                assert math.isfinite(_value(plan, name, LossContext(1, scope)))


def test_cv_squared_has_a_gradient_at_perfect_balance() -> None:
    sums_E = torch.full((4,), 2.0, requires_grad=True)
    (grad,) = torch.autograd.grad(cv_squared(sums_E), sums_E)
    assert grad.tolist() == [0.0] * 4


# ---- refusals and the bias -----------------------------------------------------------------------------------------


def test_losses_that_cannot_teach_are_refused() -> None:
    check_losses({"switch": 1e-2, "z": 1e-3, "importance": 1.0}, TopK(4, 4, 2))
    check_losses({"load": 1.0}, NoisyTopK(4, 4, 2))
    with pytest.raises(ConfigError, match='no balancing loss "swich". Did you mean "switch"'):
        check_losses({"swich": 1.0}, TopK(4, 4, 2))
    with pytest.raises(ConfigError, match="TopK has none"):
        check_losses({"load": 1.0}, TopK(4, 4, 2))

    class Table(TopK):
        facts = Facts(has_gate=False)

    with pytest.raises(ConfigError, match="no gradient path into router Table"):
        check_losses({"z": 1.0}, Table(4, 4, 2))


def test_bias_step_rules() -> None:
    counts_E = torch.tensor([10, 0, 5, 5])
    zero_E = torch.zeros(4)
    assert bias_step(zero_E, counts_E, 0.125).tolist() == [-0.125, 0.125, 0.0, 0.0]
    assert bias_step(zero_E, counts_E, 0.125, "proportional").tolist() == [-0.125, 0.125, 0.0, 0.0]
    assert bias_step(zero_E, torch.tensor([8, 4, 4, 4]), 1.0, "proportional").tolist() == pytest.approx(
        [-0.6, 0.2, 0.2, 0.2]
    )
    assert bias_step(zero_E, torch.zeros(4, dtype=torch.int64), 1.0, "proportional").tolist() == [0.0] * 4
    assert bias_step(torch.ones(4), counts_E, 0.5).dtype == torch.float32
    assert zero_E.tolist() == [0.0] * 4  # the old bias is not changed in place


def test_the_bias_balances_a_skewed_router() -> None:
    router = identity_router(
        "topk", 4, 1, score="sigmoid", normalize="none", balance_bias=True, bias_rate=0.01, init_std=0.0
    )
    logits_TE = torch.randn(256, 4) + torch.tensor([2.0, 0.0, 0.0, -2.0])
    start = float(max_violation(router(logits_TE).choice_counts_E))
    for _ in range(100):
        router.after_step(StepStats(router(logits_TE).choice_counts_E))
    assert start > 1.5
    assert float(max_violation(router(logits_TE).choice_counts_E)) < 0.2
