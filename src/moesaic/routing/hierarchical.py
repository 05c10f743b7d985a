"""Two-level routing (Shazeer et al. 2017, appendix B): a gate over groups, and in each chosen group a gate over its experts.

    E = a * b experts in a contiguous groups;  z1 = x W1 (T, a);  z2[i] = x W2[i] (T, b), for the chosen groups i only
    weight of expert (i, j) = G_i(x) * G^i_j(x)

Cost D (a + k_groups * b) per token, O(sqrt E) for a = b; not O(log E), which a tree has. Tokens are sorted by group and meet
their group's gate in one product, as rows meet experts, so the saving is real and memory stays O(T k_groups b).

| ``normalize`` | weight of a chosen expert | both gates learn for |
|---|---|---|
| "level" (the paper) | softmax over the chosen groups * softmax over the chosen of the group | at least 2 groups, 2 of each |
| "joint" | ``p = softmax(z1)_i softmax(z2[i])_j`` over the sum of p of the k chosen | at least 2 groups |
| "none" | p itself | any k |

Importance (Shazeer) is read off the weights, which are the products. With ``joint_scores`` all secondary gates run, at the
price of a linear gate, and plans carry (T, E) scores ``z1_i + log_softmax(z2[i])_j``, whose softmax is the joint distribution:
then every balancing loss applies (the z-loss holds the primary gate, since the scores' logsumexp is that of z1).

Noise is left out: the paper's load estimate ``Load_H(i,j) = Load_primary(i) Load_i(X_i)_j / |X_i|`` is a product of two batch
statistics, and a plan carries evidence per token (``gate.load_probs_TE``); importance and Switch losses need none of it.

Legend: T tokens, D model width, E experts, K experts per token, G chosen groups per token, b experts of a group, N = T * G.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moesaic.errors import ConfigError, one_of
from moesaic.ops.grouped import grouped_mm
from moesaic.ops.permute import gather_rows, group_rows
from moesaic.plan.plan import Gate, RoutingPlan
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import LinearGate, Router, check_k, choose, ruled

Normalize = Literal["joint", "level", "none"]


class Hierarchical(Router):
    """Two-level routing; each token takes ``k / k_groups`` experts in each of its ``k_groups`` best groups.

    Args:
        groups: a; None takes the divisor of E nearest to sqrt(E).
        k_groups: groups per token; None takes the smallest divisor of k from sqrt(k) up that the groups can serve.
        normalize: see the table.
        joint_scores: compute every secondary gate, so that plans carry scores of all experts.
        init_std: of both gates; 0 starts uniform.

    Raises ``ConfigError`` for groups that do not divide E, more experts than groups can give, and weights that one of the
    gates could not change.
    """

    facts = Facts(has_gate=False, source="Shazeer et al. 2017, appendix B")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        groups: int | None = None,
        k_groups: int | None = None,
        normalize: Normalize = "joint",
        joint_scores: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        one_of("normalize", normalize, get_args(Normalize))
        groups = _square_side(num_experts) if groups is None else groups
        if groups < 1 or num_experts % groups:
            raise ConfigError(f"groups={groups} must divide num_experts={num_experts}.")
        size = num_experts // groups
        k_groups = _share(k, groups, size) if k_groups is None else k_groups
        if not 1 <= k_groups <= groups or k % k_groups or k // k_groups > size:
            raise ConfigError(
                f"k={k} experts cannot come in equal parts from k_groups={k_groups} of {groups} groups of {size}; k_groups "
                f"must divide k, be at most {groups}, and leave at most {size} experts to each."
            )
        if normalize != "none" and k_groups == 1 and groups > 1:
            raise ConfigError(
                f'normalize="{normalize}" with k_groups=1 makes the primary gate\'s weight exactly 1, so it gets no gradient; '
                'use normalize="none" or k_groups of at least 2.'
            )
        if normalize == "level" and k == k_groups and size > 1:
            raise ConfigError(
                f'normalize="level" with one expert per group (k={k}, k_groups={k_groups}) makes every secondary weight '
                'exactly 1, so those gates get no gradient; use normalize="joint" or more experts per group.'
            )
        self.num_experts, self.k = num_experts, k
        self.groups, self.k_groups, self.size = groups, k_groups, size
        self.normalize, self.joint_scores = normalize, joint_scores
        self.primary = LinearGate(dim, groups, init_std=init_std)
        self.secondary = LinearGate(dim, num_experts, init_std=init_std)  # group i owns rows i*b to (i+1)*b
        if joint_scores:
            losses = {"switch": 1e-2, "z": 1e-3}
            self.facts = replace(
                self.facts, has_gate=True, teaches="all" if normalize == "none" else "chosen", losses=losses
            )

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; K rows each, group by group, the best group and each group's best expert first."""
        T = x_TD.shape[0]
        above = rules_of_groups(ctx, self.groups)
        free_Ta = self.primary(x_TD)
        primary_Ta = ruled(free_Ta, above)
        group_TG = choose(primary_Ta, self.k_groups, above.allowed_TE)
        within = rules_within(ctx, group_TG, self.size)
        gate = None
        if self.joint_scores:
            gate = self._joint(x_TD, free_Ta, primary_Ta, ctx)
            log_TGb = pick_groups(gate.logits_TE.log_softmax(dim=1), group_TG, self.size)
        else:
            secondary_Nb = ruled(self._chosen_secondaries(x_TD, group_TG), within)
            log_TG = primary_Ta.log_softmax(dim=1).gather(1, group_TG)
            log_TGb = log_TG[:, :, None] + secondary_Nb.log_softmax(dim=1).view(T, self.k_groups, self.size)
        k_within = self.k // self.k_groups
        inner_Nk = choose(log_TGb.reshape(-1, self.size), k_within, within.allowed_TE)
        inner_TGk = inner_Nk.reshape(T, self.k_groups, k_within)
        expert_TK = (group_TG[:, :, None] * self.size + inner_TGk).flatten(1)
        return self.plan(expert_TK, self._weights(log_TGb, inner_TGk), ctx, gate)

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """2 T D (a + k_groups b) FLOPs, or 2 T D (a + E) with joint scores; D (a + E) parameters."""
        a = options.get("groups") or _square_side(E)
        chosen = options.get("k_groups") or _share(k, a, E // a)
        per_token = a + (E if options.get("joint_scores", False) else chosen * (E // a))
        return Cost(2 * T * D * per_token, D * (a + E), "sorting T * k_groups rows by group")

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """The weights of these experts, which must come group by group as ``forward`` lists them."""
        expert_TGk = expert_TK.view(len(expert_TK), self.k_groups, self.k // self.k_groups)
        log_TGb = pick_groups(gate.logits_TE.log_softmax(dim=1), expert_TGk[:, :, 0] // self.size, self.size)
        return self._weights(log_TGb, expert_TGk % self.size)

    def _joint(self, x_TD: Tensor, free_Ta: Tensor, primary_Ta: Tensor, ctx: TokenContext) -> Gate:
        """Scores of all experts, by the same rules at both levels as the choice."""
        T, a, b = x_TD.shape[0], self.groups, self.size
        secondary_Tab = self.secondary(x_TD).view(T, a, b)
        if ctx.evidence is not None:
            ctx.evidence["free_logits_TE"] = (free_Ta[:, :, None] + secondary_Tab.log_softmax(dim=2)).flatten(1)
        every_Ta = torch.arange(a, device=x_TD.device).expand(T, a)
        secondary_Nb = ruled(secondary_Tab.reshape(T * a, b), rules_within(ctx, every_Ta, b))
        logits_TE = (primary_Ta[:, :, None] + secondary_Nb.log_softmax(dim=1).view(T, a, b)).flatten(1)
        return Gate(logits_TE, logits_TE.softmax(dim=1))

    def _chosen_secondaries(self, x_TD: Tensor, group_TG: Tensor) -> Tensor:
        """fp32 logits (N, b) of each token's chosen groups, in the order of ``group_TG``."""
        weight = self.secondary.weight
        token_N = torch.arange(x_TD.shape[0], device=x_TD.device).repeat_interleave(self.k_groups)
        grouping = group_rows(group_TG.flatten(), self.groups)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_ND = gather_rows(x_TD.to(weight.dtype), token_N, grouping, self.k_groups)
            sorted_Nb = grouped_mm(x_ND, weight.view(self.groups, self.size, -1).mT, grouping.counts_E)
        return sorted_Nb.index_select(0, grouping.inverse_N)

    def _weights(self, log_TGb: Tensor, inner_TGk: Tensor) -> Tensor:
        """(T, K) weights from the log joint probabilities of all experts of the chosen groups."""
        if self.normalize == "none":
            return log_TGb.gather(2, inner_TGk).exp().flatten(1)
        if self.normalize == "joint":
            return log_TGb.gather(2, inner_TGk).flatten(1).softmax(dim=1)
        # A group chosen although rules forbid all of it is -inf throughout; its rows go nowhere, but 0 * NaN must not arise.
        dead_TG = log_TGb.isneginf().all(dim=2)
        log_TGb = log_TGb.masked_fill(dead_TG[:, :, None], 0.0)
        group_TG = log_TGb.logsumexp(dim=2).masked_fill(dead_TG, float("-inf")).softmax(dim=1)
        return (group_TG[:, :, None] * log_TGb.gather(2, inner_TGk).softmax(dim=2)).flatten(1)


def rules_of_groups(ctx: TokenContext, groups: int) -> TokenContext:
    """The rules on ``groups`` equal contiguous groups of experts: one is permitted where any of its experts is.

    A group's soft rule is the log of the mean of its experts' exp(bias), so that with all logits equal the two levels together
    give each expert the share that the biases alone would.
    """
    if ctx.allowed_TE is None and ctx.rule_bias_TE is None:
        return NO_CONTEXT
    allowed_TG = bias_TG = None
    if ctx.allowed_TE is not None:
        allowed_TG = ctx.allowed_TE.unflatten(1, (groups, -1)).any(dim=2)
    if ctx.rule_bias_TE is not None:
        bias_TGb = ctx.rule_bias_TE.unflatten(1, (groups, -1))
        bias_TG = bias_TGb.logsumexp(dim=2) - math.log(bias_TGb.shape[2])
    return TokenContext(allowed_TE=allowed_TG, rule_bias_TE=bias_TG)


def rules_within(ctx: TokenContext, group_TG: Tensor, size: int) -> TokenContext:
    """The rules on the experts of each token's chosen groups: one row per (token, group), ``size`` columns."""
    if ctx.allowed_TE is None and ctx.rule_bias_TE is None:
        return NO_CONTEXT
    allowed_TE, bias_TE = (
        None if rule is None else pick_groups(rule, group_TG, size).flatten(0, 1)
        for rule in (ctx.allowed_TE, ctx.rule_bias_TE)
    )
    return TokenContext(allowed_TE=allowed_TE, rule_bias_TE=bias_TE)


def pick_groups(values_TE: Tensor, group_TG: Tensor, size: int) -> Tensor:
    """(T, G, size): the entries of each token's chosen groups of ``size`` contiguous experts."""
    values_Tab = values_TE.unflatten(1, (-1, size))
    return values_Tab.gather(1, group_TG[:, :, None].expand(-1, -1, size))


def _square_side(num_experts: int) -> int:
    """The divisor of E nearest to its square root (of a divisor d below it and its partner E / d, d is the nearer)."""
    return max(d for d in range(1, math.isqrt(num_experts) + 1) if num_experts % d == 0)


def _share(k: int, groups: int, size: int) -> int:
    """Groups per token when the user does not say; k where nothing fits."""
    fits = [g for g in range(1, min(k, groups) + 1) if k % g == 0 and k // g <= size]
    return next((g for g in fits if g * g >= k), fits[-1] if fits else k)
