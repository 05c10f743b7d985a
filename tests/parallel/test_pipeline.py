"""Pipelines against one process: every gradient, losses, evaluation, what travels; and what cannot be cut, in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moesaic.data.packing import IGNORE, Batch
from moesaic.errors import ConfigError
from moesaic.layout import Layout, ParallelConfig
from moesaic.models import Decoder, ModelConfig, MoEConfig, build_model
from moesaic.models.config import DepthConfig
from moesaic.models.inputs import side_inputs
from moesaic.parallel.comm import Group
from moesaic.parallel.pipeline import WHAT, Pipeline, check_micro_batches
from moesaic.parallel.stages import StageOutput, split_stages, take_stages
from moesaic.parallel.watch import Watch
from moesaic.parallel.world import World
from moesaic.routing import LossContext, balance_loss
from moesaic.train.recompute import recompute_activations
from tests.distributed import run_distributed

S, VOCAB = 8, 31


@dataclass(frozen=True)
class Case:
    """A pipeline over ``pp`` ranks.

    ``numbers``: micro-batches of each step; all steps go through the same pipeline. ``recompute``: there, not in one process.
    """

    name: str
    numbers: tuple[int, ...]
    model: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] = field(default_factory=dict)
    pp: int = 2
    stages_per_rank: int = 1
    dtype: torch.dtype = torch.float32
    compute: torch.dtype | None = None
    recompute: bool = False

    @property
    def config(self) -> ModelConfig:
        """Four blocks, the second and the last one sparse, unless the case says otherwise."""
        values: dict[str, Any] = {"num_experts": 4, "k": 2, "hidden": 12, "every": 2, "losses": LOSSES}
        moe = MoEConfig(**(values | self.moe))
        base = ModelConfig(vocab_size=VOCAB, dim=16, num_layers=4, num_heads=2, hidden=24, max_seq_len=16, moe=moe)
        return replace(base, **self.model)


LOSSES = {"switch": 0.3, "z": 0.2}
FP64: dict[str, Any] = {"dtype": torch.float64}
CASES_OF_2 = [
    Case("1f1b", (1, 3, 4)),
    Case("1f1b, fp64, untied, shared expert", (3,), {"tie_embeddings": False}, {"shared": 1, "shared_gate": True}, **FP64),
    Case("1f1b, fp64, losses on both stages", (1, 4), {}, {"every": 1, "shared": 1}, **FP64),
    Case("interleaved", (4, 2), {}, {"every": 1, "shared": 1}, stages_per_rank=2),
    Case("interleaved, fp64", (2, 6), {"tie_embeddings": False}, {"every": 1}, stages_per_rank=2, **FP64),
    Case("a stage without sparse layer", (2,), {}, {"layers": (3,)}),
    Case("recomputation", (2,), {"tie_embeddings": False}, {"every": 1, "shared": 1}, recompute=True, **FP64),
    Case("windows, depth, post-norm", (2,), {
        "sliding_window": (0, 3, 0, 2), "norm_placement": "post", "depth": DepthConfig(capacity=0.5, allow_leak=True)
    }),
    Case("bf16 activations", (3,), {"tie_embeddings": False}, {"every": 1}, compute=torch.bfloat16),
]  # fmt: skip
CASES_OF_3 = [
    Case("three ranks, tied", (2, 4), {"num_layers": 5}, {"every": 1}, pp=3, **FP64),
    Case("three ranks, six stages", (6,), {"num_layers": 6}, {"every": 1}, pp=3, stages_per_rank=2, **FP64),
]


def batches_of(number: int, seed: int, rows: int = 2) -> list[Batch]:
    """Micro-batches of different content, and of different numbers of targets; some rows end in padding."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for i in range(number):
        ids, targets = (torch.randint(VOCAB, (rows, S), generator=rng) for _ in range(2))
        valid = torch.ones(rows, S, dtype=torch.bool)
        valid[-1, S - i :] = False
        documents = (torch.arange(S) >= 4).long().expand(rows, S).clone() if i % 2 else torch.zeros_like(ids)
        found.append(Batch(ids, torch.where(valid, targets, IGNORE), valid, documents, torch.zeros_like(ids)))
    return found


