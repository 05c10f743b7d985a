"""Gather and combine: gradients by autograd's finite differences, both row layouts, against the plan's plain verbs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesaic.ops.permute import combine_rows, gather_rows, group_rows
from moesaic.plan import RoutingPlan, from_rows, from_topk


def _plan(per_token: bool, T: int = 5, E: int = 4, k: int = 3) -> RoutingPlan:
    expert_TK = torch.rand(T, E + 1).argsort(dim=1)[:, :k]  # E among them: some rows go nowhere
    plan = from_topk(expert_TK, torch.randn(T, k, dtype=torch.float64), E)
    if per_token:
        return plan
    mixed_N = torch.randperm(plan.num_rows)
    return from_rows(plan.token_N[mixed_N], plan.expert_N[mixed_N], plan.weight_N[mixed_N], T, E)


def _through(plan: RoutingPlan, x_TD: Tensor, weight_N: Tensor) -> Tensor:
    grouping = group_rows(plan.expert_N, plan.num_experts)
    rows_ND = gather_rows(x_TD, plan.token_N, grouping, plan.per_token)
    return combine_rows(rows_ND.square(), weight_N, plan.token_N, grouping, plan.num_tokens, plan.per_token)


@pytest.mark.parametrize("per_token", [True, False])
def test_the_verbs_of_the_plan_in_expert_order(per_token: bool) -> None:
    plan, x_TD = _plan(per_token), torch.randn(5, 3, dtype=torch.float64)
    grouping = group_rows(plan.expert_N, plan.num_experts)
    rows_ND = gather_rows(x_TD, plan.token_N, grouping, plan.per_token)
    assert torch.equal(rows_ND, plan.gather(x_TD)[grouping.order_N])
    assert torch.equal(plan.expert_N[grouping.order_N], plan.expert_N.sort().values)
    got_TD = _through(plan, x_TD, plan.weight_N)
    torch.testing.assert_close(got_TD, plan.combine(plan.gather(x_TD).square()), atol=1e-14, rtol=0)


@pytest.mark.parametrize("per_token", [True, False])
def test_gradients_by_finite_differences(per_token: bool) -> None:
    plan = _plan(per_token)
    x_TD = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight_N = plan.weight_N.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x_TD, weight_N: _through(plan, x_TD, weight_N), (x_TD, weight_N))


@pytest.mark.parametrize("per_token", [True, False])
def test_sums_run_in_fp32(per_token: bool) -> None:
    # 256 + 1 is 256 in bf16; a bf16 sum over 64 such rows would stay at 256.
    T, k = 1, 65
    expert_TK = torch.arange(k)[None]
    weight_TK = torch.ones(T, k)
    weight_TK[0, 0] = 256.0
    plan = from_topk(expert_TK, weight_TK, k)
    if not per_token:
        plan = from_rows(plan.token_N, plan.expert_N, plan.weight_N, T, k)
    y_TD = _through(plan, torch.ones(T, 1, dtype=torch.bfloat16), plan.weight_N)
    assert y_TD.dtype == torch.bfloat16
    assert float(y_TD) == 320.0
    # 1.001 is 1 in bf16: weights are not rounded before they are used.
    plan = from_topk(torch.tensor([[0, 1]]), torch.tensor([[1.001, -1.0]]), 2)
    if not per_token:
        plan = from_rows(plan.token_N, plan.expert_N, plan.weight_N, 1, 2)
    assert float(_through(plan, torch.ones(1, 1, dtype=torch.bfloat16), plan.weight_N)) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("per_token", [True, False])
def test_zero_tokens(per_token: bool) -> None:
    plan = from_topk(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), 3)
    if not per_token:
        plan = from_rows(plan.token_N, plan.expert_N, plan.weight_N, 0, 3)
    x_TD = torch.zeros(0, 4, requires_grad=True)
    y_TD = _through(plan, x_TD, plan.weight_N)
    y_TD.sum().backward()
    assert y_TD.shape == (0, 4)
    assert x_TD.grad is not None
