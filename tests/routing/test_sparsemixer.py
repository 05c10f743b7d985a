"""SparseMixer and v2 on toys whose exact gradient is known: the expectation of the estimator is summed over all outcomes.

Every outcome (expert drawn, point c) occurs among some hundred equal tokens; its gradient is read off the router there, and
its probability is p_D times that of c, both of which are tested by their frequencies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing import TokenContext, build_router
from tests.routing.gates import identity_router, route

Z = [0.4, -0.3, 0.1]  # jitter=10 masks nothing here: 20 * 0.4 = 8 is far more than 0.7
BEST = 0
Loss = Callable[[Tensor], Tensor]


def _polynomials(best: list[float], others: list[float]) -> list[Loss]:
    """l_i(m) = a m + b m^2 + c m^3: one for the most probable expert, another, of different size, for each other one."""

    def poly(coefficients: list[float], size: float) -> Loss:
        return lambda m: sum((size * a * m ** (i + 1) for i, a in enumerate(coefficients)), start=m * 0)

    return [poly(best if e == BEST else others, 1.0 + 0.5 * e) for e in range(3)]


def _sampled(name: str, k: int, tokens: int = 1500, **options: Any) -> tuple[Any, Tensor]:
    z_TE = torch.tensor([Z], dtype=torch.float64).repeat(tokens, 1).requires_grad_()
    router = identity_router(name, 3, k, jitter=10.0, **options).double()
    return router(z_TE, TokenContext(generator=torch.Generator().manual_seed(1))), z_TE


def _expectation(
    losses: list[Loss], weight_T: Tensor, drawn_T: Tensor, p_E: Tensor, z_TE: Tensor, points: dict[float, float]
) -> Tensor:
    """The estimator's exact mean: sum over experts and points of P(expert) P(c) times the gradient of that outcome."""
    loss_T = torch.stack([losses[int(e)](w) for e, w in zip(drawn_T, weight_T, strict=True)])
    (grad_TE,) = torch.autograd.grad(loss_T.sum(), z_TE, retain_graph=True)
    best, mean_E = int(p_E.argmax()), torch.zeros(3, dtype=torch.float64)
    for e in range(3):
        if p_E[e] == 0:
            continue
        for c, share in ({1.0: 1.0} if e == best else points).items():
            at_T = (drawn_T == e) & ((weight_T - c * p_E[e]).abs() < 1e-12)
            assert at_T.any(), (e, c)
            outcome_TE = grad_TE[at_T]
            torch.testing.assert_close(outcome_TE, outcome_TE[:1].expand_as(outcome_TE), atol=1e-14, rtol=0)
            mean_E += p_E[e] * share * outcome_TE[0]
    return mean_E


def _sums(losses: list[Loss], z: Tensor) -> tuple[Tensor, Tensor]:
    """The two sums of the exact gradient of the expected loss: through the weights, and through the choice."""
    z = z.clone().requires_grad_()
    p = z.softmax(0)
    through_weight = sum((p[e].detach() * losses[e](p[e]) for e in range(3)), start=z.new_zeros(()))
    through_choice = sum((p[e] * losses[e](p[e].detach()) for e in range(3)), start=z.new_zeros(()))
    (first,) = torch.autograd.grad(through_weight, z, retain_graph=True)
    (second,) = torch.autograd.grad(through_choice, z)
    return first, second


V1, V2 = {1.0: 1 / 2, 0.5: 1 / 2}, {1.0: 1 / 4, 1 / 3: 3 / 4}


def _one(losses: list[Loss], name: str, **options: Any) -> Tensor:
    """The estimator's mean for top-1."""
    plan, z_TE = _sampled(name, 1, **options)
    p_E = torch.tensor(Z, dtype=torch.float64).softmax(0)
    return _expectation(losses, plan.weight_N, plan.expert_N, p_E, z_TE, V1 if name == "sparsemixer" else V2)


def _second_order(size: Callable[[Tensor], Tensor]) -> Tensor:
    """``sum_i size_i(p_i) dp_i/dz``, the form of every error term below."""
    z = torch.tensor(Z, dtype=torch.float64, requires_grad=True)
    p = z.softmax(0)
    (grad,) = torch.autograd.grad((size(p.detach()) * p).sum(), z)
    return grad


SIZES = torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64)
NOT_BEST = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)


