"""Edits of plans: forced balance, replay, knockout, padding, on worked examples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.plan import (
    Gate,
    RoutingPlan,
    drop_over_capacity,
    force_balanced,
    from_rows,
    from_topk,
    mask_experts,
    mask_padding,
    replay,
)
from moesaic.routing import TokenContext, TopK

PROBS = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.3, 0.4, 0.1, 0.2]]


def _plan(k: int = 2, valid: list[int] | None = None) -> RoutingPlan:
    probs_TE = torch.tensor(PROBS)
    top = probs_TE.topk(k, dim=1)
    valid_T = None if valid is None else torch.tensor(valid, dtype=torch.bool)
    return from_topk(top.indices, top.values, 4, valid_T=valid_T, gate=Gate(probs_TE.log(), probs_TE))


# ---- force_balanced ------------------------------------------------------------------------------------------------


def test_round_robin_by_hand() -> None:
    plan = _plan(valid=[1, 0, 1])
    even = force_balanced(plan)
    assert even.expert_TK.tolist() == [[0, 1], [4, 4], [2, 3]]
    assert torch.equal(even.weight_N, plan.weight_N)
    assert torch.equal(even.choice_N, plan.choice_N)


@given(T=st.integers(0, 15), E=st.integers(1, 7), k=st.integers(1, 7), seed=st.integers(0, 999), loose=st.booleans())
def test_forced_loads_differ_by_at_most_one(T: int, E: int, k: int, seed: int, loose: bool) -> None:
    k = min(k, E)
    generator = torch.Generator().manual_seed(seed)
    valid_T = torch.rand(T, generator=generator) > 0.3
    expert_TK = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :k]
    plan = from_topk(expert_TK, torch.rand(T, k, generator=generator), E, valid_T=valid_T)
    if loose:
        plan = from_rows(plan.token_N, plan.expert_N, plan.weight_N, T, E, valid_T=valid_T)
    even = force_balanced(plan)
    assert int(even.counts_E.max() - even.counts_E.min()) <= 1
    assert int(even.counts_E.sum()) == int(valid_T.sum()) * k
    assert torch.equal(even.weight_N, plan.weight_N)
    if not loose:
        for row in even.expert_TK[valid_T].tolist():
            assert len(set(row)) == k


# ---- replay --------------------------------------------------------------------------------------------------------


def test_replay_with_recorded_weights() -> None:
    live, recorded = _plan(), drop_over_capacity(force_balanced(_plan()), 1)
    again = replay(live, recorded)
    assert torch.equal(again.expert_N, recorded.expert_N)
    assert torch.equal(again.weight_N, recorded.weight_N)
    assert torch.equal(again.choice_N, live.choice_N)
    assert again.gate is live.gate


def test_replay_with_live_weights_is_todays_router_on_yesterdays_choice() -> None:
    router, x_TD = TopK(6, 5, 2, init_std=1.0), torch.randn(12, 6)
    recorded = drop_over_capacity(router(x_TD), 4).detach()
    assert int(recorded.dropped) > 0
    # The same router: exactly the recorded weights, those of tokens that lost one expert to capacity included.
    again = replay(router(x_TD), recorded, router.weigh)
    torch.testing.assert_close(again.weight_N, recorded.weight_N)
    # A changed router: weights of the recorded experts under today's scores, with gradient.
    with torch.no_grad():
        router.gate.weight.mul_(-1)
    plan = router(x_TD)
    assert not torch.equal(plan.expert_N, recorded.expert_N)
    moved = replay(plan, recorded, router.weigh)
    assert torch.equal(moved.expert_N, recorded.expert_N)
    assert plan.gate is not None
    both_TK = plan.gate.probs_TE.gather(1, recorded.choice_TK)
    expected_TK = torch.where(recorded.expert_TK < 5, both_TK / both_TK.sum(1, keepdim=True), 0.0)
    torch.testing.assert_close(moved.weight_TK, expected_TK)
    moved.weight_N[0].backward()
    assert router.gate.weight.grad is not None
    assert float(router.gate.weight.grad.abs().sum()) > 0


def test_replay_refuses_another_shape_and_missing_scores() -> None:
    with pytest.raises(ConfigError, match="3 tokens, 4 experts and 3 rows on one of 3, 4 and 6"):
        replay(_plan(k=2), _plan(k=1))
    with pytest.raises(ConfigError, match="carries none"):
        replay(replace(_plan(), gate=None), _plan(), TopK(4, 4, 2).weigh)


# ---- mask_experts --------------------------------------------------------------------------------------------------


def test_knocked_out_rows_are_dropped() -> None:
    cut = mask_experts(_plan(), [0, 3])
    assert cut.expert_TK.tolist() == [[4, 1], [4, 2], [1, 4]]
    assert cut.weight_N.tolist() == pytest.approx([0, 0.3, 0, 0.3, 0.4, 0])
    assert cut.counts_E.tolist() == [0, 2, 1, 0]
    assert int(cut.dropped) == 3
    assert mask_experts(_plan(), []).expert_N.tolist() == _plan().expert_N.tolist()


def test_knocked_out_rows_with_renormalised_survivors() -> None:
    cut = mask_experts(_plan(), [0], renormalize=True)
    assert cut.weight_N.tolist() == pytest.approx([0, 0.7, 0.4, 0.3, 0.7, 0])


def test_knocked_out_rows_go_to_the_next_best() -> None:
    cut = mask_experts(_plan(), [0], policy="next_best")
    assert cut.expert_TK.tolist() == [[2, 1], [3, 2], [1, 3]]
    assert cut.weight_N.tolist() == pytest.approx([0.4, 0.3, 0.4, 0.3, 0.4, 0.3])
    # Both of token 0's experts out: best free first, then the second. Token 1 keeps its own two.
    both = mask_experts(_plan(), [0, 1], policy="next_best")
    assert both.expert_TK.tolist() == [[2, 3], [3, 2], [3, 2]]
    # One expert left: it is used once per token, never twice.
    last = mask_experts(_plan(), [0, 1, 2], policy="next_best")
    assert last.expert_TK.tolist() == [[3, 4], [3, 4], [3, 4]]
    assert mask_experts(_plan(), [0, 1, 2, 3], policy="next_best").counts_E.tolist() == [0, 0, 0, 0]


def test_knockout_leaves_padding_alone() -> None:
    cut = mask_experts(_plan(valid=[1, 0, 1]), [0], policy="next_best")
    assert cut.expert_TK.tolist() == [[2, 1], [4, 4], [1, 3]]


def test_knockout_refusals() -> None:
    with pytest.raises(ConfigError, match="no expert 4: this layer has experts 0 to 3"):
        mask_experts(_plan(), [1, 4])
    with pytest.raises(ConfigError, match="no expert -1"):
        mask_experts(_plan(), [-1])
    with pytest.raises(ConfigError, match="next_best"):
        mask_experts(replace(_plan(), gate=None), [0], policy="next_best")


# ---- mask_padding --------------------------------------------------------------------------------------------------


def test_late_padding_equals_padding_known_to_the_router() -> None:
    router, x_TD = TopK(6, 5, 2), torch.randn(4, 6)
    valid_T = torch.tensor([True, False, True, True])
    late, known = mask_padding(router(x_TD), valid_T), router(x_TD, TokenContext(valid_T=valid_T))
    for name in ("token_N", "expert_N", "choice_N", "weight_N", "valid_T"):
        assert torch.equal(getattr(late, name), getattr(known, name))
    assert int(late.dropped) == 0
    twice = mask_padding(late, torch.tensor([True, True, False, True]))
    assert twice.valid_T is not None
    assert twice.valid_T.tolist() == [True, False, False, True]
    assert int(twice.counts_E.sum()) == 4
