"""Expert prototyping: k independent top-1 routers over k groups of experts."""

from __future__ import annotations

import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.routing import TokenContext, balance_loss, build_router
from tests.routing.gates import identity_router, route


def test_by_hand() -> None:
    # Prototypes {0, 1} and {2, 3}. Token 0: softmax of (2, 1) is .7311 .2689, of (0, -1) the same: experts 0 and 2, though
    # top-2 of all four is 0 and 1. Token 1: (0, 0) is a tie, to expert 0 with .5; (1, 3): .1192 .8808, expert 3.
    plan = route([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 1.0, 3.0]], 2, "prototype")
    assert plan.expert_TK.tolist() == [[0, 2], [0, 3]]
    assert plan.weight_TK.flatten().tolist() == pytest.approx([0.7311, 0.7311, 0.5, 0.8808], abs=1e-4)
    assert plan.gate is not None
    assert plan.gate.probs_TE[0].tolist() == pytest.approx([0.7311, 0.2689, 0.7311, 0.2689], abs=1e-4)
    assert plan.gate.probs_TE.sum(dim=1).tolist() == pytest.approx([2.0, 2.0])  # one distribution per prototype


def test_gradients_against_k_separate_routers() -> None:
    z_TE = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    plan = identity_router("prototype", 6, 3).double()(z_TE)
    upstream_TK = torch.randn(7, 3, dtype=torch.float64)
    (got_TE,) = torch.autograd.grad((plan.weight_TK * upstream_TK).sum(), z_TE)
    best_TK = torch.stack([z_TE[:, 2 * i : 2 * i + 2].softmax(dim=1).amax(dim=1) for i in range(3)], dim=1)
    torch.testing.assert_close(plan.weight_TK, best_TK)
    (want_TE,) = torch.autograd.grad((best_TK * upstream_TK).sum(), z_TE)
    torch.testing.assert_close(got_TE, want_TE, atol=1e-12, rtol=0)
    first = plan.expert_TK // 2
    assert torch.equal(first, torch.arange(3).expand(7, 3))  # one of each


def test_one_prototype_is_top_1() -> None:
    z_TE = torch.randn(9, 5)
    one, top = route(z_TE, 1, "prototype"), route(z_TE, 1, "topk", normalize="none")
    assert torch.equal(one.expert_N, top.expert_N)
    torch.testing.assert_close(one.weight_N, top.weight_N)


def test_the_switch_loss_is_one_at_balance() -> None:
    # Uniform scores, choices spread evenly over the experts of each prototype.
    plan = route(torch.eye(4)[[0, 1, 2, 3]] * 1e-6, 2, "prototype")
    assert plan.counts_E.tolist() == [3, 1, 3, 1]  # ties to the lowest expert: three of four each
    loss, _ = balance_loss(plan, {"switch": 1.0})
    assert loss.item() == pytest.approx(1.0, abs=1e-5)  # P uniform: E * sum f / E, whatever f


def test_rules_that_close_one_prototype_leave_the_others_alone() -> None:
    router = identity_router("prototype", 4, 2)
    z_TE = torch.tensor([[2.0, 1.0, 0.0, -1.0]] * 3, requires_grad=True)
    allowed_TE = torch.tensor([[False, False, True, True], [False, True, False, True], [False] * 4])
    plan = router(z_TE, TokenContext(allowed_TE=allowed_TE))
    assert plan.expert_TK.tolist() == [[4, 2], [1, 3], [4, 4]]
    assert plan.weight_TK.flatten().tolist() == pytest.approx([0, 0.7311, 1, 1, 0, 0], abs=1e-4)
    (grad_TE,) = torch.autograd.grad(plan.weight_N.sum(), z_TE)
    assert grad_TE.isfinite().all()
    bias_TE = torch.tensor([[0.0, 2.0, 0.0, 0.0]] * 3)
    assert router(z_TE, TokenContext(rule_bias_TE=bias_TE)).expert_TK.tolist() == [[1, 2]] * 3


@pytest.mark.parametrize(
    ("experts", "k", "words"),
    [
        (8, 3, "k=3 prototypes cannot share num_experts=8 equally"),
        (4, 4, "k=4 prototypes of one expert each make every weight exactly 1"),
        (4, 5, "k=5"),
    ],
)
def test_refusals(experts: int, k: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_router("prototype", 8, experts, k)


def test_one_expert_is_legal() -> None:
    plan = build_router("prototype", 8, 1, 1)(torch.randn(3, 8))
    assert plan.weight_N.tolist() == [1.0, 1.0, 1.0]
