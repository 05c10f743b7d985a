"""Bytes of every all-to-all, by name and rank, against the plans that were executed and their placement (fieldguide 4.2)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.cost.communication import step_bytes
from moesaic.cost.traffic import Sent, sent_bytes, two_level_rows
from moesaic.layout import Layout, ParallelConfig
from moesaic.parallel.apply import apply
from moesaic.parallel.world import World
from moesaic.plan.capacity import CapacityRule
from moesaic.plan.edit import force_balanced
from moesaic.plan.placement import Placement
from moesaic.plan.plan import count_experts
from moesaic.plan.predict import rows_between
from moesaic.train.optim import OptimConfig, make_optimizer
from moesaic.train.recompute import recompute_activations
from moesaic.train.step import train_step
from tests.distributed import run_distributed
from tests.parallel.truth import LR, Case, batches_of, build, experts_of, share

WORLD, D, NUMBER, E, K = 4, 16, 4, 8, 2
EP4 = ParallelConfig(ep=4)
LEVELS = ParallelConfig(ep=4, exchange="hierarchical")
COPIES = {0: ((0, 1, 2), (3, 0), (4, 5, 5, 0), (6, 7)), 1: ((7,), (6, 5, 7), (7, 4, 3, 2), (1, 0))}
DROPS = CapacityRule(0.7, groups=4, minimum=0)


@dataclass(frozen=True)
class Counted:
    """A case, and whether its plans are made uniform."""

    case: Case
    uniform: bool = False


CASES = [
    Counted(Case("flat", EP4, edit="skew")),
    Counted(Case("flat, uniform", EP4), uniform=True),
    Counted(Case("flat, uniform, recomputed", EP4, recompute=True), uniform=True),
    Counted(Case("10 experts", EP4, moe={"num_experts": 10}, accumulate=3, short=1)),
    Counted(Case("two levels", LEVELS, edit="skew", ranks_per_node=2)),
    Counted(Case("two levels, uniform", LEVELS, ranks_per_node=2), uniform=True),
    Counted(Case("two levels, padded, copies", replace(LEVELS, padded=True), ranks_per_node=2, placements=COPIES)),
    Counted(Case("in chunks", replace(EP4, chunks=3), moe={"shared": 1, "num_experts": 10})),
    Counted(Case("padded, drops", replace(EP4, padded=True), moe={"capacity": DROPS}, edit="skew")),
    Counted(Case("drops", EP4, moe={"capacity": DROPS}, edit="skew", short=1)),
    Counted(Case("special experts", EP4, moe={"copy": 2, "zero": 1, "constant": 1})),
    Counted(Case("copies", EP4, placements=COPIES, accumulate=2)),
    Counted(Case("recomputed", EP4, placements=COPIES, recompute=True, accumulate=2)),
    Counted(Case("two levels, recomputed", LEVELS, recompute=True, ranks_per_node=2)),
    Counted(Case("two groups of two", ParallelConfig(ep=2), edit="skew")),
    Counted(Case("slices of experts", ParallelConfig(ep=2, tp=2))),
    Counted(Case("weights learn nothing, recomputed", EP4, recompute=True, router_name="hash", moe={"losses": {}})),
]


def run(rank: int, counted: Sequence[Counted]) -> dict[str, Tensor]:
    """One step of each case: what every executed plan sends where, bytes sent by the name of the collective."""
    found: dict[str, Tensor] = {}
    for one in counted:
        case = one.case
        model = build(case)
        world = World(Layout.of(case.parallel, WORLD), rank, ranks_per_node=case.ranks_per_node)
        spread = apply(
            model,
            world,
            case.parallel,
            recompute=recompute_activations if case.recompute else None,
            placements={i: Placement(slots, experts_of(model, i)) for i, slots in case.placements.items()},
        )
        executed: list[tuple[int, Tensor, Tensor]] = []
        for layer, moe in model.moe_layers().items():
            moe.edits = (force_balanced,) if one.uniform else ()

            def note(_moe: Any, _args: Any, output: Any, layer: int = layer, to: Any = executed) -> None:
                to.append((layer, output[1].expert_N, output[1].token_N))

            moe.register_forward_hook(note)
        rows = share(batches_of(case, 0), world["dp"].index, world["dp"].size)
        world.watch.take()
        train_step(model, make_optimizer(model, OptimConfig(lr=LR)), rows, lr=LR, clip=1.0, step=1, spread=spread)
        for what, spent in world.watch.take().items():
            found[f"{case.name}: sent: {what}"] = torch.tensor(spent.sent_bytes)
        for i, (layer, expert_N, token_N) in enumerate(executed):
            found[f"{case.name}: plan {i}"] = torch.stack([expert_N, token_N])
            found[f"{case.name}: slots {i}"] = torch.tensor(spread.placements[layer].expert_of_slot)
            found[f"{case.name}: per rank {i}"] = torch.tensor(spread.placements[layer].slots_per_rank)
    return found


@functools.cache
def ran() -> list[dict[str, Tensor]]:
    return run_distributed(WORLD, run, CASES, timeout=110)


def placement_of(answer: dict[str, Tensor], case: Case, i: int) -> Placement:
    slots, ends = answer[f"{case.name}: slots {i}"].tolist(), answer[f"{case.name}: per rank {i}"].cumsum(0).tolist()
    return Placement(tuple(tuple(slots[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)), max(slots) + 1)


def rows_of(case: Case, placement: Placement, routed: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows that each rank of a group sends to each."""
    if not case.parallel.padded:
        return rows_between(placement, routed)
    counts = []
    for r, (expert_N, token_N) in enumerate(routed):
        slot_N = placement.choose(expert_N.clamp(max=placement.num_experts), token_N, r)
        counts.append(int(count_experts(slot_N, placement.num_slots).max()))
    per_rank = torch.tensor(placement.slots_per_rank)
    return (max(counts) * per_rank).expand(len(routed), -1).clone()