def build(case: Case) -> Decoder:
    torch.set_default_dtype(case.dtype)
    try:
        model = build_model(case.config, seed=5)
    finally:
        torch.set_default_dtype(torch.float32)
    model.compute_dtype = case.compute
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.mul_(10)
    return model.train()


class Losses:
    """The losses of a step, and each one said: "lm" of every micro-batch, the balancing loss of every sparse layer in it."""

    def __init__(self, config: ModelConfig, batches: list[Batch]) -> None:
        self.config, self.number = config, len(batches)
        self.targets = sum(int((b.targets_BS != IGNORE).sum()) for b in batches)
        self.said: dict[str, float] = {}

    def __call__(self, micro: int, batch: Batch, output: Any) -> Tensor | None:
        parts, moe = [], self.config.moe
        assert moe is not None
        for layer, plan in output.plans.items():
            total, _ = balance_loss(plan, moe.losses, LossContext(len(batch.ids_BS)))
            parts.append(total / len(self.config.moe_layers) / self.number)
            self.said[f"{micro}: balance of {layer}"] = total.item()
        if output.logits is not None:
            logits_TV = output.logits.flatten(0, 1).to(torch.promote_types(output.logits.dtype, torch.float32))
            lm = F.cross_entropy(logits_TV, batch.targets_BS.flatten(), ignore_index=IGNORE, reduction="sum")
            parts.append(lm / self.targets)
            self.said[f"{micro}: lm"] = lm.item()
        for depth in output.depth.values():
            parts.append(depth.weight_N.square().mean() + depth.gate.extra["predicted_T"].square().mean())
        return torch.stack([p.to(parts[0].dtype) for p in parts]).sum() if parts else None