def test_mid_point_is_exact_for_quadratic_losses() -> None:
    losses = _polynomials([3.0], [1.0, -4.0])  # the most probable expert is Euler's: exact if linear
    first, second = _sums(losses, torch.tensor(Z, dtype=torch.float64))
    torch.testing.assert_close(_one(losses, "sparsemixer"), first + second, atol=1e-12, rtol=0)
    assert (second.abs() > 1e-2).any()  # what an ordinary gate would miss


def test_mid_point_misses_a_quarter_of_the_cubic_part() -> None:
    # (p/2)^2 * 3 * p = 3/4 p^3 where p^3 is exact.
    losses = _polynomials([3.0], [0.0, 0.0, 5.0])
    first, second = _sums(losses, torch.tensor(Z, dtype=torch.float64))
    missing = _second_order(lambda p: NOT_BEST * SIZES * 5.0 * p**3 / 4)
    torch.testing.assert_close(_one(losses, "sparsemixer"), first + second - missing, atol=1e-12, rtol=0)


def test_the_most_probable_expert_is_taken_by_euler() -> None:
    # l = 2 m^2: Euler says p * 4p = 4 p^2 where l(p) - l(0) = 2 p^2 is exact.
    losses = _polynomials([0.0, 2.0], [0.0])
    first, second = _sums(losses, torch.tensor(Z, dtype=torch.float64))
    surplus = _second_order(lambda p: (1 - NOT_BEST) * 2.0 * p**2)
    torch.testing.assert_close(_one(losses, "sparsemixer"), first + second + surplus, atol=1e-12, rtol=0)
    torch.testing.assert_close(_one(losses, "sparsemixer_v2"), second + surplus, atol=1e-12, rtol=0)


def test_heun_is_exact_for_cubic_losses() -> None:
    losses = _polynomials([3.0], [1.0, -4.0, 5.0])
    _, second = _sums(losses, torch.tensor(Z, dtype=torch.float64))
    torch.testing.assert_close(_one(losses, "sparsemixer_v2"), second, atol=1e-12, rtol=0)


def test_heun_for_the_second_expert_given_the_first() -> None:
    """After the first draw, the second is the same estimator over the experts left."""
    plan, z_TE = _sampled("sparsemixer_v2", 2)
    for first in range(3):
        left = [e for e in range(3) if e != first]
        z = torch.tensor(Z, dtype=torch.float64).index_fill(0, torch.tensor([first]), float("-inf"))
        p_E = z.softmax(0)
        losses: list[Loss] = [lambda m, e=e: (2.0 + e) * m for e in range(3)]  # type: ignore[misc]
        other = next(e for e in left if e != int(p_E.argmax()))
        losses[other] = lambda m: m - 3 * m**2 + 4 * m**3
        at_T = plan.expert_TK[:, 0] == first
        _, second = _sums(losses, z)
        rest_T = torch.where(at_T, plan.weight_TK[:, 1], 0.0)
        drawn_T = plan.expert_TK[:, 1].masked_fill(~at_T, first)
        mean_E = _expectation(losses, rest_T, drawn_T, p_E, z_TE, V2)
        torch.testing.assert_close(mean_E, second.nan_to_num(0.0), atol=1e-12, rtol=0)


def test_scaling_the_gradient_instead_of_the_forward_is_euler_at_half_size() -> None:
    plan, z_TE = _sampled("sparsemixer_v2", 1, scale_forward=False)
    p = torch.tensor(Z, dtype=torch.float64).softmax(0)
    assert torch.equal(plan.weight_N, z_TE.softmax(1).gather(1, plan.expert_TK).flatten())
    # For l = a m the second sum is sum a_i p_i dp_i; half of it for all but the best: 1/4 + 3/4 * 1/3 = 1/2.
    expected = _second_order(lambda p: (1 - NOT_BEST / 2) * SIZES * p)
    (grad_TE,) = torch.autograd.grad((SIZES[plan.expert_N] * plan.weight_N).sum(), z_TE)
    mean_E = torch.zeros(3, dtype=torch.float64)
    for e in range(3):
        both = grad_TE[plan.expert_N == e].unique(dim=0)
        assert len(both) == (1 if e == BEST else 2)
        inner, outer = both[both[:, e].argsort()][[0, -1]]
        mean_E += p[e] * (outer / 4 + inner * 3 / 4)
        if e != BEST:
            torch.testing.assert_close(inner * 3, outer)
    torch.testing.assert_close(mean_E, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "share", "inner"), [("sparsemixer", 1 / 2, 1 / 2), ("sparsemixer_v2", 3 / 4, 1 / 3)])
