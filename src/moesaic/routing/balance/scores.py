"""Losses on the gate's scores alone: how large, how sure, how obedient.

| loss | formula | source |
|---|---|---|
| z | mean of logsumexp(logits)^2 | ST-MoE, Zoph et al. 2022; coefficient 1e-3 |
| logit_l2 | mean of logits^2 | popular texts, under the name of the other |
| entropy | mean entropy of the gate; a positive coefficient makes it surer | - |
| entropy_local | mean over labels of the mean entropy of their tokens: be sure | LIMoE, Mustafa et al. 2022 |
| entropy_global | mean over labels of max(0, tau - entropy of their mean distribution): be diverse | LIMoE |
| semantic | mean of -log sum of the permitted probabilities | Xu et al. 2018 |

LIMoE's labels are modalities: both losses for text, only the global one for images, where the local one hurt. tau = log S
asks for at least S experts per label (its published values are not verified here). Without labels in the context all tokens
have one. Entropies are in nats.

Legend: T tokens, E experts, L labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan.peers import Peers
from moesaic.plan.plan import RoutingPlan, SoftPlan
from moesaic.routing.balance.context import (
    PLAIN,
    LossContext,
    distribution,
    entropy,
    evidence,
    gate_of,
    mean_over,
)


def z_loss(plan: RoutingPlan | SoftPlan, ctx: LossContext = PLAIN) -> Tensor:
    """Mean squared logsumexp of the logits: keeps them small; it does not balance load."""
    return mean_over(gate_of(plan).logits_TE.logsumexp(dim=1).square(), plan.valid_T, ctx.peers)


def logit_l2(plan: RoutingPlan | SoftPlan, ctx: LossContext = PLAIN) -> Tensor:
    """Mean squared logit: a different penalty that popular texts call z-loss."""
    logits_TE = gate_of(plan).logits_TE
    # Rules put -inf on forbidden experts: those say nothing about the gate.
    return mean_over(torch.where(logits_TE.isfinite(), logits_TE, 0.0).square().mean(dim=1), plan.valid_T, ctx.peers)


def entropy_loss(plan: RoutingPlan | SoftPlan, ctx: LossContext = PLAIN, *, maximize: bool = False) -> Tensor:
    """Mean entropy of the gate's distribution, between 0 (sure) and log E (uniform): minimised, or with its sign turned."""
    mean = mean_over(entropy(distribution(plan)), plan.valid_T, ctx.peers)
    return -mean if maximize else mean


def entropy_local_loss(
    plan: RoutingPlan | SoftPlan, ctx: LossContext = PLAIN, *, labels: list[int] | None = None
) -> Tensor:
    """Mean entropy of each label's tokens, averaged over the labels that occur (of those listed, if any are)."""
    share_TE, member_TL = distribution(plan), _members(plan, ctx, labels)
    size_L = ctx.peers.total(member_TL.sum(dim=0))
    mean_L = ctx.peers.total(entropy(share_TE) @ member_TL) / size_L.clamp(min=1)
    return mean_L.sum() / (size_L > 0).sum().clamp(min=1)


def entropy_global_loss(
    plan: RoutingPlan | SoftPlan,
    ctx: LossContext = PLAIN,
    *,
    tau: float | None = None,
    labels: list[int] | None = None,
) -> Tensor:
    """How far the entropy of each label's mean distribution is below ``tau``; without it, minus that entropy."""
    member_TL = _members(plan, ctx, labels)
    size_L = ctx.peers.total(member_TL.sum(dim=0))
    mean_LE = ctx.peers.total(member_TL.T @ distribution(plan)) / size_L.clamp(min=1)[:, None]
    loss_L = -entropy(mean_LE)
    if tau is not None:
        loss_L = (tau + loss_L).clamp(min=0)
    return torch.where(size_L > 0, loss_L, 0.0).sum() / (size_L > 0).sum().clamp(min=1)


def semantic_loss(plan: RoutingPlan | SoftPlan, ctx: LossContext = PLAIN) -> Tensor:
    """-log of the probability that falls on experts the rules permit, before rules masked any: teaches the gate to obey.

    The softmax is over the logits whatever the router's score function. Tokens without any permitted expert are left out; a
    batch no rule applies to gives 0.
    """
    gate = gate_of(plan)
    if "rules_TE" not in gate.extra:
        nothing_T = gate.logits_TE.new_zeros(plan.num_tokens)
        return mean_over(nothing_T, nothing_T > 0, ctx.peers)  # rules may apply to other parts, which ask for ours
    allowed_TE, logits_TE = gate.extra["rules_TE"], evidence(plan, "free_logits_TE", "semantic")
    bound_T = allowed_TE.any(dim=1)
    if plan.valid_T is not None:
        bound_T = bound_T & plan.valid_T
    # A row of -inf has no gradient but NaN, hence tokens that are not counted keep all their logits.
    permitted_TE = logits_TE.masked_fill(~allowed_TE & bound_T[:, None], float("-inf"))
    return mean_over(logits_TE.logsumexp(dim=1) - permitted_TE.logsumexp(dim=1), bound_T, ctx.peers)


def _members(plan: RoutingPlan | SoftPlan, ctx: LossContext, labels: list[int] | None) -> Tensor:
    """(T, L) 1 where a token has the label; padding and unknown labels have none."""
    dtype, device = gate_of(plan).probs_TE.dtype, gate_of(plan).probs_TE.device
    label_T = ctx.labels(plan)
    if label_T is None:
        if labels is not None:
            raise ConfigError(
                f"A loss for the labels {labels} needs the label of every token, and the caller gave none."
            )
        member_TL = torch.ones(plan.num_tokens, 1, dtype=torch.bool, device=device)
    else:
        kinds = torch.tensor(labels, device=device) if labels is not None else _kinds(label_T, ctx.peers)
        member_TL = (label_T[:, None] == kinds) & (label_T[:, None] >= 0)
    if plan.valid_T is not None:
        member_TL = member_TL & plan.valid_T[:, None]
    return member_TL.to(dtype)


def _kinds(label_T: Tensor, peers: Peers) -> Tensor:
    """int64 (L,): labels among which are all that occur in any part."""
    if peers.count == 1:
        return label_T.unique()
    highest = peers.most(torch.cat([label_T, label_T.new_full((1,), -1)]).amax())
    return torch.arange(int(highest) + 1, device=label_T.device)
