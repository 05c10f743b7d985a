"""Routing without a choice: Soft MoE (Puigcerver et al. 2023), and the dense softmax mixture.

Soft MoE. Every expert owns P slots. A slot reads a mixture of all tokens of its sequence; each token receives a mixture of
all slots' outputs:

    L = scale * norm(X) norm(Phi)  (T, S),    D = softmax of L over tokens,    C = softmax of L over slots,
    slots = D^T X,    y = C experts(slots),    norm(v) = v / sqrt(|v|^2 + 1e-6): X by rows, Phi by columns.

No choice, hence no balancing and no drops: loads are equal by construction. Padding gets -inf in D.

Sequences never mix; documents packed into one sequence do (soft routing has no order to mask by).

Legend: T tokens of one sequence, D model width, E experts, P slots per expert, S = E * P slots, G sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.plan.edit import restrict
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import LinearGate, Router, check_k, router_dtype, ruled


class SoftMoE(Router):
    """Soft MoE, one group per sequence, so that sequences of a batch never mix.

    Not causal: every token's output depends on all tokens of its sequence, later ones included. In a decoder (only with
    ``allow_leak``) it cheats in training, and generation is not the function it was trained as: at one token per forward
    every slot reads just that token, whose output is then the C-weighted mean of all experts on it.

    The trained slot vectors fix S when the layer is built. Sequences of another length work; their compute per token is then
    other than k.

    Args:
        tokens: tokens per sequence that the default number of slots is made for.
        slots_per_expert: P; None takes ``tokens * k / E``, rounded, at least 1, so that slots cost as much as k rows per
            token. The paper's best setting is P = 1 with many experts.
    """

    facts = Facts(
        causal=False,
        balance="exact",
        experts="all, mixed",
        has_gate=False,
        teaches="all",
        source="Puigcerver et al. 2023",
    )

    def __init__(
        self, dim: int, num_experts: int, k: int, *, tokens: int = 256, slots_per_expert: int | None = None
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        if tokens < 1:
            raise ConfigError(f"tokens must be at least 1, not {tokens}.")
        if slots_per_expert is not None and slots_per_expert < 1:
            raise ConfigError(f"slots_per_expert must be at least 1, not {slots_per_expert}.")
        self.num_experts, self.k, self.tokens = num_experts, k, tokens
        self.slots = _slots(tokens, num_experts, k, slots_per_expert)
        self.phi = nn.Parameter(torch.empty(dim, num_experts * self.slots, dtype=router_dtype()))
        self.scale = nn.Parameter(torch.ones((), dtype=router_dtype()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LeCun normal; columns are normalised, so the size decides only how fast they turn."""
        nn.init.normal_(self.phi, std=self.phi.shape[0] ** -0.5)
        nn.init.ones_(self.scale)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> SoftPlan:
        """Mix (G * T, D) tokens, sequence by sequence."""
        with torch.autocast(x_TD.device.type, enabled=False):
            unit_TD = _normalized(x_TD.to(self.phi.dtype), dim=1)
            logits_TS = unit_TD @ (self.scale * _normalized(self.phi, dim=0))
        if ctx.rule_bias_TE is not None:
            logits_TS = logits_TS + ctx.rule_bias_TE.to(logits_TS.dtype).repeat_interleave(self.slots, dim=1)
        logits_GTS = logits_TS.view(*ctx.shape(len(x_TD)), logits_TS.shape[1])
        combine_GTS = logits_GTS.softmax(dim=2)
        if ctx.valid_T is None:
            plan = SoftPlan(logits_GTS.softmax(dim=1), combine_GTS, self.num_experts)
        else:
            valid_GT1 = ctx.valid_T.view(*logits_GTS.shape[:2], 1)
            # A sequence of padding alone keeps its logits: a softmax over nothing would be NaN.
            hidden_GT1 = ~valid_GT1 & valid_GT1.any(dim=1, keepdim=True)
            dispatch_GTS = logits_GTS.masked_fill(hidden_GT1, float("-inf")).softmax(dim=1)
            dispatch_GTS, combine_GTS = (torch.where(valid_GT1, w_GTS, 0.0) for w_GTS in (dispatch_GTS, combine_GTS))
            plan = SoftPlan(dispatch_GTS, combine_GTS, self.num_experts, ctx.valid_T)
        return plan if ctx.allowed_TE is None else restrict(plan, ctx.allowed_TE)  # type: ignore[return-value]

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """Token-slot scores; mixing tokens into slots and back is done by the plan and costs twice that again."""
        S = E * _slots(options.get("tokens", 256), E, k, options.get("slots_per_expert"))
        return Cost(2 * T * D * S, D * S + 1, f"mixing by the plan: 4 T D S = {4 * T * D * S} FLOPs")

    @property
    def rows_per_token(self) -> float:
        """Slots over tokens, for sequences of ``tokens``."""
        return self.num_experts * self.slots / self.tokens


class DenseSoft(Router):
    """Every expert computes every token, weighted by the softmax over all: the mixture that sparse routers approximate.

    Costs E rows per token whatever the gate says. ("Soft routing" in popular texts means this, not Soft MoE.)
    """

    facts = Facts(balance="exact", experts="E", teaches="all", source="Jacobs et al. 1991")

    def __init__(self, dim: int, num_experts: int, k: int, *, init_std: float = 0.02) -> None:
        super().__init__()
        check_k(k, num_experts)
        if k != num_experts:
            raise ConfigError(
                f'Router "dense_soft" computes all experts for every token, so k must be num_experts={num_experts}, not {k}.'
            )
        self.num_experts, self.k = num_experts, k
        self.gate = LinearGate(dim, num_experts, init_std=init_std)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; E rows each, in the order of experts."""
        logits_TE = ruled(self.gate(x_TD), ctx)
        gate = Gate(logits_TE, logits_TE.softmax(dim=-1))
        expert_TE = torch.arange(self.num_experts, device=x_TD.device).expand_as(logits_TE)
        return self.plan(expert_TE, gate.probs_TE, ctx, gate)

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """The experts' probabilities."""
        return gate.probs_TE.gather(1, expert_TK)


def _slots(tokens: int, num_experts: int, k: int, slots_per_expert: int | None) -> int:
    return max(1, round(tokens * k / num_experts)) if slots_per_expert is None else slots_per_expert


def _normalized(v: Tensor, dim: int) -> Tensor:
    return v * (v.square().sum(dim=dim, keepdim=True) + 1e-6).rsqrt()
