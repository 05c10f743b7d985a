"""What one optimiser step did, layer by layer: taken from the plans of its forwards, added up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
def take_statistics(reading: StepReading, model: Decoder, plans: Mapping[int, RoutingPlan | SoftPlan]) -> None:
    """Add up what the layers want to know of every micro-batch when the step is over."""
    sparse = model.moe_layers()
    for layer, plan in plans.items():
        sums = reading.layers[layer].sums
        for name, value in sparse[layer].statistics(plan).items():
            sums[name] = sums[name] + value if name in sums else value


def over_ranks(reading: StepReading, world: World) -> StepReading:
    """The reading of the whole batch and of all pipeline stages, the same on every rank: one sum over dp, then what every stage
    has to tell. A layer of another stage comes without ``sums``, which are for the layer itself.

    Losses from plans are those of the whole batch on every rank, so only stages are added.
    """
    lm = torch.tensor([reading.lm_loss], dtype=torch.float64)
    world["dp"].all_reduce(lm, what="loss of the step")
    whole = float(lm[0])
    found = StepReading(
        loss=reading.loss - reading.lm_loss + whole,
        lm_loss=whole,
        losses=dict(reading.losses),
        targets=reading.targets,
        layers={layer: _summed(mine, world["dp"]) for layer, mine in sorted(reading.layers.items())},
        depth={layer: _summed(mine, world["dp"]) for layer, mine in sorted(reading.depth.items())},
    )
    if world["pp"].size == 1:
        return found
    told = world["pp"].values(_told(found), what="readings of all stages")
    found.loss, found.lm_loss = (sum(stage[name] for stage in told) for name in ("loss", "lm_loss"))
    names = dict.fromkeys(name for stage in told for name in stage["losses"])
    found.losses = {name: sum(stage["losses"].get(name, 0.0) for stage in told) for name in names}
    for kind, mine in (("layers", found.layers), ("depth", found.depth)):
        for layer, (load, *figures) in sorted((int(i), row) for stage in told for i, row in stage[kind].items()):
            mine.setdefault(layer, LayerReading(torch.tensor(load), *figures))
    found.layers, found.depth = (dict(sorted(mine.items())) for mine in (found.layers, found.depth))
    return found


def _told(found: StepReading) -> dict[str, Any]:
    """What a stage tells the others, as JSON data."""

    def rows(readings: dict[int, LayerReading]) -> dict[str, list[Any]]:
        return {
            str(layer): [r.load_E.tolist(), r.dropped, r.entropy, r.margin, r.tokens, r.computed]
            for layer, r in readings.items()
        }

    return {
        "loss": found.loss,
        "lm_loss": found.lm_loss,
        "losses": found.losses,
        "layers": rows(found.layers),
        "depth": rows(found.depth),
    }


def _summed(mine: LayerReading, group: Group) -> LayerReading:
    """One layer's reading over a group of ranks that all have the layer."""
    if group.size == 1:
        return mine
    names = sorted(mine.sums)
    tensors = [mine.sums[name] for name in names]
    E, device = len(mine.load_E), mine.load_E.device
    # fp64 holds counts exactly.
    figures = torch.tensor(
        [mine.dropped, mine.entropy, mine.margin, mine.tokens, mine.computed], dtype=torch.float64, device=device
    )
    sent = torch.cat([figures, mine.load_E.double(), *(t.double().reshape(-1) for t in tensors)])
    group.all_reduce(sent, what="load of the step")
    figures, load_E, *rest = sent.split([5, E, *(t.numel() for t in tensors)])
    sums = {
        name: (part if t.is_floating_point() else part.round()).to(t.dtype).view_as(t)
        for name, t, part in zip(names, tensors, rest, strict=True)
    }
    dropped, entropy, margin, tokens, computed = figures.tolist()
    return LayerReading(load_E.round().to(mine.load_E.dtype), dropped, entropy, margin, tokens, computed, sums)
