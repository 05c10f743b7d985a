"""The all-to-all dispatcher against the local one, and its ways against the flat one: bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.experts import StackedExperts
from moesaic.experts.dispatch import dispatch_local
from moesaic.layout import Layout, ParallelConfig
from moesaic.parallel.dispatch import ExchangeDispatch
from moesaic.parallel.exchange import FlatPath, TwoLevelPath, exchange_counts
from moesaic.parallel.orders import by_slot, reorder
from moesaic.parallel.watch import CollectiveError
from moesaic.parallel.world import World
from moesaic.plan.placement import Placement
from moesaic.plan.plan import RoutingPlan, from_rows, from_topk
from tests.distributed import run_distributed

D, H, E = 8, 6, 7


def _world(rank: int, size: int, ranks_per_node: int | None = None) -> World:
    return World(Layout.of(ParallelConfig(ep=size), size), rank, ranks_per_node=ranks_per_node)


def _whole(dtype: torch.dtype = torch.float32) -> StackedExperts:
    torch.manual_seed(3)
    return StackedExperts(E, D, H).to(dtype)


def _held(whole: StackedExperts, placement: Placement, rank: int) -> StackedExperts:
    mine = StackedExperts(1, D, H)
    slots = list(placement.slots[rank])
    mine.w_in, mine.w_out = nn.Parameter(whole.w_in.detach()[slots]), nn.Parameter(whole.w_out.detach()[slots])
    mine.num_experts = len(slots)
    return mine


def _plan(kind: str, rank: int) -> tuple[Tensor, RoutingPlan]:
    """Tokens of a rank and what becomes of them; rank 1 has none, nobody chooses expert 5."""
    generator = torch.Generator().manual_seed(10 + rank)
    T = 0 if rank == 1 else 5 + 3 * rank
    x_TD = torch.randn(T, D, generator=generator)
    skew_E = torch.tensor([6.0, 1, 1, 1, 2, 0, 1])
    expert_TK = torch.multinomial(skew_E.expand(T, E), 3, generator=generator) if T else torch.zeros(0, 3).long()
    weight_TK = torch.rand(T, 3, generator=generator)
    if kind == "dropped":
        expert_TK = torch.where(torch.rand(T, 3, generator=generator) < 0.3, E, expert_TK)
    if kind == "loose":
        token_N = torch.arange(T).repeat_interleave(3)
        return x_TD, from_rows(token_N, expert_TK.flatten(), weight_TK.flatten(), T, E)
    return x_TD, from_topk(expert_TK, weight_TK, E)


def _run(dispatcher: Any, experts: nn.Module, x_TD: Tensor, plan: RoutingPlan, **named: Any) -> dict[str, Tensor]:
    leaf_TD = x_TD.clone().requires_grad_()
    y_TD = dispatcher(leaf_TD, plan, experts, **named)
    (y_TD * torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD)).sum().backward()
    assert leaf_TD.grad is not None
    found = {"y": y_TD.detach(), "dx": leaf_TD.grad}
    for name, parameter in experts.named_parameters():
        found[f"d{name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        parameter.grad = None
    return found


PLACEMENTS = {
    "even": Placement.even(E, 4),
    "strewn": Placement(((6, 2), (0,), (5, 1, 3), (4,)), E),
    "copies": Placement(((0, 1), (0, 2, 3), (4, 5), (6, 0)), E),
}


def _ways(rank: int) -> dict[str, Tensor]:
    """1 where a way gave the flat one's bits; "local": the largest difference from all experts here."""
    worlds = {nodes: _world(rank, 4, nodes) for nodes in (1, 2, 4)}
    flat_world = worlds[1]
    out: dict[str, Tensor] = {}
    for name, placement in PLACEMENTS.items():
        whole = _whole()
        experts = _held(whole, placement, rank)
        slots = placement.slots_per_rank
        for kind in ("plain", "dropped", "loose"):
            x_TD, plan = _plan(kind, rank)
            flat = _run(ExchangeDispatch(FlatPath(flat_world["ep"], slots), placement, rank), experts, x_TD, plan)
            local = _run(dispatch_local, _whole(), x_TD, plan)
            for what in ("y", "dx"):
                wrong = float((flat[what] - local[what]).abs().max()) if len(x_TD) else 0.0
                out[f"{name} {kind} {what}: local"] = torch.tensor(wrong)
            ways: dict[str, Any] = {}
            for nodes, world in worlds.items():
                assert world.two_levels is not None
                path = TwoLevelPath(*world.two_levels, slots)
                ways[f"{nodes} per node"] = ExchangeDispatch(path, placement, rank)
            for chunks in (2, 3):
                path = FlatPath(flat_world["ep"], slots)
                ways[f"{chunks} chunks"] = ExchangeDispatch(path, placement, rank, chunks=chunks)
            for way, dispatcher in ways.items():
                other = _run(dispatcher, experts, x_TD, plan)
                same = all(torch.equal(other[what], flat[what]) for what in flat)
                out[f"{name} {kind}: {way}"] = torch.tensor(same)
            padded = ExchangeDispatch(FlatPath(flat_world["ep"], slots), placement, rank, padded=flat_world["ep"])
            other = _run(padded, experts, x_TD, plan)
            wrong = max(float((other[w] - flat[w]).abs().max()) if flat[w].numel() else 0.0 for w in flat)
            out[f"{name} {kind} padded: local"] = torch.tensor(wrong)
    return out


