"""The plan itself: constructors, views, padding, the two verbs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moesaic.plan import Gate, RoutingPlan, SoftPlan, count_experts, from_rows, from_topk


def _plan() -> RoutingPlan:
    # Token 1 is padding; the second slot of token 2 was left empty by the router.
    return from_topk(
        torch.tensor([[0, 2], [1, 0], [2, 3]]),
        torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.9, 0.1]]),
        3,
        valid_T=torch.tensor([True, False, True]),
    )


def test_top_k_rows_in_natural_order() -> None:
    plan = _plan()
    assert plan.token_N.tolist() == [0, 0, 1, 1, 2, 2]
    assert plan.expert_N.tolist() == [0, 2, 3, 3, 2, 3]
    assert plan.choice_N.tolist() == [0, 2, 3, 3, 2, 3]
    torch.testing.assert_close(plan.weight_N, torch.tensor([0.7, 0.3, 0.0, 0.0, 0.9, 0.0]))
    assert (plan.num_rows, plan.num_tokens, plan.num_experts, plan.per_token) == (6, 3, 3, 2)
    assert plan.kept_N.tolist() == [True, True, False, False, True, False]
    assert plan.counts_E.tolist() == [1, 0, 2]
    assert plan.expert_TK.shape == plan.choice_TK.shape == plan.weight_TK.shape == (3, 2)
    assert int(plan.num_valid) == 2
    assert int(plan.dropped) == 0


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_full_plan_is_the_plan(tokens: int) -> None:
    """A promise that no slot is empty changes nothing but the work, also where padding or rules empty some."""
    expert_TK, weight_TK = torch.randint(4, (tokens, 2)), torch.rand(tokens, 2, dtype=torch.float64)
    for valid_T in (None, torch.rand(tokens) < 0.5):
        for allowed_TE in (None, torch.rand(tokens, 4) < 0.5):
            plans = [
                from_topk(expert_TK, weight_TK, 4, valid_T=valid_T, allowed_TE=allowed_TE, full=full)
                for full in (False, True)
            ]
            for name in ("token_N", "expert_N", "choice_N", "weight_N"):
                assert torch.equal(getattr(plans[0], name), getattr(plans[1], name))
            assert plans[0].token_N.tolist() == [t for t in range(tokens) for _ in range(2)]
            assert plans[0].token_N.dtype == torch.int64
            assert torch.equal(plans[1].weight_N == 0, ~plans[1].kept_N)


def test_loose_rows() -> None:
    token_N, expert_N = torch.tensor([2, 0, 2, 1]), torch.tensor([1, 1, 0, 2])
    plan = from_rows(
        token_N, expert_N, torch.ones(4, dtype=torch.bfloat16), 3, 2, valid_T=torch.tensor([True, True, False])
    )
    assert plan.expert_N.tolist() == [2, 1, 2, 2]
    assert plan.weight_N.tolist() == [0.0, 1.0, 0.0, 0.0]
    assert plan.weight_N.dtype == torch.float32
    assert plan.counts_E.tolist() == [0, 1]
    assert int(plan.num_valid) == 2
    with pytest.raises(ValueError, match="varying number of rows"):
        _ = plan.expert_TK


def test_send_zeroes_weights_and_keeps_the_routers_choice() -> None:
    plan = _plan()
    sent = plan.send(torch.tensor([3, 2, 3, 3, 0, 3]))
    assert sent.weight_N.tolist() == pytest.approx([0.0, 0.3, 0.0, 0.0, 0.9, 0.0])
    assert sent.choice_N.tolist() == plan.choice_N.tolist()
    assert int(sent.dropped) == 1  # row 0; row 4 moved, the others never had an expert
    assert plan.expert_N.tolist() == [0, 2, 3, 3, 2, 3]  # the old plan is as it was


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        _plan().num_experts = 5  # type: ignore[misc]


def test_gather_and_combine_by_hand() -> None:
    plan = _plan()
    x_TD = torch.tensor([[1.0, 10.0], [float("nan"), 2.0], [3.0, 30.0]])
    rows_ND = plan.gather(x_TD)
    assert rows_ND[[0, 1, 4, 5]].tolist() == [[1, 10], [1, 10], [3, 30], [3, 30]]
    y_ND = torch.arange(12.0).view(6, 2)
    y_ND[2:4] = float("nan")  # what an expert made of padding never reaches the sum
    torch.testing.assert_close(plan.combine(y_ND), torch.tensor([[0.6, 1.6], [0.0, 0.0], [7.2, 8.1]]))
    halved = dataclasses.replace(plan, input_weight_N=torch.full((6,), 0.5))
    assert halved.gather(x_TD)[4].tolist() == [1.5, 15.0]


def test_detach_holds_no_graph() -> None:
    logits_TE = torch.randn(2, 3, requires_grad=True)
    probs_TE = logits_TE.softmax(1)
    plan = from_topk(
        torch.tensor([[0], [1]]),
        probs_TE[:, :1],
        3,
        gate=Gate(logits_TE, probs_TE, probs_TE),
        input_weight_TK=probs_TE[:, :1],
    )
    assert plan.weight_N.requires_grad
    bare = plan.detach()
    leaves = torch.utils._pytree.tree_leaves(bare)
    # The plan is a pytree down to its tensors: 4 of rows, the input weight and 3 of the gate.
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 8
    assert not any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)
    assert torch.equal(bare.weight_N, plan.weight_N)
    assert bare.gate is not None
    assert bare.gate.load_probs_TE is not None
    soft = SoftPlan(probs_TE[None], probs_TE[None], 3, gate=Gate(logits_TE, probs_TE)).detach()
    assert not soft.combine_GTS.requires_grad
    assert soft.gate is not None
    assert not soft.gate.logits_TE.requires_grad


def test_counts_leave_out_nowhere() -> None:
    assert count_experts(torch.tensor([0, 2, 2, 3, 3]), 3).tolist() == [1, 0, 2]
    assert count_experts(torch.tensor([], dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_soft_plan_by_hand() -> None:
    # X Phi = 0 with 3 tokens and 4 slots: dispatch 1/3, combine 1/4.
    logits_TS = torch.zeros(3, 4)
    plan = SoftPlan(logits_TS.softmax(dim=0)[None], logits_TS.softmax(dim=1)[None], num_experts=2)
    assert plan.counts_E.tolist() == [2, 2]
    assert (plan.num_tokens, plan.slots_per_expert) == (3, 2)
    x_TD = torch.tensor([[3.0], [6.0], [0.0]])
    torch.testing.assert_close(plan.gather(x_TD), torch.full((4, 1), 3.0))
    torch.testing.assert_close(plan.combine(torch.tensor([[1.0], [2.0], [3.0], [6.0]])), torch.full((3, 1), 3.0))
