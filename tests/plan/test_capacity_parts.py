"""Capacity of a batch in parts: the rows that find a place are those that would in one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan import CapacityRule, Gate, RoutingPlan, from_rows, from_topk
from moesaic.plan.peers import Peers
from tests.peers import cut, with_peers

T, E, K = 24, 5, 2
EVEN = [(12, 12), (8, 8, 8)]
UNEVEN = [(10, 14), (0, 24), (5, 9, 10), (24, 0, 0)]

RULES: list[dict[str, Any]] = [
    {},
    {"priority": "probability"},
    {"priority": "batch"},
    {"priority": "batch", "batch_score": "sum", "renormalize": True},
    {"overflow": "fallback_expert", "fallback_expert": 2},
    {"overflow": "fallback_expert", "fallback_expert": 2, "renormalize": True, "priority": "probability"},
    {"overflow": "next_best", "priority": "batch"},
    {"overflow": "reroute_to_free"},
    {"tau": 0.5},
    {"tau": 0.5, "renormalize": True, "priority": "batch"},
    {"factor": "exact", "max_factor": 1.5},
    {"factor": "exact", "max_factor": 9.0},
    {"rounding": "floor", "minimum": 1, "multiple_of": 2},
]
every_rule = pytest.mark.parametrize("fields", RULES, ids=lambda fields: str(fields) or "plain")


def _rule(fields: dict[str, Any], groups: int = 6) -> CapacityRule:
    return CapacityRule(**({"factor": 0.8, "minimum": 0, "groups": groups} | fields))


def _plan(seed: int, *, loose: bool, padded: bool, ruled: bool) -> RoutingPlan:
    """Skewed rows, two per token on average; rules, where there are some, are about the last ten tokens only."""
    rng = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(T, E, generator=rng, dtype=torch.float64)
    logits_TE[:, 1] += 1.5
    probs_TE = logits_TE.softmax(dim=1)
    valid_T = torch.ones(T, dtype=torch.bool)
    if padded:
        valid_T[20:] = valid_T[7] = False
    allowed_TE = torch.ones(T, E, dtype=torch.bool)
    if ruled:
        allowed_TE[14:] = torch.rand(10, E, generator=rng) < 0.6
    gate = Gate(logits_TE, probs_TE)
    options: dict[str, Any] = {"gate": gate, "valid_T": valid_T if padded else None}
    options["allowed_TE"] = allowed_TE if ruled else None
    if not loose:
        expert_TK = probs_TE.topk(K, dim=1).indices
        return from_topk(expert_TK, probs_TE.gather(1, expert_TK), E, **options)
    token_N, expert_N = (torch.rand(T, E, generator=rng) < K / E).nonzero().unbind(1)
    order_N = torch.randperm(len(token_N), generator=rng)
    token_N, expert_N = token_N[order_N], expert_N[order_N]
    return from_rows(token_N, expert_N, probs_TE[token_N, expert_N], T, E, **options)


def _parts(plan: RoutingPlan, sizes: tuple[int, ...]) -> list[RoutingPlan]:
    """As processes make them: without masks and rules that would say nothing."""
    parts = []
    for part in cut(plan, sizes):
        valid_T, allowed_TE = part.valid_T, part.allowed_TE
        valid_T = None if valid_T is None or bool(valid_T.all()) else valid_T
        allowed_TE = None if allowed_TE is None or bool(allowed_TE.all()) else allowed_TE
        parts.append(replace(part, valid_T=valid_T, allowed_TE=allowed_TE))
    return parts


@pytest.mark.parametrize("loose", [False, True], ids=["k rows", "loose rows"])
@every_rule
def test_parts_keep_the_rows_that_the_whole_keeps(fields: dict[str, Any], loose: bool) -> None:
    rule, dropped = _rule(fields), 0
    special = 2 if "tau" in fields else 0
    for seed, (padded, ruled) in enumerate([(False, False), (True, False), (False, True), (True, True)]):
        plan = _plan(seed, loose=loose, padded=padded, ruled=ruled)
        whole = rule.apply(plan, training=True, num_special=special)
        dropped += int(whole.dropped) + int((whole.expert_N != plan.expert_N).sum())
        for sizes in EVEN + UNEVEN:
            parts = _parts(plan, sizes)
            kept = with_peers(
                len(sizes),
                lambda peers: rule.apply(parts[peers.index], True, num_special=special, peers=peers),  # noqa: B023
            )
            for mine, want in zip(kept, cut(whole, sizes), strict=True):
                assert torch.equal(mine.expert_N, want.expert_N)
                torch.testing.assert_close(mine.weight_N, want.weight_N, rtol=1e-12, atol=1e-14)
                assert torch.equal(mine.choice_N, want.choice_N)
    assert (dropped > 0) == (fields.get("max_factor") != 9.0)


def test_an_even_part_decides_alone_but_by_the_slots_of_the_whole() -> None:
    """8 tokens in 2 groups, factor 1, 2 experts: 2 slots each. Each part holds one group and asks for numbers only."""
    plan = from_topk(torch.tensor([0, 0, 0, 1, 0, 0, 0, 0])[:, None], torch.ones(8, 1), 2)
    rule, asked = CapacityRule(factor=1.0, minimum=0, groups=2), []

    def work(peers: Peers) -> list[int]:
        def total(x: Tensor) -> Tensor:
            asked.append(tuple(x.shape))
            return peers.total(x)

        part = cut(plan, [4, 4])[peers.index]
        return rule.apply(part, True, peers=replace(peers, total=total)).expert_N.tolist()  # type: ignore[no-any-return]

    assert with_peers(2, work) == [[0, 0, 2, 1], [0, 0, 2, 2]]
    assert asked == [(2, 4)] * 2


def test_evaluation_drops_by_its_own_factor_and_dropless_asks_nobody() -> None:
    plan = _plan(0, loose=False, padded=False, ruled=False)
    rule = replace(_rule({}), eval_factor=0.5)
    whole, parts = rule.apply(plan, training=False), cut(plan, [12, 12])
    kept = with_peers(2, lambda peers: rule.apply(parts[peers.index], False, peers=peers))
    assert torch.equal(torch.cat([mine.expert_N for mine in kept]), whole.expert_N)
    dropless = _rule({})
    assert with_peers(2, lambda peers: peers.index or dropless.apply(plan, False, peers=peers)) == [plan, 1]


@pytest.mark.parametrize("sizes", EVEN + UNEVEN, ids=str)
def test_random_priority_fills_the_slots_and_no_more(sizes: tuple[int, ...]) -> None:
    plan, rule = _plan(0, loose=False, padded=False, ruled=False), _rule({"priority": "random"})
    slots = rule.slots(T // 6, K, E)
    assert slots is not None

    def work(peers: Peers) -> RoutingPlan:
        generator = torch.Generator().manual_seed(peers.index)
        return rule.apply(cut(plan, sizes)[peers.index], True, generator=generator, peers=peers)

    expert_N = torch.cat([part.expert_N for part in with_peers(len(sizes), work)])
    for group in range(6):
        rows = slice(group * T // 6 * K, (group + 1) * T // 6 * K)
        for e in range(E):
            wanted = int((plan.expert_N[rows] == e).sum())
            assert int((expert_N[rows] == e).sum()) == min(wanted, slots)


@pytest.mark.parametrize("sizes", [(12, 12), (10, 14)], ids=str)
def test_weights_keep_their_gradient(sizes: tuple[int, ...]) -> None:
    plan = _plan(0, loose=False, padded=False, ruled=False)
    leaf_N = plan.weight_N.detach().clone().requires_grad_()
    plan, rule = replace(plan, weight_N=leaf_N), _rule({"renormalize": True})
    upstream_N = torch.arange(T * K, dtype=torch.float64)
    (wanted_N,) = torch.autograd.grad((rule.apply(plan, True).weight_N * upstream_N).sum(), leaf_N)
    parts, ups = cut(plan, sizes), upstream_N.split([n * K for n in sizes])
    kept = with_peers(2, lambda peers: rule.apply(parts[peers.index], True, peers=peers))
    total = sum((part.weight_N * up).sum() for part, up in zip(kept, ups, strict=True))
    torch.testing.assert_close(torch.autograd.grad(total, leaf_N)[0], wanted_N, rtol=1e-12, atol=1e-14)
    assert wanted_N.abs().sum() > 0


def test_groups_that_parts_cannot_share_are_refused() -> None:
    plan = _plan(0, loose=False, padded=False, ruled=False)
    words = (
        r"capacity.groups=1 cannot be shared equally by 2 data-parallel ranks.*set capacity.groups to a multiple of 2\."
    )
    with pytest.raises(ConfigError, match=words):
        CapacityRule().apply(plan, True, peers=Peers(2))
    assert CapacityRule().apply(plan, False, peers=Peers(2)) is plan  # dropless
