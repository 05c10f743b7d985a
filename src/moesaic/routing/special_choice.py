"""Token choice among feed-forward and zero-computation experts: null experts (AdaMoE) and MoE++.

Both choose k of all E experts, of which the last Z compute nothing (``MoE(zero=..., copy=..., constant=...)``), so a token uses
0..k feed-forward experts. Both need a balancing loss that tells the kinds apart; it is the router's own, so leave "switch" out
of ``moe.losses``.

| router | weights | loss |
|---|---|---|
| null_experts | p over the sum of the chosen true experts; 0 on null ones | ``E sum_e f_e P_e``, f averaged over null experts |
| moepp | p, not rescaled | ``sum_e eta_e f_e P_e``, eta = 1 (feed-forward) or tau |

AdaMoE (Zeng et al. 2024): averaging f over the null experts leaves it to tokens which null expert they take, and pushes only
their common share towards Z / E. (In the release, CengZihao/AdaMoE, a slice over the wrong axis of a one-hot tensor makes that
averaging a no-op; here is the paper's formula, with f normalised to sum 1 as in the "switch" loss, 1 at balance.)

MoE++ (Jin et al. 2025, eq. 6-9): ``z = x W + z_prev W_g``, z_prev the logits of the previous sparse layer (with gradient; none
in the first). f_e is the share of tokens that choose e (they sum to k), so the loss is ``k tau / (tau F + Z)`` at its best
point, where zero-computation experts get 1/tau times the load of feed-forward ones. ``CapacityRule(tau=...)`` splits capacity
alike. The release (SkyworkAI/MoE-plus-plus) gates with a tanh layer in between, rescales weights leaving the zero expert out,
and doubles inputs.

Legend: T tokens, D model width, E experts, F of them feed-forward, Z zero-computation, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan.peers import Peers
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan
from moesaic.routing.balance.context import distribution
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.contextual import ContextRouter, Weights
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import LinearGate, Outcome, Router, check_k, choose, ruled


def check_kinds(router: str, num_experts: int, num_special: int) -> None:
    """Raises ``ConfigError`` unless there are experts of both kinds."""
    if not 1 <= num_special < num_experts:
        raise ConfigError(
            f'Router "{router}" chooses between feed-forward and zero-computation experts, but {num_special} of the '
            f"{num_experts} experts are zero-computation ones; set moe.zero (or copy, constant) to at least 1."
        )


class NullExperts(Router):
    """Top-k over true and null experts, renormalised over the true ones (AdaMoE).

    Null rows have weight 0, so whatever kind the special experts of the layer are, they add nothing; build it with
    ``zero=num_special``. A token all of whose k are null gets no output.

    Args:
        num_special: null experts, the last ones.
        balance: coefficient of the balancing loss.
        init_std: of the gate's weights.
    """

    facts = Facts(experts="k, null ones included", balance="no", source="Zeng et al. 2024")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        num_special: int = 0,
        balance: float = 1e-2,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        check_kinds("null_experts", num_experts, num_special)
        if k == 1:
            raise ConfigError(
                "k=1 makes the weight of a true expert exactly 1, so the router gets no gradient; null experts need k of at "
                "least 2 (AdaMoE raises k by as much as null experts take away)."
            )
        _check_balance(balance)
        self.num_experts, self.k, self.balance = num_experts, k, balance
        self.num_true = num_experts - num_special
        self.gate = LinearGate(dim, num_experts, init_std=init_std)

    @property
    def rows_per_token(self) -> float:
        """k F / E: what the loss pushes towards."""
        return self.k * self.num_true / self.num_experts

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; K rows each, best first."""
        logits_TE = ruled(self.gate(x_TD), ctx)
        gate = Gate(logits_TE, logits_TE.softmax(dim=-1))
        expert_TK = choose(gate.probs_TE, self.k, ctx.allowed_TE)
        return self.plan(expert_TK, self.weigh(gate, expert_TK), ctx, gate)

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """fp32 (T, K): probabilities over the sum of the true experts among the chosen; 0 on null ones."""
        true_TK = torch.where(expert_TK < self.num_true, gate.probs_TE.gather(1, expert_TK), 0.0)
        return true_TK / (true_TK.sum(dim=1, keepdim=True) + 1e-20)

    def own_losses(self, plan: RoutingPlan | SoftPlan, outcome: Outcome) -> dict[str, Tensor]:
        """The Switch loss over true experts and the average null expert."""
        assert isinstance(plan, RoutingPlan)
        counts_E, mean_E = _load_and_mean(plan, outcome.peers)
        null_E = counts_E[self.num_true :].mean().expand(self.num_experts - self.num_true)
        share_E = torch.cat([counts_E[: self.num_true], null_E]) / counts_E.sum().clamp(min=1)
        loss = self.num_experts * (share_E * mean_E).sum()
        return {"null_balance": self.balance * loss / outcome.num_layers}


