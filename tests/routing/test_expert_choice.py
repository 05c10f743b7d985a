"""Expert choice: hand-worked groups, gradients against dense fp64, capped choice, the predictor, padding, rules, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.experts.layer import MoE
from moesaic.plan import RoutingPlan
from moesaic.plan.read import max_violation
from moesaic.routing import Outcome, TokenContext
from moesaic.routing.expert_choice import ExpertChoice, capped, places
from tests.routing.cases import rows_of

GROUPS = pytest.mark.parametrize("group", ["batch", "sequence", "position"])


def router_of(E: int, k: int, D: int = 16, seed: int = 0, **options: Any) -> ExpertChoice:
    router = ExpertChoice(D, E, k, **options).double()
    nn.init.normal_(router.gate.weight, std=0.7, generator=torch.Generator().manual_seed(seed))
    return router


def by_probs(probs: list[list[float]], k: int, **options: Any) -> tuple[ExpertChoice, Tensor]:
    """A router whose scores are exactly these, and its input."""
    probs_TE = torch.tensor(probs, dtype=torch.float64)
    router = ExpertChoice(probs_TE.shape[1], probs_TE.shape[1], k, **options).double()
    nn.init.eye_(router.gate.weight)
    return router, probs_TE.log()


def some(T: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(T, 16, generator=rng, dtype=torch.float64) + torch.randn(16, generator=rng, dtype=torch.float64)


def taken(plan: RoutingPlan) -> list[set[int]]:
    """The tokens of each expert."""
    return [set(plan.token_N[plan.expert_N == e].tolist()) for e in range(plan.num_experts)]


PROBS = [[0.7, 0.25, 0.05], [0.6, 0.1, 0.3], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1], [0.4, 0.32, 0.28]]


def test_by_hand() -> None:
    # n=6, E=3, k=1: C=2. Expert 0 takes its best two, tokens 0 and 1; expert 1 takes 4 and 2; expert 2 takes 3 and 1.
    # So token 1 has two experts and token 5 none.
    router, x_TD = by_probs(PROBS, 1)
    plan = router(x_TD)
    assert taken(plan) == [{0, 1}, {2, 4}, {1, 3}]
    assert plan.token_N.tolist() == [0, 1, 4, 2, 3, 1]  # expert by expert, best first
    expected = torch.tensor([0.7, 0.6, 0.8, 0.4, 0.6, 0.3], dtype=torch.float64)
    torch.testing.assert_close(plan.weight_N, expected)
    assert rows_of(plan).tolist() == [1, 2, 1, 1, 1, 0]


def test_groups_by_hand() -> None:
    ctx = TokenContext(num_sequences=2)  # tokens 0 1 2 | 3 4 5
    # Sequences of n=3: C = round(3/3) = 1.
    router, x_TD = by_probs(PROBS, 1, group="sequence")
    assert taken(router(x_TD, ctx)) == [{0, 5}, {2, 4}, {1, 3}]
    # Places of n=2: C = round(2/3) = 1. Pairs (0, 3), (1, 4), (2, 5).
    router, x_TD = by_probs(PROBS, 1, group="position")
    assert taken(router(x_TD, ctx)) == [{0, 1, 2}, {0, 4, 2}, {3, 1, 5}]


def test_eight_tokens_four_experts_two_each() -> None:
    plan = router_of(4, 2)(some(8))
    assert plan.counts_E.tolist() == [4] * 4  # C = n k / E
    assert plan.num_rows == 8 * 2


@pytest.mark.parametrize(
    ("n", "k", "E", "C"),
    [(8, 2, 4, 4), (1, 1, 8, 1), (3, 1, 8, 1), (6, 1, 4, 2), (5, 8, 8, 5), (0, 2, 4, 0), (7, 2, 8, 2)],
)
def test_places(n: int, k: int, E: int, C: int) -> None:
    assert int(places(torch.tensor(n), k, E)) == C


def test_a_token_without_expert_gets_nothing_from_the_layer() -> None:
    layer = MoE(16, 8, 4, k=1, router=router_of(4, 1, inference="topc")).double()
    x_TD = some(24)
    y_TD, plan = layer(x_TD)
    nobody_T = rows_of(plan) == 0
    assert nobody_T.any()
    assert not y_TD[nobody_T].any()
    assert y_TD[~nobody_T].abs().amax(dim=1).min() > 0


@GROUPS
def test_gradients_are_those_of_the_softmax(group: Any) -> None:
    router, x_TD = router_of(8, 2, group=group), some(24).requires_grad_()
    plan = router(x_TD, TokenContext(num_sequences=3))
    dense_TE = (x_TD @ router.gate.weight.T).softmax(dim=1)
    upstream_N = torch.randn(plan.num_rows, dtype=torch.float64)
    inputs = [x_TD, router.gate.weight]
    for mine, theirs in zip(
        torch.autograd.grad((plan.weight_N * upstream_N).sum(), inputs),
        torch.autograd.grad((dense_TE[plan.token_N, plan.expert_N] * upstream_N).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@GROUPS
@pytest.mark.parametrize("k", [1, 3, 8])
def test_experts_take_their_best(group: Any, k: int) -> None:
    """Against a loop over groups and experts."""
    router, x_TD, B = router_of(8, k, group=group), some(24), 4
    plan = router(x_TD, TokenContext(num_sequences=B))
    token_BS = torch.arange(24).view(B, 6)
    groups = {"batch": [token_BS.flatten()], "sequence": list(token_BS), "position": list(token_BS.T)}[group]
    probs_TE = (x_TD @ router.gate.weight.detach().T).softmax(dim=1)
    expected: list[set[int]] = [set() for _ in range(8)]
    for tokens in groups:
        C = min(max(round(len(tokens) * k / 8 + 1e-9), 1), len(tokens))
        for e in range(8):
            expected[e] |= set(sorted(tokens.tolist(), key=lambda t: -float(probs_TE[t, e]))[:C])
    assert taken(plan) == expected


def test_ties_go_to_the_earlier_token() -> None:
    plan = ExpertChoice(16, 4, 1)(torch.ones(8, 16))
    assert taken(plan) == [{0, 1}] * 4


# ---- padding and rules -----------------------------------------------------------------------------------------


def test_a_group_with_padding_takes_its_share_of_real_tokens() -> None:
    valid_T = torch.ones(24, dtype=torch.bool)
    valid_T[[0, 1, 2, 3, 14, 15, 16, 17]] = False  # rows of 8: 4, 6 and 6 real tokens
    ctx = TokenContext(num_sequences=3, valid_T=valid_T)
    x_TD = torch.where(valid_T[:, None], some(24), 0.0)
    plan = router_of(4, 2, group="sequence")(x_TD, ctx)
    for row, n in [(0, 4), (1, 6), (2, 6)]:
        mine_N = plan.token_N // 8 == row
        assert [int(((plan.expert_N == e) & mine_N).sum()) for e in range(4)] == [n // 2] * 4
    assert valid_T[plan.token_N[plan.kept_N]].all()
    alone = router_of(4, 2, group="sequence")(x_TD[4:8], TokenContext(num_sequences=1))
    assert [{t - 4 for t in tokens if t < 8} for tokens in taken(plan)] == taken(alone)


@GROUPS
@pytest.mark.parametrize("options", [{}, {"max_experts": 2}], ids=str)
def test_nothing_but_padding(group: Any, options: dict[str, Any]) -> None:
    ctx = TokenContext(num_sequences=2, valid_T=torch.zeros(8, dtype=torch.bool))
    plan = router_of(4, 2, group=group, **options)(torch.zeros(8, 16, dtype=torch.float64), ctx)
    assert plan.counts_E.tolist() == [0] * 4
    assert plan.weight_N.isfinite().all()


def test_experts_pass_over_forbidden_tokens() -> None:
    allowed_TE = torch.ones(24, 4, dtype=torch.bool)
    allowed_TE[:12, 0] = False
    plan = router_of(4, 2)(some(24), TokenContext(allowed_TE=allowed_TE))
    assert plan.counts_E.tolist() == [12] * 4  # expert 0 finds its twelve among the others
    assert min(taken(plan)[0]) == 12


# ---- the cap ---------------------------------------------------------------------------------------------------


def test_capped_by_hand() -> None:
    # Three tokens, three experts, one token each, at most one expert per token: the best assignment is the diagonal (1.9),
    # although token 0 is the favourite of all.
    probs = [[0.9, 0.8, 0.7], [0.5, 0.6, 0.1], [0.1, 0.2, 0.4]]
    score_GEn = torch.tensor(probs, dtype=torch.float64).T[None]
    A_En = (capped(score_GEn, torch.tensor([1]), 1, temperature=1e-2, iterations=60) / 1e-2).clamp(max=0).exp()[0]
    torch.testing.assert_close(A_En, torch.eye(3, dtype=torch.float64), atol=5e-3, rtol=0)


def test_capped_solves_its_problem() -> None:
    """Feasible, and optimal: A = min(1, exp((S + alpha - beta) / t)) with beta = 0 wherever the cap does not bind."""
    score_GEn = some(60).softmax(dim=1)[:, :8].T[None]
    temperature, C, most = 0.05, 15, 3
    log_A_En = capped(score_GEn, torch.tensor([C]), most, temperature, iterations=400)[0] / temperature
    A_En = log_A_En.clamp(max=0).exp()
    torch.testing.assert_close(A_En.sum(dim=1), torch.full((8,), float(C), dtype=torch.float64), atol=1e-6, rtol=0)
    row_n = A_En.sum(dim=0)
    assert row_n.max() <= most + 1e-4
    # Recover the multipliers: log A - S / t = (alpha_e - beta_t) / t.
    both_En = log_A_En - score_GEn[0] / temperature
    beta_n = (both_En[0].max() - both_En[0]) * temperature
    torch.testing.assert_close(both_En, both_En[:, :1] + both_En[:1] - both_En[:1, :1])
    assert (beta_n > 1e-3).any()
    assert beta_n[row_n < most - 1e-3].max() < 1e-6


@pytest.mark.parametrize("most", [2, 3])
def test_no_token_has_more_experts_than_the_cap(most: int) -> None:
    x_TD = some(256)
    free, held = router_of(8, 2)(x_TD), router_of(8, 2, max_experts=most)(x_TD)
    assert rows_of(free).max() > most >= rows_of(held).max()
    assert held.num_rows == free.num_rows
    assert held.counts_E.sum() > 0.9 * free.counts_E.sum()
    assert max_violation(held.counts_E) < 0.1
    # The cap costs little of the scores' sum.
    assert 0.9 * free.weight_N.sum() < held.weight_N.sum() < free.weight_N.sum()


def test_a_cap_that_does_not_bind_changes_nothing() -> None:
    x_TD = some(64)
    assert taken(router_of(8, 2)(x_TD)) == taken(router_of(8, 2, max_experts=8)(x_TD))


# ---- evaluation ------------------------------------------------------------------------------------------------


def set_predictor(router: ExpertChoice, logits: list[float]) -> None:
    assert router.predictor is not None
    assert router.predictor.bias is not None
    with torch.no_grad():
        router.predictor.weight.zero_()
        router.predictor.bias.copy_(torch.tensor(logits))


def test_evaluation_asks_the_predictors() -> None:
    router, x_TD = by_probs(PROBS, 1)
    router.eval()
    set_predictor(router, [2.0, -1.0, 0.5])
    plan = router(x_TD)
    assert plan.num_rows == 6 * 3
    assert taken(plan) == [set(range(6)), set(), set(range(6))]
    expected = torch.tensor(PROBS, dtype=torch.float64)[:, [0, 2]].flatten()
    torch.testing.assert_close(plan.weight_N[plan.kept_N], expected)  # the gate's weights, not the predictor's
    router.max_experts = 1
    plan = router(x_TD)
    assert plan.num_rows == 6
    assert taken(plan) == [set(range(6)), set(), set()]
    router.max_experts, router.threshold = None, 0.7  # log(0.7 / 0.3) = 0.85
    assert taken(router(x_TD)) == [set(range(6)), set(), set()]


def test_predictor_loss_by_hand() -> None:
    # Two tokens, two experts, C=1: expert 0 takes token 0, expert 1 takes token 1; predictors say 0 and 1 of every token.
    router, x_TD = by_probs([[0.9, 0.1], [0.2, 0.8]], 1, predictor_loss=0.5)
    set_predictor(router, [0.0, 1.0])
    plan = router(x_TD)
    # -log of 1/2, 1/2 (expert 0), and of 1 - sigmoid(1), sigmoid(1) (expert 1), averaged.
    one = 1 / (1 + math.exp(-1))
    by_hand = 0.5 * (2 * math.log(2) - math.log(1 - one) - math.log(one)) / 4
    losses = router.own_losses(plan, Outcome(torch.zeros(2), num_layers=1))
    assert losses["choice_predictor"].item() == pytest.approx(by_hand, rel=1e-6)
    halved = router.own_losses(plan, Outcome(torch.zeros(2), num_layers=2))
    assert halved["choice_predictor"].item() == pytest.approx(by_hand / 2, rel=1e-6)


def test_predictor_loss_leaves_out_padding_and_forbidden_pairs() -> None:
    router, x_TD = router_of(4, 2), some(12)
    valid_T, allowed_TE = torch.arange(12) >= 3, torch.ones(12, 4, dtype=torch.bool)
    allowed_TE[5:9, 1] = False
    plan = router(x_TD, TokenContext(valid_T=valid_T, allowed_TE=allowed_TE))
    assert plan.gate is not None
    chosen_TE = torch.zeros(12, 4, dtype=torch.float64)
    chosen_TE[plan.token_N[plan.kept_N], plan.expert_N[plan.kept_N]] = 1.0
    asked_TE = allowed_TE & valid_T[:, None]
    predicted_TE = plan.gate.extra["predicted_TE"]
    expected = 0.1 * F.binary_cross_entropy_with_logits(predicted_TE[asked_TE], chosen_TE[asked_TE])
    loss = router.own_losses(plan, Outcome(torch.zeros(12)))["choice_predictor"]
    torch.testing.assert_close(loss, expected)


def test_the_predictor_teaches_only_itself() -> None:
    router, x_TD = router_of(4, 2), some(12).requires_grad_()
    plan = router(x_TD)
    router.own_losses(plan, Outcome(torch.zeros(12)))["choice_predictor"].backward()
    assert router.predictor is not None
    assert router.predictor.weight.grad is not None
    assert x_TD.grad is None
    assert router.gate.weight.grad is None


def test_the_predictor_learns_what_experts_take() -> None:
    """Choices that follow from the vectors can be foretold: far better than from the average, on fresh tokens too."""
    router = router_of(4, 1, group="batch")
    assert router.predictor is not None
    optimizer = torch.optim.Adam(router.predictor.parameters(), lr=0.05)
    for step in range(150):
        plan = router(some(256, seed=0)[torch.randperm(256, generator=torch.Generator().manual_seed(step))])
        loss = router.own_losses(plan, Outcome(torch.zeros(256)))["choice_predictor"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x_TD = some(256, seed=0)
    chosen, foretold = taken(router(x_TD)), taken(router.eval()(x_TD))
    agreed = sum(len(a & b) for a, b in zip(chosen, foretold, strict=True))
    assert agreed / sum(map(len, chosen)) > 0.85
    assert agreed / sum(map(len, foretold)) > 0.85


def test_the_predictor_begins_at_the_average() -> None:
    router = ExpertChoice(16, 8, 2)
    assert router.predictor is not None
    assert router.predictor.bias is not None
    torch.testing.assert_close(router.predictor.bias.sigmoid(), torch.full((8,), 0.25))
    assert ExpertChoice(16, 8, 8).eval()(torch.randn(4, 16)).counts_E.tolist() == [4] * 8


def test_topc_has_no_predictor() -> None:
    router = router_of(4, 2, inference="topc")
    assert [name for name, _ in router.named_parameters()] == ["gate.weight"]
    plan = router(some(12))
    assert router.own_losses(plan, Outcome(torch.zeros(12))) == {}
    assert taken(plan) == taken(router.eval()(some(12)))


# ---- facts and refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "causal", "alone"), [("batch", False, False), ("sequence", False, True), ("position", True, False)]
)
def test_facts_follow_the_group(group: Any, causal: bool, alone: bool) -> None:
    facts = ExpertChoice(16, 8, 2, group=group).facts
    assert (facts.causal, facts.batch_invariant) == (causal, alone)
    assert facts.causal_in_evaluation
    assert facts.batch_invariant_in_evaluation
    facts = ExpertChoice(16, 8, 2, group=group, inference="topc").facts
    assert (facts.causal_in_evaluation, facts.batch_invariant_in_evaluation) == (causal, alone)


@pytest.mark.parametrize("T", [0, 1])
@GROUPS
def test_no_tokens_and_one(group: Any, T: int) -> None:
    plan = router_of(4, 2, group=group)(some(T), TokenContext(num_sequences=1))
    assert plan.counts_E.tolist() == [T] * 4  # C is at least 1 where there is a token


def test_one_expert_and_all_experts() -> None:
    assert router_of(1, 1)(some(6)).counts_E.tolist() == [6]
    assert router_of(4, 4)(some(6)).counts_E.tolist() == [6] * 4


@pytest.mark.parametrize(
    ("k", "options", "words"),
    [
        (9, {}, "k=9 experts per token are impossible"),
        (2, {"max_experts": 1}, "max_experts=1 must be between k=2"),
        (2, {"max_experts": 9}, "max_experts=9 must be between"),
        (2, {"max_experts": 3, "cap_temperature": 0.0}, "cap_temperature=0.0 must be above 0"),
        (2, {"max_experts": 3, "cap_iterations": 0}, "cap_iterations=0 at least 1"),
        (2, {"predictor_loss": 0.0}, 'never teach the predictor.*inference="topc"'),
        (2, {"threshold": 1.0}, "threshold must be between 0 and 1"),
        (2, {"group": "document"}, "group must be"),
        (2, {"inference": "greedy"}, "inference must be"),
    ],
)
def test_refusals(k: int, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ExpertChoice(16, 8, k, **options)
