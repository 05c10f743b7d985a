"""Top-p and the budget head: counts by hand, gradients, losses, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.experts import MoE
from moesaic.plan import CapacityRule
from moesaic.routing import Outcome, TokenContext, balance_loss
from moesaic.routing.adaptive import AdaptiveRouter, Budget, TopP

ONE_LAYER = Outcome(torch.zeros(3))


def _with_probabilities(router: AdaptiveRouter, probs_TE: list[list[float]]) -> Tensor:
    """Inputs for which the router's softmax is exactly these probabilities (its gate becomes the identity)."""
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(router.num_experts))  # type: ignore[union-attr, operator, arg-type]
    return torch.tensor(probs_TE, dtype=torch.float64).log()


def _used(plan: object) -> list[list[int]]:
    return [[e for e in row if e < 4] for row in plan.expert_TK.tolist()]  # type: ignore[attr-defined]


PROBS = [
    [0.10, 0.50, 0.25, 0.15],  # sure: one expert holds 0.4
    [0.30, 0.10, 0.25, 0.35],  # 0.35 < 0.4 <= 0.65: two
    [0.25, 0.25, 0.25, 0.25],  # ties go to the lowest: two
]


@pytest.mark.parametrize(
    ("threshold", "k_max", "expected"),
    [
        (0.4, None, [[1], [3, 0], [0, 1]]),
        (0.49, None, [[1], [3, 0], [0, 1]]),
        (0.7, None, [[1, 2], [3, 0, 2], [0, 1, 2]]),
        (0.7, 2, [[1, 2], [3, 0], [0, 1]]),
        (0.95, None, [[1, 2, 3, 0], [3, 0, 2, 1], [0, 1, 2, 3]]),
        (1e-9, None, [[1], [3], [0]]),  # always at least one
    ],
)
def test_top_p_by_hand(threshold: float, k_max: int | None, expected: list[list[int]]) -> None:
    router = TopP(4, 4, 2, threshold=threshold, k_max=k_max).double()
    plan = router(_with_probabilities(router, PROBS))
    assert plan.per_token == (k_max or 4)
    assert _used(plan) == expected
    for t, row in enumerate(expected):
        assert plan.weight_TK[t, : len(row)].tolist() == pytest.approx([PROBS[t][e] for e in row])
        assert not plan.weight_TK[t, len(row) :].any()


def test_a_mass_equal_to_the_threshold_reaches_it() -> None:
    router = TopP(4, 4, 2, threshold=0.5)
    assert _used(router(torch.zeros(1, 4))) == [[0, 1]]  # 1/4 + 1/4


def test_top_p_gradient_is_that_of_the_probabilities() -> None:
    router = TopP(6, 4, 2, threshold=0.6, init_std=0.5).double()
    x_TD, upstream_TK = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    plan = router(x_TD)
    (got,) = torch.autograd.grad((plan.weight_TK * upstream_TK).sum(), router.gate.weight)
    p_TE = (x_TD @ router.gate.weight.T).softmax(dim=1)
    loss = sum(p_TE[t, e] * upstream_TK[t, j] for t in range(5) for j, e in enumerate(_used(plan)[t]))
    (want,) = torch.autograd.grad(loss, router.gate.weight)
    torch.testing.assert_close(got, want)


def test_the_recommended_entropy_loss_makes_top_p_surer() -> None:
    """Descent on it alone: tokens end with fewer experts than they began with."""
    torch.manual_seed(0)
    router = TopP(8, 8, 2, threshold=0.6)
    x_TD = torch.randn(64, 8)
    before = (router(x_TD).expert_TK < 8).sum(dim=1)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(30):
        loss, _ = balance_loss(router(x_TD), {"entropy": TopP.facts.losses["entropy"]})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = (router(x_TD).expert_TK < 8).sum(dim=1)
    assert (after <= before).all()
    assert after.sum() < before.sum() / 2
    assert (after >= 1).all()


def test_top_p_under_rules() -> None:
    router = TopP(6, 4, 2, threshold=1.0)
    allowed_TE = torch.tensor([[True, False, True, False], [False, False, False, False]])
    plan = router(torch.randn(2, 6), TokenContext(allowed_TE=allowed_TE))
    assert sorted(_used(plan)[0]) == [0, 2]
    assert _used(plan)[1] == []


def test_capacity_counts_the_experts_aimed_at() -> None:
    """12 tokens of 4 rows each, all sure of expert 1, k = 2: ceil(12 * 2 / 4) = 6 slots and not 12."""
    layer = MoE(4, 6, 4, 2, "top_p", capacity=CapacityRule(1.0, minimum=0)).double()
    assert isinstance(layer.router, TopP)
    assert layer(_with_probabilities(layer.router, PROBS[:1] * 12))[1].counts_E.tolist() == [0, 6, 0, 0]


def test_top_p_refusals() -> None:
    for threshold in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="threshold must be above 0 and at most 1"):
            TopP(4, 4, 2, threshold=threshold)
    with pytest.raises(ConfigError, match=r"k_max=1 must be between k=2 .* and num_experts=4"):
        TopP(4, 4, 2, k_max=1)
    with pytest.raises(ConfigError, match="k_max=5"):
        TopP(4, 4, 2, k_max=5)


# ---- budget --------------------------------------------------------------------------------------------------------