def alone(model: Decoder, batches: list[Batch]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and losses of one process."""
    losses = Losses(model.config, batches)
    for micro, batch in enumerate(batches):
        loss = losses(micro, batch, model(batch.ids_BS, **side_inputs(batch)))
        assert loss is not None
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients, losses.said


def evaluated(model: Decoder, batches: list[Batch]) -> dict[str, Tensor]:
    """What evaluation sees, by name."""
    found: dict[str, Tensor] = {}
    keep = _keeper(found)
    with torch.no_grad():
        for micro, batch in enumerate(batches):
            output = model(batch.ids_BS, **side_inputs(batch))
            keep(micro, batch, StageOutput(output.logits, output.plans, output.depth))
    return found


def _keeper(found: dict[str, Tensor]) -> Callable[[int, Batch, StageOutput], None]:
    def keep(micro: int, batch: Batch, output: StageOutput) -> None:
        assert not torch.is_grad_enabled()
        if output.logits is not None:
            found[f"{micro}: logits"] = output.logits
        for layer, plan in output.plans.items():
            found[f"{micro}: load of {layer}"] = plan.counts_E

    return keep


def apart(value: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest entry."""
    return float((value - wanted).abs().max() / wanted.abs().max())


def compare(case: Case, world: World) -> dict[str, Tensor]:
    """Relative errors of what is on this rank; names of what is; and counts, all prefixed by the case."""
    whole, model, group = build(case), build(case), world["pp"]
    ranges = split_stages(case.config, case.pp, case.stages_per_rank)
    take_stages(model, ranges, case.pp, group.index)
    if case.recompute:
        recompute_activations(model)
    pipeline = Pipeline(model, ranges, group)
    routed = [0]
    for layer in model.moe_layers().values():
        layer.router.register_forward_hook(lambda *_: routed.__setitem__(0, routed[0] + 1))
    worst = dict.fromkeys(["gradient", "loss", "norm", "evaluation", "routed", "bytes"], 0.0)
    for step, number in enumerate(case.numbers):
        batches = batches_of(number, seed=step)
        gradients, said = alone(whole, batches)
        losses = Losses(case.config, batches)
        routed[0], _ = 0, world.watch.take()
        pipeline.run(batches, losses)
        worst["routed"] += abs(routed[0] - number * len(model.moe_layers()))
        sent = world.watch.take()[WHAT].sent_bytes
        size = batches[0].ids_BS.numel() * 16 * (case.compute or case.dtype).itemsize
        messages = sum((not stage.is_last) + (not stage.is_first) for stage in pipeline.stages)
        worst["bytes"] += abs(sent - number * messages * size)

        square = torch.zeros((), dtype=torch.float64)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            worst["gradient"] = max(worst["gradient"], apart(parameter.grad, gradients[name]))
            if name not in pipeline.copies:
                square += parameter.grad.double().square().sum()
        group.all_reduce(square, what="norm")
        norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum()
        worst["norm"] = max(worst["norm"], float((square - norm).abs() / norm))
        for name, value in losses.said.items():
            worst["loss"] = max(worst["loss"], abs(value - said[name]) / abs(said[name]))
        lm = torch.tensor(sum(v for n, v in losses.said.items() if n.endswith("lm")), dtype=torch.float64)
        lm_alone = sum(v for n, v in said.items() if n.endswith("lm"))
        worst["loss"] = max(worst["loss"], float((pipeline.from_last(lm) - lm_alone).abs() / lm_alone))
        model.zero_grad(set_to_none=True)

        model.eval()  # validation between steps, of more batches than flow at once, and of another size at the end
        whole.eval()
        texts = [*batches_of(4 * case.pp + 1, seed=50), *batches_of(1, seed=51, rows=1)]
        found: dict[str, Tensor] = {}
        pipeline.forward(texts, _keeper(found))
        wanted = evaluated(whole, texts)
        for name, seen in found.items():
            worst["evaluation"] = max(worst["evaluation"], apart(seen, wanted[name]))
        model.train()
        whole.train()
    answer = {f"{case.name}: {what}": torch.tensor(value) for what, value in worst.items()}
    names = {f"{case.name} holds {name}": torch.tensor(1) for name, _ in model.named_parameters()}
    said_here = {f"{case.name} says {name}": torch.tensor(1) for name in [*losses.said, *found]}
    return answer | names | said_here


def work(rank: int, cases: list[Case]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    world = World(Layout.of(ParallelConfig(pp=cases[0].pp), cases[0].pp), rank)
    for case in cases:
        found |= compare(case, world)
    return found if len(world["pp"].ranks) > 2 else found | fail(world)


def fail(world: World) -> dict[str, Tensor]:
    """A mistake on the last stage comes out as it is. (By hand the other rank is given the gradient it waits for.)"""
    case, group = Case("", (1,), {"tie_embeddings": False}), world["pp"]
    model, batches = build(case), batches_of(1, 0)
    ranges = split_stages(case.config, 2)
    take_stages(model, ranges, 2, group.index)
    pipeline = Pipeline(model, ranges, group)
    if group.index == 0:
        pipeline.run(batches, Losses(case.config, batches))
        return {}

    def refuse(micro: int, batch: Batch, output: StageOutput) -> None:
        raise ConfigError(f"micro-batch {micro} is unwell")

    with pytest.raises(ConfigError, match=r"^micro-batch 0 is unwell$"):
        pipeline.run(batches, refuse)
    dist.send(torch.zeros(2, S, 16), group.ranks[0], group=group.handle)
    return {"refused": torch.tensor(True)}


def check(case: Case, answers: list[dict[str, Tensor]]) -> None:
    limit = 1e-12 if case.dtype == torch.float64 else 1e-6
    for answer in answers:
        found = {
            name.removeprefix(f"{case.name}: "): float(v)
            for name, v in answer.items()
            if name.startswith(case.name + ":")
        }
        assert found.pop("routed") == found.pop("bytes") == 0
        assert max(found.values()) < limit, found
    holders: dict[str, int] = {}
    said: list[str] = []
    for answer in answers:
        for key in answer:
            if key.startswith(f"{case.name} holds "):
                name = key.removeprefix(f"{case.name} holds ")
                holders[name] = holders.get(name, 0) + 1
            elif key.startswith(f"{case.name} says "):
                said.append(key.removeprefix(f"{case.name} says "))
    model = build(case)
    assert set(holders) == {name for name, _ in model.named_parameters()}
    twice = {name for name, number in holders.items() if number == 2}
    assert twice == ({"embedding.weight"} if case.config.tie_embeddings else set())
    assert max(holders.values()) <= 2
    layers = case.config.moe_layers
    wanted = [f"{i}: {what}" for i in range(case.numbers[-1]) for what in ["lm", *(f"balance of {n}" for n in layers)]]
    wanted += [f"{i}: {what}" for i in range(4 * case.pp + 2) for what in ["logits", *(f"load of {n}" for n in layers)]]
    assert sorted(said) == sorted(wanted)  # each thing on one rank


def test_two_ranks_equal_one_process() -> None:
    answers = run_distributed(2, work, CASES_OF_2)
    assert answers[1].pop("refused")
    for case in CASES_OF_2:
        check(case, answers)


@pytest.mark.slow
def test_three_ranks_equal_one_process() -> None:
    answers = run_distributed(3, work, CASES_OF_3)
    for case in CASES_OF_3:
        check(case, answers)


def work_sharded(rank: int, stages_per_rank: int) -> dict[str, Tensor]:
    """Two ranks of a pipeline times two with half of the rows each, stages sharded over the latter."""
    world = World(Layout.of(ParallelConfig(pp=2), 4), rank)
    dp = world["dp"]
    case = Case("", (4,), {}, {"every": 1, "losses": {}}, stages_per_rank=stages_per_rank, **FP64)
    whole, model = build(case), build(case)
    ranges = split_stages(case.config, 2, stages_per_rank)
    take_stages(model, ranges, 2, world["pp"].index)
    pipeline = Pipeline(model, ranges, world["pp"])
    for stage in pipeline.stages:
        for unit in [*stage.blocks, stage]:
            sharded: Any = fully_shard(unit, mesh=world.mesh("dp", "cpu"))
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
    worst = 0.0
    for step in range(2):
        batches = batches_of(4, seed=step, rows=4)
        gradients, _ = alone(whole, batches)
        shares = [Batch(*(getattr(b, f.name).tensor_split(2)[dp.index] for f in fields(b))) for b in batches]
        pipeline.run(shares, Losses(case.config, batches))
        for name, parameter in model.named_parameters():
            assert isinstance(parameter.grad, DTensor), name
            worst = max(worst, apart(parameter.grad.full_tensor(), gradients[name]))
        model.zero_grad(set_to_none=True)
        pipeline.forward(shares, lambda *_: None)  # which leaves no trace in the next step
    return {"worst": torch.tensor(worst)}


@pytest.mark.slow
@pytest.mark.parametrize("stages_per_rank", [1, 2])
def test_stages_may_be_sharded(stages_per_rank: int) -> None:
    assert max(float(answer["worst"]) for answer in run_distributed(4, work_sharded, stages_per_rank)) < 1e-12


def lone_rank(tied: bool = True) -> Pipeline:
    """The first of two ranks, without the other."""
    model = build(Case("", (), {"tie_embeddings": tied}))
    ranges = split_stages(model.config, 2)
    take_stages(model, ranges, 2, 0)
    return Pipeline(model, ranges, Group("pp", (0, 1), 0, None, Watch()))


def test_micro_batches_of_different_shapes_are_refused() -> None:
    batches = [*batches_of(1, 0), *batches_of(1, 1, rows=1)]
    with pytest.raises(ConfigError, match=r"must have one shape, and this step's are 1x8 and 2x8 \(rows x positions\)"):
        lone_rank().run(batches, lambda *_: None)


def test_a_tied_gradient_is_summed_once() -> None:
    pipeline = lone_rank()
    weight = pipeline.model.embedding.weight
    weight.grad = torch.zeros_like(weight)
    with pytest.raises(ValueError, match="of an earlier run"):
        pipeline.run(batches_of(2, 0), lambda *_: None)


def test_interleaved_stages_want_whole_rounds() -> None:
    for number in (4, 8):
        check_micro_batches(number, 4, 2)
    check_micro_batches(3, 4)
    for number, better in ((3, 4), (6, 8), (1, 4)):
        with pytest.raises(
            ConfigError, match=rf"accumulate={number} is no multiple of it; choose accumulate={better},"
        ):
            check_micro_batches(number, 4, 2)
