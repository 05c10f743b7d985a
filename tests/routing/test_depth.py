"""The depth router: its choice by hand, what each mode may look at, and a predictor that learns nothing but to foretell it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moesaic.errors import ConfigError
from moesaic.plan import RoutingPlan
from moesaic.routing import NO_CONTEXT, Outcome, TokenContext
from moesaic.routing.depth import DepthRouter


def by_score(scores: list[list[float]], capacity: float, valid: list[list[int]] | None = None, **options: Any) -> Any:
    """The plan of a router whose score is the token's one number."""
    router = DepthRouter(1, capacity=capacity, predictor_hidden=0, **options)
    with torch.no_grad():
        router.gate.weight.fill_(1.0)
    valid_T = None if valid is None else torch.tensor(valid).bool().flatten()
    ctx = TokenContext(num_sequences=len(scores), valid_T=valid_T)
    return router(torch.tensor(scores).view(-1, 1), ctx)


def chosen(plan: RoutingPlan, rows: int) -> list[list[int]]:
    picks: list[list[int]] = plan.kept_N.view(rows, -1).int().tolist()
    return picks


def test_the_choice_by_hand() -> None:
    scores = [[0.1, -2.0, 0.7, 0.5], [3.0, 3.0, 3.0, -1.0]]
    half = by_score(scores, 0.5)
    assert chosen(half, 2) == [[0, 0, 1, 1], [1, 1, 0, 0]]  # ties go to the earlier token
    torch.testing.assert_close(half.weight_N, torch.tensor([0, 0, 0.7, 0.5, 3, 3, 0, 0]))
    assert chosen(by_score(scores, 0.51), 2) == [[1, 0, 1, 1], [1, 1, 1, 0]]  # ceil(2.04)
    assert chosen(by_score(scores, 0.01), 2) == [[0, 0, 1, 0], [1, 0, 0, 0]]  # never fewer than one
    assert chosen(by_score(scores, 1.0), 2) == [[1] * 4] * 2
    sigmoid = by_score(scores, 0.5, weight="sigmoid")
    torch.testing.assert_close(sigmoid.weight_N[2:4], torch.tensor([0.7, 0.5]).sigmoid())


def test_padding_is_never_chosen_and_does_not_count() -> None:
    """Three real tokens: half of them is two, whatever stands around them; a row of padding takes none."""
    valid = [[0, 1, 1, 1, 0], [0] * 5]
    plan = by_score([[9, 0.1, 0.2, 0.3, 9], [9.0] * 5], 0.5, valid)
    assert chosen(plan, 2) == [[0, 0, 1, 1, 0], [0] * 5]
    assert not plan.choice_N[~plan.valid_T].lt(1).any()
    assert chosen(by_score([[0.1, 0.2, 0.3]], 0.5), 1) == [[0, 1, 1]]


