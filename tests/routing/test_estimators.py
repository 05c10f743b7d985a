"""Straight-through, Gumbel-softmax, REINFORCE: gradients exactly, draws by frequency, expectations by enumeration."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan import RoutingPlan
from moesaic.routing import Outcome, Router, StepStats, TokenContext, build_router
from moesaic.routing.estimators import GumbelSoftmax, Reinforce, log_prob_of_draw
from tests.routing.gates import identity_router, padded, route

Z = [1.0, 0.0, -0.5, 0.3]


def _same_token(logits: list[float], times: int) -> Tensor:
    """fp64 (times, E): one token again and again, a leaf of the graph."""
    return torch.tensor([logits], dtype=torch.float64).repeat(times, 1).requires_grad_()


def _seeded(seed: int = 5) -> TokenContext:
    return TokenContext(generator=torch.Generator().manual_seed(seed))


def _assert_shares(counts: Tensor, shares: Tensor) -> None:
    """Observed counts are within 4.5 standard errors of n * shares."""
    n = counts.sum()
    error = (n * shares * (1 - shares)).sqrt()
    assert ((counts - n * shares).abs() <= 4.5 * error).all(), (counts / n, shares)


# ---- straight-through ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_straight_through_is_one_forward_and_the_probability_backward(k: int) -> None:
    z_TE = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    plan = identity_router("straight_through", 4, k).double()(z_TE)
    assert torch.equal(plan.weight_N, torch.ones(5 * k, dtype=torch.float64))
    upstream_TK = torch.randn(5, k, dtype=torch.float64)
    (got_TE,) = torch.autograd.grad((plan.weight_TK * upstream_TK).sum(), z_TE)
    probs_TK = z_TE.softmax(dim=1).gather(1, z_TE.argsort(dim=1, descending=True)[:, :k])
    (want_TE,) = torch.autograd.grad((probs_TK * upstream_TK).sum(), z_TE)
    assert torch.equal(got_TE, want_TE)
    if k == 1:
        assert want_TE.abs().sum() > 0.1  # one expert with weight 1 teaches all the same


def test_straight_through_gives_ties_to_the_lowest_expert() -> None:
    assert route([[1.0, 1.0, 1.0]], 2, "straight_through").expert_TK.tolist() == [[0, 1]]


# ---- Gumbel-softmax ------------------------------------------------------------------------------------------------


def test_gumbel_draws_from_the_softmax() -> None:
    z_TE = _same_token(Z, 40_000)
    plan = identity_router("gumbel", 4, 1).double()(z_TE, _seeded())
    _assert_shares(plan.counts_E, torch.tensor(Z).softmax(0))


def test_gumbel_top_k_draws_without_replacement() -> None:
    z_TE = _same_token(Z, 40_000)
    plan = identity_router("gumbel", 4, 2).double()(z_TE, _seeded())
    p = torch.tensor(Z).softmax(0).tolist()
    pairs = list(itertools.permutations(range(4), 2))
    code_T = plan.expert_TK[:, 0] * 4 + plan.expert_TK[:, 1]
    counts = torch.tensor([int((code_T == i * 4 + j).sum()) for i, j in pairs])
    assert counts.sum() == 40_000  # never the same expert twice
    _assert_shares(counts, torch.tensor([p[i] * p[j] / (1 - p[i]) for i, j in pairs]))


@pytest.mark.parametrize("k", [1, 3])
def test_hard_gumbel_has_the_gradient_of_the_soft_sample(k: int) -> None:
    upstream_TK = torch.randn(6, k, dtype=torch.float64)
    found = {}
    for hard in (True, False):
        z_TE = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        router = identity_router("gumbel", 4, k, hard=hard, tau_start=0.7, tau_end=0.7).double()
        plan = router(z_TE, _seeded())
        q_TE = (plan.gate.noisy_TE / 0.7).softmax(dim=1)
        soft_TK = q_TE.gather(1, plan.gate.noisy_TE.argsort(dim=1, descending=True)[:, :k])
        torch.testing.assert_close(plan.weight_TK, torch.ones_like(soft_TK) if hard else soft_TK, rtol=0, atol=1e-15)
        (found[hard],) = torch.autograd.grad((plan.weight_TK * upstream_TK).sum(), z_TE, retain_graph=True)
        (want_TE,) = torch.autograd.grad((soft_TK * upstream_TK).sum(), z_TE)
        torch.testing.assert_close(found[hard], want_TE, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[True], found[False])


def test_gumbel_evaluates_without_noise() -> None:
    # z = [2, 1, 0], tau = 1: softmax .6652 .2447 .0900
    hard, soft = (route([[2.0, 1.0, 0.0]], 2, "gumbel", hard=hard) for hard in (True, False))
    assert hard.expert_TK.tolist() == soft.expert_TK.tolist() == [[0, 1]]
    assert hard.weight_N.tolist() == [1.0, 1.0]
    assert soft.weight_N.tolist() == pytest.approx([0.6652, 0.2447], abs=1e-4)


def test_the_temperature_falls_geometrically_and_stops() -> None:
    router = GumbelSoftmax(4, 4, 1, tau_start=1.0, tau_end=0.01, anneal_steps=2)
    seen = []
    for _ in range(4):
        seen.append(float(router.tau))
        router.after_step(StepStats(torch.zeros(4)))
    assert seen == pytest.approx([1.0, 0.1, 0.01, 0.01])
    again = GumbelSoftmax(4, 4, 1, tau_start=1.0, tau_end=0.01, anneal_steps=2)
    again.load_state_dict(router.state_dict())
    assert float(again.tau) == pytest.approx(0.01)  # a checkpoint resumes the schedule


# ---- REINFORCE -----------------------------------------------------------------------------------------------------


def test_the_probability_of_a_draw_by_hand() -> None:
    # p = 1/2, 1/4, 1/4: first 0 then 1: 1/2 * (1/4) / (1/2) = 1/4; first 1 then 0: 1/4 * (1/2) / (3/4) = 1/6.
    z_TE = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log().repeat(2, 1)
    log_prob_T = log_prob_of_draw(z_TE, torch.tensor([[0, 1], [1, 0]]))
    assert log_prob_T.exp().tolist() == pytest.approx([1 / 4, 1 / 6])
    draws = torch.tensor(list(itertools.permutations(range(4), 3)))
    z_TE = torch.randn(1, 4, dtype=torch.float64).expand(len(draws), 4)
    assert float(log_prob_of_draw(z_TE, draws).exp().sum()) == pytest.approx(1.0)


def test_the_probability_of_a_draw_under_rules() -> None:
    # Expert 0 is forbidden: 1 comes before 2 with probability 1/2, 2 is then certain, and 0 only fills a place.
    z_TE = torch.tensor([[-math.inf, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    log_prob_T = log_prob_of_draw(z_TE, torch.tensor([[1, 2, 0]]), torch.tensor([[False, True, True]]))
    assert log_prob_T.exp().tolist() == pytest.approx([1 / 2])
    (grad_TE,) = torch.autograd.grad(log_prob_T.sum(), z_TE)
    assert grad_TE[0].tolist() == pytest.approx([0.0, 0.5, -0.5])


LOSS = torch.tensor([7.0, 9.0, 6.5], dtype=torch.float64)


def _toy(k: int, **options: Any) -> tuple[Reinforce, list[tuple[int, ...]], Tensor, Tensor]:
    """A router of three experts, every draw, the loss each leads to, and z."""
    router = identity_router("reinforce", 3, k, entropy_bonus=0.0, **options).double()
    assert isinstance(router, Reinforce)
    draws = list(itertools.permutations(range(3), k))
    losses = torch.stack([sum((LOSS[e] / (1 + 0.4 * j) for j, e in enumerate(d)), LOSS.new_zeros(())) for d in draws])
    return router, draws, losses, torch.tensor([[0.8, 0.0, -0.4]], dtype=torch.float64, requires_grad=True)


def _estimate(router: Router, z_TE: Tensor, draw: tuple[int, ...], loss: Tensor) -> Tensor:
    """The gradient that the router's own loss has if this draw was made and led to this loss."""
    plan = router(z_TE, _seeded())
    extra = plan.gate.extra | {"log_prob_T": log_prob_of_draw(z_TE, torch.tensor([draw]))}
    plan = replace(plan, gate=replace(plan.gate, extra=extra))
    (grad_TE,) = torch.autograd.grad(router.own_losses(plan, Outcome(loss[None]))["policy"], z_TE)
    return grad_TE


