"""As many experts as a token needs: by probability mass (top-p), or by a budget the router predicts.

| router | a token's experts | weights |
|---|---|---|
| top_p | smallest prefix of the sorted probabilities whose sum reaches ``threshold`` | p |
| budget | the ``1 + argmax(MLP(x))`` most probable | p |
| top_any, see ``dynmoe.py`` | every expert whose ``sigmoid(cosine)`` exceeds a trained ``sigmoid(G_e)`` | 1 / their number |

Every token owns a fixed number of rows (``k_max``, or E), of which the unused stay empty; set ``k_max`` where E is large. ``k``
is the average number of experts these routers are meant to use: capacity, parameter counts and comparisons at equal compute
take it, the routing itself only where an option says so.

Legend: T tokens, D model width, E experts, K rows per token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan
from moesaic.routing.balance.context import mean_over
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.estimators import gumbel_noise, with_gradient_of
from moesaic.routing.facts import Cost, Facts, linear_cost
from moesaic.routing.gate import LinearGate, Outcome, Router, check_k, choose, ruled


class AdaptiveRouter(Router):
    """What these routers share: a fixed number of rows per token, best first, of which a mask says which are used."""

    def __init__(self, num_experts: int, k: int, k_max: int | None) -> None:
        super().__init__()
        check_k(k, num_experts)
        if k_max is not None and not k <= k_max <= num_experts:
            raise ConfigError(
                f"k_max={k_max} must be between k={k} (the average aimed at) and num_experts={num_experts}; null allows all."
            )
        self.num_experts, self.k, self.k_max = num_experts, k, num_experts if k_max is None else k_max

    def used(self, expert_TK: Tensor, use_TK: Tensor, weight_TK: Tensor, ctx: TokenContext, gate: Gate) -> RoutingPlan:
        """The plan in which unused rows are empty."""
        return self.plan(torch.where(use_TK, expert_TK, self.num_experts), weight_TK, ctx, gate)


class TopP(AdaptiveRouter):
    """The smallest set of experts that holds enough probability (Huang et al. 2024, "Harder Tasks Need More Experts").

    Sure of one expert, the token takes one; unsure, it takes more. At least one always. Since a flat distribution would take
    many, the paper adds the mean entropy of p to the loss (its dynamic loss; the balancing loss "entropy").

    Args:
        threshold: the probability mass to reach (0.4 in the paper's code).
        k_max: most experts per token; the prefix is cut there.
        init_std: of the gate's weights.
    """

    facts = Facts(
        experts="1..E",
        varies=True,
        teaches="all",
        losses={"switch": 1e-2, "entropy": 1e-4},  # both coefficients from memory
        source="Huang et al. 2024",
    )

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        threshold: float = 0.4,
        k_max: int | None = None,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(num_experts, k, k_max)
        if not 0 < threshold <= 1:
            raise ConfigError(f"threshold must be above 0 and at most 1, not {threshold}: it is a probability mass.")
        if k_max is not None:
            self.facts = replace(self.facts, experts=f"1..{k_max}", varies=k_max > 1)
        self.threshold = threshold
        self.gate = LinearGate(dim, num_experts, init_std=init_std)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; ``k_max`` rows each, the used ones first."""
        logits_TE = ruled(self.gate(x_TD), ctx)
        gate = Gate(logits_TE, logits_TE.softmax(dim=-1))
        expert_TK = choose(gate.probs_TE, self.k_max, ctx.allowed_TE)
        weight_TK = gate.probs_TE.gather(1, expert_TK)
        mass_TK = weight_TK.detach().cumsum(dim=1)
        before_TK = F.pad(mass_TK[:, :-1], (1, 0))  # exactly 0 for the first, which is therefore always used
        return self.used(expert_TK, before_TK < self.threshold, weight_TK, ctx, gate)


class Budget(AdaptiveRouter):
    """A small network says how many experts the token may use: ``k_t = 1 + argmax(MLP(x_t))``, of 1..``k_max``.

    The generic reading of "meta-routers" and "k-networks", which have no findable source. The straight-through gradient: with
    q the softmax of the network's scores, the j-th of a token's experts is used with soft probability ``s_j = P(k_t >= j)``,
    and its weight is ``p_j * (use_j + s_j - detach(s_j))``. So the task says of each used expert whether it is worth having;
    of those not used it says nothing, unless ``sample`` draws k_t from q in training. The loss ``cost * mean(k_t)``, or
    ``cost * (mean(k_t) - target)^2``, has its gradient through the soft count ``sum_j s_j``.

    Args:
        k_max: the largest budget; null is the smaller of 2k and E.
        hidden: width of the network (one SiLU layer).
        cost: coefficient of the loss.
        target: the average to hold; null makes every expert cost the same, and k_t falls to what the task pays for.
        sample: draw k_t (Gumbel) in training instead of taking the argmax.
        init_std: of the gate's weights.
    """

    facts = Facts(
        experts="1..k_max", varies=True, teaches="all", losses={"switch": 1e-2}, source="generic; no published source"
    )

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        k_max: int | None = None,
        hidden: int = 32,
        cost: float = 1e-2,
        target: float | None = None,
        sample: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(num_experts, k, _largest_budget(num_experts, k, k_max))
        if self.k_max < 2:
            raise ConfigError(
                f'k_max={self.k_max} leaves the budget nothing to decide; choose at least 2, or router "switch".'
            )
        if hidden < 1 or not cost >= 0:
            raise ConfigError(f"hidden={hidden} must be at least 1 and cost={cost} at least 0.")
        if target is not None and not 1 <= target <= self.k_max:
            raise ConfigError(f"target={target} must be between 1 and k_max={self.k_max} experts per token.")
        if sample:
            self.facts = replace(self.facts, noisy=True, inference="noise off")
        self.cost_of_one, self.target, self.sample = cost, target, sample
        self.gate = LinearGate(dim, num_experts, init_std=init_std)
        self.head_in = LinearGate(dim, hidden, bias=True, init_std=dim**-0.5)
        self.head_out = LinearGate(hidden, self.k_max, bias=True, init_std=init_std)
        assert self.head_out.bias is not None
        with torch.no_grad():
            self.head_out.bias[k - 1] = 1.0  # every token starts with the average

    @property
    def rows_per_token(self) -> float:
        """The target where there is one, else k, which is where training starts."""
        return float(self.k if self.target is None else self.target)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; ``k_max`` rows each, the used first. ``gate.extra["count_T"]``: k_t with the soft gradient."""
        logits_TE = ruled(self.gate(x_TD), ctx)
        budget_TK = self.head_out(F.silu(self.head_in(x_TD)))
        drawn_TK = budget_TK
        if self.sample and self.training:
            drawn_TK = budget_TK + gumbel_noise(budget_TK, ctx.generator)
        use_TK = torch.arange(self.k_max, device=x_TD.device) <= choose(drawn_TK, 1)
        # Column j: the soft probability of a budget of at least j + 1; the first is 1.
        soft_TK = budget_TK.softmax(dim=1).flip(1).cumsum(dim=1).flip(1)
        step_TK = with_gradient_of(use_TK.to(soft_TK.dtype), soft_TK)
        gate = Gate(logits_TE, logits_TE.softmax(dim=-1), extra={"count_T": step_TK.sum(dim=1)})
        expert_TK = choose(gate.probs_TE, self.k_max, ctx.allowed_TE)
        return self.used(expert_TK, use_TK, gate.probs_TE.gather(1, expert_TK) * step_TK, ctx, gate)

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """The plain gate and the network."""
        H, K = options.get("hidden", 32), _largest_budget(E, k, options.get("k_max"))
        plain = linear_cost(T, D, E)
        return Cost(plain.flops + 2 * T * H * (D + K), plain.parameters + (D + 1) * H + (H + 1) * K)

    def own_losses(self, plan: RoutingPlan | SoftPlan, outcome: Outcome) -> dict[str, Tensor]:
        """What the experts used cost, or the square of the distance to the target."""
        assert plan.gate is not None
        mean = mean_over(plan.gate.extra["count_T"], plan.valid_T, outcome.peers)
        price = mean if self.target is None else (mean - self.target).square()
        return {"budget": self.cost_of_one * price / outcome.num_layers}


def _largest_budget(num_experts: int, k: int, k_max: int | None) -> int:
    return min(2 * k, num_experts) if k_max is None else k_max
