"""Balancing: losses that are functions of a plan, and the bias that balances without a loss.

Every loss returns an fp32 scalar without coefficient. Means are over valid tokens; counts are the router's choices, before
capacity drops. Only scores carry gradient, counts never do.

| loss | formula | perfect balance | collapse on one expert |
|---|---|---|---|
| importance | CV^2 of the summed gate weights (Shazeer et al. 2017) | 0 | E - 1 |
| load | CV^2 of the expected load of a noisy gate | 0 | E - 1 |
| switch | E * sum_e f_e P_e (Fedus et al. 2022) | 1 | E |
| z | mean of logsumexp(logits)^2 (ST-MoE, Zoph et al. 2022) | - | - |
| logit_l2 | mean of logits^2 | - | - |

Legend: T tokens, N rows, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic.errors import ConfigError, nearest
from moesaic.plan.plan import RoutingPlan, SoftPlan
from moesaic.plan.read import cv_squared
from moesaic.routing.facts import Facts

Scope = Literal["micro_batch", "sequence", "global_batch"]


@dataclass(frozen=True, eq=False)
class LossContext:
    """What a balancing loss may need besides the plan.

    Attributes:
        num_sequences: the batch's B; tokens are laid out sequence by sequence (scope "sequence").
        scope: over what ``f`` of the Switch loss is counted.
        step_counts_E: with scope "global_batch", the choices counted so far in this optimiser step (earlier micro-batches and
            other ranks, this micro-batch included).
    """

    num_sequences: int = 1
    scope: Scope = "micro_batch"
    step_counts_E: Tensor | None = None


def importance_loss(plan: RoutingPlan, ctx: LossContext = LossContext()) -> Tensor:
    """CV^2 over experts of the summed gate weights after top-k (Shazeer); one expert gives 0.

    Weights are those of the plan, so rows lost to capacity add nothing: unlike counts, this is a reading after the drop.
    """
    weight_N = torch.where(plan.choice_N < plan.num_experts, plan.weight_N, 0.0)
    sums_E = weight_N.new_zeros(plan.num_experts + 1).index_add(0, plan.choice_N, weight_N)
    return cv_squared(sums_E[: plan.num_experts])


def load_loss(plan: RoutingPlan, ctx: LossContext = LossContext()) -> Tensor:
    """CV^2 of the expected load. Where a plan has no estimate (k = E, evaluation) hard counts, without gradient."""
    if plan.gate is None or plan.gate.load_probs_TE is None:
        return cv_squared(plan.choice_counts_E.float())
    return cv_squared(_masked(plan.gate.load_probs_TE, plan.valid_T).sum(dim=0))


def switch_loss(plan: RoutingPlan, ctx: LossContext = LossContext()) -> Tensor:
    """E * sum_e f_e P_e with f_e the share of choices and P_e the mean score of expert e.

    Scope "micro_batch": f and P over the plan (Mixtral, Switch). "sequence": per sequence, averaged (DeepSeek-V3; sigmoid
    scores are normalised per token). "global_batch": f over the whole optimiser step (Qiu et al. 2025), P over the plan,
    which lets experts specialise on domains.
    """
    assert plan.gate is not None
    probs_TE = plan.gate.probs_TE
    # Sigmoid and softplus scores do not sum to 1 (DeepSeek-V3 normalises them here); a softmax is left as it is.
    probs_TE = _masked(probs_TE / probs_TE.sum(dim=1, keepdim=True).clamp(min=1e-20), plan.valid_T)
    E = plan.num_experts
    if ctx.scope != "sequence":
        counts_E = plan.choice_counts_E
        if ctx.scope == "global_batch" and ctx.step_counts_E is not None:
            counts_E = ctx.step_counts_E
        share_E = counts_E.to(probs_TE.dtype) / counts_E.sum().clamp(min=1)
        return E * (share_E * probs_TE.sum(dim=0)).sum() / plan.num_valid.clamp(min=1)
    B, S = ctx.num_sequences, plan.num_tokens // ctx.num_sequences
    cell_N = plan.token_N // S * (E + 1) + plan.choice_N
    counts_BE = torch.zeros(B * (E + 1), dtype=torch.int64, device=cell_N.device)
    counts_BE = counts_BE.scatter_add(0, cell_N, torch.ones_like(cell_N)).view(B, E + 1)[:, :E]
    share_BE = counts_BE.to(probs_TE.dtype) / counts_BE.sum(dim=1, keepdim=True).clamp(min=1)
    valid_B = probs_TE.new_full((B,), S) if plan.valid_T is None else plan.valid_T.view(B, S).sum(dim=1)
    loss_B = E * (share_BE * probs_TE.view(B, S, E).sum(dim=1)).sum(dim=1) / valid_B.clamp(min=1)
    return loss_B.sum() / (valid_B > 0).sum().clamp(min=1)


def z_loss(plan: RoutingPlan | SoftPlan, ctx: LossContext = LossContext()) -> Tensor:
    """Mean squared logsumexp of the logits: keeps them small; it does not balance load."""
    assert plan.gate is not None
    return _mean(plan.gate.logits_TE.logsumexp(dim=1).square(), plan.valid_T)


def logit_l2(plan: RoutingPlan | SoftPlan, ctx: LossContext = LossContext()) -> Tensor:
    """Mean squared logit: a different penalty that popular texts call z-loss."""
    assert plan.gate is not None
    logits_TE = plan.gate.logits_TE
    # Rules put -inf on forbidden experts: those say nothing about the gate.
    return _mean(torch.where(logits_TE.isfinite(), logits_TE, 0.0).square().mean(dim=1), plan.valid_T)


Loss = Callable[[RoutingPlan, LossContext], Tensor]
LOSSES: dict[str, Loss] = {
    "importance": importance_loss,
    "load": load_loss,
    "switch": switch_loss,
    "z": z_loss,
    "logit_l2": logit_l2,
}


def check_losses(coefficients: Mapping[str, float], router: object) -> None:
    """Raises ``ConfigError`` for an unknown loss, and for one that could teach this router nothing."""
    for name in coefficients:
        if name not in LOSSES:
            raise ConfigError(
                f'There is no balancing loss "{name}".{nearest(name, LOSSES)} Known: {", ".join(LOSSES)}.'
            )
        kind = type(router).__name__
        facts = getattr(router, "facts", Facts(has_gate=False))
        if not facts.has_gate:
            raise ConfigError(
                f'Loss "{name}" has no gradient path into router {kind}, which has no gate; remove the loss.'
            )
        if name == "load" and not facts.has_load_estimate:
            raise ConfigError(
                f'Loss "load" needs the load estimate of a noisy gate, and {kind} has none; use "switch".'
            )


def balance_loss(
    plan: RoutingPlan, coefficients: Mapping[str, float], ctx: LossContext = LossContext()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the named losses of one layer, and each one's unweighted value (detached)."""
    values = {name: LOSSES[name](plan, ctx) for name in coefficients}
    zero = plan.weight_N.new_zeros(()) if isinstance(plan, RoutingPlan) else plan.combine_GTS.new_zeros(())
    total = sum((coefficients[name] * value for name, value in values.items()), start=zero)
    return total, {name: value.detach() for name, value in values.items()}