def test_draws_and_points_come_as_often_as_they_should(name: str, share: float, inner: float) -> None:
    T = 30_000
    plan, _ = _sampled(name, 1, tokens=T)
    p_E = torch.tensor(Z, dtype=torch.float64).softmax(0)
    assert ((plan.counts_E - T * p_E).abs() <= 4.5 * (T * p_E * (1 - p_E)).sqrt()).all()
    c_T = (plan.weight_N / p_E[plan.expert_N]).detach()
    torch.testing.assert_close(c_T[plan.expert_N == BEST], torch.ones_like(c_T[plan.expert_N == BEST]))
    c_M = c_T[plan.expert_N != BEST]
    is_inner = (c_M - inner).abs() < 1e-9
    assert (is_inner | ((c_M - 1).abs() < 1e-9)).all()
    assert abs(float(is_inner.double().mean()) - share) <= 4.5 * (share * (1 - share) / len(c_M)) ** 0.5


def test_v2_draws_without_replacement() -> None:
    T = 30_000
    plan, _ = _sampled("sparsemixer_v2", 2, tokens=T)
    p = torch.tensor(Z, dtype=torch.float64).softmax(0).tolist()
    for i in range(3):
        for j in range(3):
            share = 0.0 if i == j else p[i] * p[j] / (1 - p[i])
            count = int(((plan.expert_TK[:, 0] == i) & (plan.expert_TK[:, 1] == j)).sum())
            assert abs(count - T * share) <= 4.5 * (T * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(
    ("logits", "near"),
    [
        ([10.0, 8.1, 7.9, -1.0], [0, 1]),  # within 0.2 * 10 of the best
        ([-1.0, -1.2, -1.3, -9.0], [0, 1]),  # 0.2 <= 0.2 * 1.2, but 0.3 > 0.2 * 1.3
        ([0.0, 0.0, 0.0, 0.0], [0, 1, 2, 3]),
        ([0.0, 0.0, -0.1, 0.0], [0, 1, 3]),
    ],
)
@pytest.mark.parametrize("name", ["sparsemixer", "sparsemixer_v2"])
def test_experts_far_below_the_best_are_never_drawn(name: str, logits: list[float], near: list[int]) -> None:
    z_TE = torch.tensor([logits]).repeat(400, 1)
    router = identity_router(name, 4, 1)
    plan = router(z_TE)
    assert plan.expert_N.unique().tolist() == near
    p = z_TE[0, near].softmax(0)
    quiet = route([logits], 1, name)
    assert quiet.expert_N.tolist() == [0]
    assert float(quiet.weight_N) == pytest.approx(float(p[0]))  # p leaves the far ones out, in evaluation too
    whole = z_TE[:1].softmax(1)
    masked = torch.zeros(4).index_copy(0, torch.tensor(near), p)[None]
    assert quiet.gate is not None
    torch.testing.assert_close(quiet.gate.probs_TE, masked if name == "sparsemixer" else whole)


def test_evaluation_takes_the_best_in_turn() -> None:
    # z = [1, .5, .2], jitter 10: first p0 = softmax[0] = .4900; then 1 over {1, 2}: e^.5 / (e^.5 + e^.2) = .5744.
    plan = route([[1.0, 0.5, 0.2]], 2, "sparsemixer_v2", jitter=10.0)
    assert plan.expert_TK.tolist() == [[0, 1]]
    assert plan.weight_N.tolist() == pytest.approx([0.4864, 0.5744], abs=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_rules_that_leave_one_expert_leave_the_other_place_empty(training: bool) -> None:
    router = identity_router("sparsemixer_v2", 4, 2).train(training)
    allowed_TE = torch.zeros(200, 4, dtype=torch.bool)
    allowed_TE[:, 2] = True
    z_TE = torch.randn(200, 4, requires_grad=True)
    plan = router(z_TE, TokenContext(allowed_TE=allowed_TE))
    assert plan.expert_TK.tolist() == [[2, 4]] * 200
    (grad_TE,) = torch.autograd.grad(plan.weight_N.sum(), z_TE)
    assert grad_TE.isfinite().all()


@pytest.mark.parametrize(
    ("name", "k", "options", "words"),
    [
        ("sparsemixer", 2, {}, 'k must be 1, not 2; use "sparsemixer_v2"'),
        ("sparsemixer", 1, {"jitter": 0.0}, "jitter must be above 0, not 0.0"),
        ("sparsemixer_v2", 2, {"jitter": -0.1}, "jitter must be above 0, not -0.1"),
        ("sparsemixer_v2", 5, {}, "k=5"),
    ],
)
def test_refusals(name: str, k: int, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_router(name, 8, 4, k, options)
