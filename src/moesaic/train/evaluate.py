"""Validation: loss per token and per domain, and which expert each domain's tokens go to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moesaic.data.packing import IGNORE, Batch, PackedRows
from moesaic.errors import DataError
from moesaic.models.decoder import Decoder
from moesaic.models.output import Output
from moesaic.parallel.apply import Spread
from moesaic.parallel.stages import StageOutput
from moesaic.plan.peers import ALONE
from moesaic.plan.plan import RoutingPlan
from moesaic.plan.read import load_by_label, logged_load
from moesaic.train.step import forward, lm_losses


@dataclass
class Evaluation:
    """Means over target tokens, nats.

    Attributes:
        loss, tokens: mean loss and how many targets it is over.
        by_domain: mean loss of each domain that occurs.
        domain_load: domain -> per sparse layer, rows chosen for each expert (before capacity).
    """

    loss: float
    tokens: int
    by_domain: dict[str, float] = field(default_factory=dict)
    domain_load: dict[str, list[list[int]]] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss), infinity where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def record(self) -> dict[str, Any]:
        """The fields of a "val" metrics record."""
        return {
            "loss": self.loss,
            "ppl": self.perplexity,
            "by_domain": self.by_domain,
            "domain_load": self.domain_load,
        }


def evenly(rows: PackedRows, count: int) -> Tensor:
    """``count`` row numbers spread evenly over ``rows`` (all of them if there are no more)."""
    if count >= len(rows):
        return torch.arange(len(rows))
    return torch.linspace(0, len(rows) - 1, count, dtype=torch.float64).round().long()


@torch.no_grad()
def evaluate(
    model: Decoder,
    rows: PackedRows,
    indices: Tensor,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    spread: Spread | None = None,
) -> Evaluation:
    """Evaluate ``model`` on these rows; its training mode is restored. Raises ``DataError`` if they hold no target.

    ``spread``: the model is this process's part of one, and so is its share of each batch's rows; every process gets the whole
    evaluation.
    """
    peers = ALONE if spread is None else spread.peers
    pipeline = None if spread is None else spread.pipeline
    device = next(model.parameters()).device
    tally = _Tally(len(rows.labels))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(indices), batch_size):
            mine = indices[start : start + batch_size].tensor_split(peers.count)[peers.index]
            batch = rows.batch(mine).to(device)
            if pipeline is None:
                tally.add(0, batch, forward(model, batch))
            else:
                pipeline.forward([batch], tally.add)
            if progress is not None:
                progress(min(start + batch_size, len(indices)), len(indices))
    finally:
        model.train(was_training)
    if spread is not None:
        tally.over_ranks(spread)
    labels, sums_L, counts_L, loads = rows.labels, tally.sums_L, tally.counts_L, tally.loads
    total = int(counts_L.sum())
    if not total:
        raise DataError("The validation text holds no token to predict; give more text or a larger data.val_fraction.")
    seen = [i for i in range(len(labels)) if counts_L[i]]
    return Evaluation(
        loss=float(sums_L.sum() / total),
        tokens=total,
        by_domain={labels[i]: float(sums_L[i] / counts_L[i]) for i in seen},
        domain_load={labels[i]: [logged_load(load_LE[i]).tolist() for load_LE in loads.values()] for i in seen},
    )


class _Tally:
    """Sums over the batches seen: losses and targets by label, choices by layer, label and expert."""

    def __init__(self, labels: int) -> None:
        self.sums_L = torch.zeros(labels, dtype=torch.float64)
        self.counts_L = torch.zeros(labels, dtype=torch.int64)
        self.loads: dict[int, Tensor] = {}

    def add(self, _: int, batch: Batch, output: Output | StageOutput) -> None:
        """One batch; of a pipeline's stage what it has."""
        labels, label_T = len(self.sums_L), batch.label_BS.flatten()
        if output.logits is not None:
            loss_T = lm_losses(output.logits, batch.targets_BS).cpu()
            counted_T = (batch.targets_BS.flatten() != IGNORE).cpu()
            counted_label_T = label_T.cpu()[counted_T]
            self.sums_L.index_add_(0, counted_label_T, loss_T[counted_T].double())
            self.counts_L += torch.bincount(counted_label_T, minlength=labels)
        for layer, plan in output.plans.items():
            if isinstance(plan, RoutingPlan):
                # Multi-head layers route several sub-tokens of each token.
                all_label_T = label_T.repeat_interleave(plan.num_tokens // max(len(label_T), 1))
                load_LE = load_by_label(plan, all_label_T, labels).cpu()
                self.loads[layer] = self.loads.get(layer, torch.zeros_like(load_LE)) + load_LE

    def over_ranks(self, spread: Spread) -> None:
        """Of all parts and stages."""
        dp, pp = spread.world["dp"], spread.world["pp"]
        device = next(spread.model.parameters()).device
        for load_LE in (self.loads[layer] for layer in sorted(self.loads)):
            load_LE.copy_(dp.all_reduce(load_LE.to(device), what="load of the evaluation"))
        for sums_L in (self.sums_L, self.counts_L):
            summed_L = dp.all_reduce(sums_L.to(device), what="loss of the evaluation")
            sums_L.copy_(pp.all_reduce(summed_L, what="loss of the evaluation"))
        stages = pp.values(
            {str(i): t.tolist() for i, t in self.loads.items()}, what="load of all stages", device=device
        )
        found = {int(i): torch.tensor(rows) for stage in stages for i, rows in stage.items()}
        self.loads = dict(sorted(found.items()))
