"""Expert masking and gating dropout: how many experts stay, who may go where, obedience of routers, draws that repeat."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.experts import MoE
from moesaic.plan import RoutingPlan
from moesaic.routing import TokenContext
from moesaic.routing.dropout import falls_on, keep_local, mask_whole_experts, narrowed
from tests.models.tiny import lively, some_ids, sparse

CPU = torch.device("cpu")


def _seeded(seed: int, **fields: Any) -> TokenContext:
    return TokenContext(generator=torch.Generator().manual_seed(seed), **fields)


def _mask(seed: int, p: float, E: int = 8, k: int = 2, **fields: Any) -> Tensor:
    allowed_TE = mask_whole_experts(_seeded(seed, **fields), 5, E, k, p, CPU).allowed_TE
    assert allowed_TE is not None
    return allowed_TE


def test_all_tokens_lose_the_same_experts_and_k_stay() -> None:
    seen = set()
    for seed in range(60):
        allowed_TE = _mask(seed, 0.8)
        assert (allowed_TE == allowed_TE[0]).all()
        assert int(allowed_TE[0].sum()) >= 2
        seen.add(tuple(allowed_TE[0].tolist()))
    assert len(seen) > 20
    assert _mask(0, 0.9, E=3, k=3).all()


def test_the_share_of_masked_experts_is_p() -> None:
    kept = torch.stack([_mask(seed, 0.3, E=10, k=1)[0] for seed in range(1000)]).double().mean(0)
    # 1000 draws: standard error sqrt(.21 / 1000) = .0145; all ten experts masked has probability 6e-6.
    assert float((kept - 0.7).abs().max()) < 4 * 0.0145


def test_draws_repeat_with_the_generator() -> None:
    assert torch.equal(_mask(5, 0.5), _mask(5, 0.5))
    torch.manual_seed(3)
    one = mask_whole_experts(TokenContext(), 5, 8, 2, 0.5, CPU).allowed_TE
    torch.manual_seed(3)
    again = mask_whole_experts(TokenContext(), 5, 8, 2, 0.5, CPU).allowed_TE
    assert one is not None
    assert again is not None
    assert torch.equal(one, again)


def test_rules_stay_where_narrowing_leaves_too_little() -> None:
    rules_TE = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    permitted_TE = torch.tensor([1, 0, 1, 0], dtype=torch.bool).expand(4, 4)
    ctx = narrowed(TokenContext(allowed_TE=rules_TE), permitted_TE, 2)
    assert ctx.allowed_TE is not None
    # Token 1 would keep one of its two experts, token 2 none of its one: both keep what rules permit. Token 3 has none.
    assert ctx.allowed_TE.int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    alone = narrowed(TokenContext(), permitted_TE, 2)
    assert alone.allowed_TE is permitted_TE


def test_sequences_keep_to_the_experts_of_one_group() -> None:
    seen: dict[int, set[int]] = {b: set() for b in range(4)}
    for seed in range(30):
        ctx = keep_local(_seeded(seed, num_sequences=4), 12, 6, 2, 2, CPU)
        assert ctx.allowed_TE is not None
        rows = ctx.allowed_TE.view(4, 3, 6)
        assert (rows == rows[:, :1]).all()  # tokens of one sequence alike
        groups = [0 if rows[b, 0, 0] else 1 for b in range(4)]
        for b, group in enumerate(groups):
            assert rows[b, 0].tolist() == ([True] * 3 + [False] * 3 if group == 0 else [False] * 3 + [True] * 3)
            seen[b].add(group)
        assert groups[0] == groups[1] != groups[2] == groups[3]  # equal runs of sequences
    assert all(groups == {0, 1} for groups in seen.values())


def test_one_sequence_meets_every_group_in_time_and_uneven_groups_work() -> None:
    sizes = set()
    for seed in range(40):
        ctx = keep_local(_seeded(seed), 4, 7, 2, 3, CPU)
        assert ctx.allowed_TE is not None
        sizes.add(tuple(ctx.allowed_TE[0].int().tolist()))
    assert sizes == {(1, 1, 1, 0, 0, 0, 0), (0, 0, 0, 1, 1, 0, 0), (0, 0, 0, 0, 0, 1, 1)}


def test_batches_fall_with_their_probability() -> None:
    generator = torch.Generator().manual_seed(0)
    share = sum(falls_on(0.2, generator) for _ in range(2000)) / 2000
    assert abs(share - 0.2) < 4 * (0.16 / 2000) ** 0.5
    assert not any(falls_on(0.0, generator) for _ in range(50))


# ---- in the layer --------------------------------------------------------------------------------------------------


def _experts(plan: Any) -> set[int]:
    assert isinstance(plan, RoutingPlan)
    return set(plan.expert_N[plan.kept_N].tolist())


@pytest.mark.parametrize("router", ["topk", "noisy_topk", "gshard"])
def test_routers_obey_in_training_only(router: str) -> None:
    torch.manual_seed(0)
    layer = MoE(8, 4, 8, 2, router, expert_masking=0.6).train()
    x = torch.randn(64, 8)
    with torch.no_grad():
        layer.router.get_parameter("gate.weight").normal_()
    used = []
    for _ in range(20):
        _, plan = layer(x)
        assert plan.allowed_TE is not None
        out = set((~plan.allowed_TE[0]).nonzero()[:, 0].tolist())
        assert not out & _experts(plan)
        if router != "gshard":
            assert int(plan.dropped) == 0
            assert (plan.kept_N.view(64, 2)).all()  # k experts are always found
        used.append(len(_experts(plan)))
    assert min(used) < 8
    _, quiet = layer.eval()(x)
    assert quiet.allowed_TE is None
    assert _experts(quiet) == set(range(8))


def test_gating_dropout_keeps_tokens_local_or_does_nothing() -> None:
    torch.manual_seed(0)
    layer = MoE(8, 4, 8, 2, gating_dropout=0.5, gating_groups=2).train()
    x = torch.randn(2, 32, 8)
    local = 0
    for _ in range(60):
        _, plan = layer(x)
        if plan.allowed_TE is None:
            continue
        local += 1
        sides = [{e // 4 for e in plan.expert_TK.view(2, -1)[b].tolist()} for b in range(2)]
        assert sorted(map(sorted, sides)) == [[0], [1]]
    assert 15 < local < 45  # 30 of 60, standard deviation 3.9
    assert layer.eval()(x)[1].allowed_TE is None


def test_a_model_draws_once_for_all_its_layers() -> None:
    model = lively(sparse(gating_dropout=0.5, gating_groups=2)).train()
    ids = some_ids(2, 6)
    seen = set()
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        kept = [plan.allowed_TE is not None for plan in model(ids, generator=generator).plans.values()]
        assert len(set(kept)) == 1
        seen.add(kept[0])
    assert seen == {False, True}
    assert all(plan.allowed_TE is None for plan in model.eval()(ids).plans.values())


def test_masked_experts_have_a_zero_gradient_and_come_back() -> None:
    torch.manual_seed(1)
    layer = MoE(8, 4, 4, 1, router_options={"normalize": "none"}, expert_masking=0.7).train()
    y, plan = layer(torch.randn(40, 8))
    y.square().sum().backward()
    grad = layer.experts.w_in.grad
    assert grad is not None
    for expert in range(4):
        assert bool(grad[expert].any()) == (expert in _experts(plan))
    assert layer.router.get_parameter("gate.weight").grad.isfinite().all()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"expert_masking": 1.0}, "expert_masking is a probability below 1, not 1.0"),
        ({"gating_dropout": -0.1}, "gating_dropout is a probability below 1, not -0.1"),
        ({"gating_dropout": 0.2}, "needs gating_groups of at least 2"),
        ({"gating_dropout": 0.2, "gating_groups": 3}, "hold 1 each, fewer than k=2"),
        ({"expert_dropout": 1.0}, "Dropout inside experts must be at least 0 and below 1, not 1.0"),
        ({"expert_dropout": 0.1, "expert_kind": "neuron", "hidden": 1}, "neurons have one; use expert_masking"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MoE(**({"dim": 8, "hidden": 4, "experts": 4, "k": 2} | settings))