def test_every_way_gives_the_bits_of_the_flat_one() -> None:
    for answer in run_distributed(4, _ways):
        assert len(answer) == 3 * 3 * 8
        different = [what for what, value in answer.items() if not what.endswith("local") and not bool(value)]
        assert not different
        assert not [what for what, value in answer.items() if what.endswith("local") and not float(value) <= 2e-6]


def _beside(rank: int) -> dict[str, Tensor]:
    """What is computed while rows travel adds the same bits."""
    world, placement = _world(rank, 2), Placement.even(E, 2)
    experts, shared = _held(_whole(), placement, rank), nn.Linear(D, D)
    x_TD, plan = _plan("plain", 2 * rank)
    plain = ExchangeDispatch(FlatPath(world["ep"], placement.slots_per_rank), placement, rank)

    def apart(x_TD: Tensor, plan: RoutingPlan, experts: Any) -> Tensor:
        added: Tensor = plain(x_TD, plan, experts) + shared(x_TD)
        return added

    want, want_grad = _run(apart, experts, x_TD, plan), [p.grad.clone() for p in shared.parameters()]  # type: ignore[union-attr]
    out = {}
    for name, chunks in (("whole", 1), ("chunks", 2)):
        shared.zero_grad()
        way = ExchangeDispatch(FlatPath(world["ep"], placement.slots_per_rank), placement, rank, chunks=chunks)
        found = _run(way, experts, x_TD, plan, beside=shared)
        same = all(torch.equal(found[what], want[what]) for what in ("y", "dw_in", "dw_out"))
        out[name] = torch.tensor(same and bool(torch.allclose(found["dx"], want["dx"], rtol=1e-6)))
        grads = [p.grad for p in shared.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(grads, want_grad, strict=True))  # type: ignore[arg-type]
    return out


def test_shared_experts_while_rows_travel() -> None:
    for answer in run_distributed(2, _beside):
        assert all(bool(same) for same in answer.values())


def _out_of_step(rank: int) -> dict[str, Tensor]:
    group = _world(rank, 2)["ep"]
    with pytest.raises(
        CollectiveError, match=r"is at exchange (4|5) of a layer with 2 slots, 1 of them here, while this rank"
    ):
        exchange_counts(group, torch.tensor([1, 2]), [1, 1], serial=4 + rank)
    with pytest.raises(ValueError, match=r"dispatch: \[1, 1\] rows to send for 3 rows"):
        group.all_to_all(torch.zeros(3, 2), [1, 1], [1, 1], what="dispatch")
    return {"alive": torch.ones(())}


def test_ranks_out_of_step_end_in_words_and_not_in_an_abort() -> None:
    run_distributed(2, _out_of_step)


def test_orders_by_hand() -> None:
    # Two sources, two slots: source 0 sent 1 and 2 rows, source 1 sent 2 and 0.
    order = by_slot([[1, 2], [2, 0]])
    rows = torch.arange(5.0)[:, None]
    assert order.apply(rows).flatten().tolist() == [0, 3, 4, 1, 2]
    assert order.undo(order.apply(rows)).flatten().tolist() == [0, 1, 2, 3, 4]
    assert reorder([2, 0, 1], [2, 0, 1]).index.tolist() == [2, 0, 1]
    assert reorder([3, 1], [0, 1]).identity
    assert reorder([0, 0], [1, 0]).apply(torch.zeros(0, 3)).shape == (0, 3)
