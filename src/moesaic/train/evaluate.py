"""Validation: loss per token and per domain, and which expert each domain's tokens go to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moesaic.data.packing import IGNORE, PackedRows
from moesaic.errors import DataError
from moesaic.models.decoder import Decoder
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


def spread(rows: PackedRows, count: int) -> Tensor:
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
) -> Evaluation:
    """Evaluate ``model`` on these rows; its training mode is restored. Raises ``DataError`` if they hold no target."""
    labels = rows.labels
    device = next(model.parameters()).device
    sums_L = torch.zeros(len(labels), dtype=torch.float64)
    counts_L = torch.zeros(len(labels), dtype=torch.int64)
    loads: dict[int, Tensor] = {}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(indices), batch_size):
            batch = rows.batch(indices[start : start + batch_size]).to(device)
            output = forward(model, batch)
            loss_T = lm_losses(output.logits, batch.targets_BS).cpu()
            counted_T = (batch.targets_BS.flatten() != IGNORE).cpu()
            label_T = batch.label_BS.flatten().cpu()[counted_T]
            sums_L.index_add_(0, label_T, loss_T[counted_T].double())
            counts_L += torch.bincount(label_T, minlength=len(labels))
            for layer, plan in output.plans.items():
                if isinstance(plan, RoutingPlan):
                    all_label_T = batch.label_BS.flatten()
                    # Multi-head layers route several sub-tokens of each token.
                    all_label_T = all_label_T.repeat_interleave(plan.num_tokens // len(all_label_T))
                    load_LE = load_by_label(plan, all_label_T, len(labels)).cpu()
                    loads[layer] = loads.get(layer, torch.zeros_like(load_LE)) + load_LE
            if progress is not None:
                progress(min(start + batch_size, len(indices)), len(indices))
    finally:
        model.train(was_training)
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
