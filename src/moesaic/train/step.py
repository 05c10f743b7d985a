"""One optimiser step: losses from plans, gradients over micro-batches, the update, and what was measured on the way.

Every figure of a step comes from the plans its forwards returned. With several micro-batches the language-model loss is
the mean over all target tokens of the step (not the mean of means), balancing losses are averaged over micro-batches and
layers, and load is one histogram per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moesaic.data.packing import IGNORE, Batch
from moesaic.models.config import MoEConfig
from moesaic.models.decoder import Decoder
from moesaic.models.output import Output
from moesaic.plan import read
from moesaic.plan.plan import RoutingPlan, SoftPlan
from moesaic.routing import LossContext, Outcome, StepStats, balance_loss
from moesaic.train.guard import check_finite
from moesaic.train.loss import cross_entropy

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


def forward(model: Decoder, batch: Batch) -> Output:
    """The model on a packed batch; masks that would say nothing are left out, which keeps attention on its fast path."""
    valid_BS = None if bool(batch.valid_BS.all()) else batch.valid_BS
    documents_BS = batch.document_BS if bool((batch.document_BS[:, :1] != batch.document_BS).any()) else None
    return model(batch.ids_BS, valid_BS=valid_BS, document_BS=documents_BS, task_BS=batch.label_BS)  # type: ignore[no-any-return]


def lm_losses(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """fp32 (T,): cross entropy of each position in nats, 0 where there is no target."""
    return cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())


def train_step(
    model: Decoder, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], *, lr: float, clip: float, step: int
) -> tuple[StepReading, Plans]:
    """One update from ``batches`` (micro-batches). Returns the reading and the last micro-batch's plans.

    Raises ``NonFiniteError`` naming the layer, before the update, if the loss or the gradient is not finite.
    """
    model.train()
    moe = model.config.moe
    reading = StepReading(targets=sum(int((b.targets_BS != IGNORE).sum()) for b in batches))
    plans: Plans = {}
    for batch in batches:
        output = forward(model, batch)
        plans = output.plans
        token_loss_T = lm_losses(output.logits, batch.targets_BS)
        loss = token_loss_T.sum() / max(reading.targets, 1)
        reading.lm_loss += loss.item()
        take_reading(reading.layers, plans)
        take_reading(reading.depth, output.depth)
        take_statistics(reading, model, plans)
        for name, value in own_losses(model, output, token_loss_T).items():
            loss = loss + value / len(batches)
            reading.losses[name] = reading.losses.get(name, 0.0) + value.item() / len(batches)
        if moe is not None and plans and moe.losses:
            extra, values = _balance(plans, moe, reading, batch, step)
            loss = loss + extra / len(batches)
            for name, mean in values.items():
                reading.losses[name] = reading.losses.get(name, 0.0) + mean / len(batches)
        reading.loss += loss.item()
        loss.backward()  # type: ignore[no-untyped-call]
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    reading.grad_norm = norm.item()
    # Before clipping: scaling by a NaN norm would make every gradient NaN and hide where it began.
    check_finite(model, reading.loss, reading.grad_norm, step, lambda: [forward(model, batch) for batch in batches])
    # A norm within the limit would multiply every gradient by 1, one more pass over memory.
    if clip > 0 and float(clip / (norm + 1e-6)) < 1:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    after_step(model, reading)
    for layer, sparse in model.moe_layers().items():
        sparse.router.observe(plans[layer].detach(), outcome_of(plans, layer, token_loss_T))
    return reading, plans


def own_losses(model: Decoder, output: Output, token_loss_T: Tensor) -> dict[str, Tensor]:
    """Losses that only the routers themselves have, those of depth included, by name, summed over layers."""
    totals: dict[str, Tensor] = {}
    inside = {layer: sparse.router for layer, sparse in model.moe_layers().items()}
    for routers, plans in ((inside, output.plans), (model.depth_routers(), output.depth)):
        for layer, plan in plans.items():
            outcome = outcome_of(plans, layer, token_loss_T)
            for name, value in routers[layer].own_losses(plan, outcome).items():
                totals[name] = totals[name] + value if name in totals else value
    return totals


def outcome_of(plans: Mapping[int, RoutingPlan | SoftPlan], layer: int, token_loss_T: Tensor) -> Outcome:
    """What the forward led to, per token of the layer's plan: multi-head layers route several sub-tokens of each position."""
    heads = plans[layer].num_tokens // max(len(token_loss_T), 1)
    return Outcome(token_loss_T.detach().repeat_interleave(heads), len(plans))


def after_step(model: Decoder, reading: StepReading) -> None:
    """Tell every sparse layer and every depth router what the step did."""
    shares = [float(r.load_E.sum()) / max(r.tokens * len(r.load_E), 1.0) for r in reading.layers.values()]
    for layer, sparse in model.moe_layers().items():
        mine = reading.layers[layer]
        stats = StepStats(
            mine.load_E,
            int(mine.tokens),
            sum(shares) / len(shares),
            int(mine.dropped),
            mean_token_loss=reading.lm_loss,
            sums=mine.sums,
        )
        sparse.after_step(stats)
    for layer, depth in model.depth_routers().items():
        mine = reading.depth[layer]
        share = float(mine.load_E.sum()) / max(mine.tokens, 1.0)
        depth.after_step(StepStats(mine.load_E, int(mine.tokens), share, mean_token_loss=reading.lm_loss))


def _balance(
    plans: Plans, moe: MoEConfig, reading: StepReading, batch: Batch, step: int
) -> tuple[Tensor, dict[str, float]]:
    """Weighted balancing losses averaged over layers, and each one's unweighted mean."""
    totals, values = [], dict.fromkeys(moe.losses, 0.0)
    for layer, plan in plans.items():
        counts_E = reading.layers[layer].load_E  # this step's micro-batches so far, this one included
        ctx = LossContext(batch.ids_BS.shape[0], moe.loss_scope, counts_E, batch.label_BS.flatten(), step)
        total, parts = balance_loss(plan, moe.losses, ctx, moe.loss_options)
        totals.append(total)
        for name, value in parts.items():
            values[name] += value.item() / len(plans)
    return torch.stack(totals).mean(), values


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
