"""The adapted capacity factor: by hand, towards its target, used by the forward between steps only, kept in checkpoints."""

from __future__ import annotations

import pytest
import torch

from moesaic.experts import MoE
from moesaic.experts.capacity import AdaptedCapacity
from moesaic.plan import AdaptiveFactor, CapacityRule, RoutingPlan
from moesaic.routing import StepStats, TokenContext


def _stats(dropped: int, chosen: int = 100) -> StepStats:
    return StepStats(torch.tensor([chosen]), dropped=dropped)


def test_by_hand() -> None:
    adapt = AdaptiveFactor(target=0.1, eta=0.5, memory=0.5, lo=0.5, hi=1.3, step=0.25)
    adapted = AdaptedCapacity(CapacityRule(factor=1.0, adapt=adapt))
    assert adapted.in_use() == 1.0
    # d = .5 * .1 + .5 * .3 = .2; factor = 1 * (1 + .5 * .1) = 1.05, in use 1.25.
    adapted.after_step(_stats(30))
    assert float(adapted.factor) == pytest.approx(1.05)
    assert adapted.in_use() == 1.25
    # d = .1 + .5 * .9 = .55; factor = 1.05 * (1 + .5 * .45) = 1.28625; then the bound.
    adapted.after_step(_stats(90))
    assert float(adapted.factor) == pytest.approx(1.28625)
    adapted.after_step(_stats(90))
    assert float(adapted.factor) == pytest.approx(1.3)
    assert adapted.in_use() == 1.3
    for _ in range(200):
        adapted.after_step(_stats(0))
    assert float(adapted.factor) == pytest.approx(0.5)  # the other bound
    adapted.after_step(_stats(0, chosen=0))
    assert float(adapted.factor) == pytest.approx(0.5)


def test_it_finds_the_factor_that_drops_what_was_asked() -> None:
    torch.manual_seed(0)
    adapt = AdaptiveFactor(target=0.1, eta=2.0, memory=0.5, lo=0.25, hi=8.0, step=0.01)
    layer = MoE(8, 4, 8, 2, capacity=CapacityRule(factor=1.0, minimum=0, adapt=adapt)).train()
    with torch.no_grad():
        layer.router.get_parameter("gate.weight").normal_()
    rates = []
    for _ in range(60):
        _, plan = layer(torch.randn(512, 8) + 0.5)
        assert isinstance(plan, RoutingPlan)
        layer.after_step(StepStats(plan.choice_counts_E, 512, dropped=int(plan.dropped)))
        rates.append(int(plan.dropped) / 1024)
    assert rates[0] > 0.2
    assert sum(rates[-20:]) / 20 == pytest.approx(0.1, abs=0.02)


def test_forwards_change_nothing_and_evaluation_does_not_use_it() -> None:
    layer = MoE(8, 4, 4, 2, capacity=CapacityRule(factor=1.0, minimum=0, adapt=AdaptiveFactor(lo=0.25))).train()
    assert layer.adapted is not None
    layer.adapted.factor.fill_(0.25)
    x = torch.randn(32, 8)
    _, plan = layer(x)
    assert int(plan.counts_E.max()) <= 4  # ceil(.25 * 2 * 32 / 4)
    assert float(layer.adapted.factor) == 0.25
    _, quiet = layer.eval()(x)
    assert int(quiet.dropped) == 0


def test_the_state_lasts_and_stays_fp32() -> None:
    rule = CapacityRule(factor=1.0, adapt=AdaptiveFactor())
    layer = MoE(8, 4, 4, 2, capacity=rule)
    layer.after_step(StepStats(torch.tensor([50, 30, 10, 10]), dropped=40))
    saved = layer.state_dict()
    assert float(saved["adapted.factor"]) > 1.0
    again = MoE(8, 4, 4, 2, capacity=rule).to(torch.bfloat16)
    again.load_state_dict(saved)
    assert again.adapted is not None
    assert again.adapted.factor.dtype == torch.float32
    assert torch.equal(again.adapted.factor, saved["adapted.factor"])
    assert MoE(8, 4, 4, 2, capacity=CapacityRule()).adapted is None


def test_shared_and_residual_overflow_differ_by_the_shared_experts_alone() -> None:
    """The plans are the same; what carries a dropped token is the shared expert, which sees every token anyway."""
    x = torch.randn(16, 8)
    outputs = {}
    for overflow in ("residual", "shared"):
        torch.manual_seed(0)
        layer = MoE(8, 4, 4, 1, "switch", shared=1, capacity=CapacityRule(factor=0.5, minimum=0, overflow=overflow))  # type: ignore[arg-type]
        layer.router.eval()  # without jitter both see the same scores
        y, plan = layer(x)
        lost = plan.expert_N == 4
        assert lost.any()
        assert layer.shared is not None
        torch.testing.assert_close(y[lost], layer.shared(x)[lost])
        outputs[overflow] = y
    assert torch.equal(outputs["residual"], outputs["shared"])


def test_random_priority_follows_the_generator_of_the_batch() -> None:
    layer = MoE(8, 4, 2, 1, router_options={"normalize": "none"}, capacity=CapacityRule(factor=0.5, priority="random"))
    x = torch.randn(64, 8)
    kept = [
        layer(x, TokenContext(generator=torch.Generator().manual_seed(seed)))[1].kept_N.tolist() for seed in (1, 1, 2)
    ]
    assert kept[0] == kept[1] != kept[2]