def test_products_that_are_not_quite_whole_are_not_rounded_up() -> None:
    """0.1 * 30 is 3.0000000000000004 in binary, which are three tokens; tensors count as numbers do."""
    for capacity in (0.1, 0.125, 0.3, 0.7, 1.0):
        router = DepthRouter(2, capacity=capacity)
        numbers = list(range(1, 101))
        exact = [-(-round(capacity * 1000) * n // 1000) for n in numbers]
        assert [router.slots(n) for n in numbers] == exact
        assert router.slots_of(torch.tensor(numbers)).tolist() == exact


def loud(dim: int = 8, **options: Any) -> DepthRouter:
    router = DepthRouter(dim, capacity=0.25, **options).double()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(std=0.7)
    return router


def changed(x_BSD: Tensor, row: int, place: int) -> Tensor:
    x_BSD = x_BSD.clone()
    x_BSD[row, place] = 3 * torch.randn(x_BSD.shape[2], dtype=x_BSD.dtype)
    return x_BSD


@pytest.mark.parametrize("training", [True, False])
def test_facts(training: bool) -> None:
    """Training looks at later tokens, evaluation does not; neither looks at other sequences."""
    router = loud().train(training)
    leaked = mixed = apart = False
    taken = set()
    for _ in range(20):
        x_BSD, ctx = torch.randn(2, 12, 8, dtype=torch.float64), TokenContext(num_sequences=2)
        before = router(x_BSD.flatten(0, 1), ctx).kept_N.view(2, 12)
        after = router(changed(x_BSD, 0, 9).flatten(0, 1), ctx).kept_N.view(2, 12)
        leaked |= bool((before != after)[0, :9].any())
        mixed |= bool((before != after)[1].any())
        apart |= bool((before != router.train(not training)(x_BSD.flatten(0, 1), ctx).kept_N.view(2, 12)).any())
        router.train(training)
        taken |= set(before.sum(dim=1).tolist())
    facts = router.facts
    assert leaked != (facts.causal if training else facts.causal_in_evaluation)
    assert not mixed
    assert facts.batch_invariant
    assert apart
    assert facts.inference == "other rule"
    assert (taken == {3}) == training  # ceil(0.25 * 12), exactly


@pytest.mark.parametrize("hidden", [0, 5])
def test_the_predictor_gets_its_loss_and_nothing_else_does(hidden: int) -> None:
    router = loud(predictor_hidden=hidden, predictor_loss=0.5).train()
    x_TD = torch.randn(24, 8, dtype=torch.float64, requires_grad=True)
    valid_T = torch.arange(24) % 5 != 0
    plan = router(x_TD, TokenContext(num_sequences=2, valid_T=valid_T))
    losses = router.own_losses(plan, Outcome(torch.zeros(24), num_layers=2))
    assert set(losses) == {"depth_predictor"}
    # Half the coefficient's share of two layers, mean of -log of the probability of what happened, real tokens only.
    p_T = plan.gate.extra["predicted_T"].sigmoid()
    happened_T = torch.where(plan.kept_N, p_T, 1 - p_T)
    torch.testing.assert_close(losses["depth_predictor"], 0.25 * -happened_T[valid_T].log().mean())
    losses["depth_predictor"].backward()
    assert x_TD.grad is None
    assert router.gate.weight.grad is None
    assert all(p.grad is not None and p.grad.any() for n, p in router.named_parameters() if not n.startswith("gate"))


def test_the_score_learns_through_the_weight_of_the_chosen() -> None:
    router = loud().train()
    x_TD = torch.randn(12, 8, dtype=torch.float64)
    plan = router(x_TD, NO_CONTEXT)
    upstream_T = torch.randn(12, dtype=torch.float64)
    (plan.weight_N * upstream_T).sum().backward()
    assert router.gate.weight.grad is not None
    expected_D = (x_TD * upstream_T[:, None])[plan.kept_N].sum(0)
    torch.testing.assert_close(router.gate.weight.grad[0], expected_D)
    assert router.predictor.weight.grad is None


def test_the_predictor_learns_to_agree_with_the_choice() -> None:
    """On texts it never saw; always saying no would agree on 75%."""
    torch.manual_seed(0)
    router = DepthRouter(16, capacity=0.25, init_std=0.3)
    optimizer = torch.optim.Adam(router.parameters(), lr=1e-2)
    ctx = TokenContext(num_sequences=16)
    for _ in range(150):
        plan = router(torch.randn(16 * 32, 16), ctx)
        router.own_losses(plan, Outcome(torch.zeros(512)))["depth_predictor"].backward()
        optimizer.step()
        optimizer.zero_grad()
    fresh_TD = torch.randn(16 * 32, 16)
    wanted_T, said_T = router(fresh_TD, ctx).kept_N, router.eval()(fresh_TD, ctx).kept_N
    assert float((wanted_T == said_T).float().mean()) > 0.9
    assert 0.15 < float(said_T.float().mean()) < 0.35


def test_threshold_moves_how_many_evaluation_takes() -> None:
    few, many = loud(threshold=0.9).eval(), loud(threshold=0.1).eval()
    many.load_state_dict(few.state_dict())
    x_TD = torch.randn(200, 8, dtype=torch.float64)
    plans = [router(x_TD, NO_CONTEXT) for router in (few, many)]
    for plan, threshold in zip(plans, (0.9, 0.1), strict=True):
        assert torch.equal(plan.kept_N, plan.gate.extra["predicted_T"].sigmoid() > threshold)
    assert int(plans[0].kept_N.sum()) < int(plans[1].kept_N.sum())


@pytest.mark.parametrize("hidden", [0, 6])
def test_cost(hidden: int) -> None:
    router = DepthRouter(8, predictor_hidden=hidden).train()
    with FlopCounterMode(display=False) as counter:
        router(torch.randn(20, 8), NO_CONTEXT)
    cost = DepthRouter.cost(20, 8, 1, 1, predictor_hidden=hidden)
    assert counter.get_total_flops() == cost.flops
    assert sum(p.numel() for p in router.parameters()) == cost.parameters
    assert DepthRouter(8, capacity=0.3).rows_per_token == 0.3


def test_fp32_whatever_happens_around_it() -> None:
    router = DepthRouter(8).to(torch.bfloat16)
    plan = router(torch.randn(6, 8, dtype=torch.bfloat16), NO_CONTEXT)
    assert {p.dtype for p in router.parameters()} == {torch.float32}
    assert plan.weight_N.dtype == plan.gate.logits_TE.dtype == plan.gate.extra["predicted_T"].dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_no_tokens_and_one(training: bool) -> None:
    router = DepthRouter(8).train(training)
    assert router(torch.randn(0, 8), NO_CONTEXT).num_tokens == 0
    assert router(torch.randn(1, 8), NO_CONTEXT).num_tokens == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"capacity": 0.0}, "capacity must be above 0 and at most 1, not 0.0"),
        ({"capacity": 1.5}, "capacity must be above 0 and at most 1, not 1.5"),
        ({"predictor_hidden": -1}, "predictor_hidden must be at least 0, not -1"),
        ({"predictor_loss": 0.0}, "would never teach the predictor"),
        ({"threshold": 1.0}, "threshold must be between 0 and 1, not 1.0"),
        ({"weight": "softmax"}, "weight"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DepthRouter(8, **options)
