"""The prototype loss: by hand, each option against dumb loops, who gets the gradient, empty experts, and the memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.plan import RoutingPlan
from moesaic.routing import LOSSES, LossContext, StepStats, TokenContext
from moesaic.routing.balance import PrototypeMemory
from moesaic.routing.balance.prototype import members
from tests.routing.gates import identity_router, padded


def _plan(p_TE: Tensor, x_TD: Tensor, valid: list[int] | None = None) -> RoutingPlan:
    """A plan of these scores whose router input is ``x_TD``."""
    router = identity_router("topk", p_TE.shape[1], 1, normalize="none").to(x_TD.dtype)
    ctx = TokenContext() if valid is None else padded(valid)
    plan: RoutingPlan = router(p_TE.log(), ctx)
    assert plan.gate is not None
    plan.gate.extra.update(input_TD=x_TD, free_logits_TE=plan.gate.logits_TE)
    return plan


def _loss(plan: RoutingPlan, **options: Any) -> Tensor:
    return LOSSES["prototype"](plan, **options)


def _dumb(p_TE: Tensor, v_TV: Tensor, tau: float, most: int, loo: bool, cosine: bool, detach: bool) -> Tensor:
    T, E = p_TE.shape
    home = [max(range(E), key=lambda e: (float(p_TE[t, e].detach()), -e)) for t in range(T)]
    top = {
        e: sorted((t for t in range(T) if home[t] == e), key=lambda t: -float(p_TE[t, e].detach()))[:most]
        for e in range(E)
    }
    alive = [e for e in range(E) if top[e]]
    if len(alive) < 2:
        return v_TV.sum() * 0

    def mean(tokens: list[int]) -> Tensor:
        mu = sum(v_TV[t] for t in tokens) / len(tokens)
        return mu.detach() if detach else mu

    def sim(a: Tensor, b: Tensor) -> Tensor:
        return (torch.cosine_similarity(a, b, dim=0) if cosine else a @ b) / tau

    losses = []
    for t in range(T):
        own = [u for u in top[home[t]] if u != t] if loo else top[home[t]]
        if not own:
            continue
        scores = [sim(v_TV[t], mean(own if e == home[t] else top[e])) for e in alive]
        losses.append(-torch.stack(scores).log_softmax(0)[alive.index(home[t])])
    return sum(losses) / max(len(losses), 1) if losses else v_TV.sum() * 0


def test_by_hand() -> None:
    # Tokens 0, 1 at expert 0, token 2 at expert 1, expert 2 empty. Prototypes (1, 0) and (0, 1); cosines 1, 1, 1 and 0.
    p_TE = torch.tensor([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.2, 0.7, 0.1]])
    x_TD = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    wanted = -math.log(math.exp(2) / (math.exp(2) + 1))
    assert float(_loss(_plan(p_TE, x_TD), tau=0.5)) == pytest.approx(wanted)
    # M = 1: expert 0's prototype is its likeliest token, here token 0; turn token 1 round and its cosine is -1.
    turned = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 3.0]])
    other = -math.log(math.exp(-2) / (math.exp(-2) + 1))
    assert float(_loss(_plan(p_TE, turned), tau=0.5, most=1)) == pytest.approx((2 * wanted + other) / 3)
    # Leave one out: token 0's prototype is token 1 (cosine -1), token 1's is token 0; token 2 is alone and not counted.
    assert float(_loss(_plan(p_TE, turned), tau=0.5, leave_one_out=True)) == pytest.approx(other)


def test_members_are_the_likeliest_and_ties_go_to_the_lowest_expert() -> None:
    p_TE = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    home_TE, top_TE = members(_plan(p_TE, torch.zeros(4, 2)), 2)
    assert home_TE.tolist() == [[1, 0], [1, 0], [1, 0], [0, 1]]
    assert top_TE.tolist() == [[0, 0], [1, 0], [1, 0], [0, 1]]


@pytest.mark.parametrize("space", ["input", "logits", "router_proj"])
@pytest.mark.parametrize("loo", [False, True])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(("similarity", "most"), [("cosine", 64), ("cosine", 2), ("dot", 64)])
def test_values_and_gradients_against_dumb_loops(
    space: Any, loo: bool, detach: bool, similarity: Any, most: int
) -> None:
    z_TE = torch.randn(11, 4, dtype=torch.float64)
    z_TE[:, 3] -= 9.0  # an expert nobody chooses
    z_TE.requires_grad_()
    x_TD = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    router = identity_router("topk", 4, 1, normalize="none").double()
    plan = router(z_TE)
    assert plan.gate is not None
    plan.gate.extra.update(input_TD=x_TD, free_logits_TE=plan.gate.logits_TE)
    options = {"most": most, "tau": 0.7, "similarity": similarity, "detach": detach, "leave_one_out": loo}
    got = _loss(plan, space=space, **options)
    v_TV = x_TD if space == "input" else z_TE
    want = _dumb(z_TE.softmax(1), v_TV, 0.7, most, loo, similarity == "cosine", detach)
    torch.testing.assert_close(got, want)
    (a,), (b,) = torch.autograd.grad(got, v_TV, retain_graph=True), torch.autograd.grad(want, v_TV)
    torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    assert float(a.abs().sum()) > 0


def test_who_gets_the_gradient() -> None:
    """In the input space the layers below; the router's matrix only in spaces it makes."""
    for space, reaches_router in (("input", False), ("logits", True), ("router_proj", True)):
        router = identity_router("topk", 4, 2)
        x_TD = torch.randn(12, 4, requires_grad=True)
        evidence = dict[str, Tensor]()
        plan = router(x_TD, TokenContext(evidence=evidence))
        assert plan.gate is not None
        plan.gate.extra.update(evidence, input_TD=x_TD)
        weight = router.get_parameter("gate.weight")
        to_x, to_router = torch.autograd.grad(_loss(plan, space=space), [x_TD, weight], allow_unused=True)
        assert float(to_x.abs().sum()) > 0
        assert (to_router is not None and float(to_router.abs().sum()) > 0) == reaches_router


