"""Experts that move between steps: the training of one process goes on, moments included; failures change nothing."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layout import Layout, ParallelConfig
from moesaic.parallel import comm
from moesaic.parallel.apply import Spread
from moesaic.parallel.experts import stack_of
from moesaic.parallel.gradients import local
from moesaic.parallel.held import keep, other_rows, pick, rows, whole
from moesaic.parallel.migrate import Moved, move_experts
from moesaic.parallel.world import World
from moesaic.plan.placement import Placement
from tests.distributed import run_distributed
from tests.parallel.truth import Case, compare, train

EP2, EP3 = ParallelConfig(ep=2), ParallelConfig(ep=3)
STEPS, EVERY = 20, 3


def some_placement(rng: random.Random, like: Placement, *, spare: int = 0, same_counts: bool = False) -> Placement:
    """Experts anywhere; ``spare`` slots of copies; other numbers of slots per rank unless ``same_counts``."""
    E, P = like.num_experts, like.num_ranks
    slots = like.num_slots if same_counts else E + spare
    experts = [*range(E), *(rng.randrange(E) for _ in range(slots - E))]
    rng.shuffle(experts)
    counts = list(like.slots_per_rank)
    if not same_counts:
        ends = sorted(rng.sample(range(1, slots), P - 1))
        counts = [b - a for a, b in zip([0, *ends], [*ends, slots], strict=True)]
    ends = [sum(counts[:r]) for r in range(P + 1)]
    return Placement(tuple(tuple(experts[ends[r] : ends[r + 1]]) for r in range(P)), E)


def moving(spread: Spread, optimizer: Any, step: int, *, same_counts: bool) -> None:
    """Every third step all experts of every layer lie somewhere else."""
    if (step + 1) % EVERY:
        return
    for layer, old in sorted(spread.placements.items()):
        rng = random.Random(1000 * step + layer)
        new = some_placement(rng, old, spare=rng.randrange(4), same_counts=same_counts)
        spread.world.watch.take()
        moved = move_experts(spread, optimizer, layer, new)
        spent = spread.world.watch.take().get("migration")
        assert (0 if spent is None else spent.sent_bytes) == moved.sent_bytes[spread.world["ep"].index]
        assert spread.placements[layer] == new != old


CASES = {
    "ep 2": (2, Case("ep 2", EP2)),
    "ep 2, accumulated, recomputed, biases": (
        2,
        Case("biases", EP2, moe={"expert_bias": True, "num_experts": 5}, accumulate=2, recompute=True),
    ),
    "ep 3, special experts, balanced by a bias": (
        3,
        Case("special", EP3, moe={"num_experts": 7, "copy": 1, "zero": 1}, router={"balance_bias": True}, batch=5),
    ),
    "ep 2, fsdp 2, copies": (
        4,
        Case("fsdp", replace(EP2, fsdp=True), placements={0: ((0, 1, 2, 3, 4), (5, 6, 7, 0, 0))}),
    ),
    "ep 2, tp 2": (4, Case("tp", ParallelConfig(ep=2, tp=2))),
    "ep 4, hierarchical": (4, Case("levels", ParallelConfig(ep=4, exchange="hierarchical"), ranks_per_node=2)),
    "pp 2, ep 2": (4, Case("pp", ParallelConfig(pp=2, ep=2), accumulate=2)),
    "ep 2, fp32": (2, Case("fp32", EP2, dtype="float32")),
}


def run(rank: int, size: int, names: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in names:
        case = CASES[name][1]
        case = replace(case, name=name, steps=STEPS, dtype="float32" if "fp32" in name else "float64")
        world = World(Layout.of(case.parallel, size), rank, ranks_per_node=case.ranks_per_node)
        found |= compare(case, world, functools.partial(moving, same_counts=case.parallel.fsdp))
    return found


@functools.cache
def errors(size: int) -> list[dict[str, Tensor]]:
    return run_distributed(size, run, size, [name for name, (ranks, _) in CASES.items() if ranks == size], timeout=110)


@pytest.mark.parametrize("name", CASES)
def test_training_does_not_notice(name: str) -> None:
    """20 steps, experts moved after every third: losses, gradients, weights and moments of one process."""
    limit = 1e-6 if "fp32" in name else 1e-12
    for answer in errors(CASES[name][0]):
        found = {what: float(wrong) for what, wrong in answer.items() if what.startswith(f"{name}: ")}
        assert len(found) == 6
        found[f"{name}: moment"] /= 2  # squares have twice the rounding, with or without moves
        assert all(wrong <= limit for wrong in found.values()), found


# ---- pieces ----------------------------------------------------------------------------------------------------------

SMALL = Case("small", EP2, moe={"num_experts": 5}, dtype="float64", batch=2)


def here(spread: Spread, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything the experts of layer 0 own on this rank."""
    found = {}
    for name, p in stack_of(spread.model.moe_layers()[0]).named_parameters():
        found[name] = local(p).detach().clone()
        found |= {f"{name} {key}": local(v).clone() for key, v in optimizer.state[p].items()}
    return found


