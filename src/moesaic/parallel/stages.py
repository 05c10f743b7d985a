"""Pipeline stages: which blocks each holds, what a rank keeps of a model, and a stage as a module that computes its part.

    stage   0        1        2        3           pp=2, two stages per rank: rank 0 holds 0 and 2, rank 1 holds 1 and 3
    blocks  0 1      2 3      4 5      6
            embed                      norm, head

A rank keeps its blocks in the same ``Decoder`` under the same names, so optimisers, checkpoints and norms go by name as ever. A
tied matrix lies on the first and on the last stage, both under the embedding's name.

Every rank of a pipeline has the whole micro-batch of its dp index, so positions, masks, labels and targets are made where they
are needed and only activations travel. What a stage adds to the loss (balancing, its routers' own) joins the graph where the
activations leave it (``with_loss``), so that schedules need not know of it.

Legend: B rows, S positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.data.packing import Batch
from moesaic.errors import ConfigError
from moesaic.experts.layer import MoE
from moesaic.models.block import Block
from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder
from moesaic.models.depth import DepthBlock
from moesaic.models.inputs import side_inputs
from moesaic.plan.plan import RoutingPlan, SoftPlan


@dataclass(frozen=True, eq=False)
class StageOutput:
    """What one stage's forward led to; the fields of ``models.Output`` as far as they are here.

    Attributes:
        logits: (B, S, V), of the last stage; None on the others.
        plans, depth: of the stage's own layers, by index in the whole model.
    """

    logits: Tensor | None
    plans: Mapping[int, RoutingPlan | SoftPlan]
    depth: Mapping[int, RoutingPlan]


# (number of the micro-batch, the micro-batch, what came out) -> the loss this stage adds; None where it adds nothing.
LossOf = Callable[[int, Batch, StageOutput], Tensor | None]


def split_stages(config: ModelConfig, pp: int, stages_per_rank: int = 1) -> tuple[range, ...]:
    """The blocks of every stage, in order; stage s lies on rank ``s % pp`` of a pipeline.

    The costliest stage, by the parameters that a token meets, is as cheap as can be, the head counted with the last block;
    among such splits shares are near equal. Raises ``ConfigError`` where there are more stages than blocks.
    """
    stages = pp * stages_per_rank
    if stages > config.num_layers:
        raise ConfigError(
            f"parallel.pp={pp} with stages_per_rank={stages_per_rank} makes {stages} pipeline stages of a model of "
            f"{config.num_layers} blocks, and each needs at least one; lower them to {config.num_layers} stages at most."
        )
    model = build_model(config, device="meta")
    costs = [_cost(block) for _, block in model.layers()]
    costs[-1] += model.head.weight.numel()
    bounds = cut_evenly(costs, stages)
    return tuple(range(start, stop) for start, stop in pairwise(bounds))


def _cost(block: Block) -> int:
    """Parameters a token meets, which is half the FLOPs of its products."""
    ffn = block.ffn
    cost = sum(p.numel() for p in block.attention.parameters())
    cost += ffn.active_parameters() if isinstance(ffn, MoE) else sum(p.numel() for p in ffn.parameters())
    return round(cost * block.depth.capacity) if isinstance(block, DepthBlock) else cost


def cut_evenly(costs: Sequence[int], parts: int) -> list[int]:
    """Bounds (parts + 1 of them) of consecutive, non-empty runs whose largest sum is least; near equal shares among those."""
    total = [0, *accumulate(costs)]
    n = len(costs)
    low, high = max(costs), total[n]
    while low < high:  # the least limit under which greedy runs suffice
        limit = (low + high) // 2
        if len(_from_the_end(total, limit)) - 1 <= parts:
            high = limit
        else:
            low = limit + 1
    greedy = _from_the_end(total, low)  # may need fewer parts; further cuts make no run larger
    earliest = [0] * (
        parts + 1 - len(greedy)
    ) + greedy  # where a part may begin so that those behind it suffice for the rest
    bounds = [0]
    for i in range(1, parts):
        first = max(earliest[i], bounds[-1] + 1)
        last = max(b for b in range(first, n - (parts - i) + 1) if total[b] - total[bounds[-1]] <= low)
        bounds.append(min(range(first, last + 1), key=lambda b: abs(total[b] * parts - total[n] * i)))
    return [*bounds, n]


def _from_the_end(total: Sequence[int], limit: int) -> list[int]:
    """Bounds of runs of at most ``limit``, each as long as can be, filled from the end."""
    bounds = [len(total) - 1]
    while bounds[0]:
        begin = bounds[0] - 1
        while begin and total[bounds[0]] - total[begin - 1] <= limit:
            begin -= 1
        bounds.insert(0, begin)
    return bounds


def check_stages(model: Decoder, ranges: Sequence[range]) -> None:
    """Raises ``ConfigError`` where a layer needs to know what only another stage knows. A model on the meta device will do."""
    stage_of = {layer: stage for stage, layers in enumerate(ranges) for layer in layers}
    sparse, moe = model.moe_layers(), model.config.moe
    before: int | None = None
    for layer, ffn in sparse.items():
        facts, where = ffn.router.facts, f'Router "{moe.router.name}" of block {layer}' if moe else ""
        if facts.reads_previous and before is not None and stage_of[before] != stage_of[layer]:
            raise ConfigError(
                f"{where} reads what that of block {before} decided, which lies on another pipeline stage, and between stages "
                "only activations travel; set parallel.pp=1, or choose another router."
            )
        if facts.reads_loss and stage_of[layer] != len(ranges) - 1:
            raise ConfigError(
                f"{where} learns from the loss of every token, which only the last pipeline stage knows, and the block is on "
                f"stage {stage_of[layer]} of {len(ranges)}; set parallel.pp=1, or choose another router."
            )
        before = layer
    if moe is not None and moe.gating_dropout and len({stage_of[layer] for layer in sparse}) > 1:
        raise ConfigError(
            f"model.moe.gating_dropout={moe.gating_dropout} draws once for all sparse layers, and those of this model lie on "
            "several pipeline stages; set it to 0, or parallel.pp=1."
        )


def take_stages(model: Decoder, ranges: Sequence[range], pp: int, index: int) -> None:
    """Keep of a whole model what rank ``index`` of ``pp`` computes, in place; the rest is freed. Names stay."""
    check_stages(model, ranges)
    layers = [layer for stage in range(index, len(ranges), pp) for layer in ranges[stage]]
    model.keep(layers, embedding=index == 0, head=index == pp - 1)


class Stage(nn.Module):
    """One stage of a model that ``take_stages`` has cut: from ids or activations to activations, or on the last to the loss.

    Its modules are the model's own; they are children of it so that FSDP can take a stage as one unit.

    Args:
        layers: its blocks. index, count: number of the stage, and of all.

    Attributes:
        batches, loss_of: what it computes now; set by whoever drives it.
    """

    def __init__(self, model: Decoder, layers: range, index: int, count: int) -> None:
        super().__init__()
        self.layers, self.index = layers, index
        self.is_first, self.is_last = index == 0, index == count - 1
        self.blocks = nn.ModuleList(block for layer, block in model.layers() if layer in layers)
        if self.is_first or (self.is_last and model.config.tie_embeddings):
            self.embedding = model.embedding
        if self.is_last:
            self.norm, self.head = model.norm, model.head
        self._whole = (model,)  # in a tuple, which hides it from the tree of modules
        self.batches: Sequence[Batch] = ()
        self.loss_of: LossOf | None = None

    def forward(self, *received: Tensor, micro: int) -> Tensor:
        """(B, S, D) activations of micro-batch ``micro`` for the next stage, from those of the stage before (none for the
        first); of the last stage its loss, a scalar.
        """
        (model,) = self._whole
        assert self.loss_of is not None
        batch = self.batches[micro]
        ids_BS, attention, tokens = model.read(batch.ids_BS, **side_inputs(batch))  # type: ignore[arg-type]
        x_BSD, plans, depth = model.through(
            model.embed(ids_BS) if self.is_first else received[0], attention, tokens, self.layers
        )
        logits_BSV = model.predict(x_BSD) if self.is_last else None
        loss = self.loss_of(micro, batch, StageOutput(logits_BSV, plans, depth))
        if self.is_last:
            return x_BSD.new_zeros(()) if loss is None else loss
        if x_BSD.dtype != model.compute_dtype:  # the next stage would read the bytes as something else
            raise ValueError(f"block {self.layers[-1]} gives {x_BSD.dtype}, not {model.compute_dtype}")
        return (x_BSD if loss is None else with_loss(x_BSD, loss)).contiguous()


def with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """``x``, and whoever takes its gradient takes that of ``loss`` (a scalar) too, as if it had been added to the loss."""
    joined: Tensor = _WithLoss.apply(x, loss)
    return joined


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return x.detach()  # the same numbers; a view would make FSDP warn of changes in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return grad, torch.ones((), dtype=dtype, device=device)
