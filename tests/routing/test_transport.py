"""BASE and Sinkhorn routing: values worked by hand, gradients against dense fp64, balance, padding, rules, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.plan.read import max_violation
from moesaic.routing import TokenContext, build_router
from moesaic.routing.assignment import assign_balanced
from moesaic.routing.transport import Base, Sinkhorn, placed, sinkhorn

BOTH = pytest.mark.parametrize(("name", "k"), [("base", 1), ("sinkhorn", 1), ("sinkhorn", 2)])


def by_identity(router: Any) -> Any:
    """The router with the identity as its gate: vectors are the scores."""
    nn.init.eye_(router.gate.weight)
    return router.double()


def skewed(T: int, D: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(T, D, generator=rng, dtype=torch.float64) + torch.randn(D, generator=rng, dtype=torch.float64)


def sharp(router: Any, seed: int = 0) -> Any:
    router.double()
    nn.init.normal_(router.gate.weight, std=0.7, generator=torch.Generator().manual_seed(seed))
    return router


# ---- BASE ------------------------------------------------------------------------------------------------------


def test_base_by_hand() -> None:
    # All four prefer expert 0, which has two places. The two that lose least by leaving it (0.5 and 1) go to expert 1.
    scores = torch.tensor([[2.0, 1.0], [3.0, 0.0], [1.5, 1.0], [4.0, 2.0]], dtype=torch.float64)
    router = by_identity(Base(2, 2))
    plan = router(scores)
    assert plan.expert_TK[:, 0].tolist() == [1, 0, 1, 0]
    # sigmoid(1), sigmoid(3), sigmoid(1), sigmoid(4)
    expected = torch.tensor([0.7311, 0.9526, 0.7311, 0.9820], dtype=torch.float64)
    torch.testing.assert_close(plan.weight_TK[:, 0], expected, atol=5e-5, rtol=0)
    # In evaluation each goes where it wants.
    assert router.eval()(scores).expert_TK[:, 0].tolist() == [0, 0, 0, 0]


def test_base_takes_the_best_balanced_assignment_and_teaches_the_chosen() -> None:
    router, x_TD = sharp(Base(16, 8)), skewed(64, 16).requires_grad_()
    plan = router(x_TD)
    logits_TE = x_TD @ router.gate.weight.T
    assert torch.equal(plan.expert_TK[:, 0], assign_balanced(logits_TE.detach()))
    assert plan.counts_E.tolist() == [8] * 8
    upstream_N = torch.randn(64, dtype=torch.float64)
    dense_T = 1 / (1 + (-(x_TD * router.gate.weight[plan.expert_N]).sum(dim=1)).exp())
    inputs = [x_TD, router.gate.weight]
    for mine, theirs in zip(
        torch.autograd.grad((plan.weight_N * upstream_N).sum(), inputs),
        torch.autograd.grad((dense_T * upstream_N).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_centroids_are_orthogonal_with_gain() -> None:
    for D, E in [(16, 4), (4, 16)]:
        weight_ED = Base(D, E, gain=0.3).gate.weight.detach()
        gram = weight_ED @ weight_ED.T if E <= D else weight_ED.T @ weight_ED
        torch.testing.assert_close(gram, 0.09 * torch.eye(min(D, E)))


def test_base_loads_differ_by_one_where_experts_do_not_divide_tokens() -> None:
    counts_E = sharp(Base(16, 8))(skewed(61, 16)).counts_E
    assert sorted(counts_E.tolist()) == [7, 7, 7, 8, 8, 8, 8, 8]


def test_nan_in_a_token_ends_and_stays_with_it() -> None:
    router, x_TD = sharp(Base(16, 8)), skewed(64, 16)
    x_TD[3] = float("nan")
    plan = router(x_TD)
    assert plan.counts_E.tolist() == [8] * 8
    assert plan.weight_TK[:, 0].isfinite().sum() == 63


# ---- Sinkhorn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "E"), [(6, 4), (3, 7), (1, 1)])
def test_equal_scores_give_the_uniform_plan(T: int, E: int) -> None:
    plan_TE = sinkhorn(torch.zeros(T, E, dtype=torch.float64)).exp()
    torch.testing.assert_close(plan_TE, torch.full((T, E), 1 / (T * E), dtype=torch.float64))


def test_sinkhorn_by_hand() -> None:
    # 2 x 2 with K = [[4, 1], [1, 1]]: the plan keeps the cross ratio a d / (b c) = 4 and has margins 1/2, so a = d, b = c,
    # a / b = 2, a + b = 1/2: a = 1/3, b = 1/6.
    scores = torch.tensor([[math.log(4.0), 0.0], [0.0, 0.0]], dtype=torch.float64)
    plan = sinkhorn(scores, tolerance=1e-12, max_iterations=1000).exp()
    torch.testing.assert_close(plan, torch.tensor([[1 / 3, 1 / 6], [1 / 6, 1 / 3]], dtype=torch.float64))


def test_margins_and_size_of_scores() -> None:
    scores_TE = skewed(60, 8)
    plan_TE = sinkhorn(scores_TE).exp()
    torch.testing.assert_close(plan_TE.sum(dim=1), torch.full((60,), 1 / 60, dtype=torch.float64))
    torch.testing.assert_close(plan_TE.sum(dim=0), torch.full((8,), 1 / 8, dtype=torch.float64), atol=1e-4, rtol=0)
    # Offsets of tokens and of experts change nothing, however large.
    moved_TE = scores_TE + 1e4 * torch.randn(60, 1, dtype=torch.float64) + 1e4 * torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(moved_TE, max_iterations=500).exp(), plan_TE, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_hopeless_scores_end_finite(scale: float) -> None:
    log_plan_TE = sinkhorn(scale * skewed(40, 8).float(), max_iterations=20)
    assert not log_plan_TE.isnan().any()
    torch.testing.assert_close(log_plan_TE.exp().sum(dim=1), torch.full((40,), 1 / 40), atol=1e-6, rtol=1e-3)


def test_sinkhorn_router_by_hand() -> None:
    # Margins of expert 0 over 1: 3, 2, 1, 0.5. The plan halves the tokens at the middle, so the upper two stay.
    scores = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.5, 0.0]], dtype=torch.float64)
    router = by_identity(Sinkhorn(2, 2, 1))
    plan = router(scores)
    assert plan.expert_TK[:, 0].tolist() == [0, 0, 1, 1]
    expected = torch.tensor([3.0, 2.0, 0.0, 0.0], dtype=torch.float64).sigmoid()  # raw scores, not the plan's
    torch.testing.assert_close(plan.weight_TK[:, 0], expected)
    assert router.eval()(scores).expert_TK[:, 0].tolist() == [0, 0, 0, 0]


def test_a_colder_plan_is_better_balanced_in_its_largest_entries() -> None:
    # Small scores that vary ten times more for the last expert than for the first: the last is most tokens' best or worst.
    logits_TE = 0.02 * skewed(512, 8) * torch.linspace(0.2, 2, 8, dtype=torch.float64)
    router = by_identity(Sinkhorn(8, 8, 1))
    flat = float(max_violation(router(logits_TE).counts_E))
    router.temperature = 0.01
    cold = float(max_violation(router(logits_TE).counts_E))
    assert cold < 0.3 < 0.7 < flat


@pytest.mark.parametrize("k", [1, 2, 8])
def test_sinkhorn_weights_and_gradients_are_those_of_raw_scores(k: int) -> None:
    router, x_TD = sharp(Sinkhorn(16, 8, k)), skewed(48, 16).requires_grad_()
    plan = router(x_TD)
    logits_TE = x_TD @ router.gate.weight.T
    chosen_TK = sinkhorn(logits_TE).sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(plan.expert_TK, chosen_TK)
    dense_TE = logits_TE.sigmoid() if k == 1 else logits_TE.exp() / logits_TE.exp().sum(dim=1, keepdim=True)
    upstream_N = torch.randn(48 * k, dtype=torch.float64)
    inputs = [x_TD, router.gate.weight]
    for mine, theirs in zip(
        torch.autograd.grad((plan.weight_N * upstream_N).sum(), inputs),
        torch.autograd.grad((dense_TE.gather(1, chosen_TK).flatten() * upstream_N).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


# ---- both ------------------------------------------------------------------------------------------------------


@BOTH
def test_training_balances_what_evaluation_does_not(name: str, k: int) -> None:
    router, x_TD = sharp(build_router(name, 16, 8, k)), skewed(256, 16)
    balanced = float(max_violation(router(x_TD).counts_E))
    greedy = float(max_violation(router.eval()(x_TD).counts_E))
    assert balanced < 0.4 < greedy


@BOTH
def test_padding_takes_no_place(name: str, k: int) -> None:
    """The real tokens are routed as if the padding were not there."""
    router, x_TD = sharp(build_router(name, 16, 4, k)), skewed(20, 16)
    valid_T = torch.ones(20, dtype=torch.bool)
    valid_T[[0, 7, 8, 19]] = False
    padded = router(torch.where(valid_T[:, None], x_TD, 0.0), TokenContext(valid_T=valid_T))
    alone = router(x_TD[valid_T])
    assert torch.equal(padded.expert_TK[valid_T], alone.expert_TK)
    assert (padded.expert_TK[~valid_T] == 4).all()
    if name == "base":
        assert padded.counts_E.tolist() == [4] * 4


@BOTH
def test_nothing_but_padding(name: str, k: int) -> None:
    plan = build_router(name, 16, 4, k)(torch.zeros(6, 16), TokenContext(valid_T=torch.zeros(6, dtype=torch.bool)))
    assert plan.counts_E.tolist() == [0] * 4


def test_base_uses_permitted_pairs_where_balance_allows() -> None:
    # Each token is barred from the expert it likes best. There is a balanced assignment without barred pairs.
    router, x_TD = sharp(Base(16, 4)), skewed(40, 16)
    logits_TE = (x_TD @ router.gate.weight.T).detach()
    allowed_TE = torch.ones(40, 4, dtype=torch.bool)
    allowed_TE[torch.arange(40), torch.arange(40) % 4] = False
    plan = router(x_TD, TokenContext(allowed_TE=allowed_TE))
    assert plan.counts_E.tolist() == [10] * 4
    # And no place is kept for a token that nobody may serve.
    allowed_TE[:4] = False
    plan = router(x_TD, TokenContext(allowed_TE=allowed_TE))
    assert plan.counts_E.tolist() == [9] * 4
    assert (plan.expert_TK[:4] == 4).all()
    place_R, scores_RE = placed(logits_TE, TokenContext(allowed_TE=allowed_TE))
    assert place_R.tolist() == list(range(4, 40))
    assert scores_RE[~allowed_TE[4:]].max() < logits_TE[4:].min()


def test_base_drops_what_rules_and_balance_cannot_both_have() -> None:
    # Everyone may use expert 0 only; half of the places are elsewhere, and whoever gets one is sent nowhere.
    allowed_TE = torch.zeros(8, 2, dtype=torch.bool)
    allowed_TE[:, 0] = True
    plan = sharp(Base(16, 2))(skewed(8, 16), TokenContext(allowed_TE=allowed_TE))
    assert plan.counts_E.tolist() == [4, 0]


@BOTH
def test_one_expert(name: str, k: int) -> None:
    plan = build_router(name, 16, 1, 1)(torch.randn(5, 16))
    assert plan.counts_E.tolist() == [5]


@pytest.mark.parametrize(
    ("name", "k", "options", "words"),
    [
        ("base", 2, {}, 'k must be 1, not 2; use "sinkhorn"'),
        ("base", 1, {"gain": 0.0}, "gain must be above 0"),
        ("sinkhorn", 9, {}, "k=9 experts per token are impossible"),
        ("sinkhorn", 1, {"temperature": 0.0}, "temperature must be above 0"),
        ("sinkhorn", 1, {"tolerance": -1.0}, "tolerance must be at least 0"),
        ("sinkhorn", 1, {"max_iterations": 0}, "max_iterations must be at least 1"),
    ],
)
def test_refusals(name: str, k: int, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_router(name, 16, 8, k, options)


def test_facts_follow_k() -> None:
    assert Sinkhorn(16, 8, 1).facts.teaches == "chosen"
    assert Sinkhorn(16, 8, 2).facts.teaches == "all"
    assert not Base(16, 8).facts.causal
    assert Base(16, 8).facts.causal_in_evaluation


def test_the_auction_of_the_paper_gives_the_same_balance_and_nearly_the_same_scores() -> None:
    x_TD = torch.randn(64, 8, dtype=torch.float64)
    exact, bids = (
        build_router("base", 8, 4, 1, {"solver": solver, "epsilon": 1e-4}).double() for solver in ("exact", "auction")
    )
    bids.load_state_dict(exact.state_dict())
    best, sold = exact(x_TD), bids(x_TD)
    assert best.counts_E.tolist() == sold.counts_E.tolist() == [16] * 4
    z_TE = best.gate.logits_TE
    gain = (z_TE.gather(1, best.expert_TK) - z_TE.gather(1, sold.expert_TK)).sum()
    spread = float((z_TE.max() - z_TE.min()).detach())
    assert 0 <= float(gain.detach()) <= 64 * 1e-4 * spread
