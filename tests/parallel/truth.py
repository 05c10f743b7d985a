"""N processes against one: the same steps in both ways, inside every process, and how far what it holds is from the whole.

A case is plain data, so that it travels to the processes. Every rank trains the whole model alone and its part of the spread
one on the same rows, then compares every gradient, weight and moment it holds with the boxes of the whole they belong to.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moesaic.data.packing import IGNORE, Batch
from moesaic.layout import Layout, ParallelConfig
from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig, MoEConfig, RouterConfig
from moesaic.models.decoder import Decoder
from moesaic.parallel.apply import Spread, apply
from moesaic.parallel.experts import stack_of
from moesaic.parallel.gradients import local
from moesaic.parallel.held import Held
from moesaic.parallel.world import World
from moesaic.plan.placement import Placement
from moesaic.train.optim import OptimConfig, make_optimizer
from moesaic.train.reading import StepReading
from moesaic.train.recompute import RecomputedDispatch, RecomputedForward, recompute_activations
from moesaic.train.step import train_step

# Adam's first step is g / (|g| + eps): with the usual 1e-8 a gradient that is 0 but for rounding moves its weight by the whole
# learning rate, in a direction that is noise. Larger than rounding, smaller than gradients.
EPS, LR = 1e-3, 1e-3
Between = Callable[[Spread, Any, int], None]  # of what is trained, its optimizer, and the number of the step, from 0


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        parallel: the layout. moe: changes to the sparse layers. model: changes to the model.
        batch: rows of a micro-batch. accumulate: micro-batches of a step. steps: how many.
        edit: changes both models before training, by biases of their gates ("skew": every token takes one expert, most of it;
            "starve": the last expert gets no token; "zipf": the more the lower its number).
        short: rows of the last micro-batch that are padding, counted from the end.
        placements: per sparse layer the experts of every rank's slots; evenly where it says nothing.
        shadows: per sparse layer the experts that have shadows in the first step.
    """

    name: str
    parallel: ParallelConfig
    moe: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    router: dict[str, Any] = field(default_factory=dict)
    router_name: str = "topk"
    batch: int = 4
    accumulate: int = 1
    steps: int = 1
    recompute: bool = False
    dtype: str = "float32"
    edit: str = ""
    short: int = 0
    ranks_per_node: int | None = None
    placements: dict[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    shadows: dict[int, tuple[int, ...]] = field(default_factory=dict)


def config_of(case: Case) -> ModelConfig:
    """A tiny decoder: two sparse layers and more, if the case says so."""
    options = {**case.router, **({"gate_bias": True} if case.edit else {})}
    router = RouterConfig(case.router_name, options, allow_leak=True)
    moe = MoEConfig(**{"num_experts": 8, "k": 2, "hidden": 16, "router": router, **case.moe})
    base = ModelConfig(vocab_size=31, dim=16, num_layers=2, num_heads=2, hidden=24, max_seq_len=16, moe=moe)
    return replace(base, **case.model)


def build(case: Case) -> Decoder:
    """The whole model of a case."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*it acts only together with")  # a setting that is compared must be in force
        warnings.filterwarnings("ignore", ".*(allow_leak|capacity)")
        model = build_model(config_of(case))
    if case.dtype == "float64":
        model = to_fp64(model)
    if case.edit:
        for layer in model.moe_layers().values():
            gate: Any = layer.router.gate
            with torch.no_grad():
                gate.weight.mul_({"zipf": 15.0, "skew": 3.0, "starve": 6.0}[case.edit])  # tokens differ
                if case.edit == "zipf":
                    gate.bias.copy_(-1.2 * torch.arange(1, len(gate.bias) + 1).log())
                elif case.edit == "skew":
                    gate.bias[0] = 5.0
                else:
                    gate.bias[-1] = -1e4
    return model


def experts_of(model: Decoder, layer: int) -> int:
    """Feed-forward experts of a layer of a whole model."""
    return stack_of(model.moe_layers()[layer]).num_experts


def to_fp64(model: Decoder) -> Decoder:
    """Everything, routers included, which otherwise stay fp32."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = parameter.data.double()
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.double()
    return model


def batches_of(case: Case, step: int) -> list[Batch]:
    """The whole step's micro-batches."""
    generator = torch.Generator().manual_seed(100 + step)
    found = []
    for m in range(case.accumulate):
        S = 12
        ids = torch.randint(0, 31, (case.batch, S + 1), generator=generator)
        # No two tokens see the same: their equal states are computed in two places, and a capacity or an expert that has to
        # choose between them decides by how each was rounded. So documents start differently, and not with one token twice.
        starts = torch.randperm(31, generator=generator)[torch.arange(2 * case.batch) % 31].view(case.batch, 2)
        ids[:, [0, 7]] = starts
        ids[:, [1, 8]] = (starts + torch.randint(1, 31, starts.shape, generator=generator)) % 31
        documents = (torch.arange(S) >= 7).long().expand(case.batch, S).clone()
        targets = ids[:, 1:].clone()
        targets[:, 6] = IGNORE
        valid = torch.ones(case.batch, S, dtype=torch.bool)
        if m == case.accumulate - 1 and case.short:
            valid[-case.short :] = False
            targets[-case.short :] = IGNORE
        labels = torch.where(valid, torch.arange(case.batch)[:, None] % 3, -1)
        found.append(Batch(ids[:, :-1].contiguous(), targets, valid, documents, labels))
    return found


def share(batches: list[Batch], part: int, parts: int) -> list[Batch]:
    """A rank's rows of every micro-batch."""
    names = ("ids_BS", "targets_BS", "valid_BS", "document_BS", "label_BS")
    return [Batch(*(getattr(b, n).tensor_split(parts)[part] for n in names)) for b in batches]


@dataclass
class Trained:
    """What training left: readings, the first step's gradients, weights and moments at the end."""

    readings: list[StepReading]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    model: Any = None
    held: dict[str, Held] = field(default_factory=dict)
    held_first: dict[str, Held] = field(default_factory=dict)  # before experts moved
    spread: Spread | None = None


def train(case: Case, world: World | None, between: Between | None = None) -> Trained:
    """Train alone, or spread over the processes of ``world``, where ``between`` is called after each step."""
    model = build(case)
    spread = None
    if world is not None:
        spread = apply(
            model,
            world,
            case.parallel,
            recompute=recompute_activations if case.recompute else None,
            placements={i: Placement(slots, experts_of(model, i)) for i, slots in case.placements.items()},
        )
        for layer, experts in case.shadows.items():
            assert spread.shadows is not None
            if layer in spread.placements:  # not those of other stages
                spread.shadows.choose(layer, experts)
    elif case.recompute:
        recompute_activations(model)
    held_first = {} if spread is None else dict(spread.held)
    optimizer = make_optimizer(model, OptimConfig(lr=LR, eps=EPS))
    found: dict[str, Tensor] = {}

    def keep(_opt: Any, _args: Any, _kwargs: Any) -> None:
        if not found:
            found.update({n: local(p.grad).detach().clone() for n, p in model.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    readings = []
    for step in range(case.steps):
        rows = batches_of(case, step)
        if spread is not None and world is not None:
            rows = share(rows, world["dp"].index, world["dp"].size)
        reading, _ = train_step(model, optimizer, rows, lr=LR, clip=1.0, step=step + 1, spread=spread)
        readings.append(reading)
        if between is not None and spread is not None:
            between(spread, optimizer, step)
    names = {id(p): n for n, p in model.named_parameters()}
    weights = {n: local(t).detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    moments = {}
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if key != "step":
                moments[f"{key}/{names[id(p)]}"] = local(value).detach().clone()
    held = {} if spread is None else spread.held
    return Trained(readings, found, weights, moments, model, held, held_first, spread)


def error(mine: Tensor, whole: Tensor, held: Held) -> float:
    """How far what is held is from the whole.

    In fp64 the largest difference over the largest entry. In fp32, where single entries are sums that cancel and each of the
    two ways rounds them for itself, the root mean square of the differences over that of the entries.
    """
    worst, squares, count = 0.0, 0.0, 0
    assert tuple(mine.shape) == held.local, (held.name, tuple(mine.shape), held.local)
    for box in held.boxes:
        wrong_ = (mine[box.local_slices].double() - whole[box.logical_slices].double()).abs()
        if wrong_.numel():
            worst = max(worst, float(wrong_.max()))
            squares, count = squares + float(wrong_.square().sum()), count + wrong_.numel()
    if whole.dtype == torch.float64:
        return worst / max(float(whole.abs().max()), 1e-30)
    return (squares / max(count, 1)) ** 0.5 / max(float(whole.double().square().mean()) ** 0.5, 1e-30)


def in_force(case: Case, alone: Trained, many: Trained, world: World, counts: bool) -> None:
    """Fails where a case does not do what it says, and would compare one thing with itself; ``counts``: of exchanges too."""
    assert many.spread is not None
    model, spread, parallel, dispatch = many.model, many.spread, case.parallel, world.watch.spent.get("dispatch")
    for one in alone.readings[0].layers.values():
        if case.edit == "skew":
            assert one.load_E[0] >= 0.9 * one.tokens, one.load_E
        if case.edit == "starve":
            assert one.load_E[-1] == 0, one.load_E
    held = sum(math.prod(box.extents) for h in many.held.values() for box in h.boxes)
    whole = sum(t.numel() for t in alone.weights.values())
    copies = bool(case.placements) or parallel.replicas > 0
    if not copies and (parallel.fsdp or parallel.tp > 1 or parallel.pp > 1 or world["ep"].size > 1):
        assert held < whole, (held, whole)
    if parallel.fsdp:
        assert any(isinstance(p, DTensor) for p in model.parameters())
    blocks = [block for _, block in model.layers()]
    if case.recompute:
        assert all(isinstance(block.attention.forward, RecomputedForward) for block in blocks)
        assert all(_wrapped(layer.dispatcher) for layer in model.moe_layers().values())
    if parallel.compile:
        assert all(block.attention._compiled_call_impl is not None for block in blocks)
    if counts and spread.placements and case.ranks_per_node is None and not case.shadows:
        pieces = sum(min(parallel.chunks, max(p.slots_per_rank)) for p in spread.placements.values())
        assert dispatch is not None
        assert dispatch.calls == pieces * case.accumulate * case.steps * (1 + case.recompute), dispatch


def _wrapped(dispatcher: Any) -> bool:
    """Whether some dispatcher in the chain recomputes."""
    while dispatcher is not None and not isinstance(dispatcher, RecomputedDispatch):
        dispatcher = getattr(dispatcher, "inner", None)
    return dispatcher is not None


def complete(kind: str, mine: dict[str, Tensor], held: dict[str, Held], whole: dict[str, Tensor], world: World) -> None:
    """Fails unless every number of the whole is held by some rank."""
    boxes = {name: [box.logical_slices for box in held[name.split("/")[-1]].boxes] for name in mine}
    parts = [boxes] * world.everyone.size
    if world.everyone.size > 1:
        dist.all_gather_object(parts, boxes)
    for name, tensor in whole.items():
        known = torch.zeros(tensor.shape, dtype=torch.bool)
        for part in parts:
            for place in part.get(name, ()):
                known[place] = True
        assert bool(known.all()), f"nobody holds a part of the {kind} of {name}"


def compare(case: Case, world: World, between: Between | None = None) -> dict[str, Tensor]:
    """Errors by what: "loss" and other figures of a step, "norm", "gradient", "weight", "moment", relative; "load": experts
    whose counts differ.
    """
    world.watch.take()
    alone, many = train(case, None), train(case, world, between)
    in_force(case, alone, many, world, counts=between is None)
    out: dict[str, float] = {"loss": 0.0, "norm": 0.0, "load": 0.0, "gradient": 0.0, "weight": 0.0, "moment": 0.0}
    worst = {"gradient": "", "weight": "", "moment": ""}
    for one, other in zip(alone.readings, many.readings, strict=True):
        out["loss"] = max(out["loss"], abs(one.loss - other.loss) / abs(one.loss))
        out["loss"] = max(out["loss"], abs(one.lm_loss - other.lm_loss) / abs(one.lm_loss))
        assert set(one.losses) == set(other.losses), (one.losses, other.losses)
        for name in one.losses:
            out["loss"] = max(out["loss"], abs(one.losses[name] - other.losses[name]) / (abs(one.losses[name]) + 1e-3))
        out["norm"] = max(out["norm"], abs(one.grad_norm - other.grad_norm) / one.grad_norm)
        assert (list(one.layers), list(one.depth)) == (list(other.layers), list(other.depth))
        for a, b in zip(
            [*one.layers.values(), *one.depth.values()], [*other.layers.values(), *other.depth.values()], strict=True
        ):
            out["load"] += float((a.load_E != b.load_E).sum())
            out["load"] += (a.tokens != b.tokens) + (a.dropped != b.dropped) + (a.computed != b.computed)
            if case.dtype == "float64":
                for figure, same in ((a.entropy, b.entropy), (a.margin, b.margin)):
                    out["loss"] = max(out["loss"], abs(figure - same) / max(a.tokens, 1.0))
    for kind, mine, theirs in (
        ("gradient", many.gradients, alone.gradients),
        ("weight", many.weights, alone.weights),
        ("moment", many.moments, alone.moments),
    ):
        held_by = many.held_first if kind == "gradient" else many.held
        complete(kind, mine, held_by, theirs, world)
        for name, tensor in mine.items():
            held = held_by[name.split("/")[-1]]
            if name not in theirs:
                raise AssertionError(f"{kind} of {name} is not in the model of one process")
            wrong = error(tensor, theirs[name], held)
            if wrong > out[kind]:
                out[kind], worst[kind] = wrong, name
    if max(out.values()) > (1e-6 if case.dtype == "float32" else 1e-12):
        print(case.name, world.rank, out, worst, flush=True)
    return {f"{case.name}: {key}": torch.tensor(value) for key, value in out.items()}


def run_cases(rank: int, cases: list[Case], size: int) -> dict[str, Tensor]:
    """All cases of one number of processes, in one start."""
    found: dict[str, Tensor] = {}
    for case in cases:
        world = World(Layout.of(case.parallel, size), rank, ranks_per_node=case.ranks_per_node)
        found |= compare(case, world)
    return found
