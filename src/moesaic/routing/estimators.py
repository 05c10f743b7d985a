"""Gradients for the hard choice: straight-through, Gumbel-softmax, REINFORCE. (SparseMixer: ``sparsemixer.py``.)

A top-k router's ordinary gradient comes from the weights alone; these routers give the choice itself a gradient.

| router | choice in training | weight, forward | gradient into the router |
|---|---|---|---|
| ``straight_through`` | top-k of p | 1 | that of p |
| ``gumbel`` | top-k of z + g | 1 (``hard``), else q | that of q = softmax((z + g) / tau) |
| ``reinforce`` | k draws from p without replacement | 1 | policy gradient of the token's loss, none through weights |

These are the sparse forms: dense straight-through and dense Gumbel-softmax need the outputs of all experts. With weight 1 and
k > 1 a token's output is the plain sum of its experts. GShard, Switch, Mixtral and DeepSeek train with none of these.

Sources: Bengio et al. 2013 (straight-through); Jang et al. 2016 and Maddison et al. 2016 (Gumbel-softmax), Kool et al. 2019
(Gumbel top-k); Williams 1992 (REINFORCE), as "RL-R" in Clark et al. 2022.
Legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from moesaic.errors import ConfigError, one_of
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan
from moesaic.routing.balance.context import mean_over
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts, linear_cost
from moesaic.routing.gate import LinearGate, Outcome, Router, StepStats, check_k, choose, router_dtype, ruled


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """``value`` in the forward, bit for bit; the gradient of ``surrogate`` in the backward."""
    return value.detach() + (surrogate - surrogate.detach())


def gumbel_noise(like_TE: Tensor, generator: torch.Generator | None) -> Tensor:
    """Independent standard Gumbel draws ``-log(-log u)``; the k largest of z + g are k draws from softmax(z) without
    replacement."""
    # -log u of a uniform is an exponential; clamped, because its smallest draw may be 0.
    return -torch.empty_like(like_TE).exponential_(generator=generator).clamp_(min=1e-30).log()


class StraightThrough(Router):
    """Top-k with weight 1 for each chosen expert and the gradient of its softmax probability: ``1 + p - sg(p)``.

    Unlike Switch, the size of the output does not depend on how sure the router is. Works for k = 1.
    """

    facts = Facts(teaches="all", losses={"switch": 1e-2, "z": 1e-3}, source="Bengio et al. 2013")

    def __init__(self, dim: int, num_experts: int, k: int, *, init_std: float = 0.02) -> None:
        super().__init__()
        check_k(k, num_experts)
        self.num_experts, self.k = num_experts, k
        self.gate = LinearGate(dim, num_experts, init_std=init_std)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; K rows each, best first."""
        logits_TE = ruled(self.gate(x_TD), ctx)
        gate = Gate(logits_TE, logits_TE.softmax(dim=-1))
        expert_TK = choose(gate.probs_TE, self.k, ctx.allowed_TE)
        return self.plan(expert_TK, self.weigh(gate, expert_TK), ctx, gate)

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """Ones with the gradient of the probabilities."""
        probs_TK = gate.probs_TE.gather(1, expert_TK)
        return with_gradient_of(torch.ones_like(probs_TK), probs_TK)


