"""Copies of experts on several ranks, and twice on one: gradients are those of all their rows, training that of one process."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.layout import Layout, ParallelConfig
from moesaic.parallel import apply as apply_module
from moesaic.parallel.apply import Spread
from moesaic.parallel.comm import Group
from moesaic.parallel.gradients import first_slots, local, sum_copies
from moesaic.parallel.watch import Watch
from moesaic.parallel.world import World
from moesaic.plan.capacity import CapacityRule
from moesaic.plan.placement import Placement
from tests.distributed import run_distributed
from tests.parallel.truth import Case, compare, run_cases

EP2 = ParallelConfig(ep=2)
FSDP = ParallelConfig(ep=2, fsdp=True)
ON_BOTH = {0: ((0, 1, 2, 3), (4, 5, 6, 7, 0)), 1: ((7, 6, 5), (4, 3, 2, 1, 0, 7, 6))}
TWICE = {0: ((0, 1, 2, 0, 3), (4, 5, 6, 7, 4, 4)), 1: ((0, 1, 0, 1, 2, 3), (1, 4, 5, 6, 7))}
EVEN = {0: ((0, 1, 2, 0, 3), (4, 5, 0, 6, 7)), 1: ((5, 1, 2, 3, 4), (5, 6, 7, 0, 0))}
FOUR = {0: ((0, 1, 2), (3, 0), (4, 5, 5, 0), (6, 7)), 1: ((7,), (6, 5, 7), (7, 4, 3, 2), (1, 0))}

CASES = {
    2: [
        Case("on both ranks", EP2, placements=ON_BOTH),
        Case("twice on one rank", EP2, placements=TWICE, edit="skew"),
        Case("accumulated", EP2, placements=TWICE, accumulate=3, short=1),
        Case("recomputed", EP2, placements=ON_BOTH, accumulate=2, recompute=True),
        Case("in chunks", ParallelConfig(ep=2, chunks=3), placements=ON_BOTH, moe={"shared": 1}),
        Case(
            "padded",
            ParallelConfig(ep=2, padded=True),
            placements=ON_BOTH,
            moe={"capacity": CapacityRule(1.0, groups=2), "copy": 1},
        ),
        Case("biases, soft", EP2, placements=ON_BOTH, moe={"expert_bias": True, "losses": {}}, router_name="soft_moe"),
        Case("as configured", ParallelConfig(ep=2, replicas=4), edit="starve"),
    ],
    4: [
        Case("four ranks", ParallelConfig(ep=4), placements=FOUR, accumulate=2),
        Case("over two levels", ParallelConfig(ep=4, exchange="hierarchical"), placements=FOUR, ranks_per_node=2),
        Case("copies of copies", EP2, placements=TWICE),
        Case("sharded", FSDP, placements=EVEN, accumulate=2),
        Case("sharded, other numbers of slots", FSDP, placements=TWICE, recompute=True, moe={"expert_bias": True}),
        Case("sliced", ParallelConfig(ep=2, tp=2), placements=TWICE, recompute=True),
    ],
}
STEPS = 3


def prepared(size: int) -> list[Case]:
    return [replace(case, dtype="float64", steps=STEPS) for case in CASES[size]]


@functools.cache
def errors(size: int) -> list[dict[str, Tensor]]:
    return run_distributed(size, run_cases, prepared(size), size, timeout=110)


@pytest.mark.parametrize(("size", "name"), [(size, case.name) for size, cases in CASES.items() for case in cases])
def test_training_with_copies_is_that_of_one_process(size: int, name: str) -> None:
    for answer in errors(size):
        found = {what: float(wrong) for what, wrong in answer.items() if what.startswith(f"{name}: ")}
        assert len(found) == 6
        assert all(wrong <= 1e-12 for wrong in found.values()), found


def copies(rank: int) -> dict[str, Tensor]:
    """After three steps, every slot of an expert holds the same bits; and what happens where copies are not summed."""
    found: dict[str, Tensor] = {}

    def gather(spread: Spread, optimizer: Any, step: int) -> None:
        for name, p in spread.parameters().items():
            if ".experts." in name:
                found[name] = local(p).detach().clone()

    case = next(case for case in prepared(4) if case.name == "sharded")
    compare(case, World(Layout.of(case.parallel, 4), rank), gather)

    def forgotten(parameters: Any, held: Any, world: World, placements: Any) -> None:
        whole(parameters, held, world, {})

    whole = apply_module.sum_gradients
    apply_module.sum_gradients = forgotten
    wrong = compare(replace(case, name="wrong"), World(Layout.of(case.parallel, 4), rank))
    return {**found, "wrong": wrong["wrong: gradient"]}


def test_copies_stay_equal_and_unsummed_ones_show() -> None:
    ranks = run_distributed(4, copies)
    assert all(float(answer["wrong"]) > 1e-3 for answer in ranks)
    for layer, slots in EVEN.items():
        for part in ("w_in", "w_out"):
            for edp in (0, 1):
                held = [ranks[2 * edp + ep][f"blocks.{layer}.ffn.experts.{part}"] for ep in (0, 1)]
                seen: dict[int, Tensor] = {}
                for ep, experts in enumerate(slots):
                    for place, expert in enumerate(experts):
                        assert torch.equal(held[ep][place], seen.setdefault(expert, held[ep][place]))
                assert len(seen) == 8


def test_sums_by_hand_on_one_rank() -> None:
    placement = Placement(((0, 1, 0, 2, 0),), 3)
    grad = torch.tensor([[1.0], [10.0], [2.0], [20.0], [4.0]])
    sum_copies(grad, placement, Group("ep", (0,), 0, None, Watch()))
    assert grad.flatten().tolist() == [7.0, 10.0, 7.0, 20.0, 7.0]
    assert first_slots(placement, 0, grad.device).tolist() == [True, True, False, True, False]
    two = Placement(((1, 1), (0, 1, 0)), 2)
    assert [first_slots(two, rank, grad.device).tolist() for rank in (0, 1)] == [[True, False], [True, False, False]]
