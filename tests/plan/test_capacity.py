"""Capacity: slot counts of known code bases, priorities and overflow policies on worked examples, accounting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.plan import (
    AdaptiveFactor,
    CapacityRule,
    Gate,
    RoutingPlan,
    drop_over_capacity,
    from_rows,
    from_topk,
    restrict,
)
from moesaic.plan.overflow import fullest


def _one_choice(experts: list[int], weights: list[float], E: int = 4, valid: list[int] | None = None) -> RoutingPlan:
    valid_T = None if valid is None else torch.tensor(valid, dtype=torch.bool)
    return from_topk(torch.tensor(experts)[:, None], torch.tensor(weights)[:, None], E, valid_T=valid_T)


def _with_scores(experts_TK: list[list[int]], probs: list[list[float]]) -> RoutingPlan:
    expert_TK, probs_TE = torch.tensor(experts_TK), torch.tensor(probs)
    weight_TK = probs_TE.gather(1, expert_TK.clamp(max=probs_TE.shape[1] - 1))
    return from_topk(expert_TK, weight_TK, probs_TE.shape[1], gate=Gate(probs_TE.log(), probs_TE))


# ---- slots ---------------------------------------------------------------------------------------------------------

MESH_TF: dict[str, Any] = {"rounding": "floor", "count_k": False, "minimum": 0}
MESH_TF_NEW = MESH_TF | {"minimum": 4}
MEGATRON: dict[str, Any] = {"minimum": 0}
VMOE: dict[str, Any] = {"multiple_of": 4, "minimum": 1}


@pytest.mark.parametrize(
    ("rule", "T", "k", "E", "slots"),
    [
        ({"factor": 1.25} | MESH_TF, 100, 2, 16, 7),  # int(100 * 1.25 / 16 = 7.8), no k even for top-2
        ({"factor": 1.25} | MESH_TF_NEW, 10, 2, 16, 4),
        ({"factor": 9.0} | MESH_TF, 10, 1, 4, 10),  # never more than the tokens
        ({"factor": 1.25}, 100, 2, 16, 16),  # DeepSpeed: ceil(2 * 1.25 * 100 / 16 = 15.6)
        ({"factor": 1.0}, 10, 1, 16, 4),  # DeepSpeed's min_capacity 4
        ({"factor": 1.0, "minimum": 8}, 64, 1, 16, 8),
        ({"factor": 1.0} | MEGATRON, 10, 1, 16, 1),
        ({"factor": 1.25} | MEGATRON, 64, 6, 64, 8),  # ceil(7.5)
        ({"factor": 1.05} | VMOE, 1000, 2, 32, 68),  # ceil(65.6) = 66, up to a multiple of 4
        ({"factor": 1.05, "rounding": "round"} | VMOE, 1000, 2, 32, 68),
        ({"factor": 1.0, "rounding": "round", "minimum": 0}, 9, 1, 4, 2),  # 2.25
        ({"factor": 1.1, "minimum": 0}, 10, 1, 1, 10),
        ({"factor": 1.1, "minimum": 0}, 100, 1, 10, 11),  # 1.1 * 10 is 11.000000000000002 in binary
        ({"factor": 1.0, "minimum": 0, "multiple_of": 8}, 6, 1, 1, 6),  # clipped to T last
        ({"factor": 1.0}, 0, 2, 4, 0),
    ],
)
def test_slots_of_the_code_bases(rule: dict[str, Any], T: int, k: int, E: int, slots: int) -> None:
    assert CapacityRule(**rule).slots(T, k, E) == slots


def test_slots_in_evaluation() -> None:
    assert CapacityRule(eval_factor=2.0).slots(16, 1, 16, training=False) == 2  # the minimum is for training
    assert CapacityRule(eval_factor=None).slots(16, 1, 16, training=False) is None
    plan = _one_choice([0] * 6, [1.0] * 6)
    assert CapacityRule(eval_factor=None).apply(plan, training=False) is plan


def test_slots_split_between_kinds_of_experts() -> None:
    """12 tokens, 2 feed-forward and 2 zero-computation experts, tau 1/2: 0.5 * 2 + 2 = 3 units of 4 slots."""
    rule = CapacityRule(factor=1.0, minimum=0, tau=0.5)
    assert rule.split_slots(12, 1, 4, 2) == (2, 4)
    assert rule.split_slots(12, 2, 4, 2) == (4, 8)
    assert CapacityRule(factor=1.0, minimum=0, tau=0.5, count_k=False).split_slots(12, 2, 4, 2) == (2, 4)
    assert CapacityRule(factor=1.0, minimum=0, tau=1.0).split_slots(12, 1, 4, 2) == (3, 3)  # as ``slots``
    assert CapacityRule(tau=0.5).split_slots(12, 1, 4, 2, training=False) is None
    plan = _one_choice([0] * 4 + [2] * 5 + [1] * 1 + [3] * 2, [1.0] * 12)
    capped = rule.apply(plan, training=True, num_special=2)
    assert capped.counts_E.tolist() == [2, 1, 4, 2]
    assert capped.kept_N.nonzero().flatten().tolist() == [0, 1, 4, 5, 6, 7, 9, 10, 11]
    assert not capped.weight_N[~capped.kept_N].any()
    assert rule.apply(plan, training=False, num_special=2) is plan
    # Without zero-computation experts it is the plain rule: 3 slots each.
    assert rule.apply(plan, training=True).counts_E.tolist() == [3, 1, 3, 2]


def test_split_slots_renormalise() -> None:
    """Two rows of one token, one of them dropped: the other takes over its weight."""
    plan = from_topk(torch.tensor([[0, 2], [0, 3]]), torch.tensor([[0.6, 0.3], [0.5, 0.4]]), 4)
    rule = CapacityRule(factor=0.5, minimum=1, tau=0.5, renormalize=True)
    assert rule.split_slots(2, 2, 4, 2) == (1, 1)
    capped = rule.apply(plan, training=True, num_special=2)
    assert capped.expert_TK.tolist() == [[0, 2], [4, 3]]
    assert capped.weight_N.tolist() == pytest.approx([0.6, 0.3, 0.0, 0.9])


def test_adaptive_routers_are_capped_by_the_experts_they_use() -> None:
    """6 tokens own 4 rows each and use 1: at factor 1 an expert has ceil(6 / 4) = 2 slots, not 6."""
    plan = from_topk(torch.tensor([[0, 4, 4, 4]] * 6), torch.ones(6, 4), 4)
    rule = CapacityRule(factor=1.0, minimum=0)
    assert rule.apply(plan, training=True).counts_E.tolist() == [6, 0, 0, 0]
    assert rule.apply(plan, training=True, k=1).counts_E.tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tau": 0.0}, "capacity.tau must be above 0 and at most 1, not 0.0"),
        ({"tau": 0.5, "overflow": "next_best"}, 'overflow="next_best" cannot move rows between them'),
        ({"factor": 0.0}, "capacity.factor must be above 0, not 0.0"),
        ({"factor": float("nan")}, "capacity.factor must be above 0"),
        ({"eval_factor": -1.0}, "capacity.eval_factor must be above 0"),
        ({"multiple_of": 0}, "at least 1"),
        ({"groups": 0}, "at least 1"),
        ({"minimum": -1}, "at least 0"),
        ({"overflow": "fallback_expert"}, "set both or neither"),
        ({"fallback_expert": 1}, "set both or neither"),
        ({"factor": "exct"}, 'Did you mean "exact"'),
        ({"max_factor": 2.0}, 'max_factor bounds factor="exact", and factor is 1.25'),
        ({"factor": "exact", "max_factor": 0.0}, "capacity.max_factor must be above 0"),
        ({"factor": "exact", "adapt": AdaptiveFactor()}, "leaves nothing for tau or adapt to set"),
        ({"factor": "exact", "tau": 0.5}, "leaves nothing for tau or adapt to set"),
        ({"factor": 5.0, "adapt": AdaptiveFactor(hi=4.0)}, "starts outside capacity.adapt's 0.5 to 4.0"),
        ({"overflow": "next_best", "adapt": AdaptiveFactor()}, "follows dropped rows"),
        ({"batch_score": "mean"}, "capacity.batch_score must be one of"),
    ],
)
def test_impossible_rules_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CapacityRule(**fields)


# ---- factors that are not numbers -----------------------------------------------------------------------------------


def test_the_exact_factor_drops_nothing_up_to_its_bound() -> None:
    # Loads 5, 2, 1, 0: the fullest expert needs 5 slots, a factor of 5 / (8 / 4) = 2.5.
    plan = _one_choice([0, 0, 1, 0, 2, 0, 1, 0], [1.0] * 8)
    assert fullest(plan) == 5
    free = CapacityRule(factor="exact", minimum=0)
    assert free.slots(8, 1, 4, needed=5) == 5
    assert free.apply(plan, training=True) is plan
    bounded = CapacityRule(factor="exact", max_factor=2.0, minimum=0)
    assert bounded.slots(8, 1, 4, needed=5) == 4  # Tutel's -2: never more than a factor of 2
    assert bounded.slots(8, 1, 4, needed=3) == 3
    assert bounded.apply(plan, training=True).counts_E.tolist() == [4, 2, 1, 0]
    assert CapacityRule(factor="exact", max_factor=2.5, minimum=0).apply(plan, training=True).counts_E[0] == 5
    assert CapacityRule(factor="exact", minimum=4, multiple_of=4).slots(16, 1, 4, needed=5) == 8
    assert CapacityRule(factor="exact").slots(16, 1, 4, needed=1) == 4
    assert bounded.apply(plan, training=False) is plan  # evaluation is dropless unless asked
    with pytest.raises(ConfigError, match="say what its fullest expert needs"):
        free.slots(8, 1, 4)


def test_the_fullest_expert_is_that_of_any_group() -> None:
    plan = _one_choice([0, 0, 1, 1, 1, 0], [1.0] * 6, valid=[1, 1, 1, 1, 1, 0])
    assert fullest(plan) == 3
    assert fullest(plan, groups=2) == 2  # the first three of five tokens: 0 0 1; the others: 1 1
    assert fullest(_one_choice([4, 4], [1.0, 1.0])) == 0
    grouped = CapacityRule(factor="exact", max_factor=99.0, minimum=0, groups=2)
    assert int(grouped.apply(plan, training=True).dropped) == 0


def test_an_adapted_factor_replaces_the_rules_own_in_training() -> None:
    rule = CapacityRule(factor=1.0, minimum=0, eval_factor=1.0, adapt=AdaptiveFactor())
    plan = _one_choice([0] * 6 + [1, 2], [1.0] * 8)
    assert rule.apply(plan, training=True).counts_E.tolist() == [2, 1, 1, 0]
    assert rule.apply(plan, training=True, factor=2.0).counts_E.tolist() == [4, 1, 1, 0]
    assert rule.apply(plan, training=False, factor=2.0).counts_E.tolist() == [2, 1, 1, 0]


def test_factors_in_use_are_multiples_within_bounds() -> None:
    adapt = AdaptiveFactor(lo=0.9, hi=2.0, step=0.25)
    assert [adapt.in_use(f) for f in (0.9, 1.0, 1.01, 1.25, 1.9, 2.0)] == [1.0, 1.0, 1.25, 1.25, 2.0, 2.0]
    assert AdaptiveFactor(step=0.05).in_use(1.1) == pytest.approx(1.1)  # 1.1 / .05 is 22.000000000000004


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target": 1.0}, "below 1, not 1.0"),
        ({"memory": -0.1}, "at least 0 and below 1"),
        ({"eta": 0.0}, "eta=0.0"),
        ({"lo": 2.0, "hi": 1.0}, "0 < lo <= hi"),
        ({"step": 0.0}, "step=0.0"),
    ],
)
def test_impossible_adaptation_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AdaptiveFactor(**fields)


# ---- who goes first ------------------------------------------------------------------------------------------------


def test_ten_tokens_for_one_expert_with_four_slots() -> None:
    weights = [0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.5, 0.55]
    plan = _one_choice([0] * 10, weights)
    by_position = drop_over_capacity(plan, 4)
    assert by_position.kept_N.nonzero().flatten().tolist() == [0, 1, 2, 3]
    by_weight = drop_over_capacity(plan, 4, priority="probability")
    assert by_weight.kept_N.nonzero().flatten().tolist() == [1, 3, 5, 7]
    assert drop_over_capacity(plan, 4, priority="batch").kept_N.nonzero().flatten().tolist() == [1, 3, 5, 7]
    for capped in (by_position, by_weight):
        assert capped.counts_E.tolist() == [4, 0, 0, 0]
        assert capped.choice_counts_E.tolist() == [10, 0, 0, 0]
        assert int(capped.dropped) == 6
        assert (capped.weight_N[~capped.kept_N] == 0).all()
        assert torch.equal(capped.weight_N[capped.kept_N], plan.weight_N[capped.kept_N])


# Token: first choice, second choice (weights). Expert 0 is wanted by a (1st), b (2nd), c (1st), d (2nd).
TWO = from_topk(
    torch.tensor([[0, 1], [2, 0], [0, 3], [1, 0]]),
    torch.tensor([[0.5, 0.4], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2]]),
    4,
)


@pytest.mark.parametrize(
    ("priority", "slots", "expert_0"),
    [
        ("position", 1, [0]),
        ("position", 2, [0, 2]),  # first choices of a and c before b's second
        ("position", 3, [0, 1, 2]),
        ("probability", 1, [2]),  # c .7
        ("probability", 3, [0, 2, 3]),  # then a .5, d .2
        ("batch", 1, [2]),  # tokens b .9, d .8, c .7, a .5: the first first choice for expert 0 is c's
        ("batch", 2, [0, 2]),
        ("batch", 3, [0, 1, 2]),  # then second choices: b's before d's
    ],
)
def test_priorities_with_two_choices(priority: Any, slots: int, expert_0: list[int]) -> None:
    capped = drop_over_capacity(TWO, slots, priority=priority)
    assert sorted(capped.token_N[capped.expert_N == 0].tolist()) == expert_0


def test_random_priority_follows_its_generator() -> None:
    plan = _one_choice([0] * 12, [1.0] * 12)

    def kept(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return drop_over_capacity(plan, 4, priority="random", generator=generator).kept_N.nonzero().flatten().tolist()

    assert kept(1) == kept(1)
    assert len({tuple(kept(seed)) for seed in range(8)}) > 4
    assert all(len(kept(seed)) == 4 for seed in range(8))


def test_loose_rows_have_priorities_too() -> None:
    plan = from_rows(
        torch.tensor([3, 1, 0, 2]), torch.zeros(4, dtype=torch.int64), torch.tensor([0.4, 0.1, 0.2, 0.9]), 4, 2
    )
    assert sorted(plan.token_N[drop_over_capacity(plan, 2).kept_N].tolist()) == [0, 1]
    for priority in ("probability", "batch"):
        kept_N = drop_over_capacity(plan, 2, priority=priority).kept_N  # type: ignore[arg-type]
        assert sorted(plan.token_N[kept_N].tolist()) == [2, 3]


def test_batch_priority_goes_by_scores_not_by_renormalised_weights() -> None:
    """V-MoE sorts by the softmax; after renormalising, the token of .3 and .05 would look surer than that of .5 and .4."""
    scores = [[0.3, 0.05, 0.33, 0.32], [0.5, 0.4, 0.05, 0.05], [0.45, 0.1, 0.4, 0.05]]
    probs_TE = torch.tensor(scores)
    expert_TK = torch.tensor([[0, 1], [0, 1], [0, 1]])
    weight_TK = probs_TE.gather(1, expert_TK)
    weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
    assert weight_TK[0, 0] == weight_TK[:, 0].max()
    plan = from_topk(expert_TK, weight_TK, 4, gate=Gate(probs_TE.log(), probs_TE))
    by_best = drop_over_capacity(plan, 1, priority="batch")
    assert by_best.token_N[by_best.kept_N].tolist() == [1, 1]
    # Best .5 and .45, sums .55 and .9: the sum over choices turns the order round.
    expert_TK = torch.tensor([[0, 1], [0, 1]])
    probs_TE = torch.tensor([[0.5, 0.05, 0.45], [0.45, 0.45, 0.1]])
    plan = from_topk(expert_TK, probs_TE.gather(1, expert_TK), 3, gate=Gate(probs_TE.log(), probs_TE))
    for score, first in (("max", 0), ("sum", 1)):
        capped = drop_over_capacity(plan, 1, priority="batch", batch_score=score)  # type: ignore[arg-type]
        assert capped.token_N[capped.kept_N].tolist() == [first, first]
    rule = CapacityRule(factor=1e-9, minimum=1, priority="batch", batch_score="sum")
    assert rule.apply(plan, training=True).kept_N.tolist() == [False, False, True, True]


def test_loose_rows_are_ranked_by_weight_within_their_token() -> None:
    # Token 0's rows: expert 1 (.2), expert 0 (.8); token 1's: expert 0 (.6), expert 1 (.4). First choices are all for expert 0.
    plan = from_rows(
        torch.tensor([0, 0, 1, 1, 1]),
        torch.tensor([1, 0, 0, 1, 2]),
        torch.tensor([0.2, 0.8, 0.6, 0.4, 0.0]),
        2,
        2,
    )
    assert drop_over_capacity(plan, 1).kept_N.tolist() == [True, True, False, False, False]
    as_topk = from_topk(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.8, 0.2], [0.6, 0.4]]), 2)
    for priority in ("position", "batch", "probability"):
        loose = drop_over_capacity(plan, 1, priority=priority)  # type: ignore[arg-type]
        strict = drop_over_capacity(as_topk, 1, priority=priority)  # type: ignore[arg-type]
        seats = {(int(t), int(e)) for t, e in zip(loose.token_N, loose.expert_N, strict=True) if e < 2}
        assert seats == {(int(t), int(e)) for t, e in zip(strict.token_N, strict.expert_N, strict=True) if e < 2}


def test_padding_takes_no_slot_and_does_not_count_as_a_token() -> None:
    plan = _one_choice([0] * 8, [1.0] * 8, valid=[0, 0, 1, 0, 1, 1, 1, 0])
    assert drop_over_capacity(plan, 2).kept_N.nonzero().flatten().tolist() == [2, 4]
    # 4 valid tokens, 4 experts, factor 1: one slot, not two.
    assert int(CapacityRule(factor=1.0, minimum=0).apply(plan, training=True).counts_E[0]) == 1


def test_groups_have_slots_of_their_own() -> None:
    plan = _one_choice([0, 0, 0, 1, 0, 0], [1.0] * 6)
    assert drop_over_capacity(plan, 1).kept_N.nonzero().flatten().tolist() == [0, 3]
    assert drop_over_capacity(plan, 1, groups=2).kept_N.nonzero().flatten().tolist() == [0, 3, 4]
    assert drop_over_capacity(plan, 1, groups=3).kept_N.nonzero().flatten().tolist() == [0, 2, 3, 4]
    # T per group: 6 tokens, 2 groups, 4 experts, factor 1.25: ceil(3 * 1.25 / 4) = 1 slot each.
    rule = CapacityRule(factor=1.25, minimum=0, groups=2)
    assert rule.apply(plan, training=True).kept_N.nonzero().flatten().tolist() == [0, 3, 4]


# ---- what happens to the rest --------------------------------------------------------------------------------------


def test_residual_and_shared_send_nowhere() -> None:
    plan = _one_choice([0, 0, 1], [0.5, 0.6, 0.7])
    for overflow in ("residual", "shared"):
        capped = drop_over_capacity(plan, 1, overflow=overflow)  # type: ignore[arg-type]
        assert capped.expert_N.tolist() == [0, 4, 1]


def test_fallback_expert_has_no_limit_and_keeps_the_weight() -> None:
    plan = _one_choice([0, 0, 3, 3, 0], [0.5, 0.6, 0.7, 0.8, 0.9])
    capped = drop_over_capacity(plan, 1, overflow="fallback_expert", fallback_expert=3)
    assert capped.expert_N.tolist() == [0, 3, 3, 3, 3]
    assert capped.weight_N.tolist() == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert int(capped.dropped) == 0
    with pytest.raises(ConfigError, match="must name one of the 4 experts, not 9"):
        drop_over_capacity(plan, 1, overflow="fallback_expert", fallback_expert=9)


def test_next_best_one_choice() -> None:
    plan = _with_scores(
        [[0], [0], [0], [1]],
        [[0.9, 0.06, 0.04], [0.5, 0.4, 0.1], [0.6, 0.1, 0.3], [0.2, 0.7, 0.1]],
    )
    capped = drop_over_capacity(plan, 1, overflow="next_best")
    # Token 0 keeps expert 0 and token 3 expert 1. Token 2's second choice, expert 2, is offered a round before token 1's
    # third, which is the same expert: token 1 is left without a seat.
    assert capped.expert_N.tolist() == [0, 3, 2, 1]
    assert capped.weight_N.tolist() == pytest.approx([0.9, 0.0, 0.6, 0.7])


def test_next_best_never_gives_a_token_one_expert_twice() -> None:
    plan = _with_scores(
        [[0, 1], [0, 1], [0, 1], [0, 1]],
        [[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.1, 0.2], [0.4, 0.3, 0.1, 0.2]],
    )
    capped = drop_over_capacity(plan, 2, overflow="next_best")
    assert capped.expert_TK.tolist() == [[0, 1], [0, 1], [3, 2], [3, 2]]
    # One token with both rows lost and two free slots on its best free expert: one each on two experts.
    three = _with_scores([[0, 1]] * 3, [[0.4, 0.3, 0.1, 0.2]] * 3)
    assert drop_over_capacity(three, 2, overflow="next_best").expert_TK.tolist() == [[0, 1], [0, 1], [3, 2]]
    tight = drop_over_capacity(plan, 1, overflow="next_best")
    assert tight.expert_TK[0].tolist() == [0, 1]
    assert sorted(tight.expert_TK[1:].flatten().tolist()) == [2, 3, 4, 4, 4, 4]
    assert int(tight.dropped) == 4


def test_next_best_for_loose_rows_is_that_of_top_k() -> None:
    """Rows of one token need not stand together, nor be equally many."""
    generator = torch.Generator().manual_seed(3)
    probs_TE = torch.randn(9, 5, generator=generator).softmax(1)
    top = probs_TE.topk(2, dim=1)
    gate = Gate(probs_TE.log(), probs_TE)
    strict = from_topk(top.indices, top.values, 5, gate=gate)
    mixed_N = torch.randperm(18, generator=generator)
    loose = from_rows(strict.token_N[mixed_N], strict.expert_N[mixed_N], strict.weight_N[mixed_N], 9, 5, gate=gate)
    for slots in (2, 3, 4):
        a = drop_over_capacity(strict, slots, priority="probability", overflow="next_best")
        b = drop_over_capacity(loose, slots, priority="probability", overflow="next_best")
        assert a.counts_E.tolist() == b.counts_E.tolist()
        assert int(b.dropped) == max(0, 18 - 5 * slots)
        for token in range(9):
            mine = [int(e) for t, e in zip(b.token_N, b.expert_N, strict=True) if int(t) == token and e < 5]
            assert len(mine) == len(set(mine))


def test_rerouting_offers_permitted_experts_only() -> None:
    probs = [[0.5, 0.3, 0.15, 0.05]] * 3
    plan = _with_scores([[0], [0], [0]], probs)
    allowed_TE = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 0]], dtype=torch.bool)
    ruled = restrict(plan, allowed_TE)
    for overflow in ("next_best", "reroute_to_free"):
        capped = drop_over_capacity(ruled, 1, overflow=overflow)  # type: ignore[arg-type]
        assert capped.expert_N.tolist() == [0, 3, 4]
    sent = drop_over_capacity(ruled, 1, overflow="fallback_expert", fallback_expert=3)
    assert sent.expert_N.tolist() == [0, 3, 4]


def test_next_best_does_not_revive_padding_or_seats_the_router_left_empty() -> None:
    plan = from_topk(
        torch.tensor([[0, 3], [0, 1], [0, 1]]),
        torch.full((3, 2), 0.5),
        3,
        valid_T=torch.tensor([True, False, True]),
        gate=Gate(torch.zeros(3, 3), torch.full((3, 3), 1 / 3)),
    )
    capped = drop_over_capacity(plan, 1, overflow="next_best")
    assert capped.expert_TK.tolist() == [[0, 3], [3, 3], [2, 1]]


def test_reroute_to_free_fills_the_lowest_free_slots_in_priority_order() -> None:
    plan = _one_choice([0, 0, 0, 0, 2, 0], [0.1, 0.9, 0.5, 0.6, 0.3, 0.2], E=3)
    capped = drop_over_capacity(plan, 2, overflow="reroute_to_free")
    assert capped.expert_N.tolist() == [0, 0, 1, 1, 2, 2]
    by_weight = drop_over_capacity(plan, 2, overflow="reroute_to_free", priority="probability")
    assert by_weight.expert_N.tolist() == [2, 0, 1, 0, 2, 1]
    full = drop_over_capacity(plan, 1, overflow="reroute_to_free")
    assert full.expert_N.tolist() == [0, 1, 3, 3, 2, 3]
    grouped = drop_over_capacity(plan, 1, overflow="reroute_to_free", groups=2)
    assert grouped.expert_N.tolist() == [0, 1, 2, 0, 2, 1]


def test_next_best_needs_scores() -> None:
    with pytest.raises(ConfigError, match="scores for all experts"):
        drop_over_capacity(_one_choice([0, 0], [1.0, 1.0]), 1, overflow="next_best")


def test_renormalise_after_the_drop() -> None:
    plan = from_topk(torch.tensor([[0, 1], [0, 1], [0, 2]]), torch.tensor([[0.75, 0.25], [0.6, 0.3], [0.5, 0.5]]), 3)
    before = drop_over_capacity(plan, 1)
    assert before.weight_N.tolist() == pytest.approx([0.75, 0.25, 0, 0, 0, 0.5])  # GShard: normalised before
    after = drop_over_capacity(plan, 1, renormalize=True)
    assert after.weight_N.tolist() == pytest.approx([0.75, 0.25, 0, 0, 0, 1.0])  # DeepSpeed: the survivor takes all
    # The sum before the drop is what is restored, not 1.
    some = drop_over_capacity(plan.send(torch.tensor([0, 1, 3, 1, 0, 2])), 1, renormalize=True)
    assert some.weight_N.tolist() == pytest.approx([0.75, 0.25, 0, 0, 0, 1.0])


def test_renormalised_weights_carry_gradient() -> None:
    logits_TK = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    plan = from_topk(torch.tensor([[0, 1], [0, 2], [0, 3]]), logits_TK.sigmoid(), 4)
    capped = drop_over_capacity(plan, 1, renormalize=True)
    (grad,) = torch.autograd.grad(capped.weight_N[3], logits_TK)
    # w2' = (s1 + s2): both scores of token 1 matter, no other.
    s = logits_TK.detach().sigmoid()
    expected = torch.zeros_like(s)
    expected[1] = s[1] * (1 - s[1])
    torch.testing.assert_close(grad, expected)


# ---- accounting ----------------------------------------------------------------------------------------------------

PRIORITIES = ["position", "probability", "batch", "random"]
OVERFLOWS = ["residual", "shared", "next_best", "reroute_to_free"]


@given(
    seed=st.integers(0, 10_000),
    T=st.integers(0, 12),
    E=st.integers(1, 6),
    k=st.integers(1, 3),
    slots=st.integers(0, 6),
    groups=st.integers(1, 3),
    priority=st.sampled_from(PRIORITIES),
    overflow=st.sampled_from(OVERFLOWS),
    padding=st.booleans(),
)
def test_accounting_adds_up(
    seed: int, T: int, E: int, k: int, slots: int, groups: int, priority: Any, overflow: Any, padding: bool
) -> None:
    k = min(k, E)
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(T, E, generator=generator) * 2
    probs_TE = logits_TE.softmax(dim=1)
    valid_T = torch.rand(T, generator=generator) > 0.3 if padding else None
    top = probs_TE.topk(k, dim=1)
    plan = from_topk(top.indices, top.values, E, valid_T=valid_T, gate=Gate(logits_TE, probs_TE))
    capped = drop_over_capacity(plan, slots, priority=priority, overflow=overflow, groups=groups)
    chosen, kept = int((plan.choice_N < E).sum()), int(capped.kept_N.sum())
    assert kept + int(capped.dropped) == chosen
    assert int(capped.counts_E.sum()) == kept
    assert torch.equal(capped.choice_N, plan.choice_N)
    assert torch.equal(capped.weight_N, torch.where(capped.kept_N, plan.weight_N, 0.0))
    seat_T = (torch.ones(T, dtype=torch.bool) if valid_T is None else valid_T).cumsum(0) - 1  # padding has no seat
    group_N = (seat_T.clamp(min=0) * groups // max(int(plan.num_valid), 1))[plan.token_N]
    for group in range(groups):
        here_N = capped.kept_N & (group_N == group)
        counts_E = torch.bincount(capped.expert_N[here_N], minlength=E)
        assert int(counts_E.max()) <= slots
        # Nobody is turned away while there is room: a lost row's expert (for rerouting, every expert) is full.
        lost_N = (plan.choice_N < E) & ~capped.kept_N & (group_N == group)
        if overflow == "reroute_to_free":
            for token in plan.token_N[lost_N].tolist():  # every expert it does not use already is full
                others = sorted(set(range(E)) - set(capped.expert_TK[token].tolist()))
                assert (counts_E[others] == slots).all()
        elif overflow != "next_best":
            assert (counts_E[plan.choice_N[lost_N]] == slots).all()
    if overflow in ("next_best", "reroute_to_free"):
        for row in capped.expert_TK.tolist():
            real = [e for e in row if e < E]
            assert len(real) == len(set(real))
        for t, row in enumerate(capped.expert_TK.tolist()):
            for choice, expert in zip(plan.choice_TK[t].tolist(), row, strict=True):
                if choice < E and expert == E:  # dropped only if all experts it does not already use are full
                    group = int(group_N[t * k])
                    counts_E = torch.bincount(capped.expert_N[capped.kept_N & (group_N == group)], minlength=E)
                    assert all(int(counts_E[e]) >= slots for e in range(E) if e not in row)


def test_rerouting_gives_a_token_no_expert_twice() -> None:
    plan = from_topk(torch.tensor([[0, 1], [0, 1], [0, 2], [0, 3]]), torch.full((4, 2), 0.5), 4)
    capped = drop_over_capacity(plan, 2, overflow="reroute_to_free")
    # Tokens 2 and 3 lost expert 0. Experts 2 and 3 have one slot left each: 2 may only take 3, and 3 may only take 2.
    assert capped.expert_TK.tolist() == [[0, 1], [0, 1], [3, 2], [2, 3]]


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [("priority", "probabilty", "probability"), ("overflow", "nextbest", "next_best"), ("rounding", "cell", "ceil")],
)
def test_misspelt_policies_are_refused_with_the_nearest(name: str, value: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f'{name} must be one of .* not .{value}..* Did you mean "{meant}"'):
        CapacityRule(**{name: value})
    if name != "rounding":
        with pytest.raises(ConfigError, match=meant):
            drop_over_capacity(_one_choice([0, 1], [1.0, 1.0]), 1, **{name: value})