def _budget(counts: list[float], **options: object) -> Budget:
    """A budget head whose scores are these numbers for every token."""
    router = Budget(4, 4, 2, k_max=len(counts), **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        router.head_out.weight.zero_()
        router.head_out.bias.copy_(torch.tensor(counts))  # type: ignore[union-attr]
    return router


def test_budget_by_hand() -> None:
    """Scores 0, 1, 0 say two experts; equal scores go to the smallest budget."""
    router = _budget([0.0, 1.0, 0.0])
    plan = router(_with_probabilities(router, PROBS))
    assert _used(plan) == [[1, 2], [3, 0], [0, 1]]
    assert plan.weight_TK[0].tolist() == pytest.approx([0.5, 0.25, 0.0])
    assert plan.gate.extra["count_T"].tolist() == pytest.approx([2.0] * 3)
    tied = _budget([1.0, 1.0, 1.0])
    assert _used(tied(_with_probabilities(tied, PROBS))) == [[1], [3], [0]]


def test_every_token_starts_with_k() -> None:
    plan = Budget(16, 8, 3)(torch.randn(40, 16))
    assert (plan.expert_TK < 8).sum(dim=1).tolist() == [3] * 40
    assert plan.per_token == 6


def test_straight_through_gradient_of_the_budget_by_hand() -> None:
    """q = softmax(0, 1, 0) = (1, e, 1) / (2 + e) = (a, b, a). Used: the first two. The soft probability of the first is 1 and
    has no gradient; that of the second is s = q_2 + q_3 = 1 - q_1, so its weight p_2 moves the scores by p_2 ds/dz,
    ds/dz = -dq_1/dz = (-a (1 - a), a b, a a)."""
    router = _budget([0.0, 1.0, 0.0])
    plan = router(_with_probabilities(router, PROBS[:1]))
    a, b = 1 / (2 + math.e), math.e / (2 + math.e)
    (first,) = torch.autograd.grad(plan.weight_TK[0, 0], router.head_out.bias, retain_graph=True)  # type: ignore[arg-type]
    (second,) = torch.autograd.grad(plan.weight_TK[0, 1], router.head_out.bias, retain_graph=True)  # type: ignore[arg-type]
    (third,) = torch.autograd.grad(plan.weight_TK[0, 2], router.head_out.bias, retain_graph=True)  # type: ignore[arg-type]
    assert first.tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    assert second.tolist() == pytest.approx([0.25 * v for v in (-a * (1 - a), a * b, a * a)])
    assert not third.any()  # not used: nobody knows what it would have said


def test_budget_losses_by_hand() -> None:
    """The value is the true count; the gradient that of the soft count 1 + (q_2 + q_3) + q_3."""
    router = _budget([0.0, 1.0, 0.0], cost=0.5)
    plan = router(_with_probabilities(router, PROBS))
    (loss,) = router.own_losses(plan, Outcome(torch.zeros(3), num_layers=2)).values()
    assert loss.item() == pytest.approx(0.5 * 2 / 2)
    (got,) = torch.autograd.grad(loss, router.head_out.bias)  # type: ignore[arg-type]
    z = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad((z.softmax(0) * torch.tensor([1.0, 2.0, 3.0])).sum() * 0.25, z)
    torch.testing.assert_close(got, want)

    aimed = _budget([0.0, 1.0, 0.0], cost=0.5, target=1.5)
    plan = aimed(_with_probabilities(aimed, PROBS))
    (loss,) = aimed.own_losses(plan, ONE_LAYER).values()
    assert loss.item() == pytest.approx(0.5 * 0.25)  # (2 - 1.5)^2
    assert aimed.rows_per_token == 1.5
    assert router.rows_per_token == 2.0


def test_target_is_reached() -> None:
    """Gradient descent on the loss alone brings the mean count of many tokens from 3 to 1.5."""
    torch.manual_seed(0)
    router = Budget(8, 8, 3, cost=1.0, target=1.5)
    x_TD = torch.randn(256, 8)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(150):
        (loss,) = router.own_losses(router(x_TD), ONE_LAYER).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert router(x_TD).gate.extra["count_T"].mean().item() == pytest.approx(1.5, abs=0.25)


def test_sampled_budgets_follow_the_softmax() -> None:
    """Scores 0, 1, 0 over 20 000 draws: shares within 4 standard errors of q."""
    router = _budget([0.0, 1.0, 0.0], sample=True)
    x_TD = torch.zeros(20_000, 4, dtype=torch.float64)
    plan = router(x_TD, TokenContext(generator=torch.Generator().manual_seed(0)))
    counts = plan.gate.extra["count_T"].round()
    q = torch.tensor([0.0, 1.0, 0.0]).softmax(0)
    for i in range(3):
        error = math.sqrt(float(q[i] * (1 - q[i])) / 20_000)
        assert float((counts == i + 1).double().mean()) == pytest.approx(float(q[i]), abs=4 * error)
    assert (router.eval()(x_TD).gate.extra["count_T"].round() == 2).all()


def test_budget_refusals() -> None:
    with pytest.raises(ConfigError, match="k_max=1 leaves the budget nothing to decide"):
        Budget(4, 1, 1)
    with pytest.raises(ConfigError, match=r"target=0\.5 must be between 1 and k_max=4"):
        Budget(4, 4, 2, target=0.5)
    with pytest.raises(ConfigError, match="hidden=0"):
        Budget(4, 4, 2, hidden=0)
    with pytest.raises(ConfigError, match="k_max=9"):
        Budget(4, 4, 2, k_max=9)
