"""Routers whose batch is in parts: own losses, statistics, memories and batch-wide draws are those of the whole, in fp64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.plan import RoutingPlan, SoftPlan
from moesaic.plan.peers import Peers
from moesaic.routing import Outcome, Router, TokenContext
from moesaic.routing.depth import DepthRouter
from moesaic.routing.dropout import agreed, keep_local, mask_whole_experts
from moesaic.routing.dynmoe import TopAny
from moesaic.routing.memory import MemoryRouter
from tests.peers import cut, with_peers
from tests.routing.cases import CASES, DIM, Case, Input, some_input

B, S = 6, 4
ROWS = [(3, 3), (1, 5), (0, 6), (2, 1, 3), (6, 0, 0)]
CPU = torch.device("cpu")
Plan = RoutingPlan | SoftPlan
every_router = pytest.mark.parametrize("case", [*CASES, Case("mixture_of_depths")], ids=lambda case: case.id)
HAVE_LOSSES = {
    "top_any",
    "budget",
    "null_experts",
    "moepp",
    "reinforce",
    "relu",
    "tree",
    "expert_choice",
    "mixture_of_depths",
}


def _router(case: Case) -> Router:
    if case.name == "mixture_of_depths":
        router: Router = DepthRouter(DIM, capacity=0.5).double().train()
    else:
        router = case.build()
    for name, value in (("mean_reward", -1.3), ("steps_seen", 5)):
        if name in dict(router.named_buffers()):
            router.get_buffer(name).fill_(value)
    return router


def _batches() -> list[Input]:
    valid_BS = torch.ones(B, S, dtype=torch.bool)
    valid_BS[4, 1:] = valid_BS[2, 3] = False
    first_BS = torch.ones(B, S, dtype=torch.bool)
    first_BS[:3] = False  # more than one part of some splits
    return [replace(some_input(B, S, seed=i), valid_BS=v) for i, v in enumerate((None, valid_BS, first_BS))]


def _parts(router: Router, batch: Input, plan: Plan, rows: tuple[int, ...]) -> list[Plan]:
    """Cut from the whole, so that noise is the same; routed anew where the evidence is a sum over tokens."""
    if not isinstance(router, TopAny):
        return cut(plan, [n * S for n in rows])
    starts = [sum(rows[:i]) for i in range(len(rows))]
    places = slice(None)
    return [batch.part(slice(a, a + n), places).route(router) for a, n in zip(starts, rows, strict=True)]


def _gradients(losses: dict[str, Tensor], router: Router) -> list[Tensor]:
    parameters = list(router.parameters())
    total = sum(losses.values(), start=torch.zeros((), dtype=torch.float64))
    grads = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True)]


@every_router
def test_own_losses_of_parts_are_those_of_the_whole(case: Case) -> None:
    router = _router(case)
    seen = False
    for batch in _batches():
        plan = batch.route(router)
        loss_T = torch.rand(B * S, dtype=torch.float64).masked_fill(torch.rand(B * S) < 0.3, 0.0)  # 0: no target
        whole = router.own_losses(plan, Outcome(loss_T, num_layers=2))
        seen |= bool(whole)
        if not whole:
            continue
        wanted = _gradients(whole, router)
        assert any(grad.abs().max() > 0 for grad in wanted)
        for rows in ROWS:
            parts, losses = _parts(router, batch, plan, rows), loss_T.split([n * S for n in rows])

            def work(peers: Peers) -> tuple[dict[str, Tensor], list[Tensor]]:
                outcome = Outcome(losses[peers.index], 2, peers)  # noqa: B023
                mine = router.own_losses(parts[peers.index], outcome)  # noqa: B023
                return mine, _gradients(mine, router)

            answers = with_peers(len(rows), work)
            for mine, _ in answers:
                assert list(mine) == list(whole)
                for name, value in whole.items():
                    torch.testing.assert_close(mine[name], value, rtol=1e-12, atol=1e-14)
            for grads, want in zip(zip(*(grads for _, grads in answers), strict=True), wanted, strict=True):
                torch.testing.assert_close(sum(grads), want, rtol=1e-12, atol=1e-14)
    assert seen == (
        case.name in HAVE_LOSSES and case.options.get("train") != "hard" and case.options.get("inference") != "topc"
    )


@every_router
def test_statistics_of_parts_add_up(case: Case) -> None:
    router = _router(case)
    for batch in _batches():
        plan = batch.route(router)
        whole = router.statistics(plan)
        for rows in ROWS:
            shares = [router.statistics(part) for part in _parts(router, batch, plan, rows)]
            for name, value in whole.items():
                torch.testing.assert_close(sum(share[name] for share in shares), value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("writes", [3, 100])
def test_all_parts_remember_what_one_process_would(writes: int) -> None:
    case = Case("memory", {"writes": writes, "tenants": B, "capacity": 8, "threshold": -1.0})
    for batch in _batches():
        router = case.build()
        plan = batch.route(router).detach()
        loss_T = torch.rand(B * S, dtype=torch.float64)
        whole = copy.deepcopy(router)
        whole.observe(plan, Outcome(loss_T))
        assert int(whole.get_buffer("written_N").sum() - router.get_buffer("written_N").sum()) >= min(writes, 4)
        for rows in ROWS:
            parts, losses = cut(plan, [n * S for n in rows]), loss_T.split([n * S for n in rows])

            def work(peers: Peers) -> MemoryRouter:
                mine = copy.deepcopy(router)  # noqa: B023
                mine.observe(parts[peers.index], Outcome(losses[peers.index], peers=peers))  # noqa: B023
                return mine  # type: ignore[return-value]

            for mine in with_peers(len(rows), work):
                for name, buffer in whole.named_buffers():
                    assert torch.equal(mine.get_buffer(name), buffer), name


def test_no_token_worth_remembering_in_any_part() -> None:
    router = Case("memory").build()
    plan = some_input(B, S).route(router).detach()
    parts, before = cut(plan, [8, 16]), {name: b.clone() for name, b in router.named_buffers()}
    with_peers(
        2, lambda peers: router.observe(parts[peers.index], Outcome(torch.zeros(8 + 8 * peers.index), peers=peers))
    )
    assert all(torch.equal(b, before[name]) for name, b in router.named_buffers())


# ---- draws for all tokens alike --------------------------------------------------------------------------------------


def _drawn(rows: int | None, seed: int, **fields: Any) -> TokenContext:
    return TokenContext(num_sequences=rows, generator=torch.Generator().manual_seed(seed), **fields)


def test_masked_experts_and_local_groups_are_those_of_the_whole() -> None:
    """The first part draws what one process would; the others draw something else, which nobody uses."""
    groups_seen = set()
    for seed in range(10):
        masked = mask_whole_experts(_drawn(B, seed), B * S, 8, 2, 0.5, CPU).allowed_TE
        local = keep_local(_drawn(B, seed), B * S, 8, 2, 3, CPU).allowed_TE
        assert masked is not None
        assert local is not None
        groups_seen.add(tuple(local[0].tolist()))
        for rows in ROWS:

            def work(peers: Peers) -> tuple[Tensor | None, Tensor | None]:
                n, mine = rows[peers.index], seed + 100 * peers.index  # noqa: B023
                return (
                    mask_whole_experts(_drawn(n, mine), n * S, 8, 2, 0.5, CPU, peers).allowed_TE,
                    keep_local(_drawn(n, mine), n * S, 8, 2, 3, CPU, peers).allowed_TE,
                )

            answers = with_peers(len(rows), work)
            assert torch.equal(torch.cat([m for m, _ in answers if m is not None]), masked)
            assert torch.equal(torch.cat([m for _, m in answers if m is not None]), local)
    assert len(groups_seen) > 1


def test_whether_a_batch_stays_local_is_for_the_first_part_to_say() -> None:
    assert with_peers(3, lambda peers: agreed(peers.index == 0, CPU, peers)) == [True] * 3
    assert with_peers(3, lambda peers: agreed(peers.index == 1, CPU, peers)) == [False] * 3