def predicted(case: Case, answers: list[dict[str, Tensor]], group: tuple[int, ...], rank: int) -> dict[str, list[Sent]]:
    """What ``rank`` of a group sends for every plan, by the stage of the exchange ("" where there is one)."""
    found: dict[str, list[Sent]] = {}
    plans = sum(key.startswith(f"{case.name}: plan ") for key in answers[rank])
    for i in range(plans):
        routed = [tuple(answers[r][f"{case.name}: plan {i}"]) for r in group]
        rows_RR = rows_of(case, placement_of(answers[rank], case, i), routed)  # type: ignore[arg-type]
        stages = {"": rows_RR}
        if case.ranks_per_node is not None:
            stages = dict(zip((" within nodes", " between nodes"), two_level_rows(rows_RR, 2), strict=True))
        for stage, matrix in stages.items():
            found.setdefault(stage, []).append(sent_bytes(matrix, group.index(rank), D * NUMBER))
    return found


@pytest.mark.parametrize("counted", CASES, ids=lambda counted: counted.case.name)
def test_every_all_to_all_sends_what_the_plans_say(counted: Counted) -> None:
    answers, case = ran(), counted.case
    layout = Layout.of(case.parallel, WORLD)
    for rank, answer in enumerate(answers):
        prefix = f"{case.name}: sent: "
        sent = {key.removeprefix(prefix): int(x) for key, x in answer.items() if key.startswith(prefix)}
        travel = {what: size for what, size in sent.items() if what.startswith(("dispatch", "combine"))}
        wanted: dict[str, int] = {}
        again = 1 + case.recompute  # recomputation repeats the forward, there and back: two more passes
        total = 0
        for stage, plans in predicted(case, answers, layout.group_of("ep", rank), rank).items():
            wanted |= {
                f"dispatch{stage}": again * sum(sum(p.dispatch) for p in plans),
                f"combine{stage}": again * sum(sum(p.combine) for p in plans),
                f"combine{stage} backward": sum(sum(p.combine_backward) for p in plans),
                f"dispatch{stage} backward": sum(sum(p.dispatch_backward) for p in plans),
            }
            total += sum(p.total(recompute=case.recompute) for p in plans)
        assert travel == wanted
        assert sum(travel.values()) > 0
        assert sum(travel.values()) == total


@pytest.mark.parametrize("name", ["flat, uniform", "flat, uniform, recomputed"])
def test_uniform_routing_sends_the_closed_formula(name: str) -> None:
    """4 T k d b (P - 1) / P for each of two layers on every rank; 6 with recomputation."""
    T = 12  # one row of the batch
    for answer in ran():
        sent = sum(
            int(x) for key, x in answer.items() if key.startswith((f"{name}: sent: d", f"{name}: sent: combine"))
        )
        passes = 6 if "recomputed" in name else 4
        assert sent * WORLD == 2 * passes * T * K * D * NUMBER * (WORLD - 1)
        assert sent == 2 * step_bytes(T * K, D, NUMBER, WORLD, recompute="recomputed" in name)


def test_a_second_level_sends_between_nodes_what_one_level_does() -> None:
    """Uniform: (G - 1)/G of the rows within nodes, (M - 1)/M between them, where a flat exchange sends 2/4 between nodes."""
    rows = 12 * K * D * NUMBER
    for answer in ran():
        for what in ("dispatch", "combine"):
            within = int(answer[f"two levels, uniform: sent: {what} within nodes"])
            between = int(answer[f"two levels, uniform: sent: {what} between nodes"])
            assert (within, between) == (2 * rows // 2, 2 * rows // 2)