class MoEPlusPlus(ContextRouter):
    """Top-k with gating residuals and a loss that lets zero-computation experts take more.

    Args:
        num_special: zero-computation experts, the last ones.
        tau: load of a feed-forward expert over that of a zero-computation one; smaller computes less.
        balance: beta, coefficient of the loss.
        normalize: "none" (the paper's equation 1), or "chosen" to rescale the weights of a token to sum to 1.
        init_std: of both matrices.
    """

    facts = Facts(experts="k, zero-computation ones included", reads_previous=True, source="Jin et al. 2025")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        num_special: int = 0,
        tau: float = 0.75,
        balance: float = 1e-2,
        normalize: Weights = "none",
        init_std: float = 0.02,
    ) -> None:
        super().__init__(num_experts, k, normalize)
        check_kinds("moepp", num_experts, num_special)
        _check_balance(balance)
        if not 0 < tau <= 1:
            raise ConfigError(f"tau must be above 0 and at most 1, not {tau}.")
        self.tau, self.balance, self.num_true = tau, balance, num_experts - num_special
        self.gate = LinearGate(dim, num_experts, init_std=init_std)
        self.residual = LinearGate(num_experts, num_experts, init_std=init_std)

    @property
    def rows_per_token(self) -> float:
        """k tau F / (tau F + Z): what the loss pushes towards."""
        weighted = self.tau * self.num_true
        return self.k * weighted / (weighted + self.num_experts - self.num_true)

    def logits(self, x_TD: Tensor, ctx: TokenContext) -> tuple[Tensor, dict[str, Tensor]]:
        """(T, E)."""
        own_TE = self.gate(x_TD)
        return own_TE + self.residual(self._previous(own_TE, ctx)), {}

    def _previous(self, own_TE: Tensor, ctx: TokenContext) -> Tensor:
        if ctx.previous is None:
            return torch.zeros_like(own_TE)  # and not None, so that the first layer's W_g has a gradient (of zero)
        logits_TE = ctx.previous.logits_TE
        if logits_TE.shape != own_TE.shape:
            raise ConfigError(
                f'Router "moepp" adds the logits of the previous sparse layer to its own, but those are '
                f"{tuple(logits_TE.shape)} and its own {tuple(own_TE.shape)}; give all sparse layers as many experts."
            )
        return torch.where(logits_TE.isfinite(), logits_TE, 0.0).to(own_TE.dtype)  # rules leave -inf

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """Two matrices, D E and E E."""
        return Cost(2 * T * E * (D + E), E * (D + E))

    def own_losses(self, plan: RoutingPlan | SoftPlan, outcome: Outcome) -> dict[str, Tensor]:
        """The heterogeneous load-balance loss."""
        assert isinstance(plan, RoutingPlan)
        counts_E, mean_E = _load_and_mean(plan, outcome.peers)
        share_E = counts_E / outcome.peers.total(plan.num_valid).clamp(min=1)
        eta_E = torch.full_like(share_E, self.tau)
        eta_E[: self.num_true] = 1.0
        loss = (eta_E * share_E * mean_E).sum()
        return {"moepp_balance": self.balance * loss / outcome.num_layers}


def _check_balance(balance: float) -> None:
    if not balance >= 0:
        raise ConfigError(f"balance must be at least 0, not {balance}.")


def _load_and_mean(plan: RoutingPlan, peers: Peers) -> tuple[Tensor, Tensor]:
    """(E,) rows chosen for each expert, and its mean probability over real tokens, which alone has a gradient."""
    share_TE = distribution(plan)
    counts_E, tokens = peers.total(plan.choice_counts_E), peers.total(plan.num_valid)
    return counts_E.to(share_TE.dtype), peers.total(share_TE.sum(dim=0)) / tokens.clamp(min=1)
