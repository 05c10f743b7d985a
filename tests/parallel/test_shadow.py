"""Shadow experts: training is that of one process; bytes and rows change by what the rule says."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import CheckpointError, ConfigError
from moesaic.layout import Layout, ParallelConfig
from moesaic.parallel.apply import Spread, apply
from moesaic.parallel.comm import Group
from moesaic.parallel.experts import stack_of
from moesaic.parallel.shadow import Shadows, expert_bytes
from moesaic.parallel.watch import Watch
from moesaic.parallel.world import World
from moesaic.plan.capacity import CapacityRule
from moesaic.plan.placement import Placement
from moesaic.plan.predict import critical_rows, rows_between, shadows
from moesaic.train.optim import OptimConfig, make_optimizer
from moesaic.train.step import train_step
from tests.distributed import run_distributed
from tests.parallel.truth import EPS, LR, Case, batches_of, build, compare, share

EP2, EP4 = ParallelConfig(ep=2, shadow=True), ParallelConfig(ep=4, shadow=True)
FIRST = {0: (0, 5), 1: (7,)}
LATER = [{}, {0: (3, 4, 1), 1: (0, 7)}, {1: (2,)}]

CASES = {
    2: [
        Case("plain", EP2, accumulate=2, shadows=FIRST),
        Case("recomputed", EP2, accumulate=2, recompute=True, shadows=FIRST, edit="skew", moe={"shared": 1}),
        Case("all of a rank, none used", EP2, shadows={0: (4, 5, 6, 7), 1: (7,)}, edit="starve", moe={"shared": 1}),
        Case("special, biases", EP2, shadows=FIRST, moe={"copy": 1, "zero": 1, "constant": 1, "expert_bias": True}),
        Case(
            "padded, drops",
            replace(EP2, padded=True),
            shadows=FIRST,
            moe={"capacity": CapacityRule(0.8, groups=2, minimum=0)},
        ),
        Case("in chunks", replace(EP2, chunks=2), shadows=FIRST, moe={"shared": 1}),
        Case("soft", EP2, shadows=FIRST, router_name="soft_moe", moe={"losses": {}}),
        Case(
            "expert choice",
            EP2,
            shadows=FIRST,
            router_name="expert_choice",
            router={"group": "sequence"},
            moe={"losses": {}},
        ),
    ],
    4: [
        Case("four ranks", EP4, shadows=FIRST, recompute=True, edit="skew"),
        Case("over two levels", replace(EP4, exchange="hierarchical"), shadows=FIRST, ranks_per_node=2),
        Case("two copies of each", EP2, shadows=FIRST, accumulate=2),
        Case("sharded", replace(EP2, fsdp=True), shadows=FIRST, accumulate=2, moe={"expert_bias": True}),
        Case("sharded, recomputed", replace(EP2, fsdp=True), shadows=FIRST, recompute=True),
        Case("sliced", replace(EP2, tp=2), shadows=FIRST, moe={"expert_bias": True, "shared": 1}),
        Case("rows shared out", ParallelConfig(ep=4, tp=2, etp=1, shadow=True), shadows=FIRST, recompute=True),
        Case(
            "beside copies",
            EP2,
            shadows=FIRST,
            placements={0: ((0, 1, 2, 3), (4, 5, 6, 7, 0)), 1: ((7, 6, 7), (5, 4, 3, 2, 1, 0, 7))},
        ),
    ],
}


def others(spread: Spread, optimizer: Any, step: int) -> None:
    """Other shadows in the next step than in this one."""
    assert spread.shadows is not None
    for layer in (0, 1):
        spread.shadows.choose(layer, LATER[step].get(layer, ()))


def run(rank: int, size: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for case in CASES[size]:
        world = World(Layout.of(case.parallel, size), rank, ranks_per_node=case.ranks_per_node)
        found |= compare(replace(case, dtype="float64", steps=3), world, others)
        spent = world.watch.take()
        found[f"{case.name}, calls"] = torch.tensor([spent[f"shadow {w}"].calls for w in ("weights", "gradients")])
    return found


@functools.cache
def errors(size: int) -> list[dict[str, Tensor]]:
    return run_distributed(size, run, size, timeout=110)


@pytest.mark.parametrize(("size", "name"), [(size, case.name) for size, cases in CASES.items() for case in cases])
def test_training_with_shadows_is_that_of_one_process(size: int, name: str) -> None:
    for answer in errors(size):
        found = {what: float(wrong) for what, wrong in answer.items() if what.startswith(f"{name}: ")}
        assert len(found) == 6
        assert all(wrong <= 1e-12 for wrong in found.values()), found
        there, back = answer[f"{name}, calls"].tolist()
        assert there == back >= 4
