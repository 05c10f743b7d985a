"""ReMoE (Wang, Zhu, Chen, ICLR 2025): ReLU instead of softmax and top-k, which makes routing differentiable throughout.

``R = relu(x W)`` are the weights as they are; expert e computes a token iff R_e > 0. A token has as many experts as it has
positive scores, possibly none (its output is then that of the shared experts, or zero). How many there are on average is
steered by an L1 penalty whose strength follows the sparsity S that was seen in the last step:

    L_reg = 1/(L T) sum_l sum_t sum_e f_e R_te,    f_e = E/(k T) sum_t [R_te > 0]  (no gradient; 1 without balancing)
    S = 1 - share of (token, expert) pairs in use, over all L sparse layers
    lambda <- lambda * alpha ^ sign((1 - k/E) - S)

f_e presses hardest on the experts used most: with f the penalty also balances. About the first hundred steps are nearly
dense (half of the scores are positive at the start) and cost accordingly. A fixed lambda would not do: the penalty's
minimum is "everything off", and a score that is negative for every token has no gradient and never comes back.

Legend: T tokens, D model width, E experts, L sparse layers; k is the number of experts per token aimed at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan, from_rows
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Facts
from moesaic.routing.gate import LinearGate, Outcome, Router, StepStats, check_k, router_dtype, ruled


class ReLURouter(Router):
    """ReLU routing with the adaptive L1 penalty.

    The plan has T * E rows, those of silent experts sent nowhere: N stays static, nothing is dropped.

    Args:
        lambda_start, alpha: lambda's first value and its factor per step.
        balance: weigh the penalty by load (f above); False is the plain L1.
    """

    facts = Facts(
        balance="learned", experts="0..E", varies=True, can_drop=True, source="Wang, Zhu and Chen 2024 (ReMoE)"
    )
    penalty: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        lambda_start: float = 1e-8,
        alpha: float = 1.2,
        balance: bool = True,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        if not lambda_start > 0:
            raise ConfigError(
                f"lambda_start must be above 0, not {lambda_start}: it is only ever multiplied, so it would stay."
            )
        if not alpha > 1:
            raise ConfigError(
                f"alpha must be above 1, not {alpha}: lambda has to grow while too many experts are in use."
            )
        if not init_std > 0:
            raise ConfigError(
                f"init_std must be above 0, not {init_std}: all scores would be 0, where ReLU has no gradient."
            )
        self.num_experts, self.k = num_experts, k
        self.alpha, self.balance = alpha, balance
        self.gate = LinearGate(dim, num_experts, init_std=init_std)
        self.register_buffer("penalty", torch.tensor(lambda_start, dtype=router_dtype()))

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; rows in order of (token, expert)."""
        logits_TE = ruled(self.gate(x_TD), ctx)
        gate = Gate(logits_TE, logits_TE.relu())
        T, E = logits_TE.shape
        token_N = torch.arange(T, device=x_TD.device).repeat_interleave(E)
        expert_N = torch.arange(E, device=x_TD.device).repeat(T)
        weight_N = gate.probs_TE.reshape(-1)
        expert_N = torch.where(weight_N > 0, expert_N, E)
        return from_rows(token_N, expert_N, weight_N, T, E, valid_T=ctx.valid_T, gate=gate, allowed_TE=ctx.allowed_TE)

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """Today's scores of these experts."""
        return gate.probs_TE.gather(1, expert_TK)

    def own_losses(self, plan: RoutingPlan | SoftPlan, outcome: Outcome) -> dict[str, Tensor]:
        """lambda times this layer's share of L_reg, over valid tokens."""
        assert isinstance(plan, RoutingPlan) and plan.gate is not None
        weight_TE = plan.gate.probs_TE
        if plan.valid_T is not None:
            weight_TE = torch.where(plan.valid_T[:, None], weight_TE, 0.0)
        total = outcome.peers.total
        tokens = total(plan.num_valid).clamp(min=1)
        mean_E = total(weight_TE.sum(dim=0)) / tokens
        if self.balance:
            mean_E = mean_E * total((weight_TE > 0).sum(dim=0)) * (self.num_experts / (self.k * tokens))
        return {"l1": self.penalty * mean_E.sum() / outcome.num_layers}

    def after_step(self, stats: StepStats) -> None:
        """Stronger while more experts than k are in use, weaker while fewer are."""
        too_dense = stats.active_share - self.k / self.num_experts
        step = (too_dense > 0) - (too_dense < 0)
        # Clamped, because a target out of reach would otherwise drive it to infinity or, for good, to zero.
        self.penalty.mul_(self.alpha**step).clamp_(1e-30, 1e30)
