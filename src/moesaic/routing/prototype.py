"""Expert prototyping (M6-T, Yang et al. 2021): k routers, each choosing one of its own E/k experts; their outputs are summed.

Costs what top-k costs, but the k choices are independent: no expert competes with one of another prototype, and choosing is
k argmaxes side by side instead of k rounds. The weight is the chosen expert's probability within its prototype, so the
weights of a token sum to something between 1 and k.

Prototype i owns experts ``i E/k ... (i + 1) E/k - 1``; its router is those rows of the one gate.

Legend: T tokens, D model width, E experts, K prototypes (= experts per token), M = E / K experts of one prototype.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan.plan import Gate, RoutingPlan
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Facts
from moesaic.routing.gate import LinearGate, Router, check_k, choose, ruled


class Prototypes(Router):
    """k top-1 routers over k groups of experts.

    ``gate.probs_TE`` is normalised within each prototype: a token's scores sum to k. Losses and readings that want a
    distribution over experts divide by that sum.
    """

    facts = Facts(teaches="all", losses={"switch": 1e-2}, source="Yang et al. 2021 (M6-T)")

    def __init__(self, dim: int, num_experts: int, k: int, *, init_std: float = 0.02) -> None:
        super().__init__()
        check_k(k, num_experts)
        if num_experts % k:
            raise ConfigError(
                f"k={k} prototypes cannot share num_experts={num_experts} equally; choose a k that divides it."
            )
        if k == num_experts > 1:
            raise ConfigError(
                f"k={k} prototypes of one expert each make every weight exactly 1, so the router gets no gradient; "
                f"choose k below num_experts={num_experts}."
            )
        self.num_experts, self.k = num_experts, k
        self.gate = LinearGate(dim, num_experts, init_std=init_std)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; row i of a token is the choice of prototype i."""
        K, M = self.k, self.num_experts // self.k
        # Prototypes are tokens of their own as far as rules and choosing go: one that rules empty must not disturb the others.
        allowed_RM = None if ctx.allowed_TE is None else ctx.allowed_TE.reshape(-1, M)
        bias_RM = None if ctx.rule_bias_TE is None else ctx.rule_bias_TE.reshape(-1, M)
        logits_RM = ruled(self.gate(x_TD).view(-1, M), replace(ctx, allowed_TE=allowed_RM, rule_bias_TE=bias_RM))
        logits_TE = logits_RM.view(-1, K * M)
        gate = Gate(logits_TE, logits_TE.view(-1, K, M).softmax(dim=-1).flatten(1))
        best_TK = choose(gate.probs_TE.view(-1, M), 1, allowed_RM).view(-1, K)
        expert_TK = best_TK + torch.arange(K, device=x_TD.device) * M
        return self.plan(expert_TK, self.weigh(gate, expert_TK), ctx, gate)

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """The experts' probabilities, each within its prototype."""
        return gate.probs_TE.gather(1, expert_TK)
