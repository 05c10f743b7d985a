"""Readings: plan -> numbers. Training logs, reports and audits all take their figures from here.

Counts are of valid tokens only. Readings named ``..._E`` or ``..._EE`` are tensors; the rest are 0-dim tensors, so that a
training step can gather them without waiting for the device. Natural logarithms: entropies are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.plan.plan import RoutingPlan, SoftPlan, count_experts

AnyPlan = RoutingPlan | SoftPlan


def load(plan: AnyPlan) -> Tensor:
    """int64 (E,): rows the router chose for each expert, before capacity."""
    return plan.choice_counts_E if isinstance(plan, RoutingPlan) else plan.counts_E


MOST_LOGGED = 4096  # loads a log keeps per layer and step; with more experts neighbours are added up


def logged_load(counts_E: Tensor) -> Tensor:
    """The loads as logs keep them: one per expert, or with very many (PEER) sums over groups of neighbours."""
    E = counts_E.shape[0]
    group = -(-E // MOST_LOGGED)
    return torch.nn.functional.pad(counts_E, (0, -E % group)).view(-1, group).sum(dim=1) if group > 1 else counts_E


def num_logged(num_experts: int) -> int:
    """How many numbers ``logged_load`` gives."""
    return -(-num_experts // -(-num_experts // MOST_LOGGED))


def max_violation(counts_E: Tensor) -> Tensor:
    """MaxVio = max load / mean load - 1 (Wang et al. 2024): 0 at perfect balance, E/k - 1 at collapse; 0 without load."""
    counts_E = counts_E.double()
    mean = counts_E.mean(dim=-1)
    return torch.where(mean > 0, counts_E.amax(dim=-1) / mean.clamp(min=1e-30) - 1, 0.0)


def cv_squared(values_E: Tensor) -> Tensor:
    """Squared coefficient of variation, population variance: Var / (Mean^2 + 1e-10); 0 if E = 1. Differentiable.

    Written as variance over squared mean, because the gradient of a standard deviation is undefined at perfect balance.
    """
    if values_E.shape[-1] == 1:
        return values_E.sum(-1) * 0.0
    mean = values_E.mean(dim=-1, keepdim=True)
    variance = (values_E - mean).square().mean(dim=-1)
    return variance / (mean.squeeze(-1).square() + 1e-10)


def load_entropy(counts_E: Tensor) -> Tensor:
    """Entropy of the load distribution in nats: ln E at perfect balance."""
    share_E = counts_E.double() / counts_E.sum(-1, keepdim=True).clamp(min=1)
    return -torch.special.xlogy(share_E, share_E).sum(dim=-1)


def router_entropy(plan: AnyPlan) -> Tensor:
    """Mean over tokens of the entropy of the gate's distribution, in nats; NaN if the plan carries no gate."""
    if plan.gate is None:
        return torch.tensor(float("nan"))
    share_TE = _distribution(plan)
    return _mean(-torch.special.xlogy(share_TE, share_TE).sum(dim=1), plan.valid_T)


def margin(plan: AnyPlan) -> Tensor:
    """Mean gap between the best and second-best share of the gate; NaN without a gate or with one expert."""
    if plan.gate is None or plan.gate.probs_TE.shape[1] < 2:
        return torch.tensor(float("nan"))
    best_T2 = _distribution(plan).topk(2, dim=1).values
    return _mean(best_T2[:, 0] - best_T2[:, 1], plan.valid_T)


def drop_rate(plan: AnyPlan) -> Tensor:
    """Share of chosen rows that no expert computes; 0 if nothing was chosen."""
    if isinstance(plan, SoftPlan):
        return torch.zeros((), dtype=torch.float64)
    chosen = (plan.choice_N < plan.num_experts).sum()
    return plan.dropped.double() / chosen.clamp(min=1)


def dead_experts(counts_E: Tensor) -> Tensor:
    """int64: experts without a single row (sum the counts of a window of steps first)."""
    return (counts_E == 0).sum(dim=-1)


def overlap(a: RoutingPlan, b: RoutingPlan) -> Tensor:
    """Mean over valid tokens of |A & B| / |A | B|, the experts two plans give a token; tokens with none in both count 1."""
    in_a_TE, in_b_TE = _membership(a), _membership(b)
    both_T = (in_a_TE & in_b_TE).sum(1).double()
    either_T = (in_a_TE | in_b_TE).sum(1).double()
    same_T = torch.where(either_T > 0, both_T / either_T.clamp(min=1), 1.0)
    return _mean(same_T, a.valid_T)


def co_activation(plan: RoutingPlan) -> Tensor:
    """fp64 (E, E): share of expert i's tokens that also use expert j; 0 on the diagonal; rows of used experts sum to k - 1."""
    in_TE = _membership(plan).double()
    pairs_EE = in_TE.T @ in_TE
    own_E = pairs_EE.diagonal().clone()
    pairs_EE.fill_diagonal_(0)
    return pairs_EE / own_E.clamp(min=1)[:, None]


def load_by_label(plan: RoutingPlan, label_T: Tensor, num_labels: int) -> Tensor:
    """int64 (labels, E): rows chosen for each expert by tokens of each label (domain); label -1 is left out."""
    label_N = label_T[plan.token_N]
    outside = num_labels * plan.num_experts
    counted_N = (plan.choice_N < plan.num_experts) & (label_N >= 0)
    cell_N = torch.where(counted_N, label_N * plan.num_experts + plan.choice_N, outside)
    return count_experts(cell_N, outside).view(num_labels, plan.num_experts)


def _distribution(plan: AnyPlan) -> Tensor:
    """Gate scores as a distribution over experts (sigmoid scores do not sum to 1)."""
    assert plan.gate is not None
    probs_TE = plan.gate.probs_TE.detach().double()
    return probs_TE / probs_TE.sum(dim=1, keepdim=True).clamp(min=1e-20)


def _membership(plan: RoutingPlan) -> Tensor:
    in_TE = torch.zeros(plan.num_tokens, plan.num_experts + 1, dtype=torch.bool, device=plan.expert_N.device)
    in_TE[plan.token_N, plan.expert_N] = True
    return in_TE[:, : plan.num_experts]


def _mean(values_T: Tensor, valid_T: Tensor | None) -> Tensor:
    if valid_T is None:
        return values_T.mean() if len(values_T) else values_T.new_zeros(())
    # where, not multiplication: a padding token's value may be NaN.
    return torch.where(valid_T, values_T, 0.0).sum() / valid_T.sum().clamp(min=1)
