"""Experts laid out anew by load while a model is trained: predictions kept, training unchanged, state for a checkpoint."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import CheckpointError, ConfigError
from moesaic.layout import Layout, ParallelConfig
from moesaic.parallel.apply import Spread, apply
from moesaic.parallel.rebalance import Rebalancer, saved_placements
from moesaic.parallel.world import World
from moesaic.plan.placement import Placement
from moesaic.plan.predict import critical_rows, expected_rows_between, rows_between
from moesaic.plan.rebalance import initial
from moesaic.train.optim import OptimConfig, make_optimizer
from moesaic.train.step import train_step
from tests.distributed import run_distributed
from tests.parallel.truth import EPS, LR, Case, batches_of, build, share, train

E, P, STEPS, EVERY = 16, 4, 12, 4
ZIPF = Case(
    "zipf",
    ParallelConfig(ep=P, rebalance_every=EVERY),
    moe={"num_experts": E},
    router={"gate_bias": True},
    edit="zipf",
    batch=16,
    dtype="float64",
)
COPIES = replace(ZIPF, name="copies", parallel=ParallelConfig(ep=P, replicas=4, rebalance_every=EVERY))


@dataclass
class Run:
    """A run with a rebalancer, and what it made of every step."""

    spread: Spread
    optimizer: Any
    balancer: Rebalancer
    step: int = 0

    def go(self, case: Case, steps: int) -> tuple[dict[str, Tensor], list[list[dict[str, Any]]]]:
        """Per step: losses, rows computed by layer, routed rows; what was moved."""
        seen: dict[str, Tensor] = {}
        moved = []
        for _ in range(steps):
            world, placements = self.spread.world, dict(self.spread.placements)
            rows = share(batches_of(case, self.step), world["dp"].index, world["dp"].size)
            reading, plans = train_step(
                self.spread.model, self.optimizer, rows, lr=LR, clip=1.0, step=self.step + 1, spread=self.spread
            )
            computed = self.spread.take_rows()
            for layer, plan in plans.items():
                at = f"{self.step} {layer}"
                seen[f"computed {at}"] = torch.tensor(computed[str(layer)])
                seen[f"expert {at}"], seen[f"token {at}"] = plan.expert_N, plan.token_N
                seen[f"slots {at}"] = torch.tensor(placements[layer].expert_of_slot)
                seen[f"per rank {at}"] = torch.tensor(placements[layer].slots_per_rank)
            seen[f"loss {self.step}"] = torch.tensor(reading.loss, dtype=torch.float64)
            self.step += 1
            loads = {layer: mine.load_E for layer, mine in reading.layers.items()}
            moved.append(self.balancer.after_step(self.optimizer, self.step, loads))
        return seen, moved


def start(case: Case, rank: int, size: int, placements: dict[int, Placement] | None = None) -> Run:
    model = build(case)
    world = World(Layout.of(case.parallel, size), rank)
    spread = apply(model, world, case.parallel, placements=placements)
    optimizer = make_optimizer(model, OptimConfig(lr=LR, eps=EPS))
    return Run(spread, optimizer, Rebalancer(spread, case.parallel.rebalance_every))


def text(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def said(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))


def run(rank: int, case: Case) -> dict[str, Tensor]:
    mine = start(case, rank, P)
    seen, moved = mine.go(case, STEPS)
    sent = mine.spread.world.watch.take()["migration"].sent_bytes
    return {**seen, "moved": text(moved), "state": text(mine.balancer.state_dict()), "sent": torch.tensor(sent)}


@functools.cache
def ran(name: str) -> list[dict[str, Tensor]]:
    return run_distributed(P, run, {"zipf": ZIPF, "copies": COPIES}[name])


def placement_at(answer: dict[str, Tensor], at: str) -> Placement:
    slots, ends = answer[f"slots {at}"].tolist(), answer[f"per rank {at}"].cumsum(0).tolist()
    return Placement(tuple(tuple(slots[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)), E)


@pytest.mark.parametrize("case", [ZIPF, COPIES], ids=["zipf", "copies"])
def test_the_busiest_rank_computes_what_was_predicted(case: Case) -> None:
    ranks = ran(case.name)
    alone = train(replace(case, steps=STEPS), None)
    falls, wrong = [], []
    for step in range(STEPS):
        for answer in ranks:
            assert float(answer[f"loss {step}"]) == pytest.approx(alone.readings[step].loss, rel=1e-12)
        for layer in (0, 1):
            at = f"{step} {layer}"
            placement = placement_at(ranks[0], at)
            assert all(placement_at(answer, at) == placement for answer in ranks)
            routed = [(answer[f"expert {at}"], answer[f"token {at}"]) for answer in ranks]
            computed = [int(answer[f"computed {at}"]) for answer in ranks]
            rows_RR = rows_between(placement, routed)
            # From the plans: exact, rank by rank.
            assert computed == rows_RR.sum(dim=0).tolist()
            assert max(computed) == critical_rows(rows_RR)
            if case is ZIPF:  # from counts: exact without copies
                counts_RE = torch.stack([torch.bincount(expert, minlength=E) for expert, _ in routed])
                assert max(computed) == critical_rows(expected_rows_between(placement, counts_RE))
            evenly = critical_rows(rows_between(Placement.even(E, P), routed))
            falls.append(max(computed) / evenly)
    moved = [said(answer["moved"]) for answer in ranks]
    assert all(what == moved[0] for what in moved)
    assert all(not what for step, what in enumerate(moved[0]) if (step + 1) % EVERY)
    assert [entry["layer"] for entry in moved[0][EVERY - 1]] == [0, 1]
    for step, what in enumerate(moved[0]):
        for entry in what:
            layer = entry["layer"]
            assert entry["rows"] < 0.98 * entry["rows_before"]
            after = [max(int(a[f"computed {s} {layer}"]) for a in ranks) for s in range(step + 1, min(step + 5, STEPS))]
            wrong += [abs(rows - entry["rows"]) / entry["rows"] for rows in after]
    # From the average load of earlier steps: other tokens come, and a rank keeps its rows of a copy that it holds.
    assert max(wrong) < 0.15
    assert max(falls[2 * EVERY :]) < 0.6, falls  # two layers per step: from the first move on


@pytest.mark.parametrize("name", ["zipf", "copies"])
def test_bytes_in_the_record_are_those_sent(name: str) -> None:
    ranks = ran(name)
    total = sum(entry["bytes"] for what in said(ranks[0]["moved"]) for entry in what)
    assert total == sum(int(answer["sent"]) for answer in ranks) > 0


def test_state_is_plain_data_and_the_same_everywhere() -> None:
    ranks = ran("copies")
    states = [said(answer["state"]) for answer in ranks]
    assert all(state == states[0] for state in states)
    assert list(states[0]) == ["0", "1"]
    placements = saved_placements(states[0], P)
    assert all(p.num_slots == E + 4 and p.replicated for p in placements.values())
    assert placements[0].to_list() == states[0]["0"]["placement"]
    assert saved_placements(states[0], 2) == {}  # of another number of ranks


def resumed(rank: int) -> dict[str, Tensor]:
    """10 steps, against 5, a new start from the state, and 5 more."""
    case = replace(COPIES, parallel=replace(COPIES.parallel, rebalance_every=3))
    whole = start(case, rank, P)
    wanted, moved = whole.go(case, 10)
    first = start(case, rank, P)
    first.go(case, 5)
    state = json.loads(json.dumps(first.balancer.state_dict()))
    second = start(case, rank, P, saved_placements(state, P))
    second.balancer.load_state_dict(state)
    with torch.no_grad():
        for mine, theirs in zip(second.spread.model.parameters(), first.spread.model.parameters(), strict=True):
            mine.copy_(theirs)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.step = 5
    found, moved_too = second.go(case, 5)
    assert moved[5:] == moved_too
    assert any(moved_too)
    return {"same": torch.tensor(all(torch.equal(tensor, wanted[name]) for name, tensor in found.items()))}


def test_a_resumed_run_moves_the_same_experts() -> None:
    assert all(bool(answer["same"]) for answer in run_distributed(P, resumed))


def test_no_look_and_no_gain_change_nothing() -> None:
    for answer in run_distributed(2, quiet):
        assert said(answer["moved"]) == [[], [], []]
        assert bool(answer["still"])


def quiet(rank: int) -> dict[str, Tensor]:
    case = replace(ZIPF, parallel=ParallelConfig(ep=2))
    mine = start(case, rank, 2)
    before = dict(mine.spread.placements)
    _, moved = mine.go(case, 2)
    with torch.no_grad():  # evaluation is not counted among the rows of steps
        mine.spread.model.eval()(batches_of(case, 0)[0].ids_BS)
    assert mine.spread.take_rows() == {"0": 0, "1": 0}
    equal = {layer: torch.tensor([5] * E + [1000]) for layer in before}  # a special expert counts for nobody
    balancer = Rebalancer(mine.spread, 1)
    moved.append(balancer.after_step(mine.optimizer, 3, equal))
    return {"moved": text(moved), "still": torch.tensor(mine.spread.placements == before)}


def staged(rank: int) -> dict[str, Tensor]:
    """Layer 0 and layer 1 on two stages of two ranks each."""
    parallel = ParallelConfig(pp=2, ep=2, rebalance_every=2)
    mine = start(replace(ZIPF, parallel=parallel, accumulate=2), rank, P)
    _, moved = mine.go(replace(ZIPF, parallel=parallel, accumulate=2), 4)
    return {
        "moved": text(moved),
        "state": text(mine.balancer.state_dict()),
        "here": text(sorted(mine.spread.placements)),
    }


def test_stages_say_together_what_moved() -> None:
    ranks = run_distributed(P, staged)
    assert [said(answer["here"]) for answer in ranks] == [[0], [0], [1], [1]]
    assert all(torch.equal(answer[what], ranks[0][what]) for answer in ranks for what in ("moved", "state"))
    assert [[entry["layer"] for entry in what] for what in said(ranks[0]["moved"])][:2] == [[], [0, 1]]
    assert list(saved_placements(said(ranks[0]["state"]), 2)) == [0, 1]


@pytest.mark.parametrize(
    "state",
    [
        {"0": []},
        {"0": {"load": [1.0], "weight": "1", "placement": [[0]]}},
        {"0": {"load": [], "weight": 1.0, "placement": [[0]]}},
        {"0": {"load": [1.0, None], "weight": 1.0, "placement": [[0], [1]]}},
        {"0": {"load": [1.0, 2.0], "weight": 1.0}},
        {"x": {"load": [1.0, 2.0], "weight": 1.0, "placement": [[0], [1]]}},
    ],
)
def test_a_state_of_something_else_is_refused(state: Any) -> None:
    with pytest.raises(CheckpointError, match="state of the rebalancer"):
        saved_placements(state, 2)


def test_a_placement_of_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="no slot for expert 1"):
        saved_placements({"0": {"load": [1.0, 2.0], "weight": 1.0, "placement": [[0], [0]]}}, 2)


def test_at_first_experts_lie_evenly_and_copies_elsewhere() -> None:
    assert initial(5, 2) == Placement.even(5, 2)
    for num_experts, ranks, spare in ((8, 2, 2), (8, 4, 4), (16, 4, 4), (6, 4, 2)):
        first = initial(num_experts, ranks, spare)
        assert set(first.slots_per_rank) == {(num_experts + spare) // ranks}
        assert all(len(set(rank)) == len(rank) for rank in first.slots)
        assert sorted(first.replicas_E) == [1] * (num_experts - spare) + [2] * spare


def refused(rank: int) -> dict[str, Tensor]:
    found = []
    for change in ({"replicas": 2}, {"rebalance_every": 5}, {}):
        parallel = ParallelConfig(ep=2, fsdp=True, **change)
        case = Case("", parallel, moe={"hidden": 15})
        try:
            apply(build(case), World(Layout.of(parallel, 4), rank), parallel)
            found.append("")
        except ConfigError as error:
            found.append(str(error))
    return {"said": text(found)}


def test_fsdp_must_cut_all_slots_alike() -> None:
    for answer in run_distributed(4, refused):
        first, second, third = said(answer["said"])
        assert "15, is no multiple of the 2 ranks with the same experts" in first
        assert first == second
        assert third == ""