class GumbelSoftmax(Router):
    """Gumbel-softmax routing: ``q = softmax((z + g) / tau)``, the k experts with the largest z + g.

    Evaluation takes g = 0, hence argmax. ``gate.noisy_TE`` holds z + g.

    Args:
        hard: weight 1 forward and the gradient of q (straight-through Gumbel); else weight q, not renormalised.
        tau_start, tau_end, anneal_steps: the temperature falls geometrically from the first to the second over that many
            optimiser steps. Low temperatures are nearly one-hot, with gradients of high variance.
    """

    facts = Facts(
        teaches="all",
        noisy=True,
        inference="noise off",
        losses={"switch": 1e-2},
        source="Jang et al. 2016; Maddison et al. 2016",
    )
    step: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        hard: bool = True,
        tau_start: float = 1.0,
        tau_end: float = 0.1,
        anneal_steps: int = 10_000,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        if not 0 < tau_end <= tau_start:
            raise ConfigError(
                f"tau_end={tau_end} must be above 0 and at most tau_start={tau_start}: the temperature is lowered."
            )
        if anneal_steps < 1:
            raise ConfigError(
                f"anneal_steps must be at least 1, not {anneal_steps}; for a constant temperature set tau_end=tau_start."
            )
        self.num_experts, self.k, self.hard = num_experts, k, hard
        self.tau_start, self.tau_end, self.anneal_steps = tau_start, tau_end, anneal_steps
        self.gate = LinearGate(dim, num_experts, init_std=init_std)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def tau(self) -> Tensor:
        """Today's temperature, a scalar on the router's device."""
        done = (self.step.to(self.gate.weight.dtype) / self.anneal_steps).clamp(max=1.0)
        return self.tau_start * (self.tau_end / self.tau_start) ** done

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; K rows each, best first. ``gate.probs_TE`` is the softmax of the clean logits."""
        clean_TE = ruled(self.gate(x_TD), ctx)
        noisy_TE = clean_TE + gumbel_noise(clean_TE, ctx.generator) if self.training else None
        gate = Gate(clean_TE, clean_TE.softmax(dim=-1), noisy_TE=noisy_TE)
        expert_TK = choose(clean_TE if noisy_TE is None else noisy_TE, self.k, ctx.allowed_TE)
        return self.plan(expert_TK, self.weigh(gate, expert_TK), ctx, gate)

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """q of these experts, or ones with its gradient."""
        logits_TE = gate.logits_TE if gate.noisy_TE is None else gate.noisy_TE
        q_TK = (logits_TE / self.tau).softmax(dim=-1).gather(1, expert_TK)
        return with_gradient_of(torch.ones_like(q_TK), q_TK) if self.hard else q_TK

    def after_step(self, stats: StepStats) -> None:
        """One step further down the temperature's schedule."""
        self.step.add_(1)


