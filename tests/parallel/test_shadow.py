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
from moesaic.plan.predict import shadows
from moesaic.train.optim import OptimConfig, make_optimizer
from moesaic.train.step import train_step
from tests.distributed import run_distributed
from tests.parallel.truth import EPS, LR, Case, batches_of, build, compare, share, train

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
        Case("stages", ParallelConfig(pp=2, ep=2, shadow=True), shadows=FIRST, accumulate=3),
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
    for layer in spread.placements:
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
        assert there == back >= 2


# ---- by rule ---------------------------------------------------------------------------------------------------------

ZIPF = Case("zipf", EP4, router={"gate_bias": True}, edit="zipf", batch=16, accumulate=2, dtype="float64")
E, R, D, NUMBER = 8, 4, 16, 8
STEPS = 3


def by_rule(rank: int, case: Case) -> dict[str, Tensor]:
    """Per step: rows of this rank by expert, rows it computed, bytes it sent, what was chosen for the next step."""
    model, found = build(case), dict[str, Tensor]()
    world = World(Layout.of(case.parallel, R), rank)
    spread = apply(model, world, case.parallel)
    assert spread.shadows is not None
    optimizer = make_optimizer(model, OptimConfig(lr=LR, eps=EPS))
    for layer, moe in model.moe_layers().items():

        def note(_moe: Any, _args: Any, output: Any, layer: int = layer) -> None:
            rows_E = torch.bincount(output[1].expert_N, minlength=E)
            at = f"rows {step} {layer}"
            found[at] = found[at] + rows_E if at in found else rows_E

        moe.register_forward_hook(note)
    for step in range(STEPS):
        rows = share(batches_of(case, step), world["dp"].index, world["dp"].size)
        world.watch.take()
        reading, _ = train_step(model, optimizer, rows, lr=LR, clip=1.0, step=step + 1, spread=spread)
        spent = world.watch.take()
        found[f"loss {step}"] = torch.tensor(reading.loss, dtype=torch.float64)
        travel = ("dispatch", "combine", "combine backward", "dispatch backward")
        found[f"bytes {step}"] = torch.tensor([spent[what].sent_bytes for what in travel])
        there_and_back = [spent.get(f"shadow {what}") for what in ("weights", "gradients")]
        found[f"shadow bytes {step}"] = torch.tensor([0 if s is None else s.sent_bytes for s in there_and_back])
        computed = spread.take_rows()
        chosen = spread.shadows.decide()
        for layer, moe in model.moe_layers().items():
            found[f"computed {step} {layer}"] = torch.tensor(computed[str(layer)])
            found[f"chosen {step} {layer}"] = torch.tensor(chosen.get(layer, ()), dtype=torch.int64)
            assert expert_bytes(stack_of(moe)) == 3 * D * 16 * NUMBER
    return found


@functools.cache
def ruled() -> list[dict[str, Tensor]]:
    return run_distributed(R, by_rule, ZIPF)


def test_the_rule_chooses_and_bytes_and_rows_follow() -> None:
    ranks, placement, one = ruled(), Placement.even(E, R), 3 * D * 16 * NUMBER
    alone = train(replace(ZIPF, steps=STEPS), None)
    fell = 0
    for step in range(STEPS):
        assert all(float(a[f"loss {step}"]) == pytest.approx(alone.readings[step].loss, rel=1e-12) for a in ranks)
        bytes_P4, shadow_bytes = torch.stack([a[f"bytes {step}"] for a in ranks]), 0
        sent, back = torch.stack([a[f"shadow bytes {step}"] for a in ranks]).sum(dim=0).tolist()
        rows_away = 0
        for layer in (0, 1):
            rows_RE = torch.stack([a[f"rows {step} {layer}"] for a in ranks])
            home_E = torch.tensor([placement.home(e) for e in range(E)])
            local_E = rows_RE[home_E, torch.arange(E)]
            before = ranks[0][f"chosen {step - 1} {layer}"].tolist() if step else []
            # Sent without shadows, and what they spare: rows to other ranks of the chosen.
            away_E = rows_RE.sum(dim=0) - local_E
            rows_away += int(away_E.sum() - away_E[before].sum())
            shadow_bytes += len(before) * one * (R - 1)
            computed = [int(a[f"computed {step} {layer}"]) for a in ranks]
            shadowed_E = torch.zeros(E, dtype=torch.bool)
            shadowed_E[before] = True
            at_home = [int(rows_RE[:, home_E == r][:, ~shadowed_E[home_E == r]].sum()) for r in range(R)]
            assert computed == [at_home[r] + int(rows_RE[r, shadowed_E].sum()) for r in range(R)]
            unshadowed = max(int(rows_RE[:, home_E == r].sum()) for r in range(R))
            assert sum(computed) == int(rows_RE.sum())
            if before:
                assert max(computed) < unshadowed
                fell += 1
            # What the step's rows decide for the next one.
            chosen = shadows(rows_RE, placement, dim=D, element_bytes=NUMBER, expert_bytes=one)
            assert all(tuple(a[f"chosen {step} {layer}"].tolist()) == chosen for a in ranks)
            for e in range(E):
                assert (e in chosen) == (4 * int(away_E[e]) * D * NUMBER > 2 * one)
        assert bytes_P4.sum(dim=0).tolist() == [rows_away * D * NUMBER] * 4
        assert [sent, back] == [shadow_bytes] * 2  # 2 * one for each that receives: weights there, gradients back
    assert fell >= 3


# ---- pieces ----------------------------------------------------------------------------------------------------------


def reduced(rank: int) -> dict[str, Tensor]:
    group = World(Layout.of(ParallelConfig(ep=3), 3), rank)["ep"]
    x = group.reduce(torch.tensor([1.0, 10.0]) * (rank + 1), 1, what="sum")
    return {"x": x, "sent": torch.tensor(group.watch.take()["sum"].sent_bytes)}


def test_reduce_by_hand() -> None:
    ranks = run_distributed(3, reduced)
    assert ranks[1]["x"].tolist() == [6.0, 60.0]
    assert [int(a["sent"]) for a in ranks] == [8, 0, 8]
    alone = Group("ep", (0,), 0, None, Watch())
    assert alone.reduce(torch.tensor([3.0]), what="sum").tolist() == [3.0]


def test_experts_there_are_not_and_other_states_are_refused() -> None:
    shadowing = Shadows({}, {0: Placement.even(8, 2)}, World(Layout.of(ParallelConfig(), 1)))
    for expert in (8, -1):
        with pytest.raises(ConfigError, match=f"experts 0 to 7, so expert {expert} can have no shadow"):
            shadowing.choose(0, (1, expert))
    assert shadowing.chosen == {}
    shadowing.choose(0, (1, 2, 1))
    assert shadowing.chosen == {0: (1, 2)}
    shadowing.load({"3": [1]})  # of a layer of another stage
    for state in ({"0": 1}, {"0": [True]}, {"a": [1]}):
        with pytest.raises(CheckpointError, match="lists of experts by layer"):
            shadowing.load(state)
    assert shadowing.decide() == {}  # nothing was counted, so nothing is chosen


def forgotten(rank: int) -> dict[str, Tensor]:
    """Gradients of shadows that stay where they are."""
    Shadows.give_back = lambda self: None  # type: ignore[method-assign]
    case = replace(CASES[2][0], dtype="float64")
    return compare(case, World(Layout.of(case.parallel, 2), rank))


def test_the_comparison_notices_gradients_that_do_not_come_home() -> None:
    assert all(float(answer["plain: gradient"]) > 1e-3 for answer in run_distributed(2, forgotten))
