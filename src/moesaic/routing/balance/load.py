"""Losses on load: they push towards every expert getting as much as every other.

| loss | formula | balance | collapse on one expert |
|---|---|---|---|
| importance | CV^2 of the summed gate weights (Shazeer et al. 2017) | 0 | E - 1 |
| load | CV^2 of the expected load of a noisy gate | 0 | E - 1 |
| switch | E * sum_e f_e P_e (Fedus et al. 2022) | 1 (k with "slots") | E |
| sequence | the same per sequence, averaged (DeepSeek-V3, alpha = 1e-4) | 1 | E / k |

f_e is the share of choices, before capacity; P_e the mean score. Only scores carry gradient, counts never do. V-MoE uses
``0.005 * importance + 0.005 * load`` with importance of the "scores". Sums and counts are over all parts of the micro-batch.

Legend: T tokens, B sequences of S, N rows, E experts.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moesaic.plan.plan import RoutingPlan
from moesaic.plan.read import cv_squared
from moesaic.routing.balance.context import (
    PLAIN,
    LossContext,
    counts_by_sequence,
    distribution,
    gate_of,
    masked,
    mean_over_sequences,
    valid_by_sequence,
)


def importance_loss(
    plan: RoutingPlan, ctx: LossContext = PLAIN, *, of: Literal["weights", "scores"] = "weights"
) -> Tensor:
    """CV^2 over experts of their importance; one expert gives 0.

    Args:
        of: "weights": the plan's gate weights after top-k (Shazeer); rows lost to capacity add nothing, so unlike counts this
            is a reading after the drop. "scores": the gate's scores of all experts, without noise (V-MoE).
    """
    if of == "scores":
        return cv_squared(ctx.peers.total(masked(gate_of(plan).probs_TE, plan.valid_T).sum(dim=0)))
    weight_N = plan.weight_N.masked_fill(plan.choice_N == plan.num_experts, 0.0)
    sums_E = weight_N.new_zeros(plan.num_experts + 1).index_add(0, plan.choice_N, weight_N)
    return cv_squared(ctx.peers.total(sums_E[: plan.num_experts]))


def load_loss(plan: RoutingPlan, ctx: LossContext = PLAIN) -> Tensor:
    """CV^2 of the expected load. Where a plan has no estimate (k = E, evaluation) hard counts, without gradient."""
    if plan.gate is None or plan.gate.load_probs_TE is None:
        return cv_squared(ctx.peers.total(plan.choice_counts_E).float())
    return cv_squared(ctx.peers.total(masked(plan.gate.load_probs_TE, plan.valid_T).sum(dim=0)))


def switch_loss(
    plan: RoutingPlan, ctx: LossContext = PLAIN, *, normalize: Literal["share", "slots"] = "share"
) -> Tensor:
    """E * sum_e f_e P_e with f_e the share of choices and P_e the mean score of expert e.

    Scope "micro_batch": f and P over the micro-batch (Mixtral, Switch). "sequence": per sequence, averaged (DeepSeek-V3;
    sigmoid scores are normalised per token). "global_batch": f over the whole optimiser step (Qiu et al. 2025), P over the
    micro-batch, which lets experts specialise on domains.

    Args:
        normalize: "slots" divides counts by tokens and not by choices, as Hugging Face's Mixtral does: k times as much. (That
            code also takes f and P over the tokens of all layers at once; here layers are averaged.)
    """
    total = ctx.peers.total
    chosen_E, tokens = total(plan.choice_counts_E), total(plan.num_valid).clamp(min=1)
    if ctx.scope == "sequence":
        loss = sequence_loss(plan, ctx)
    else:
        probs_TE = distribution(plan)
        counts_E = chosen_E
        if ctx.scope == "global_batch" and ctx.step_counts_E is not None:
            counts_E = ctx.step_counts_E
        share_E = counts_E.to(probs_TE.dtype) / counts_E.sum().clamp(min=1)
        loss = plan.num_experts * (share_E * total(probs_TE.sum(dim=0))).sum() / tokens
    return loss if normalize == "share" else loss * (chosen_E.sum() / tokens)


def sequence_loss(plan: RoutingPlan, ctx: LossContext = PLAIN) -> Tensor:
    """The Switch loss of each sequence, averaged over sequences that are not all padding, whatever the scope of the context.

    f counts what was chosen, selection bias included; scores are normalised to sum to 1 per token.
    """
    B, E, probs_TE = ctx.sequences, plan.num_experts, distribution(plan)
    counts_BE = counts_by_sequence(plan, B)
    share_BE = counts_BE.to(probs_TE.dtype) / counts_BE.sum(dim=1, keepdim=True).clamp(min=1)
    valid_B = valid_by_sequence(plan, B)
    loss_B = E * (share_BE * probs_TE.view(B, plan.num_tokens // B, E).sum(dim=1)).sum(dim=1) / valid_B.clamp(min=1)
    return mean_over_sequences(loss_B, valid_B, ctx.peers)
