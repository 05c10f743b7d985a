"""One optimiser step: losses from plans, gradients over micro-batches, the update, and what was measured on the way.

Every figure of a step comes from the plans its forwards returned. With several micro-batches the language-model loss is
the mean over all target tokens of the step (not the mean of means), balancing losses are averaged over micro-batches and
layers, and load is one histogram per layer.

On several processes (``spread``) each computes its share of every micro-batch's rows. Losses are those of the whole batch:
sums over all ranks over counts over all ranks, so gradients are plain sums, and the step is that of one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moesaic.data.packing import IGNORE, Batch
from moesaic.models.decoder import Decoder
from moesaic.models.inputs import side_inputs
from moesaic.models.output import Output
from moesaic.parallel.agree import Agreement
from moesaic.parallel.apply import Spread
from moesaic.parallel.gradients import local
from moesaic.parallel.stages import StageOutput
from moesaic.plan.peers import ALONE, Peers
from moesaic.plan.plan import RoutingPlan, SoftPlan
from moesaic.routing import LossContext, Outcome, Router, StepStats, balance_loss
from moesaic.train.guard import check_finite
from moesaic.train.loss import cross_entropy
from moesaic.train.reading import Plans, StepReading, over_ranks, take_reading, take_statistics


def forward(model: Decoder, batch: Batch) -> Output:
    """The model on a packed batch."""
    output: Output = model(batch.ids_BS, **side_inputs(batch))
    return output


def lm_losses(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """fp32 (T,): cross entropy of each position in nats, 0 where there is no target."""
    return cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())


def train_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    lr: float,
    clip: float,
    step: int,
    spread: Spread | None = None,
    agreement: Agreement | None = None,
) -> tuple[StepReading, Plans]:
    """One update from ``batches`` (micro-batches). Returns the reading and the last micro-batch's plans, of this rank's share.

    Args:
        spread: the model is this rank's part of one; ``batches`` are its share of the rows.
        agreement: with the other ranks, on refusing the step.

    Raises ``NonFiniteError`` naming the layer, before the update, if the loss or the gradient is not finite.
    """
    model.train()
    losses = StepLosses(model, batches, step, spread)
    if spread is not None:
        spread.begin_step()
    pipeline = None if spread is None else spread.pipeline
    if pipeline is not None:
        pipeline.run(batches, losses.of)
    else:
        for i, batch in enumerate(batches):
            output = forward(model, batch)
            losses.of(i, batch, output).backward()  # type: ignore[no-untyped-call]
    reading = losses.reading
    parameters = [p for p in model.parameters() if p.grad is not None]
    if spread is None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    else:
        spread.sum_gradients()
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = spread.gradient_norm()
        reading = over_ranks(reading, spread.world)
    reading.grad_norm = norm.item()

    def run_again() -> None:
        if pipeline is not None:
            pipeline.forward(batches, lambda *_: None)
        else:
            for batch in batches:
                forward(model, batch)

    # Before clipping: scaling by a NaN norm would make every gradient NaN and hide where it began.
    check_finite(model, reading.loss, reading.grad_norm, step, run_again, agreement)
    # A norm within the limit would multiply every gradient by 1, one more pass over memory.
    if clip > 0 and float(clip / (norm + 1e-6)) < 1:
        if spread is None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        else:
            torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], float(clip / (norm + 1e-6)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    after_step(model, reading)
    for layer, sparse in model.moe_layers().items():
        sparse.router.observe(losses.plans[layer].detach(), losses.outcome(layer, losses.last_T))
    return reading, losses.plans


class StepLosses:
    """The losses of a step, micro-batch by micro-batch, and the reading that they fill.

    Attributes:
        reading: of this rank's share; of the language-model loss its part, of the others the whole.
        plans: of the last micro-batch. last_T: its token losses; zeros on a pipeline stage without logits.
    """

    def __init__(self, model: Decoder, batches: Sequence[Batch], step: int, spread: Spread | None) -> None:
        self.model, self.step = model, step
        self.peers = ALONE if spread is None else spread.peers
        self.num_sparse = len(model.moe_layers()) if spread is None else len(spread.sizes)
        self.num_depth = len(model.depth_routers()) if spread is None else spread.num_depth
        self.micro = len(batches)
        targets = sum(int((b.targets_BS != IGNORE).sum()) for b in batches)
        if self.peers.count > 1:
            targets = int(self.peers.total(torch.tensor(targets, device=batches[0].ids_BS.device)))
        self.reading = StepReading(targets=targets)
        self.plans: Plans = {}
        self.last_T = torch.zeros(0)

    def of(self, i: int, batch: Batch, output: Output | StageOutput) -> Tensor:
        """What a forward of micro-batch ``i`` adds to the loss of the step."""
        if output.logits is None:
            token_loss_T = torch.zeros(batch.ids_BS.numel(), device=batch.ids_BS.device)
            loss = token_loss_T.sum()
        else:
            token_loss_T = lm_losses(output.logits, batch.targets_BS)
            loss = self.of_tokens(token_loss_T)
        if i == self.micro - 1:
            self.plans.update(output.plans)
            self.last_T = token_loss_T if output.logits is not None or not len(self.last_T) else self.last_T
        return loss + self.of_plans(batch, output, token_loss_T)

    def of_tokens(self, token_loss_T: Tensor) -> Tensor:
        """This rank's part of the mean over all target tokens of the step."""
        loss = token_loss_T.sum() / max(self.reading.targets, 1)
        self.reading.lm_loss += loss.item()
        self.reading.loss += loss.item()
        return loss

    def of_plans(self, batch: Batch, output: Output | StageOutput, token_loss_T: Tensor) -> Tensor:
        """Balancing losses and the routers' own, of the whole micro-batch, over the number of micro-batches."""
        reading, plans, moe = self.reading, output.plans, self.model.config.moe
        take_reading(reading.layers, plans)
        take_reading(reading.depth, output.depth)
        take_statistics(reading, self.model, plans)
        total = token_loss_T.new_zeros(())
        own = own_losses(self.model, output, token_loss_T, peers=self.peers, counts=(self.num_sparse, self.num_depth))
        for name, value in own.items():
            total = total + value / self.micro
            reading.losses[name] = reading.losses.get(name, 0.0) + value.item() / self.micro
        if moe is not None and plans and moe.losses:
            extra, values = self._balance(plans, batch)
            total = total + extra / self.micro
            for name, mean in values.items():
                reading.losses[name] = reading.losses.get(name, 0.0) + mean / self.micro
        reading.loss += total.item()
        return total

    def outcome(self, layer: int, token_loss_T: Tensor) -> Outcome:
        """Of the last micro-batch, for the router of a sparse layer."""
        return outcome_of(self.plans, layer, token_loss_T, peers=self.peers, num_layers=self.num_sparse)

    def _balance(self, plans: Mapping[int, RoutingPlan | SoftPlan], batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Weighted balancing losses averaged over layers, and each one's unweighted mean."""
        moe = self.model.config.moe
        assert moe is not None
        totals, values = [], dict.fromkeys(moe.losses, 0.0)
        for layer, plan in plans.items():
            counts_E = self.reading.layers[layer].load_E  # this step's micro-batches so far, this one included
            if moe.loss_scope == "global_batch":
                counts_E = self.peers.total(counts_E)
            ctx = LossContext(
                batch.ids_BS.shape[0], moe.loss_scope, counts_E, batch.label_BS.flatten(), self.step, self.peers
            )
            total, parts = balance_loss(plan, moe.losses, ctx, moe.loss_options)
            totals.append(total)
            for name, value in parts.items():
                values[name] += value.item() / self.num_sparse
        return torch.stack(totals).sum() / self.num_sparse, values


def own_losses(
    model: Decoder,
    output: Output | StageOutput,
    token_loss_T: Tensor,
    *,
    peers: Peers = ALONE,
    counts: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Losses that only the routers themselves have, those of depth included, by name, summed over the layers of ``output``.

    ``counts``: sparse layers and depth blocks of the whole model, where these are a part of them.
    """
    totals: dict[str, Tensor] = {}
    inside = {layer: sparse.router for layer, sparse in model.moe_layers().items()}
    all_layers = counts or (len(output.plans), len(output.depth))
    kinds: list[tuple[Mapping[int, Router], Mapping[int, RoutingPlan | SoftPlan], int]] = [
        (inside, output.plans, all_layers[0]),
        (model.depth_routers(), output.depth, all_layers[1]),
    ]
    for routers, plans, number in kinds:
        for layer, plan in plans.items():
            outcome = outcome_of(plans, layer, token_loss_T, peers=peers, num_layers=number)
            for name, value in routers[layer].own_losses(plan, outcome).items():
                totals[name] = totals[name] + value if name in totals else value
    return totals


def outcome_of(
    plans: Mapping[int, RoutingPlan | SoftPlan],
    layer: int,
    token_loss_T: Tensor,
    *,
    peers: Peers = ALONE,
    num_layers: int | None = None,
) -> Outcome:
    """What the forward led to, per token of the layer's plan: multi-head layers route several sub-tokens of each position."""
    heads = plans[layer].num_tokens // max(len(token_loss_T), 1)
    return Outcome(token_loss_T.detach().repeat_interleave(heads), num_layers or len(plans), peers=peers)


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