def _exact(z_TE: Tensor, draws: list[tuple[int, ...]], losses: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of all draws from the definition, and the gradient of the expected loss."""
    p = z_TE.exp()[0]
    probs = []
    for draw in draws:
        left, prob = p.sum(), p.new_ones(())
        for e in draw:
            prob, left = prob * p[e] / left, left - p[e]
        probs.append(prob)
    (grad_TE,) = torch.autograd.grad((torch.stack(probs) * losses).sum(), z_TE)
    return torch.stack(probs).detach(), grad_TE


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("baseline", ["ema", "learned"])
@pytest.mark.parametrize("level", [0.0, -7.5, 100.0])
def test_reinforce_is_unbiased_whatever_the_baseline(k: int, baseline: str, level: float) -> None:
    router, draws, losses, z_TE = _toy(k, baseline=baseline)
    router.steps_seen.fill_(1)
    router.mean_reward.fill_(level)
    if router.value is not None:
        assert router.value.bias is not None
        torch.nn.init.constant_(router.value.bias, level)
    probs, exact_TE = _exact(z_TE, draws, losses)
    mean_TE = sum(p * _estimate(router, z_TE, d, loss) for p, d, loss in zip(probs, draws, losses, strict=True))
    assert exact_TE.abs().max() > 0.05
    torch.testing.assert_close(mean_TE, exact_TE, atol=1e-12, rtol=0)


def test_a_baseline_lowers_the_variance() -> None:
    router, draws, losses, z_TE = _toy(1)
    router.steps_seen.fill_(1)
    probs, exact_TE = _exact(z_TE, draws, losses)
    variance = {}
    for level in (0.0, float(-(probs * losses).sum())):
        router.mean_reward.fill_(level)
        spread = [
            p * (_estimate(router, z_TE, d, loss) - exact_TE).square().sum()
            for p, d, loss in zip(probs, draws, losses, strict=True)
        ]
        variance[level] = float(sum(spread))
    without, with_mean = variance.values()
    assert with_mean < without / 20


def test_reinforce_by_sampling_through_the_router() -> None:
    """The same from end to end: what forward draws and own_losses returns, over many tokens."""
    router, draws, losses, z_TE = _toy(2)
    router.steps_seen.fill_(1)
    router.mean_reward.fill_(-11.0)
    _, exact_TE = _exact(z_TE, draws, losses)
    T = 20_000
    tokens_TE = _same_token(z_TE[0].tolist(), T)
    plan = router(tokens_TE, _seeded())
    assert torch.equal(plan.weight_N, torch.ones_like(plan.weight_N))
    assert not plan.weight_N.requires_grad
    which = {draw: i for i, draw in enumerate(draws)}
    token_loss_T = losses[[which[tuple(draw)] for draw in plan.expert_TK.tolist()]]
    (grad_TE,) = torch.autograd.grad(router.own_losses(plan, Outcome(token_loss_T))["policy"] * T, tokens_TE)
    error_E = grad_TE.std(dim=0) / T**0.5
    assert ((grad_TE.mean(dim=0) - exact_TE[0]).abs() <= 4.5 * error_E).all()


def test_the_running_mean_by_hand() -> None:
    # Rewards -4, -2, -1. Decay 0.5: -4, then half way to -2: -3, then half way to -1: -2. Decay 0.99: plain means so far.
    for decay, expected in ((0.5, [-4.0, -3.0, -2.0]), (0.99, [-4.0, -3.0, -7 / 3])):
        router, seen = Reinforce(4, 4, 1, ema_decay=decay), []
        for loss in (4.0, 2.0, 1.0):
            router.after_step(StepStats(torch.zeros(4), mean_token_loss=loss))
            seen.append(float(router.mean_reward))
        assert seen == pytest.approx(expected)


def _policy_grad(router: Router, x_TD: Tensor, outcome: Outcome, ctx: TokenContext) -> Tensor:
    weight = router.get_parameter("gate.weight")
    (grad,) = torch.autograd.grad(router.own_losses(router(x_TD, ctx), outcome)["policy"], weight)
    return grad


def test_the_policy_term_is_a_mean_over_targets_not_over_layers() -> None:
    router = build_router("reinforce", 4, 3, 1, {"init_std": 1.0}).double()
    x_TD, losses = torch.randn(4, 4, dtype=torch.float64), torch.tensor([2.0, 0.0, 3.0, 5.0], dtype=torch.float64)
    first = _policy_grad(router, x_TD, Outcome(losses), _seeded())
    assert not first.any()  # nothing to compare rewards with yet
    router.after_step(StepStats(torch.zeros(3), mean_token_loss=4.0))
    grad = _policy_grad(router, x_TD, Outcome(losses), _seeded())
    assert grad.any()
    assert torch.equal(grad, _policy_grad(router, x_TD, Outcome(losses, num_layers=4), _seeded()))
    # Token 1 has no target and token 3 is padding: what is left is the mean of tokens 0 and 2.
    valid = replace(padded([1, 1, 1, 0]), generator=_seeded().generator)
    two = _policy_grad(router, x_TD, Outcome(losses), valid)
    alone = [
        _policy_grad(router, x_TD, Outcome(torch.where(torch.arange(4) == t, losses, 0.0)), _seeded()) for t in (0, 2)
    ]
    torch.testing.assert_close(two, sum(alone) / 2)


def test_the_entropy_bonus_by_hand() -> None:
    router = identity_router("reinforce", 4, 1, entropy_bonus=0.3)
    outcome = Outcome(torch.ones(2))
    plan = router(torch.tensor([[0.0, 0, 0, 0], [math.log(2), 0, 0, -math.inf]]).clamp(min=-1e4), _seeded())
    # Uniform over four: ln 4. p = 1/2, 1/4, 1/4, 0: (ln 2)/2 + (ln 4)/2.
    mean = (math.log(4) + 0.5 * math.log(2) + 0.5 * math.log(4)) / 2
    assert router.own_losses(plan, outcome)["entropy"].item() == pytest.approx(-0.3 * mean)
    ruled = replace(_seeded(), allowed_TE=torch.tensor([[True, True, True, False]] * 2))
    z_TE = torch.zeros(2, 4, requires_grad=True)
    loss = router.own_losses(router(z_TE, ruled), outcome)["entropy"]
    assert loss.item() == pytest.approx(-0.3 * math.log(3))  # forbidden experts are not in the distribution
    (grad_TE,) = torch.autograd.grad(loss, z_TE)
    assert grad_TE.isfinite().all()


def test_a_learned_baseline_is_taught_by_its_error_alone() -> None:
    router = build_router("reinforce", 4, 3, 1, {"baseline": "learned", "value_weight": 1.0})
    assert isinstance(router, Reinforce)
    router.after_step(StepStats(torch.zeros(3), mean_token_loss=1.5))  # the head is to say how R differs from -1.5
    assert router.value is not None
    x_TD = torch.randn(64, 4, requires_grad=True)
    outcome = Outcome(2.0 + x_TD[:, 0].detach().abs())
    for _ in range(200):
        losses = router.own_losses(router(x_TD), outcome)
        grads = torch.autograd.grad(losses["value"], [*router.value.parameters(), x_TD], allow_unused=True)
        assert grads[2] is None  # the trunk is not bent to make losses predictable
        assert torch.autograd.grad(losses["policy"], router.value.weight, allow_unused=True)[0] is None
        with torch.no_grad():
            for parameter, grad in zip(router.value.parameters(), grads[:2], strict=True):
                assert grad is not None
                parameter -= 0.2 * grad
    assert router.value.bias is not None
    assert router.value.bias.item() == pytest.approx(1.5 - float(outcome.token_loss_T.mean()), abs=0.2)


def test_evaluation_plans_have_no_policy_loss() -> None:
    router = identity_router("reinforce", 4, 2).eval()
    plan = router(torch.tensor([Z]))
    assert plan.expert_TK.tolist() == [[0, 3]]
    assert router.own_losses(plan, Outcome(torch.ones(1))) == {}


def test_the_policy_learns_which_expert_lowers_the_loss() -> None:
    """Expert 2 is best for every token: from the rewards alone, the router finds it."""
    router = build_router("reinforce", 4, 3, 1, {"entropy_bonus": 0.0})
    x_TD, per_expert = torch.cat([torch.randn(64, 3), torch.ones(64, 1)], dim=1), torch.tensor([3.0, 2.0, 1.0])
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(120):
        plan = router(x_TD)
        assert isinstance(plan, RoutingPlan)
        token_loss_T = per_expert[plan.expert_N]
        optimizer.zero_grad()
        router.own_losses(plan, Outcome(token_loss_T))["policy"].backward()
        optimizer.step()
        router.after_step(StepStats(plan.counts_E, mean_token_loss=float(token_loss_T.mean())))
    assert router(x_TD).gate.probs_TE[:, 2].mean().item() > 0.8


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gumbel", {"tau_end": 0.0}, "tau_end=0.0 must be above 0"),
        ("gumbel", {"tau_start": 0.5, "tau_end": 0.7}, "at most tau_start=0.5"),
        ("gumbel", {"anneal_steps": 0}, "anneal_steps must be at least 1, not 0"),
        ("reinforce", {"baseline": "emma"}, 'Did you mean "ema"'),
        ("reinforce", {"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1, not 1.0"),
        ("reinforce", {"entropy_bonus": -1.0}, "entropy_bonus must be at least 0, not -1.0"),
        ("reinforce", {"value_weight": 0.0}, "value_weight must be above 0, not 0.0"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_router(name, 8, 4, 1, options)
