"""What one optimiser step did, layer by layer: taken from the plans of its forwards, added up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moesaic.models.decoder import Decoder
from moesaic.parallel.comm import Group
from moesaic.parallel.world import World
from moesaic.plan import read
from moesaic.plan.plan import RoutingPlan, SoftPlan

Plans = dict[int, RoutingPlan | SoftPlan]


@dataclass
class LayerReading:
    """What one sparse layer did during one step, summed over micro-batches; ``sums`` is for the layer itself."""

    load_E: Tensor
    dropped: float = 0.0
    entropy: float = 0.0
    margin: float = 0.0
    tokens: float = 0.0
    computed: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class StepReading:
    """The figures of one step. Lists have one entry per sparse layer.

    Attributes:
        loss: language-model loss plus weighted balancing losses and the routers' own.
        lm_loss: nats per target token.
        losses: unweighted balancing losses, averaged over layers; the routers' own losses, weighted and summed over layers.
        grad_norm: global norm before clipping.
        depth: readings of Mixture-of-Depths blocks, by layer.
    """

    loss: float = 0.0
    lm_loss: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    targets: int = 0
    layers: dict[int, LayerReading] = field(default_factory=dict)
    depth: dict[int, LayerReading] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """The balance fields of a metrics record."""
        layers = self.layers.values()
        chosen = [max(int(r.load_E.sum()), 1) for r in layers]
        tokens = [max(r.tokens, 1.0) for r in layers]
        return {
            "load": [read.logged_load(r.load_E).tolist() for r in layers],
            "max_vio": [float(read.max_violation(r.load_E)) for r in layers],
            "drop_rate": [r.dropped / c for r, c in zip(layers, chosen, strict=True)],
            "entropy": [r.entropy / t for r, t in zip(layers, tokens, strict=True)],
            "margin": [r.margin / t for r, t in zip(layers, tokens, strict=True)],
            "per_token": [r.computed / t for r, t in zip(layers, tokens, strict=True)],
            **({"depth_share": [r.computed / max(r.tokens, 1.0) for r in self.depth.values()]} if self.depth else {}),
        }


def take_reading(readings: dict[int, LayerReading], plans: Mapping[int, RoutingPlan | SoftPlan]) -> None:
    """Add one forward's plans to the step's reading of each layer, in place."""
    for layer, plan in plans.items():
        load_E = read.load(plan)
        tokens = float(plan.num_tokens if plan.valid_T is None else plan.valid_T.sum())
        mine = readings.setdefault(layer, LayerReading(torch.zeros_like(load_E)))
        mine.load_E = mine.load_E + load_E
        mine.dropped += float(plan.dropped) if isinstance(plan, RoutingPlan) else 0.0
        mine.computed += float(plan.counts_E.sum())
        mine.entropy += float(read.router_entropy(plan)) * tokens
        mine.margin += float(read.margin(plan)) * tokens
        mine.tokens += tokens


@torch.no_grad()
def take_statistics(reading: StepReading, model: Decoder, plans: Plans) -> None:
    """Add up what the layers want to know of every micro-batch when the step is over."""
    sparse = model.moe_layers()
    for layer, plan in plans.items():
        sums = reading.layers[layer].sums
        for name, value in sparse[layer].statistics(plan).items():
            sums[name] = sums[name] + value if name in sums else value


def over_ranks(reading: StepReading, world: World, sizes: Mapping[int, int]) -> StepReading:
    """The reading of the whole batch and of all pipeline stages, the same on every rank: one sum over dp, one over pp.

    Everything travels as fp64, which holds counts exactly. A layer of another stage comes without ``sums``, which are for the
    layer itself. Losses from plans are those of the whole batch on every rank, so only stages are added.

    Args:
        sizes: entries of ``load_E`` of every sparse layer of the model.
    """
    layers = {layer: _summed(mine, world["dp"]) for layer, mine in sorted(reading.layers.items())}
    depth = {layer: _summed(mine, world["dp"]) for layer, mine in sorted(reading.depth.items())}
    lm = torch.tensor([reading.lm_loss], dtype=torch.float64)
    world["dp"].all_reduce(lm, what="loss of the step")
    balance = reading.loss - reading.lm_loss
    names = sorted(reading.losses)
    if world["pp"].size > 1:
        parts = [_flat(layers.get(layer), E) for layer, E in sorted(sizes.items())]
        values = torch.tensor([balance, *(reading.losses[name] for name in names)], dtype=torch.float64)
        sent = torch.cat([lm, values, *parts])
        world["pp"].all_reduce(sent, what="readings of all stages")
        head, *rows = sent.split([2 + len(names), *(E + 5 for _, E in sorted(sizes.items()))])
        lm, balance = head[:1], float(head[1])
        found = dict(zip(names, head[2:].tolist(), strict=True))
        for (layer, _), row in zip(sorted(sizes.items()), rows, strict=True):
            if layer not in layers:
                layers[layer] = LayerReading(row[5:].round().long(), *row[:5].tolist())
        reading.losses = found
    whole = float(lm[0])
    return StepReading(
        loss=whole + balance,
        lm_loss=whole,
        losses=reading.losses,
        grad_norm=reading.grad_norm,
        targets=reading.targets,
        layers=dict(sorted(layers.items())),
        depth=depth,
    )


def _flat(mine: LayerReading | None, size: int) -> Tensor:
    """fp64 (5 + E,): figures, then load; zeros for a layer that is elsewhere."""
    if mine is None:
        return torch.zeros(size + 5, dtype=torch.float64)
    figures = torch.tensor([mine.dropped, mine.entropy, mine.margin, mine.tokens, mine.computed], dtype=torch.float64)
    return torch.cat([figures, mine.load_E.double().cpu()])


def _summed(mine: LayerReading, group: Group) -> LayerReading:
    """One layer's reading over a group of ranks that all have the layer."""
    if group.size == 1:
        return mine
    names = sorted(mine.sums)
    tensors = [mine.sums[name] for name in names]
    E, device = len(mine.load_E), mine.load_E.device
    sent = torch.cat([_flat(mine, E).to(device), *(t.double().reshape(-1) for t in tensors)])
    group.all_reduce(sent, what="load of the step")
    figures, load_E, *rest = sent.split([5, E, *(t.numel() for t in tensors)])
    sums = {
        name: (part if t.is_floating_point() else part.round()).to(t.dtype).view_as(t)
        for name, t, part in zip(names, tensors, rest, strict=True)
    }
    return LayerReading(load_E.round().to(mine.load_E.dtype), *figures.tolist(), sums=sums)
