"""Losses on scores alone: entropies by hand and per label, LIMoE's threshold, and the semantic loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan import RoutingPlan
from moesaic.routing import LOSSES, LossContext, balance_loss
from tests.routing.gates import identity_router, padded, route

H = math.log(2)  # entropy of (1/2, 1/2)


def _loss(plan: RoutingPlan, name: str, of_tokens: list[int] | None = None, /, **options: object) -> float:
    ctx = LossContext(label_T=None if of_tokens is None else torch.tensor(of_tokens))
    return float(balance_loss(plan, {name: 1.0}, ctx, {name: options})[0].detach())


def _plan(p: list[list[float]], valid: list[int] | None = None) -> RoutingPlan:
    router = identity_router("topk", len(p[0]), 1, normalize="none")
    return router(torch.tensor(p).clamp(min=1e-30).log(), padded(valid or [1] * len(p)))


def test_entropy_by_hand() -> None:
    plan = _plan([[0.5, 0.5], [1.0, 0.0]])
    assert _loss(plan, "entropy") == pytest.approx(H / 2)
    assert _loss(plan, "entropy", maximize=True) == pytest.approx(-H / 2)
    assert _loss(route(torch.zeros(3, 8), 2), "entropy") == pytest.approx(math.log(8))
    sigmoid = route(torch.tensor([[0.0, 0.0, math.log(3)]]), 1, score="sigmoid", normalize="none")  # 2/7 2/7 3/7
    by_hand = -(4 / 7 * math.log(2 / 7) + 3 / 7 * math.log(3 / 7))
    assert _loss(sigmoid, "entropy") == pytest.approx(by_hand)


def test_local_and_global_entropy_by_hand() -> None:
    # Label 0 (image): two sure tokens on different experts. Label 1 (text): one unsure token, and one sure one.
    plan = _plan([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    labels = [0, 0, 1, 1]
    assert _loss(plan, "entropy_local", labels) == pytest.approx((0 + H / 2) / 2)
    text = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))  # of the mean (.75, .25)
    assert _loss(plan, "entropy_global", labels) == pytest.approx(-(H + text) / 2)
    # With tau = ln 2 the image is as diverse as asked, the text is not.
    assert _loss(plan, "entropy_global", labels, tau=H) == pytest.approx((H - text) / 2)
    assert _loss(plan, "entropy_global", labels, tau=0.5) == 0.0
    # LIMoE: the local one on text only.
    assert _loss(plan, "entropy_local", labels, labels=[1]) == pytest.approx(H / 2)
    # A label that does not occur does not count.
    assert _loss(plan, "entropy_local", labels, labels=[1, 7]) == pytest.approx(H / 2)
    assert _loss(plan, "entropy_local", labels, labels=[7]) == 0.0
    # Without labels all tokens are one: local H/4, global of (.625, .375).
    assert _loss(plan, "entropy_local") == pytest.approx(H / 4)
    assert _loss(plan, "entropy_global") == pytest.approx(0.625 * math.log(0.625) + 0.375 * math.log(0.375))
    with pytest.raises(ConfigError, match=r"labels \[1\] needs the label of every token"):
        _loss(plan, "entropy_local", labels=[1])


def test_padding_and_unknown_labels_are_left_out() -> None:
    plan = _plan([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], valid=[1, 1, 0, 1])
    assert _loss(plan, "entropy") == pytest.approx(2 * H / 3)
    assert _loss(plan, "entropy_local", [0, 0, 0, -1]) == pytest.approx(H / 2)
    assert _loss(plan, "entropy_global", [0, 0, 0, -1]) == pytest.approx(0.75 * math.log(0.75) + 0.25 * math.log(0.25))


def test_sub_tokens_share_their_tokens_label() -> None:
    plan = _plan([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])  # two heads of two tokens
    assert _loss(plan, "entropy_local", [0, 1], labels=[1]) == pytest.approx(H)


def _dense(name: str, p_TE: Tensor, labels: list[int], tau: float | None) -> Tensor:
    parts = []
    for label in sorted(set(labels)):
        mine = [t for t in range(len(labels)) if labels[t] == label]
        if name == "entropy_local":
            parts.append(sum(-(p_TE[t] * p_TE[t].log()).sum() for t in mine) / len(mine))
            continue
        mean_E = sum(p_TE[t] for t in mine) / len(mine)
        below = (mean_E * mean_E.log()).sum() + (tau or 0.0)
        parts.append(below.clamp(min=0) if tau is not None else below)
    return sum(parts) / len(parts)


@pytest.mark.parametrize(("name", "tau"), [("entropy_local", None), ("entropy_global", None), ("entropy_global", 1.6)])
def test_gradients_against_a_dense_formulation(name: str, tau: float | None) -> None:
    z_TE = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    labels = [0, 2, 1, 1, 0, 2, 2, 0, 1]
    plan = identity_router("topk", 5, 2).double()(z_TE)
    options = {} if tau is None else {name: {"tau": tau}}
    got, _ = balance_loss(plan, {name: 1.0}, LossContext(label_T=torch.tensor(labels)), options)
    want = _dense(name, z_TE.softmax(1), labels, tau)
    torch.testing.assert_close(got, want)
    (a,), (b,) = torch.autograd.grad(got, z_TE), torch.autograd.grad(want, z_TE)
    torch.testing.assert_close(a, b)
    assert float(a.abs().sum()) > 0


def test_semantic_loss_by_hand() -> None:
    p = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25], [0.2, 0.3, 0.5], [0.2, 0.3, 0.5]])
    plan = route(p.log(), 1, normalize="none")
    assert float(LOSSES["semantic"](plan)) == 0.0  # a batch no rule applied to
    assert plan.gate is not None
    allowed_TE = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 0, 1]], dtype=torch.bool)
    plan.gate.extra.update(rules_TE=allowed_TE, free_logits_TE=p.log() + 5.0)
    # Token 2 has no permitted expert and is left out: -(ln .3 + ln 1 + ln .5) / 3.
    assert float(LOSSES["semantic"](plan)) == pytest.approx(-(math.log(0.3) + math.log(0.5)) / 3)


def test_semantic_gradient_and_padding() -> None:
    z_TE = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    plan = identity_router("topk", 3, 1, normalize="none").double()(z_TE, padded([1, 0, 1, 1]))
    allowed_TE = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    assert plan.gate is not None
    plan.gate.extra.update(rules_TE=allowed_TE, free_logits_TE=z_TE)
    p_TE = z_TE.softmax(1)
    want = -(p_TE[0, 0].log() + (p_TE[3, 1] + p_TE[3, 2]).log()) / 2
    got = LOSSES["semantic"](plan)
    torch.testing.assert_close(got, want)
    (a,), (b,) = torch.autograd.grad(got, z_TE), torch.autograd.grad(want, z_TE)
    torch.testing.assert_close(a, b)
