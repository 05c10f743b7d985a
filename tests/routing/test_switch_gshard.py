"""Switch's jitter and GShard's stochastic second expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesaic.experts import MoE
from moesaic.plan import RoutingPlan, SoftPlan
from moesaic.routing import TokenContext
from tests.routing.gates import identity_router, route


def test_jitter_multiplies_the_input_within_its_bounds() -> None:
    router = identity_router("switch", 4, 1, jitter=0.1)
    x_TD = torch.tensor([[1.0, -2.0, 3.0, 0.5]]).repeat(4000, 1)
    plan = router(x_TD)
    assert plan.gate is not None
    ratio_TD = (plan.gate.logits_TE / x_TD).detach()
    assert 0.9 <= float(ratio_TD.min()) < 0.901
    assert 1.099 < float(ratio_TD.max()) <= 1.1
    assert abs(float(ratio_TD.mean()) - 1) < 2e-3
    assert float(ratio_TD.std()) == pytest.approx(0.2 / 12**0.5, rel=0.02)  # uniform, not normal


def test_no_jitter_in_evaluation_or_when_disabled() -> None:
    x_TD = torch.randn(8, 4)
    for router in (identity_router("switch", 4, 1, jitter=0.1).eval(), identity_router("switch", 4, 1, jitter=0.0)):
        plan = router(x_TD)
        assert plan.gate is not None
        torch.testing.assert_close(plan.gate.logits_TE, x_TD)


def test_the_generator_decides_the_jitter() -> None:
    router, x_TD = identity_router("switch", 4, 1, jitter=0.1), torch.randn(8, 4)

    def logits(seed: int) -> Tensor:
        plan = router(x_TD, TokenContext(generator=torch.Generator().manual_seed(seed)))
        return plan.gate.logits_TE

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))


def test_experts_see_the_clean_input() -> None:
    layer = MoE(4, 4, 4, 1, "switch", {"jitter": 0.5})
    seen: list[Tensor] = []
    local = layer.dispatcher

    def spy(x_TD: Tensor, plan: RoutingPlan | SoftPlan, experts: object) -> Tensor:
        seen.append(x_TD)
        return local(x_TD, plan, experts)

    layer.dispatcher = spy
    x_TD = torch.randn(16, 4)
    _, plan = layer(x_TD)
    assert torch.equal(seen[0], x_TD)
    clean_TE = x_TD @ layer.router.get_parameter("gate.weight").T
    assert plan.gate is not None
    assert not torch.allclose(plan.gate.logits_TE, clean_TE)  # while the router did see the jitter


def test_switch_weight_is_the_probability() -> None:
    plan = route([[2.0, 1.0, 0.0, -1.0]], 1, "switch")
    assert plan.expert_N.tolist() == [0]
    assert float(plan.weight_N) == pytest.approx(0.6439, abs=6e-5)


# GShard. Logits ln 6, ln 2, ln 1, ln 1: p = .6 .2 .1 .1, so g1 = .75 and g2 = .25 after renormalising.
LOGITS = torch.tensor([6.0, 2.0, 1.0, 1.0]).log()


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        ({"second": "stochastic"}, 0.5),  # min(1, 2 * .25)
        ({"second": "threshold_stochastic", "threshold": 0.8}, 0.3125),  # min(1, .25 / .8)
        ({"second": "threshold_stochastic", "threshold": 0.2}, 1.0),
        ({"second": "threshold", "threshold": 0.2}, 1.0),
        ({"second": "threshold", "threshold": 0.3}, 0.0),
        ({"second": "all"}, 1.0),
    ],
)
def test_how_often_the_second_expert_is_kept(options: dict[str, object], keep: float) -> None:
    T = 20_000
    plan = identity_router("gshard", 4, 2, **options)(LOGITS.repeat(T, 1))
    assert (plan.expert_TK[:, 0] == 0).all()
    kept_T = plan.expert_TK[:, 1] == 1
    assert (plan.expert_TK[~kept_T, 1] == 4).all()
    share = float(kept_T.double().mean())
    assert abs(share - keep) <= 4 * (keep * (1 - keep) / T) ** 0.5
    # The first weight stays .75 whether or not the second was kept; a rejected second weighs 0.
    torch.testing.assert_close(plan.weight_TK[:, 0], torch.full((T,), 0.75))
    torch.testing.assert_close(plan.weight_TK[:, 1], torch.where(kept_T, 0.25, 0.0))
    # It was the router's own choice, so it is neither counted nor a drop.
    assert int(plan.dropped) == 0
    assert int(plan.choice_counts_E[1]) == int(kept_T.sum())


def test_gumbel_draws_the_second_from_the_other_probabilities() -> None:
    T = 20_000
    plan = identity_router("gshard", 4, 2, second="gumbel")(LOGITS.repeat(T, 1))
    assert (plan.expert_TK[:, 0] == 0).all()
    share_E = plan.choice_counts_E[1:].double() / T
    torch.testing.assert_close(share_E, torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), atol=0.015, rtol=0)


def test_evaluation_has_a_policy_of_its_own() -> None:
    logits_TE = LOGITS.repeat(50, 1)
    assert int(route(logits_TE, 2, "gshard", second="threshold", threshold=0.3).counts_E[1]) == 50
    assert int(route(logits_TE, 2, "gshard", eval_second="threshold", threshold=0.3).counts_E[1]) == 0
