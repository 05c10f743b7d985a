"""Plans of some tokens in the batch's numbering: by hand, and back again; gradients; sub-tokens; loose rows; soft plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moesaic.plan import Gate, Part, RoutingPlan, SoftPlan, from_rows, from_topk, lift, lower, mask_experts, read
from moesaic.plan.lift import lift_gate, lower_gate, per_token

PART = Part(torch.tensor([4, 0, 2]), 5)  # in any order


def small(valid: bool = True) -> RoutingPlan:
    """Three tokens, two experts each of three; the last token is padding."""
    logits_TE = torch.tensor([[3.0, 2, 1], [1, 3, 2], [2, 1, 3]], requires_grad=True)
    extra = {"state_TR": torch.arange(6.0).view(3, 2), "mean": torch.tensor(7.0), "seen_D": torch.ones(3)}
    gate = Gate(logits_TE, logits_TE.softmax(1), extra=extra)
    expert_TK = torch.tensor([[0, 1], [1, 2], [2, 0]])
    valid_T = torch.tensor([True, True, False]) if valid else None
    return from_topk(expert_TK, gate.probs_TE.gather(1, expert_TK), 3, valid_T=valid_T, gate=gate)


def test_a_plan_of_k_rows_per_token_by_hand() -> None:
    plan = lift(small(), PART)
    assert (plan.num_tokens, plan.per_token, plan.num_rows) == (5, 2, 10)
    # Token 0 of the part is token 4 of the batch, 1 is 0, 2 (padding) is 2; 1 and 3 never arrived.
    assert plan.expert_TK.tolist() == [[1, 2], [3, 3], [3, 3], [3, 3], [0, 1]]
    assert plan.choice_TK.tolist() == plan.expert_TK.tolist()
    assert plan.token_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert plan.valid_T is not None
    assert plan.valid_T.tolist() == [True, False, False, False, True]
    torch.testing.assert_close(plan.weight_TK[4], small().weight_TK[0])
    assert plan.weight_TK[1:4].tolist() == [[0, 0]] * 3
    assert plan.gate is not None
    assert plan.gate.logits_TE.tolist() == [[1, 3, 2], [0, 0, 0], [2, 1, 3], [0, 0, 0], [3, 2, 1]]
    assert plan.gate.extra["state_TR"].tolist() == [[2, 3], [0, 0], [4, 5], [0, 0], [0, 1]]
    assert plan.gate.extra["mean"] == 7
    assert plan.gate.extra["seen_D"].tolist() == [1, 1, 1]  # three numbers by chance, not three tokens
    assert lift(small(valid=False), PART).valid_T.tolist() == [True, False, True, False, True]  # type: ignore[union-attr]


def test_readings_are_those_of_the_part() -> None:
    part, whole = small(), lift(small(), PART)
    assert torch.equal(read.load(whole), read.load(part))
    assert int(whole.dropped) == int(part.dropped) == 0
    for reading in (read.router_entropy, read.margin, read.drop_rate):
        torch.testing.assert_close(reading(whole), reading(part))
    assert torch.equal(read.co_activation(whole), read.co_activation(part))


def same(a: RoutingPlan, b: RoutingPlan) -> None:
    for name in ("token_N", "expert_N", "weight_N", "choice_N", "num_tokens", "num_experts", "per_token"):
        x, y = getattr(a, name), getattr(b, name)
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name


@pytest.mark.parametrize("rules", [False, True])
@pytest.mark.parametrize("loose", [False, True])
def test_lowering_undoes_lifting(loose: bool, rules: bool) -> None:
    plan = replace(small(), input_weight_N=torch.arange(6.0))
    if loose:
        plan = from_rows(
            torch.tensor([1, 0, 1, 2]), torch.tensor([0, 2, 1, 1]), torch.arange(4.0), 3, 3, valid_T=small().valid_T
        )
    if rules:
        allowed_TE = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
        plan = replace(plan, allowed_TE=allowed_TE).send(plan.expert_N)
    whole = lift(plan, PART)
    again = lower(whole, PART)
    same(again, plan)
    assert torch.equal(read.load(whole), read.load(plan))
    if rules:
        assert torch.equal(again.allowed_TE, plan.allowed_TE)  # type: ignore[arg-type]
    if loose:
        assert whole.token_N.tolist() == [0, 4, 0, 2]
    else:
        assert torch.equal(again.input_weight_N, plan.input_weight_N)  # type: ignore[arg-type]


def test_an_edit_of_the_whole_is_an_edit_of_the_part() -> None:
    same(lower(mask_experts(lift(small(), PART), [1]), PART), mask_experts(small(), [1]))


def test_loose_rows_of_tokens_outside_go_nowhere() -> None:
    """As when a recorded plan is replayed on another choice of tokens."""
    whole = from_rows(torch.tensor([0, 1, 2, 4]), torch.tensor([0, 1, 2, 0]), torch.ones(4), 5, 3)
    plan = lower(whole, PART)
    assert plan.expert_N.tolist() == [0, 3, 2, 0]
    assert plan.choice_N.tolist() == [0, 3, 2, 0]
    assert plan.weight_N.tolist() == [1, 0, 1, 1]
    assert plan.token_N[torch.tensor([0, 2, 3])].tolist() == [1, 2, 0]


def test_gradients_pass() -> None:
    plan = small()
    assert plan.gate is not None
    whole = lift(plan, PART)
    assert whole.gate is not None
    upstream = torch.randn(5, 2)
    loss = (whole.weight_TK * upstream).sum() + whole.gate.probs_TE[:, 0].sum()
    expected = (plan.weight_TK * upstream[PART.place_T]).sum() + plan.gate.probs_TE[:, 0].sum()
    (found,) = torch.autograd.grad(loss, plan.gate.logits_TE, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected, plan.gate.logits_TE)[0])


def test_sub_tokens_follow_their_tokens() -> None:
    """Two of four tokens, each cut in two: sub-tokens 4, 5 and 2, 3 of eight."""
    part = Part(torch.tensor([2, 1]), 4)
    plan = from_topk(torch.tensor([[0], [1], [2], [0]]), torch.ones(4, 1), 3)
    whole = lift(plan, part)
    assert whole.num_tokens == 8
    assert whole.expert_N.tolist() == [3, 3, 2, 0, 0, 1, 3, 3]
    same(lower(whole, part), plan)
    gate = Gate(torch.arange(4.0)[:, None], torch.ones(4, 1))
    assert lift_gate(gate, part).logits_TE.flatten().tolist() == [0, 0, 2, 3, 0, 1, 0, 0]
    assert torch.equal(lower_gate(lift_gate(gate, part), part).logits_TE, gate.logits_TE)


def test_soft_plans_keep_their_groups() -> None:
    """Two sequences of three; places 0 and 2 of the first, 1 and 2 of the second, two slots."""
    part = Part(torch.tensor([0, 2, 4, 5]), 6)
    plan = SoftPlan(torch.rand(2, 2, 2), torch.rand(2, 2, 2), 2)
    whole = lift(plan, part)
    assert whole.dispatch_GTS.shape == (2, 3, 2)
    assert torch.equal(whole.dispatch_GTS[0, [0, 2]], plan.dispatch_GTS[0])
    assert torch.equal(whole.combine_GTS[1, [1, 2]], plan.combine_GTS[1])
    assert not whole.combine_GTS[0, 1].any()
    assert not whole.dispatch_GTS[1, 0].any()
    x_TD = torch.randn(6, 3)
    torch.testing.assert_close(whole.gather(x_TD), plan.gather(x_TD[part.place_T]))
    again = lower(whole, part)
    assert torch.equal(again.dispatch_GTS, plan.dispatch_GTS)
    assert torch.equal(again.combine_GTS, plan.combine_GTS)


def test_nobody() -> None:
    empty = Part(torch.zeros(0, dtype=torch.int64), 3)
    plan = from_topk(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), 4)
    whole = lift(plan, empty)
    assert whole.expert_TK.tolist() == [[4, 4]] * 3
    assert lower(whole, empty).num_tokens == 0


def test_names_tell_what_is_per_token() -> None:
    assert all(per_token(name) for name in ("recurrent_TR", "log_prob_T", "free_logits_TE"))
    assert not any(per_token(name) for name in ("diversity", "unserved_D", "Total", "memory_EV"))