class Reinforce(Router):
    """Experts are drawn from the policy p = softmax(z) and taught by the policy gradient alone.

    With R = -(loss of the token), its baseline b and the draw (i_1, ..., i_K) without replacement,

        policy = mean over tokens with a target of ``sg(R - b) * -log P(i_1, ..., i_K)``,
        log P = sum_j z[i_j] - logsumexp(z without i_1 ... i_(j-1)).

    Its gradient is an unbiased estimate of that of the mean expected loss wherever a token's routing acts on its own loss
    alone; what routing does to later tokens through attention gets no credit. The loss is one of the router's own, not
    divided by the number of layers: every layer's policy answers for the whole loss. The first step has no reward to compare
    with and is left out. Evaluation takes the k most probable experts.

    Args:
        baseline: "ema": the running mean of the steps' mean reward; "learned": that plus a linear head on the router's
            (detached) input, taught by squared error, which costs D + 1 parameters.
        ema_decay: of the running mean (a plain mean until 1 / (1 - decay) steps have been seen). A mean over a batch is already
            smooth; a longer memory would only lag behind a falling loss.
        entropy_bonus: coefficient of the mean entropy of p, which is added to what is maximised.
        value_weight: coefficient of the learned head's squared error. Nobody else reads that gradient, so an optimiser that
            normalises it does not care; small, because it counts in the global norm that clipping looks at.

    ``gate.extra`` in training: ``log_prob_T``, and with "learned" ``value_T``, the head's output.
    """

    facts = Facts(
        teaches="estimated",
        reads_loss=True,
        noisy=True,
        inference="noise off",
        losses={"switch": 1e-2},
        source="Williams 1992; RL-R in Clark et al. 2022",
    )
    mean_reward: Tensor
    steps_seen: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        baseline: Literal["ema", "learned"] = "ema",
        ema_decay: float = 0.9,
        entropy_bonus: float = 1e-2,
        value_weight: float = 1e-2,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        one_of("baseline", baseline, ("ema", "learned"))
        if not 0 <= ema_decay < 1:
            raise ConfigError(f"ema_decay must be at least 0 and below 1, not {ema_decay}.")
        if not entropy_bonus >= 0:
            raise ConfigError(f"entropy_bonus must be at least 0, not {entropy_bonus}: a negative one is a collapse.")
        if not value_weight > 0:
            raise ConfigError(f"value_weight must be above 0, not {value_weight}: the head would never learn.")
        self.num_experts, self.k = num_experts, k
        self.ema_decay, self.entropy_bonus, self.value_weight = ema_decay, entropy_bonus, value_weight
        self.gate = LinearGate(dim, num_experts, init_std=init_std)
        self.value = LinearGate(dim, 1, bias=True, init_std=0.0) if baseline == "learned" else None
        self.register_buffer("mean_reward", torch.zeros((), dtype=router_dtype()))
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; K rows of weight 1 each, in the order drawn."""
        logits_TE = ruled(self.gate(x_TD), ctx)
        gate = Gate(logits_TE, logits_TE.softmax(dim=-1))
        if not self.training:
            expert_TK = choose(logits_TE, self.k, ctx.allowed_TE)
            return self.plan(expert_TK, self.weigh(gate, expert_TK), ctx, gate)
        expert_TK = choose(logits_TE + gumbel_noise(logits_TE, ctx.generator), self.k, ctx.allowed_TE)
        extra = {"log_prob_T": log_prob_of_draw(logits_TE, expert_TK, ctx.allowed_TE)}
        if self.value is not None:
            extra["value_T"] = self.value(x_TD.detach()).squeeze(1)
        return self.plan(expert_TK, self.weigh(gate, expert_TK), ctx, replace(gate, extra=extra))

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """Ones, without gradient."""
        return torch.ones_like(expert_TK, dtype=gate.logits_TE.dtype)

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """The gate, and the head of a learned baseline, which evaluation does not run."""
        gate = linear_cost(T, D, E)
        if options.get("baseline", "ema") == "ema":
            return gate
        return Cost(gate.flops + 2 * T * D, gate.parameters + D + 1)

    def own_losses(self, plan: RoutingPlan | SoftPlan, outcome: Outcome) -> dict[str, Tensor]:
        """The policy term, the entropy bonus, and the squared error of a learned baseline; empty for an evaluation plan."""
        if plan.gate is None or "log_prob_T" not in plan.gate.extra:
            return {}
        reward_T = -outcome.token_loss_T
        target_T = reward_T != 0  # 0 where there is no target; a real loss of exactly 0 has nothing to teach
        if plan.valid_T is not None:
            target_T = target_T & plan.valid_T
        advantage_T = (reward_T - self.mean_reward) * (self.steps_seen > 0)
        losses = {}
        if self.value is not None:
            value_T = plan.gate.extra["value_T"]
            losses["value"] = self.value_weight * mean_over((advantage_T - value_T).square(), target_T, outcome.peers)
            advantage_T = advantage_T - value_T.detach()
        losses["policy"] = mean_over(-advantage_T * plan.gate.extra["log_prob_T"], target_T, outcome.peers)
        if self.entropy_bonus:
            log_p_TE = plan.gate.logits_TE.log_softmax(dim=-1)
            # Rules put -inf on forbidden experts, and 0 * -inf is NaN.
            entropy_T = -(plan.gate.probs_TE * torch.where(log_p_TE.isfinite(), log_p_TE, 0.0)).sum(dim=-1)
            losses["entropy"] = -self.entropy_bonus * mean_over(entropy_T, target_T, outcome.peers)
        return losses

    def after_step(self, stats: StepStats) -> None:
        """Take the step's mean reward into the running mean."""
        rate = (1 / (self.steps_seen + 1)).clamp(min=1 - self.ema_decay)
        self.mean_reward.add_(rate.to(self.mean_reward.dtype) * (-stats.mean_token_loss - self.mean_reward))
        self.steps_seen.add_(1)


def log_prob_of_draw(logits_TE: Tensor, expert_TK: Tensor, allowed_TE: Tensor | None = None) -> Tensor:
    """(T,) log-probability of drawing these experts in this order without replacement (Plackett-Luce).

    Experts that rules forbid fill places for want of permitted ones; they go nowhere and count as certain.
    """
    permitted_TE = torch.ones_like(logits_TE, dtype=torch.bool) if allowed_TE is None else allowed_TE
    taken_TE = torch.zeros_like(permitted_TE)
    total_T1 = logits_TE.new_zeros(logits_TE.shape[0], 1)
    for expert_T1 in expert_TK.split(1, dim=1):
        permitted_T1 = permitted_TE.gather(1, expert_T1)
        # Zeros before the logarithm, not only after: the gradient of what `where` discards would still be NaN.
        left_TE = torch.where(permitted_T1, logits_TE.masked_fill(taken_TE, float("-inf")), 0.0)
        total_T1 = total_T1 + torch.where(permitted_T1, left_TE.log_softmax(dim=-1).gather(1, expert_T1), 0.0)
        taken_TE = taken_TE.scatter(1, expert_T1, True)
    return total_T1.squeeze(1)
