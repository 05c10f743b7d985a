"""Token choice: every token takes its k best experts. One router for the four gate orders of real models.

| order | weights of the chosen | models |
|---|---|---|
| A  ``normalize="none"`` | ``p[idx]`` | Switch, OLMoE, Qwen2-MoE, DeepSeek-V2 (times ``scale``) |
| B  ``normalize="chosen"`` | ``p[idx] / sum p[idx]`` | Mixtral in Hugging Face, Qwen3-MoE |
| B' ``normalize="softmax_chosen"`` | ``softmax(z[idx])`` | Shazeer 2017, gpt-oss (``gate_bias``), Megatron-LM |
| C  ``score="sigmoid", balance_bias=True`` | ``scale * s[idx] / max(sum s[idx], 1e-20)``, chosen by s + b | DeepSeek-V3 |

B equals B' in real arithmetic. In A every logit gets task gradient through the softmax; in the others only the chosen do.

Sources: Shazeer et al. 2017; Mixtral (Jiang et al. 2024); DeepSeek-V2, -V3; auxiliary-loss-free balancing (Wang et al. 2024).
Legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moesaic.errors import ConfigError, one_of
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan
from moesaic.routing.balance import BiasController, BiasRule, Gains
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts, Inference
from moesaic.routing.gate import (
    LinearGate,
    Router,
    Score,
    StepStats,
    check_k,
    choose,
    mask_groups,
    router_dtype,
    ruled,
    score,
)

Normalize = Literal["none", "chosen", "softmax_chosen"]


class TopK(Router):
    """Token-choice top-k routing in any of the orders above.

    Args:
        dim, num_experts, k: D, E, K.
        score: score function of the logits.
        normalize: see the table.
        scale: factor on the weights (DeepSeek's ``routed_scaling_factor``).
        gate_bias: trained bias on the logits (gpt-oss).
        balance_bias: an untrained fp32 bias on the scores, used for choosing only, that ``after_step`` moves against load.
        bias_rule, bias_rate: how that bias follows load and its step (None: the rule's own), see ``balance/bias.py``.
        bias_p, bias_i, bias_d, bias_limit: gains of the "pid" rule, and the most its sum may contribute.
        bias_bins: resolution of the "quantile" rule.
        ffn_rows: LongCat's budget: the bias steers towards this many rows per token at feed-forward experts, shared equally,
            and leaves zero-computation experts alone; None treats all experts alike.
        groups, groups_kept, group_score: choose only inside the best ``groups_kept`` of ``groups`` contiguous groups.
        idle: build it although k=1 with renormalised weights teaches the gate nothing: for models that were released so.
        init_std: of the gate's weights; 0 starts uniform.

    Raises ``ConfigError`` for k > E, groups that cannot hold k, and k=1 with renormalised weights (the weight would be 1
    whatever the router says, so it could not learn).
    """

    facts = Facts(losses={"switch": 1e-2, "z": 1e-3}, source="Shazeer et al. 2017; Jiang et al. 2024")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        score: Score = "softmax",
        normalize: Normalize = "chosen",
        scale: float = 1.0,
        gate_bias: bool = False,
        balance_bias: bool = False,
        bias_rule: BiasRule = "sign",
        bias_rate: float | None = None,
        bias_p: float = 1.0,
        bias_i: float = 1.0,
        bias_d: float = 0.0,
        bias_limit: float = 1.0,
        bias_bins: int = 1000,
        ffn_rows: float | None = None,
        num_special: int = 0,
        groups: int = 1,
        groups_kept: int | None = None,
        group_score: Literal["max", "top2_sum"] = "max",
        idle: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        one_of("score", score, get_args(Score))
        one_of("normalize", normalize, get_args(Normalize))
        one_of("group_score", group_score, ("max", "top2_sum"))
        if not (scale > 0 and math.isfinite(scale)):
            raise ConfigError(
                f"scale={scale} would leave the router without gradient or turn it round; it must be above 0."
            )
        learns = k > 1 or normalize == "none" or num_experts == 1
        if not learns and not idle:
            raise ConfigError(
                f'k=1 with normalize="{normalize}" makes every weight exactly {scale:g}, so the router gets no gradient; '
                'use normalize="none" (Switch) or k of at least 2, or idle=true to run a model that was released so.'
            )
        if score != "softmax" and normalize == "softmax_chosen":
            raise ConfigError(f'normalize="softmax_chosen" takes its own softmax; it does not go with score="{score}".')
        groups_kept = groups if groups_kept is None else groups_kept
        if groups < 1 or num_experts % groups:
            raise ConfigError(f"groups={groups} must divide num_experts={num_experts}.")
        if not 1 <= groups_kept <= groups:
            raise ConfigError(f"groups_kept={groups_kept} must be between 1 and groups={groups}.")
        if k > groups_kept * (num_experts // groups):
            raise ConfigError(
                f"k={k} experts do not fit into groups_kept={groups_kept} groups of {num_experts // groups}; keep more groups."
            )
        self.num_experts, self.k = num_experts, k
        self.score, self.normalize, self.scale = score, normalize, scale
        self.groups, self.groups_kept, self.group_score = groups, groups_kept, group_score
        self.gate = LinearGate(dim, num_experts, bias=gate_bias, init_std=init_std)
        self.choice_bias_E: Tensor | None
        bias_E = torch.zeros(num_experts, dtype=router_dtype()) if balance_bias else None
        controller = BiasController(
            num_experts,
            k,
            bias_rule,
            bias_rate,
            target_E=_budget(num_experts, k, ffn_rows, num_special),
            gains=Gains(bias_p, bias_i, bias_d, bias_limit),
            bins=bias_bins,
        )
        if bias_rule == "quantile" and (score == "sqrt_softplus" or groups_kept < groups):
            raise ConfigError(
                'bias_rule="quantile" solves for scores between 0 and 1 in a free choice of experts, so it does not go with '
                'score="sqrt_softplus" or groups; use "sign".'
            )
        self.controller = controller if balance_bias else None
        if not learns:
            self.facts = replace(self.facts, teaches="none")
        if normalize == "none" and score == "softmax":
            self.facts = replace(self.facts, teaches="all")  # every logit is in the softmax's denominator
        if balance_bias:
            self.facts = replace(
                self.facts, balance="learned", losses={}, source="Wang et al. 2024; DeepSeek-V3 (2024)"
            )
        self.register_buffer("choice_bias_E", bias_E)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; K rows per token, best first."""
        logits_TE = ruled(self.gate(x_TD), ctx)
        probs_TE = score(logits_TE, self.score)
        gate = Gate(logits_TE, probs_TE)
        choice_TE = probs_TE if self.choice_bias_E is None else probs_TE + self.choice_bias_E
        if self.groups_kept < self.groups:
            choice_TE = mask_groups(choice_TE, self.groups, self.groups_kept, self.group_score)
        expert_TK = choose(choice_TE, self.k, ctx.allowed_TE)
        return self.plan(expert_TK, self.weigh(gate, expert_TK), ctx, gate, full=True)

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """fp32 (T, K) weights of any choice of experts, from the unbiased scores."""
        if self.normalize == "softmax_chosen":
            weight_TK = gate.logits_TE.gather(1, expert_TK).softmax(dim=-1)
        else:
            weight_TK = gate.probs_TE.gather(1, expert_TK)
        if self.normalize == "chosen":
            # The floor only keeps 0 / 0 away. Models add 1e-20 instead: the same fp32 number above 1e-12, and slower.
            weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        return weight_TK if self.scale == 1 else weight_TK * self.scale

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """The plain gate; its bias adds E parameters."""
        return Cost(2 * T * D * E, D * E + (E if options.get("gate_bias") else 0))

    def statistics(self, plan: RoutingPlan | SoftPlan) -> dict[str, Tensor]:
        """What the rule of the selection bias counts besides rows."""
        if self.choice_bias_E is None or self.controller is None:
            return {}
        return self.controller.statistics(plan, self.choice_bias_E)

    def after_step(self, stats: StepStats) -> None:
        """Move the selection bias against load; nothing without ``balance_bias``."""
        if self.choice_bias_E is not None and self.controller is not None:
            self.choice_bias_E.copy_(self.controller.step(self.choice_bias_E, stats))


def _budget(num_experts: int, k: int, ffn_rows: float | None, num_special: int) -> Tensor | None:
    """(E,) share of load each feed-forward expert should get, -1 for zero-computation experts, which are not steered."""
    if ffn_rows is None:
        return None
    if not num_special:
        raise ConfigError(
            f"ffn_rows={ffn_rows} leaves the other rows to zero-computation experts, and this layer has none."
        )
    if not 0 < ffn_rows < k:
        raise ConfigError(f"ffn_rows must be above 0 and below k={k}, not {ffn_rows}.")
    ffn = num_experts - num_special
    return torch.tensor([ffn_rows / k / ffn] * ffn + [-1.0] * num_special, dtype=torch.float64, device="cpu")


class Switch(Router):
    """Top-1 with the chosen probability as weight and multiplicative input jitter in training (Fedus et al. 2022).

    Args:
        jitter: epsilon of ``x * U(1 - eps, 1 + eps)``, seen by the router only, in training only; 0 disables.
    """

    facts = Facts(
        noisy=True,
        experts="1",
        teaches="all",
        inference="noise off",
        losses={"switch": 1e-2},
        source="Fedus et al. 2021",
    )

    def __init__(self, dim: int, num_experts: int, k: int = 1, *, jitter: float = 1e-2, init_std: float = 0.02) -> None:
        super().__init__()
        check_k(k, num_experts)
        if k != 1:
            raise ConfigError(f'Router "switch" sends every token to one expert, so k must be 1, not {k}; use "topk".')
        if not 0 <= jitter < 1:
            raise ConfigError(f"jitter must be at least 0 and below 1, not {jitter}.")
        self.num_experts, self.k, self.jitter = num_experts, k, jitter
        if not jitter:
            self.facts = replace(self.facts, noisy=False, inference="same")
        self.gate = LinearGate(dim, num_experts, init_std=init_std)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens, one row each. Experts see the clean input."""
        x_TD = x_TD.to(self.gate.weight.dtype)
        if self.training and self.jitter:
            noise_TD = torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter, generator=ctx.generator)
            x_TD = x_TD * noise_TD
        logits_TE = ruled(self.gate(x_TD), ctx)
        gate = Gate(logits_TE, score(logits_TE, "softmax"))
        expert_TK = choose(gate.probs_TE, 1, ctx.allowed_TE)
        return self.plan(expert_TK, self.weigh(gate, expert_TK), ctx, gate, full=True)

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """The chosen probability, not renormalised."""
        return gate.probs_TE.gather(1, expert_TK)


class GShardTop2(Router):
    """Top-2 with a stochastic second expert (Lepikhin et al. 2020).

    Weights are renormalised by ``g1 + g2 + 1e-9`` before the second expert is sampled away and before capacity.

    Args:
        second: which second experts are kept in training. "stochastic": with probability min(1, 2 g2), g2 renormalised
            (as in fairseq's top2gate); "threshold_stochastic": with probability min(1, g2 / threshold) (mesh-tf);
            "threshold": where g2 > threshold; "gumbel": the second is sampled by Gumbel-max over the remaining logits and
            always kept (DeepSpeed); "all".
        eval_second: the policy in evaluation: "all" or "threshold".
    """

    facts = Facts(
        noisy=True,
        experts="1..2",
        varies=True,
        inference="noise off",
        losses={"switch": 1e-2},
        source="Lepikhin et al. 2020",
    )

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        second: Literal["stochastic", "threshold_stochastic", "threshold", "gumbel", "all"] = "stochastic",
        eval_second: Literal["all", "threshold"] = "all",
        threshold: float = 0.2,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        one_of("second", second, ("stochastic", "threshold_stochastic", "threshold", "gumbel", "all"))
        one_of("eval_second", eval_second, ("all", "threshold"))
        if k != 2:
            raise ConfigError(f'Router "gshard" sends every token to at most two experts, so k must be 2, not {k}.')
        if not 0 < threshold < 1:
            raise ConfigError(f"threshold must be between 0 and 1, not {threshold}.")
        self.num_experts, self.k = num_experts, k
        self.second, self.eval_second, self.threshold = second, eval_second, threshold
        if second in ("all", "gumbel"):
            self.facts = replace(self.facts, experts="k", varies=False)
        if second in ("all", "threshold"):
            rule = "" if second == eval_second else f"second experts: {eval_second}"
            inference: Inference = "other rule" if rule else "same"
            self.facts = replace(self.facts, noisy=False, inference=inference, inference_rule=rule)
        self.gate = LinearGate(dim, num_experts, init_std=init_std)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; two rows each, the second possibly going nowhere by the router's own choice."""
        logits_TE = ruled(self.gate(x_TD), ctx)
        gate = Gate(logits_TE, score(logits_TE, "softmax"))
        policy = self.second if self.training else self.eval_second
        expert_TK = self._choose(gate, policy, ctx)
        weight_TK = self.weigh(gate, expert_TK)
        keep_T = self._keep_second(weight_TK[:, 1].detach(), policy, ctx)
        expert_TK = torch.stack([expert_TK[:, 0], torch.where(keep_T, expert_TK[:, 1], self.num_experts)], dim=1)
        return self.plan(expert_TK, weight_TK, ctx, gate)

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """Both probabilities over their sum + 1e-9."""
        weight_TK = gate.probs_TE.gather(1, expert_TK)
        return weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + 1e-9)

    def _choose(self, gate: Gate, policy: str, ctx: TokenContext) -> Tensor:
        if policy != "gumbel":
            return choose(gate.probs_TE, 2, ctx.allowed_TE)
        first_T1 = choose(gate.probs_TE, 1, ctx.allowed_TE)
        uniform_TE = torch.empty_like(gate.logits_TE).uniform_(generator=ctx.generator).clamp_(1e-20, 1 - 1e-7)
        noisy_TE = gate.logits_TE.detach() - (-uniform_TE.log()).log()
        second_T1 = choose(noisy_TE.scatter(1, first_T1, float("-inf")), 1, _but(ctx.allowed_TE, first_T1))
        return torch.cat([first_T1, second_T1], dim=1)

    def _keep_second(self, weight_T: Tensor, policy: str, ctx: TokenContext) -> Tensor:
        if policy in ("all", "gumbel"):
            return torch.ones_like(weight_T, dtype=torch.bool)
        if policy == "threshold":
            return weight_T > self.threshold
        uniform_T = torch.empty_like(weight_T).uniform_(generator=ctx.generator)
        limit = 0.5 if policy == "stochastic" else self.threshold
        return weight_T / limit > uniform_T


def _but(allowed_TE: Tensor | None, taken_T1: Tensor) -> Tensor | None:
    """The rules without the expert a token has taken already."""
    return None if allowed_TE is None else allowed_TE.scatter(1, taken_T1, False)