def bias_step(bias_E: Tensor, counts_E: Tensor, rate: float, rule: Literal["sign", "proportional"] = "sign") -> Tensor:
    """The selection bias after one optimiser step: up for experts below mean load, down for those above.

    "sign": ``b + rate * sign(mean(c) - c)`` (Wang et al. 2024; sign(0) = 0). "proportional": ``b + rate * (mean(c) - c) /
    mean(c)``. ``counts_E`` are the whole step's choices, over all micro-batches and ranks.
    """
    error_E = counts_E.double().mean() - counts_E.double()
    step_E = error_E.sign() if rule == "sign" else error_E / counts_E.double().mean().clamp(min=1e-20)
    return bias_E + (rate * step_E).to(bias_E.dtype)


def _masked(values_TE: Tensor, valid_T: Tensor | None) -> Tensor:
    # where, not multiplication: padding may hold NaN, and NaN * 0 is NaN.
    return values_TE if valid_T is None else torch.where(valid_T[:, None], values_TE, 0.0)


def _mean(values_T: Tensor, valid_T: Tensor | None) -> Tensor:
    if valid_T is None:
        return values_T.sum() / max(len(values_T), 1)
    return torch.where(valid_T, values_T, 0.0).sum() / valid_T.sum().clamp(min=1)