def by_hand(rank: int) -> dict[str, Tensor]:
    """Ranks hold experts 0 1 and 2 3 4. Then 3 0 and 2 1 4, in place; then 3 and 1 0 2 4 3, in new parameters."""
    found: dict[str, Tensor] = {}

    def move(spread: Spread, optimizer: Any, step: int) -> None:
        stack = stack_of(spread.model.moe_layers()[0])
        before, parameters = here(spread, optimizer), list(stack.parameters())
        slots = [((3, 0), (2, 1, 4)), ((3,), (1, 0, 2, 4, 3))][step]
        moved: Moved = move_experts(spread, optimizer, 0, Placement(slots, 5))
        after = here(spread, optimizer)
        same = all(a is b for a, b in zip(stack.parameters(), parameters, strict=True))
        listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found[f"same {step}"] = torch.tensor(same)
        found[f"trained {step}"] = torch.tensor(listed == {id(p) for p in spread.model.parameters()})
        found[f"states {step}"] = torch.tensor(len(optimizer.state) == len(listed))
        found[f"sent {step}"] = torch.tensor([*moved.sent_bytes, moved.slot_bytes, len(moved.moves)])
        found[f"experts {step}"] = torch.tensor(stack.num_experts)
        for when, what in (("before", before), ("after", after)):
            found.update({f"{when} {step} {name}": tensor for name, tensor in what.items()})

    world = World(Layout.of(EP2, 2), rank)
    train(replace(SMALL, steps=2), world, move)
    return found


def test_rows_and_moments_by_hand() -> None:
    ranks = run_distributed(2, by_hand)
    names = [name.removeprefix("before 0 ") for name in ranks[0] if name.startswith("before 0 ")]
    assert {"w_in", "w_out", "w_in exp_avg", "w_out exp_avg_sq", "w_in step"} <= set(names)
    placements = [((0, 1), (2, 3, 4)), ((3, 0), (2, 1, 4)), ((3,), (1, 0, 2, 4, 3))]
    for step in (0, 1):
        for name in names:
            before, after = ([r[f"{when} {step} {name}"] for r in ranks] for when in ("before", "after"))
            if name.endswith(" step"):
                assert all(int(a) == step + 1 for a in after)
                continue
            value = {e: before[r][i] for r in (0, 1) for i, e in enumerate(placements[step][r])}
            assert len(value) == 5
            for r in (0, 1):
                assert torch.equal(after[r], torch.stack([value[e] for e in placements[step + 1][r]])), (step, name)
    D, H = 16, 16
    slot = 8 * 3 * (D * 2 * H + H * D)  # fp64, two moments each
    for answer in ranks:
        # Moves: 3 and 0 to rank 0 (0 from its other slot), 1 to rank 1; one leaves each rank.
        assert answer["sent 0"].tolist() == [slot, slot, slot, 3]
        # 3 stays; to rank 1 come 0 and 3, and its own three experts change places.
        assert answer["sent 1"].tolist() == [2 * slot, 0, slot, 5]
        assert [bool(answer[f"same {step}"]) for step in (0, 1)] == [True, False]
        assert all(bool(answer[f"{what} {step}"]) for what in ("trained", "states") for step in (0, 1))
    assert [[int(answer[f"experts {step}"]) for step in (0, 1)] for answer in ranks] == [[2, 1], [3, 5]]


