"""Noisy top-k gating with its differentiable load estimate (Shazeer et al. 2017), and the fixed-noise variant of V-MoE.

``H = x W_g + N(0, 1) * sigma``, ``sigma = softplus(x W_noise) + 1e-2``; weights are the softmax over the k largest of H.
Both matrices start at zero, so that routing begins uniform and driven by noise. Noise is off in evaluation.

Legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import ConfigError, one_of
from moesaic.plan.plan import Gate, RoutingPlan
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import LinearGate, Router, check_k, choose, ruled


class NoisyTopK(Router):
    """Noisy top-k routing.

    Args:
        variant: "shazeer": learned noise, weights softmax over the chosen noisy logits, threshold for the load estimate
            leaves the expert itself out. "vmoe": fixed noise 1/E, weights ``softmax(noisy)`` not renormalised, threshold the
            k-th largest noisy logit (google-research/vmoe, nn/routing.py).
        noise_floor: least standard deviation of the learned noise (tensor2tensor; not in the paper).
        init_std: of the gate; 0 as in the paper. With "vmoe" the usual 0.02 is a better start.

    ``gate.load_probs_TE`` is P(expert among the chosen) under fresh noise on that expert alone; None in evaluation and for
    k = E, where every expert is always chosen.
    """

    facts = Facts(
        noisy=True,
        has_load_estimate=True,
        inference="noise off",
        losses={"importance": 0.1, "load": 0.1},
        source="Shazeer et al. 2017",
    )

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        variant: Literal["shazeer", "vmoe"] = "shazeer",
        noise_floor: float = 1e-2,
        init_std: float = 0.0,
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        one_of("variant", variant, ("shazeer", "vmoe"))
        if k == 1 and variant == "shazeer" and num_experts > 1:
            raise ConfigError(
                'k=1 with variant="shazeer" renormalises a single weight to exactly 1, so the router gets no task gradient; '
                'use variant="vmoe" or k of at least 2.'
            )
        if noise_floor <= 0:
            raise ConfigError(
                f"noise_floor must be above 0, not {noise_floor}: the load estimate divides by the noise."
            )
        self.num_experts, self.k = num_experts, k
        if variant == "vmoe":
            self.facts = replace(self.facts, teaches="all", source="Riquelme et al. 2021")
        self.variant, self.noise_floor = variant, noise_floor
        self.gate = LinearGate(dim, num_experts, init_std=init_std)
        self.noise_gate = LinearGate(dim, num_experts, init_std=0.0) if variant == "shazeer" else None

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; K rows each. ``gate.probs_TE`` is the softmax of the clean logits."""
        clean_TE = ruled(self.gate(x_TD), ctx)
        noisy_TE, std_TE = clean_TE, None
        if self.training:
            std_TE = self._noise_std(x_TD, clean_TE)
            noise_TE = torch.empty_like(clean_TE).normal_(generator=ctx.generator)
            noisy_TE = clean_TE + noise_TE * std_TE
        expert_TK = choose(noisy_TE, self.k, ctx.allowed_TE)
        load_TE = None if std_TE is None or self.k == self.num_experts else self._load(clean_TE, noisy_TE, std_TE)
        gate = Gate(clean_TE, clean_TE.softmax(dim=-1), load_TE, None if std_TE is None else noisy_TE)
        return self.plan(expert_TK, self.weigh(gate, expert_TK), ctx, gate)

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """Gate, and with "shazeer" the noise gate, which evaluation does not run."""
        matrices = 2 if options.get("variant", "shazeer") == "shazeer" else 1
        return Cost(2 * T * D * E * matrices, D * E * matrices)

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """Softmax over the chosen logits ("shazeer") or the chosen entries of the full softmax ("vmoe")."""
        logits_TE = gate.logits_TE if gate.noisy_TE is None else gate.noisy_TE
        if self.variant == "shazeer":
            return logits_TE.gather(1, expert_TK).softmax(dim=-1)
        return logits_TE.softmax(dim=-1).gather(1, expert_TK)

    def _noise_std(self, x_TD: Tensor, clean_TE: Tensor) -> Tensor:
        if self.noise_gate is None:
            return torch.full_like(clean_TE, 1.0 / self.num_experts)
        return F.softplus(self.noise_gate(x_TD)) + self.noise_floor

    def _load(self, clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor) -> Tensor:
        """P(expert stays among the top k if only its own noise were drawn again), (T, E); 0 where rules forbid the expert."""
        permitted_TE = clean_TE.isfinite()
        # Forbidden experts stand at -inf, and 0 * inf in the gradient of the noise would be NaN.
        clean_TE, noisy_TE = clean_TE.clamp(min=-1e4), noisy_TE.clamp(min=-1e4)
        top_TK1 = noisy_TE.topk(self.k + 1, dim=1).values
        kth_T1, next_T1 = top_TK1[:, self.k - 1, None], top_TK1[:, self.k, None]
        threshold_TE = kth_T1
        if self.variant == "shazeer":
            # The k-th largest of the others: the (k+1)-th overall for an expert that is in, the k-th for one that is out.
            threshold_TE = torch.where(noisy_TE > next_T1, next_T1, kth_T1)
        return torch.where(permitted_TE, torch.special.ndtr((clean_TE - threshold_TE) / std_TE), 0.0)