def test_rules_and_padding() -> None:
    p_TE = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.1, 0.9]])
    x_TD = torch.randn(4, 3)
    x_TD[3] = float("nan")
    with_padding = _loss(_plan(p_TE, x_TD, [1, 1, 1, 0]))
    torch.testing.assert_close(with_padding, _loss(_plan(p_TE[:3], x_TD[:3])))
    # Logits of forbidden experts are -inf; they count as 0 in the space of logits.
    allowed_TE = torch.tensor([[1, 1, 0]] * 4, dtype=torch.bool)
    logits_TE = torch.randn(4, 3, requires_grad=True)
    plan = identity_router("topk", 3, 1, normalize="none")(logits_TE, TokenContext(allowed_TE=allowed_TE))
    value = _loss(plan, space="logits")
    assert value.isfinite()
    assert torch.autograd.grad(value, logits_TE)[0].isfinite().all()


def test_fewer_than_two_experts_alive_give_zero() -> None:
    p_TE = torch.tensor([[0.8, 0.2], [0.7, 0.3]])
    x_TD = torch.randn(2, 3, requires_grad=True)
    value = _loss(_plan(p_TE, x_TD))
    assert float(value.detach()) == 0.0
    assert not torch.autograd.grad(value, x_TD)[0].any()
    # All tokens alone and left out: nothing is counted.
    alone = _loss(_plan(torch.tensor([[0.8, 0.2], [0.3, 0.7]]), x_TD), leave_one_out=True)
    assert float(alone.detach()) == 0.0