def broken(rank: int) -> dict[str, Tensor]:
    """The second of two all-to-alls fails; then moments stay behind."""
    found: dict[str, Tensor] = {}

    def move(spread: Spread, optimizer: Any, step: int) -> None:
        before, held, placement = here(spread, optimizer), dict(spread.held), spread.placements[0]
        whole_way, calls = comm.Group.all_to_all, []

        def fails(self: comm.Group, *args: Any, **named: Any) -> Tensor:
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("the cable")
            return whole_way(self, *args, **named)

        comm.Group.all_to_all = fails  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="the cable"):
            move_experts(spread, optimizer, 0, Placement(((4, 3, 2), (1, 0)), 5))
        comm.Group.all_to_all = whole_way  # type: ignore[method-assign]
        after = here(spread, optimizer)
        found["calls"] = torch.tensor(len(calls))
        found["as it was"] = torch.tensor(
            all(torch.equal(before[n], after[n]) for n in before)
            and spread.held == held
            and spread.placements[0] is placement
        )

    train(SMALL, World(Layout.of(EP2, 2), rank), move)

    def forgets(spread: Spread, optimizer: Any, step: int) -> None:
        if step == 0:
            kept = {name: t for name, t in here(spread, optimizer).items() if "exp_avg" in name}
            move_experts(spread, optimizer, 0, Placement(((3, 4), (2, 1, 0)), 5))
            for name, p in stack_of(spread.model.moe_layers()[0]).named_parameters():
                for key in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[p][key].copy_(kept[f"{name} {key}"])

    return found | compare(replace(SMALL, steps=2), World(Layout.of(EP2, 2), rank), forgets)


def test_a_failure_changes_nothing_and_forgotten_moments_show() -> None:
    for answer in run_distributed(2, broken):
        assert int(answer["calls"]) == 2
        assert bool(answer["as it was"])
        assert float(answer["small: weight"]) > 1e-4


def refused(rank: int) -> dict[str, Tensor]:
    said: list[str] = []

    def ask(
        spread: Spread, optimizer: Any, layer: int, slots: tuple[tuple[int, ...], ...], num_experts: int = 8
    ) -> None:
        with pytest.raises((ConfigError, ValueError)) as caught:
            move_experts(spread, optimizer, layer, Placement(slots, num_experts))
        said.append(str(caught.value))

    def between(spread: Spread, optimizer: Any, step: int) -> None:
        swapped = ((4, 1, 2, 3), (0, 5, 6, 7))
        if not spread.config.fsdp:
            ask(spread, optimizer, 7, swapped)
            ask(spread, optimizer, 0, ((4, 1, 2), (3, 0)), 5)
            p = stack_of(spread.model.moe_layers()[0]).w_in
            p.grad = torch.zeros_like(p)
            ask(spread, optimizer, 0, swapped)
            p.grad, optimizer.state[p]["exp_avg"] = None, torch.zeros(4, 1)
            ask(spread, optimizer, 0, swapped)
        elif spread.model.config.moe is not None and spread.model.config.moe.hidden == 16:
            ask(spread, optimizer, 0, ((4, 1, 2), (3, 0, 5, 6, 7)))
        else:
            ask(spread, optimizer, 0, swapped)

    for parallel, hidden in ((EP2, 16), (replace(EP2, fsdp=True), 16), (replace(EP2, fsdp=True), 15)):
        case = Case("refused", replace(parallel, tp=1), moe={"hidden": hidden})
        train(case, World(Layout.of(case.parallel, 4), rank), between)
    return {"said": torch.frombuffer(bytearray("\n".join(said).encode()), dtype=torch.uint8)}


def test_what_cannot_move_is_refused_in_words() -> None:
    words = ("Layer 7 has no experts on other", "from 8 experts on 2", "move experts after a step",
             "exp_avg of shape [4, 1]", "keeps its number of expert slots, [4, 4] in layer 0, and the new placement has [3, 5]",
             "its next dimension, 15, is no multiple of the 2 ranks")  # fmt: skip
    for answer in run_distributed(4, refused):
        said = bytes(answer["said"].tolist()).decode().split("\n")
        assert len(said) == len(words)
        for sentence, part in zip(said, words, strict=True):
            assert part in sentence


def test_other_rows_are_cut_as_those_before() -> None:
    """Slices of gate and up columns, then FSDP's: the same boxes as if the rows had been these from the start."""

    def cut(order: tuple[int, ...]) -> Any:
        held = pick(rows(whole("w_in", (5, 4, 12), "experts"), order), 2, [(0, 3), (6, 9)], "etp")
        return keep(held, 1, 2, 4, "edp")

    for order in ((4,), (0, 0, 3), (2, 1), ()):
        assert other_rows(cut((1, 3)), order) == cut(order)
    plain = rows(whole("w_in", (5, 4, 12), "experts"), ())
    assert other_rows(plain, (3, 1)) == rows(whole("w_in", (5, 4, 12), "experts"), (3, 1))
    with pytest.raises(ValueError, match="no row of w_in"):
        other_rows(cut(()), (1,))
