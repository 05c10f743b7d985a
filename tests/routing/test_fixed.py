"""Random and round-robin routing: uniform and independent in training, reproducible in evaluation, in turn by position."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.plan import RoutingPlan
from moesaic.routing import TokenContext, build_router
from tests.routing.cases import Input, decision, some_input


def route(name: str, experts: int, k: int, ctx: TokenContext, T: int, training: bool = True) -> RoutingPlan:
    plan = build_router(name, 4, experts, k).train(training)(torch.zeros(T, 4), ctx)
    assert isinstance(plan, RoutingPlan)
    return plan


def test_round_robin_by_hand() -> None:
    # E = 3, k = 2: position 0 takes seats 0 1, position 1 takes 2 3, position 2 takes 4 5; modulo 3.
    plan = route("round_robin", 3, 2, TokenContext(), 4)
    assert plan.expert_TK.tolist() == [[0, 1], [2, 0], [1, 2], [0, 1]]
    assert plan.weight_N.tolist() == [0.5] * 8
    # Two sequences of two tokens; and a document that begins in the middle.
    assert route("round_robin", 3, 2, TokenContext(num_sequences=2), 4).expert_TK.tolist() == [[0, 1], [2, 0]] * 2
    packed = TokenContext(position_T=torch.tensor([0, 1, 0, 1]))
    assert route("round_robin", 3, 2, packed, 4).expert_TK.tolist() == [[0, 1], [2, 0]] * 2


@pytest.mark.parametrize(("experts", "k", "length"), [(8, 1, 37), (5, 2, 23), (7, 7, 6), (1, 1, 4), (6, 4, 100)])
def test_round_robin_loads_differ_by_at_most_one(experts: int, k: int, length: int) -> None:
    plan = route("round_robin", experts, k, TokenContext(), length)
    assert int(plan.counts_E.max() - plan.counts_E.min()) <= 1
    assert all(len(set(row)) == k for row in plan.expert_TK.tolist())


def test_random_draws_every_set_of_k_equally_often() -> None:
    T = 30_000
    ctx = TokenContext(generator=torch.Generator().manual_seed(0))
    plan = route("random", 4, 2, ctx, T)
    assert plan.weight_N.unique().tolist() == [0.5]
    sets = [frozenset(row) for row in plan.expert_TK.tolist()]
    for pair in itertools.combinations(range(4), 2):
        # p = 1/6, standard error sqrt(p (1 - p) / T) = 0.0022; four of them.
        assert sets.count(frozenset(pair)) / T == pytest.approx(1 / 6, abs=0.0087)
    # Neighbouring tokens are independent: the chance that two share their first expert is 1/4, error 0.0025.
    first = plan.expert_TK[:, 0]
    assert float((first[1:] == first[:-1]).double().mean()) == pytest.approx(0.25, abs=0.01)


def test_training_draws_anew_and_evaluation_does_not() -> None:
    router, batch = build_router("random", 16, 8, 2), some_input(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    first, second = (batch.route(router, generator=generator) for _ in range(2))
    assert not torch.equal(first.expert_N, second.expert_N)
    router.eval()
    first, second = (batch.route(router, generator=generator) for _ in range(2))
    assert torch.equal(first.expert_N, second.expert_N)


def test_evaluation_depends_on_position_id_and_seed_alone() -> None:
    router, batch = build_router("random", 16, 8, 2).eval(), some_input(dtype=torch.float32)
    base = decision(batch.route(router))
    assert torch.equal(base, decision(replace(batch, x_BSD=-batch.x_BSD, seed=5).route(router)))
    moved: list[Input] = [
        replace(batch, ids_BS=batch.ids_BS + 1),
        replace(batch, position_BS=batch.position_BS + 1),
    ]
    # 24 tokens would all have to draw the same 2 of 8 again: (1/28)^24.
    assert all(not torch.equal(base, decision(other.route(router))) for other in moved)
    assert not torch.equal(base, decision(batch.route(build_router("random", 16, 8, 2, {"seed": 1}).eval())))
    # The same word twice in a text does not mean the same experts.
    same = replace(batch, ids_BS=torch.full_like(batch.ids_BS, 3)).route(router)
    assert isinstance(same, RoutingPlan)
    assert len({tuple(row) for row in same.expert_TK[:12].tolist()}) > 3


def test_the_evaluation_hash_is_uniform() -> None:
    T, E = 40_000, 8
    ids_T = torch.arange(T) % 500
    plan = route("random", E, 1, TokenContext(ids_T=ids_T, position_T=torch.arange(T) // 500), T, training=False)
    # Each expert's share 1/8 has standard error 0.00165; four of them. The maximum of 8 stays within.
    share_E = plan.counts_E.double() / T
    torch.testing.assert_close(share_E, torch.full((E,), 1 / E, dtype=torch.float64), atol=0.0066, rtol=0)
    # And no position or id prefers one: 500 tokens of one id, 80 of one position; 5 sigma of the largest of 8 * 580 counts.
    for group_T, size in ((ids_T, 80), (torch.arange(T) // 500, 500)):
        counts = torch.bincount(group_T * E + plan.expert_N)
        assert float((counts - size / E).abs().max()) < 5.5 * (size / E * (1 - 1 / E)) ** 0.5


def test_rules_restrict_the_draw() -> None:
    allowed_TE = torch.zeros(500, 4, dtype=torch.bool)
    allowed_TE[:, 1:3] = True
    for training in (True, False):
        ctx = TokenContext(allowed_TE=allowed_TE, generator=torch.Generator().manual_seed(0))
        plan = route("random", 4, 2, ctx, 500, training)
        assert plan.counts_E.tolist() == [0, 500, 500, 0]


def test_refusals() -> None:
    for name in ("random", "round_robin"):
        with pytest.raises(ConfigError, match="k=5 experts per token are impossible with num_experts=4"):
            build_router(name, 8, 4, 5)