def test_memory_by_hand() -> None:
    memory = PrototypeMemory(3, 2, space="input", most=64, ema=0.75)
    p_TE = torch.tensor([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.2, 0.7, 0.1]])
    x_TD = torch.tensor([[4.0, 0.0], [0.0, 2.0], [1.0, 1.0]])

    def step(*batches: RoutingPlan) -> None:
        sums = dict[str, Tensor]()
        for plan in batches:
            for name, value in memory.statistics(plan).items():
                sums[name] = sums.get(name, 0) + value
        memory.after_step(StepStats(torch.zeros(3, dtype=torch.int64), sums=sums))

    # Two micro-batches are one step: expert 0's mean is over tokens 0 and 1, whichever batch they were in.
    step(_plan(p_TE[:1], x_TD[:1]), _plan(p_TE[1:], x_TD[1:]))
    assert memory.mean_EV.tolist() == [[2.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    assert memory.known_E.tolist() == [True, True, False]
    # Expert 0 moves a quarter of the way to (4, 0); expert 1 has no token and stays; expert 2 is still unknown.
    step(_plan(p_TE[:1], x_TD[:1]))
    assert memory.mean_EV.tolist() == [[2.5, 0.75], [1.0, 1.0], [0.0, 0.0]]

    # In the loss: expert 0's prototype is 3/4 (2.5, .75) + 1/4 of the batch's, expert 1's is remembered, expert 2 is dead.
    plan = _plan(p_TE[:2], x_TD[:2])
    assert plan.gate is not None
    plan.gate.extra.update(memory.recall())
    mu0, mu1 = torch.tensor([2.375, 0.8125]), torch.tensor([1.0, 1.0])
    wanted = 0.0
    for x in x_TD[:2]:
        scores = torch.stack([torch.cosine_similarity(x, mu, dim=0) for mu in (mu0, mu1)]) / 0.5
        wanted -= float(scores.log_softmax(0)[0]) / 2
    assert float(_loss(plan, tau=0.5, ema=0.75)) == pytest.approx(wanted, rel=1e-5)
    # Leave one out mixes the remembered prototype with the other token's vector.
    wanted = 0.0
    for x, other in ((x_TD[0], x_TD[1]), (x_TD[1], x_TD[0])):
        own = 0.75 * torch.tensor([2.5, 0.75]) + 0.25 * other
        scores = torch.stack([torch.cosine_similarity(x, mu, dim=0) for mu in (own, mu1)]) / 0.5
        wanted -= float(scores.log_softmax(0)[0]) / 2
    assert float(_loss(plan, tau=0.5, ema=0.75, leave_one_out=True)) == pytest.approx(wanted, rel=1e-5)
    # A token alone at its expert is compared with what is remembered of it.
    lone = _plan(p_TE[:1], x_TD[:1])
    assert lone.gate is not None
    lone.gate.extra.update(memory.recall())
    scores = torch.stack([torch.cosine_similarity(x_TD[0], mu, dim=0) for mu in (memory.mean_EV[0], mu1)]) / 0.5
    value = _loss(lone, tau=0.5, ema=0.75, leave_one_out=True)
    assert float(value) == pytest.approx(-float(scores.log_softmax(0)[0]), rel=1e-5)


def test_memory_lasts_and_stays_fp32() -> None:
    memory = PrototypeMemory(3, 2, space="input", most=64, ema=0.75)
    memory.after_step(
        StepStats(
            torch.zeros(3, dtype=torch.int64),
            sums=memory.statistics(_plan(torch.tensor([[0.8, 0.1, 0.1]]), torch.tensor([[4.0, 1.0]]))),
        )
    )
    again = PrototypeMemory(3, 2, space="input", most=64, ema=0.75)
    again.load_state_dict(memory.state_dict())
    assert again.mean_EV.tolist() == [[4.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    assert again.known_E.tolist() == [True, False, False]
    assert memory.to(torch.bfloat16).mean_EV.dtype == torch.float32


def test_it_fades_in_over_the_first_steps() -> None:
    plan = _plan(torch.randn(12, 4).softmax(1), torch.randn(12, 5))
    full = float(_loss(plan))
    for step, share in ((1, 0.001), (500, 0.5), (1000, 1.0), (5000, 1.0)):
        assert float(_loss(plan, ctx=LossContext(step=step))) == pytest.approx(share * full, rel=1e-5)
    assert float(_loss(plan, ctx=LossContext(step=1), warmup=0)) == pytest.approx(full)
