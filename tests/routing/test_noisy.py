"""Noisy top-k: the differentiable load estimate by hand, by Monte Carlo, and at the symmetric point."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moesaic.plan.read import cv_squared
from moesaic.routing import LossContext, NoisyTopK, TokenContext, balance_loss
from tests.routing.gates import padded


def _phi(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def _noisy(k: int, num_experts: int = 5, variant: str = "shazeer", dim: int = 6) -> tuple[NoisyTopK, Tensor, Tensor]:
    """A double router with random weights, its input, and the noise it will draw from seed 7."""
    router = NoisyTopK(dim, num_experts, k, variant=variant, init_std=0.5).double()  # type: ignore[arg-type]
    if router.noise_gate is not None:
        torch.nn.init.normal_(router.noise_gate.weight, std=0.5)
    x_TD = torch.randn(4, dim, dtype=torch.float64)
    noise_TE = torch.empty(4, num_experts, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(7))
    return router, x_TD, noise_TE


def _seed7() -> TokenContext:
    return TokenContext(generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_shazeer_by_the_definition(k: int) -> None:
    router, x_TD, noise_TE = _noisy(k)
    plan = router(x_TD, _seed7())
    assert router.noise_gate is not None
    clean_TE = (x_TD @ router.gate.weight.T).tolist()
    std_TE = (((x_TD @ router.noise_gate.weight.T).exp() + 1).log() + 1e-2).tolist()
    for t in range(4):
        noisy = [clean_TE[t][e] + noise_TE[t, e].item() * std_TE[t][e] for e in range(5)]
        chosen = sorted(range(5), key=lambda e: -noisy[e])[:k]
        assert plan.expert_TK[t].tolist() == chosen
        total = sum(math.exp(noisy[e]) for e in chosen)
        assert plan.weight_TK[t].tolist() == pytest.approx([math.exp(noisy[e]) / total for e in chosen], abs=1e-12)
        load_E = plan.gate.load_probs_TE[t].tolist()
        for e in range(5):
            others = sorted((noisy[j] for j in range(5) if j != e), reverse=True)
            expected = _phi((clean_TE[t][e] - others[k - 1]) / std_TE[t][e])
            assert load_E[e] == pytest.approx(expected, abs=1e-12)


def test_vmoe_by_the_definition() -> None:
    router, x_TD, noise_TE = _noisy(2, variant="vmoe")
    plan = router(x_TD, _seed7())
    clean_TE = x_TD @ router.gate.weight.T
    noisy_TE = clean_TE + noise_TE / 5
    kth_T1 = noisy_TE.sort(dim=1, descending=True).values[:, 1:2]  # expert itself not left out
    expected_TE = 1 - torch.tensor([[_phi(float(v)) for v in row] for row in ((kth_T1 - clean_TE) * 5).detach()])
    torch.testing.assert_close(plan.gate.load_probs_TE, expected_TE.double(), atol=1e-6, rtol=0)
    p_TE = noisy_TE.exp() / noisy_TE.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(plan.weight_TK, p_TE.gather(1, plan.expert_TK))  # of all experts: not renormalised
    assert (plan.weight_TK.sum(dim=1) < 1).all()


def test_load_estimate_is_the_probability_under_fresh_noise_of_that_expert() -> None:
    router, x_TD, noise_TE = _noisy(2)
    plan = router(x_TD, _seed7())
    assert router.noise_gate is not None
    clean_TE = x_TD @ router.gate.weight.T
    std_TE = torch.nn.functional.softplus(x_TD @ router.noise_gate.weight.T) + 1e-2
    noisy_TE = clean_TE + noise_TE * std_TE
    draws = 20_000
    for e in range(5):
        fresh_MT = clean_TE[:, e] + torch.randn(draws, 4, dtype=torch.float64) * std_TE[:, e]
        others_TE = noisy_TE.clone()
        others_TE[:, e] = -math.inf
        second_T = others_TE.topk(2, dim=1).values[:, 1]
        share_T = (fresh_MT > second_T).double().mean(dim=0)
        torch.testing.assert_close(plan.gate.load_probs_TE[:, e], share_T, atol=0.02, rtol=0)


def test_zero_gate_loads_every_expert_alike() -> None:
    T = 8000
    x_TD = torch.randn(T, 3)
    router = NoisyTopK(3, 4, 2)  # starts at zero
    torch.testing.assert_close(router(x_TD).gate.load_probs_TE.sum(0), torch.full((4,), T / 2), rtol=0.03, atol=0)
    router.k = 1  # refused for its weights; the estimate is the textbook case
    torch.testing.assert_close(router(x_TD).gate.load_probs_TE.sum(0), torch.full((4,), T / 4), rtol=0.03, atol=0)
    # V-MoE compares with the largest of all four, itself included: E[1 - Phi(max of 4)] = 1/5.
    vmoe = NoisyTopK(3, 4, 1, variant="vmoe")
    torch.testing.assert_close(vmoe(x_TD).gate.load_probs_TE.sum(0), torch.full((4,), T / 5), rtol=0.03, atol=0)


def test_hard_counts_where_there_is_no_estimate() -> None:
    everyone = NoisyTopK(3, 4, 4)(torch.randn(6, 3))
    assert everyone.gate.load_probs_TE is None
    assert float(balance_loss(everyone, {"load": 1.0})[0]) == 0.0
    router = NoisyTopK(3, 4, 2).eval()
    plan = router(torch.randn(6, 3))  # zero gate, no noise: ties, all to experts 0 and 1
    assert plan.gate.load_probs_TE is None
    assert plan.counts_E.tolist() == [6, 6, 0, 0]
    assert float(balance_loss(plan, {"load": 1.0})[0]) == pytest.approx(1.0)  # counts 6 6 0 0: var 9 over mean^2 9


def test_evaluation_is_without_noise() -> None:
    router, x_TD, _ = _noisy(2)
    router.eval()
    first, second = router(x_TD), router(x_TD)
    assert torch.equal(first.weight_N, second.weight_N)
    assert torch.equal(first.expert_TK[:, 0], (x_TD @ router.gate.weight.T).argmax(dim=1))


def test_load_loss_teaches_both_matrices_and_ignores_padding() -> None:
    router, x_TD, _ = _noisy(2)
    plan = router(x_TD, TokenContext(valid_T=padded([1, 1, 0, 1]).valid_T, generator=_seed7().generator))
    loss, _ = balance_loss(plan, {"load": 1.0}, LossContext())
    expected = cv_squared(plan.gate.load_probs_TE[[0, 1, 3]].sum(dim=0))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert router.noise_gate is not None
    for weight in (router.gate.weight, router.noise_gate.weight):
        assert weight.grad is not None
        assert float(weight.grad.abs().sum()) > 0
