"""Top-any gating with trained thresholds, and experts that come and go (DynMoE, Guo et al. 2024, arXiv 2405.14297).

``s_te = x_t . w_e / (|x_t| |w_e|)``; expert e is active for token t iff ``sigmoid(s_te) > sigmoid(G_e)``. The output is the
plain average of the active experts; backward treats "active" as ``sigmoid(s) - sigmoid(G)`` (straight-through, active experts
only), which moves both directions and thresholds. Orthogonal directions and G = 0 at the start: about half of the experts are
active.

A token that activates no expert: in training the release (LINs-lab/DynMoE, sharded_moe.py) gives it none, so that such tokens
can be counted and call for a new expert; in evaluation it takes the best one. ``fallback="always"`` does so in training too.

Own loss, as released (loss.py): diversity ``|| W W^T - I ||_F`` over unit directions of living experts plus simplicity, the
mean norm of the directions. (The release's fast path adds a load and an efficiency loss; here "switch" of the balancing losses
does that, on sigmoid scores.)

The adaptive process. Buffers record, since the last reset, how often each expert was active and the sum of the inputs nobody
was active for. ``suggest_experts`` reads them: experts never active should go; if any token was left alone, one expert should
come, with the direction of those inputs and threshold 0. With ``adapt_every`` > 0 the router does it itself after that many
steps, within its E places: experts that go sleep (never chosen), and the lowest sleeping one wakes.

Legend: T tokens, D model width, E experts, K rows per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError, one_of
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan
from moesaic.routing.adaptive import AdaptiveRouter
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.estimators import with_gradient_of
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import Outcome, StepStats, choose, router_dtype, ruled
from moesaic.routing.projected import cosine_scores


@dataclass(frozen=True, eq=False)
class ExpertSuggestion:
    """What the records say.

    Attributes:
        remove: living experts that were never active.
        add_D: unit direction of an expert for the tokens nobody was active for; None where there were none.
        tokens, unserved: tokens recorded, and how many of them activated no expert.
    """

    remove: tuple[int, ...]
    add_D: Tensor | None
    tokens: int
    unserved: int


class TopAny(AdaptiveRouter):
    """Every expert over its threshold.

    Args:
        fallback: where a token without active experts takes the best one: in "evaluation" only (the paper), or "always".
        k_max: at most that many active experts are used, the most similar ones.
        threshold: every G at the start.
        diversity: coefficient of the own loss (1e-2 is MoE-LLaVA's weight of auxiliary losses [from memory]).
        adapt_every: steps after which suggestions are followed and records begin anew; 0 leaves that to the user. (The release
            records 300 of every 900 forwards.)
    """

    facts = Facts(
        experts="0..E",
        varies=True,
        can_drop=True,
        inference="other rule",
        inference_rule="tokens without an active expert take the best one",
        losses={"switch": 1e-2},
        source="Guo et al. 2024",
    )

    alive_E: Tensor
    active_E: Tensor
    unserved_D: Tensor
    counts: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        fallback: Literal["evaluation", "always"] = "evaluation",
        k_max: int | None = None,
        threshold: float = 0.0,
        diversity: float = 1e-2,
        adapt_every: int = 0,
    ) -> None:
        super().__init__(num_experts, k, k_max)
        one_of("fallback", fallback, ("evaluation", "always"))
        if not -1 < threshold < 1:
            raise ConfigError(f"threshold must lie between -1 and 1, not {threshold}: it is compared with a cosine.")
        if not diversity >= 0 or adapt_every < 0:
            raise ConfigError(f"diversity={diversity} and adapt_every={adapt_every} must be at least 0.")
        most = "E" if k_max is None else k_max
        self.facts = replace(self.facts, experts=f"0..{most}")
        if fallback == "always":
            self.facts = replace(
                self.facts,
                experts=f"1..{most}",
                varies=self.k_max > 1,
                can_drop=False,
                inference="same",
                inference_rule="",
            )
        self.fallback, self.diversity, self.adapt_every = fallback, diversity, adapt_every
        self.direction_ED = nn.Parameter(torch.empty(num_experts, dim, dtype=router_dtype()))
        nn.init.orthogonal_(self.direction_ED)
        self.threshold_E = nn.Parameter(torch.full((num_experts,), threshold, dtype=router_dtype()))
        self.register_buffer("alive_E", torch.ones(num_experts, dtype=torch.bool))
        self.register_buffer("active_E", torch.zeros(num_experts, dtype=torch.int64))
        self.register_buffer("unserved_D", torch.zeros(dim, dtype=router_dtype()))
        self.register_buffer(
            "counts", torch.zeros(3, dtype=torch.int64)
        )  # steps, tokens, unserved tokens since the reset

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; ``k_max`` rows each, the used ones first. ``gate.extra`` holds the two parts of the own loss and
        what the records need.
        """
        x_TD = x_TD.to(self.direction_ED.dtype)
        scores_TE = ruled(cosine_scores(x_TD, self.direction_ED), ctx)
        probs_TE = scores_TE.sigmoid()
        over_TE = probs_TE - self.threshold_E.sigmoid()
        # Asleep, an expert is like one that rules forbid, but last of all: where no other is permitted, it may still serve.
        rank_TE = probs_TE.detach().masked_fill(~self.alive_E, -1.0)
        expert_TK = choose(rank_TE, self.k_max, ctx.allowed_TE)
        use_TK = ((over_TE > 0) & self.alive_E).gather(1, expert_TK)
        unserved_T = ~((over_TE > 0) & self.alive_E).any(dim=1)
        if self.fallback == "always" or not self.training:
            first_K = torch.arange(self.k_max, device=x_TD.device) == 0
            use_TK = use_TK | (unserved_T[:, None] & first_K)
        over_TK = over_TE.gather(1, expert_TK)
        step_TK = with_gradient_of(use_TK.to(over_TK.dtype), torch.where(use_TK, over_TK, 0.0))
        weight_TK = step_TK / use_TK.sum(dim=1, keepdim=True).clamp(min=1)
        extra = self._evidence(x_TD, unserved_T, ctx) if self.training else {}
        return self.used(expert_TK, use_TK, weight_TK, ctx, Gate(scores_TE, probs_TE, extra=extra))

    def _evidence(self, x_TD: Tensor, unserved_T: Tensor, ctx: TokenContext) -> dict[str, Tensor]:
        unserved_T = unserved_T if ctx.valid_T is None else unserved_T & ctx.valid_T
        if ctx.allowed_TE is not None:
            unserved_T = unserved_T & ctx.allowed_TE.any(dim=1)  # a new expert would not help those without permission
        alive_E = self.alive_E.to(x_TD.dtype)
        same_EE = cosine_scores(self.direction_ED, self.direction_ED)
        apart_EE = (
            (same_EE - torch.eye(self.num_experts, dtype=x_TD.dtype, device=x_TD.device)) * alive_E * alive_E[:, None]
        )
        return {
            "diversity": torch.linalg.vector_norm(apart_EE),
            "simplicity": torch.linalg.vector_norm(self.direction_ED, dim=1).mean(),
            "unserved_D": torch.where(unserved_T[:, None], x_TD, 0.0).sum(dim=0).detach(),
            "unserved": unserved_T.sum(),
        }

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """Similarity of tokens with experts, and in training of experts with experts."""
        return Cost(2 * (T + E) * D * E, E * (D + 1))

    def own_losses(self, plan: RoutingPlan | SoftPlan, outcome: Outcome) -> dict[str, Tensor]:
        """Diversity and simplicity of the directions."""
        assert plan.gate is not None
        if not self.diversity or "diversity" not in plan.gate.extra:
            return {}
        loss = plan.gate.extra["diversity"] + plan.gate.extra["simplicity"]
        peers = outcome.peers  # every part has this loss of the directions, and gradients are summed
        return {"dynmoe": peers.total(self.diversity * loss / outcome.num_layers / peers.count)}

    # ---- the adaptive process ----------------------------------------------------------------------------------

    def statistics(self, plan: RoutingPlan | SoftPlan) -> dict[str, Tensor]:
        """The tokens nobody was active for: how many, and the sum of their inputs."""
        assert plan.gate is not None
        return {name: plan.gate.extra[name] for name in ("unserved", "unserved_D") if name in plan.gate.extra}

    @torch.no_grad()
    def after_step(self, stats: StepStats) -> None:
        """Add the step to the records; with ``adapt_every``, act on them when it is time."""
        self.active_E += stats.counts_E.to(self.active_E)
        self.counts[0] += 1
        self.counts[1] += stats.num_tokens
        if "unserved" in stats.sums:
            self.counts[2] += stats.sums["unserved"]
            self.unserved_D += stats.sums["unserved_D"].to(self.unserved_D.dtype)
        if self.adapt_every and int(self.counts[0]) >= self.adapt_every:
            self.adapt()

    def suggest_experts(self) -> ExpertSuggestion:
        """What the records since the last reset call for. Nothing is removed before anything was recorded."""
        _, tokens, unserved = self.counts.tolist()
        idle_E = self.alive_E & (self.active_E == 0)
        remove = tuple(idle_E.nonzero().flatten().tolist()) if tokens else ()
        if len(remove) == int(self.alive_E.sum()):
            remove = remove[1:]  # somebody must stay
        norm = self.unserved_D.norm()
        add_D = self.unserved_D / norm if unserved and float(norm) > 0 else None
        return ExpertSuggestion(remove, add_D, tokens, unserved)

    @torch.no_grad()
    def adapt(self) -> ExpertSuggestion:
        """Follow the suggestion within the E places and begin new records. Returns what was suggested."""
        suggestion = self.suggest_experts()
        for expert in suggestion.remove:
            self.alive_E[expert] = False
        asleep = (~self.alive_E).nonzero().flatten().tolist()
        if suggestion.add_D is not None and asleep:
            self.alive_E[asleep[0]] = True
            self.direction_ED[asleep[0]] = suggestion.add_D
            self.threshold_E[asleep[0]] = 0.0
        self.reset_records()
        return suggestion

    def reset_records(self) -> None:
        """Begin new records."""
        for record in (self.active_E, self.unserved_D, self.counts):
            record.zero_()
