"""The loss of a Hugging Face training loop on our models: what ``train/step.py`` minimises, from one forward's output.

Legend: B batch, S positions, T = B * S tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.data.packing import IGNORE
from moesaic.models.decoder import Decoder
from moesaic.models.output import Output
from moesaic.plan import read
from moesaic.routing import LossContext, balance_loss
from moesaic.train.loss import cross_entropy
from moesaic.train.step import own_losses


def targets_of(labels_BS: Tensor) -> Tensor:
    """Hugging Face's labels are the tokens themselves; position s is to say what stands at s + 1."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=IGNORE)


def token_losses(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """fp32 (B, S): cross entropy in nats, 0 where there is no target."""
    return cross_entropy(logits_BSV.flatten(0, 1), targets_BS.to(logits_BSV.device).flatten()).view(targets_BS.shape)


def mean_over_targets(loss_BS: Tensor, targets_BS: Tensor, items: Tensor | int | None) -> tuple[Tensor, Tensor]:
    """The mean over all targets of the optimiser step, and this batch's share of them.

    ``items``: how many targets the step has (Trainer's ``num_items_in_batch``); None where this batch is the step. Losses that
    are not per token are to be multiplied by the share, so that over a step's batches they come to a mean as well.
    """
    mine = (targets_BS != IGNORE).sum().to(loss_BS.device)
    total = mine if items is None else torch.as_tensor(items, device=loss_BS.device)
    return loss_BS.sum() / total.clamp(min=1), mine / total.clamp(min=1)


def balancing_losses(
    model: Decoder, output: Output, loss_BS: Tensor, step: int | None, task_BS: Tensor | None = None
) -> Tensor:
    """Scalar: weighted balancing losses averaged over layers, plus the routers' own losses, as in a training step.

    Under gradient accumulation each batch is balanced by itself: what a Trainer's earlier batches did is not known here, so
    ``loss_scope="global_batch"`` counts this batch.
    """
    total = loss_BS.new_zeros(())
    for value in own_losses(model, output, loss_BS.detach().flatten()).values():
        total = total + value
    moe = model.config.moe
    if moe is None or not output.plans or not moe.losses:
        return total
    label_T = None if task_BS is None else task_BS.flatten()
    losses = []
    for plan in output.plans.values():
        ctx = LossContext(len(loss_BS), moe.loss_scope, read.load(plan), label_T, step)
        losses.append(balance_loss(plan, moe.losses, ctx, moe.loss_options)[0])
    return total + torch.stack(losses).mean()
