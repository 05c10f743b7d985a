"""Routers refuse settings under which they could not learn, and arithmetic that ends in NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.experts import MoE
from moesaic.plan import CapacityRule
from moesaic.plan.edit import replay
from moesaic.routing import GShardTop2, LossContext, NoisyTopK, TopK, balance_loss, build_router, check_losses


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scale": 0.0}, "scale=0.0 would leave the router without gradient"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"bias_rate": -1.0, "balance_bias": True}, "bias_rate must be at least 0, not -1.0"),
        ({"init_std": -1.0}, "init_std must be at least 0, not -1.0"),
        ({"score": "softmx"}, 'Did you mean "softmax"'),
        ({"normalize": "choosen"}, 'Did you mean "chosen"'),
        ({"group_score": "top2"}, 'Did you mean "top2_sum"'),
    ],
)
def test_topk(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TopK(8, 4, 2, **settings)


def test_gshard_and_noisy() -> None:
    with pytest.raises(ConfigError, match='Did you mean "gumbel"'):
        GShardTop2(8, 4, second="gumble")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="variant must be one of"):
        NoisyTopK(8, 4, 2, variant="vit")  # type: ignore[arg-type]


def test_sqrt_softplus_keeps_finite_gradients_where_softplus_underflows() -> None:
    router = TopK(4, 4, 2, score="sqrt_softplus")
    with torch.no_grad():
        router.gate.weight.zero_()
        router.gate.weight[0, 0] = -200.0
    x_TD = torch.ones(3, 4, requires_grad=True)
    plan = router(x_TD)
    loss, _ = balance_loss(plan, {"switch": 1.0}, LossContext())
    (plan.weight_N.square().sum() + loss).backward()
    assert x_TD.grad is not None
    assert x_TD.grad.isfinite().all()
    assert router.gate.weight.grad is not None
    assert router.gate.weight.grad.isfinite().all()


@pytest.mark.parametrize("variant", ["shazeer", "vmoe"])
def test_a_noisy_plan_replayed_on_itself_keeps_its_weights(variant: Any) -> None:
    torch.manual_seed(0)
    router = NoisyTopK(8, 6, 2, variant=variant, init_std=0.5).train()
    plan = router(torch.randn(32, 8))
    again = replay(plan, plan.detach(), router.weigh)
    torch.testing.assert_close(again.weight_N, plan.weight_N, rtol=0, atol=0)


def test_a_gate_alone_keeps_fp32_too() -> None:
    router = TopK(8, 4, 2)
    router.gate.to(torch.bfloat16)
    assert router.gate.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options"),
    [("segment", {"segment_len": 10**20}), ("gumbel", {"anneal_steps": 10**23}), ("random", {"seed": -(10**22)})],
)
def test_numbers_that_no_tensor_can_hold(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="which no tensor can hold"):
        build_router(name, 8, 4, 2, options)


def test_options_of_losses_too() -> None:
    with pytest.raises(ConfigError, match="which no tensor can hold"):
        check_losses({"entropy_local": 0.1}, TopK(8, 4, 2), {"entropy_local": {"labels": [10**20]}})


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (CapacityRule(overflow="fallback_expert", fallback_expert=99), "one of the 4 experts, not 99"),
        (CapacityRule(overflow="next_best"), "scores for all experts"),
    ],
)
def test_a_capacity_that_a_router_cannot_follow_is_refused_when_built(rule: CapacityRule, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MoE(8, 8, 4, 1, "hash", {"vocab_size": 16}, capacity=rule)
