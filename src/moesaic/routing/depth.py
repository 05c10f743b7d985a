"""Mixture-of-Depths: which tokens of a sequence go through a block at all (Raposo et al. 2024, arXiv 2404.02258).

| | score ``r_t = w . x_t`` of a token; a block of capacity c takes |
|---|---|
| training | the ``ceil(c n)`` tokens of largest score of each sequence of n real tokens (packed documents share a row's) |
| evaluation, generation | the tokens whose predictor says so: ``sigmoid(g(x_t)) > threshold``, each by its own vector |

The first looks at later tokens (a token is in or out against those behind it), so sampling could not repeat it. Hence g, a
small network trained by binary cross entropy to foretell the first from the token's vector, behind a stop-gradient: it teaches
nothing but itself. ``x`` is the residual stream as the block receives it, not normalised, as in the paper.

The decision is a plan with one expert, the block (``models/depth.py``): ``weight_N`` is r (or sigmoid(r)), which scales what
the block adds and through which w learns. Ties go to the earlier token. Padding is never chosen.

The predictor lags: at first it learns the base rate and says no to everybody, and a model validated then is one without these
blocks. Measured (c = 0.25, D = 64, one seed): after 60 steps three of the four depth blocks of two models agreed with the
choice on 75% of tokens, the base rate; after 150 steps the two of one model did on 87% and 89%. A falling loss alone does not
show it; compare ``kept_N`` in both modes.

Legend: T tokens (B sequences of S), D model width, P width of the predictor.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import ConfigError, one_of
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan, from_topk
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import LinearGate, Outcome, Router


class DepthRouter(Router):
    """Chooses the tokens of a Mixture-of-Depths block.

    Args:
        capacity: c, share of a sequence's tokens the block takes in training.
        weight: what scales the block's update: the "score" itself (the paper) or its "sigmoid".
        predictor_hidden: P; 0 makes the predictor linear.
        predictor_loss: coefficient of its cross entropy, a mean over tokens and over depth blocks. Nothing else of the model
            gets a gradient from it.
        threshold: probability above which the predictor takes a token in evaluation.
        init_std: of w and of the predictor.

    ``gate.logits_TE`` are the scores (T, 1), ``gate.extra["predicted_T"]`` the predictor's logits.
    """

    facts = Facts(
        causal=False,
        balance="exact",
        experts="0..1",
        varies=True,
        can_drop=True,
        inference="other rule",
        inference_rule="a predictor decides from the token's own vector",
        infer_causal=True,
        source="Raposo et al. 2024 (Mixture-of-Depths)",
    )

    def __init__(
        self,
        dim: int,
        *,
        capacity: float = 0.125,
        weight: Literal["score", "sigmoid"] = "score",
        predictor_hidden: int = 64,
        predictor_loss: float = 0.1,
        threshold: float = 0.5,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        one_of("weight", weight, ("score", "sigmoid"))
        if not 0 < capacity <= 1:
            raise ConfigError(f"capacity must be above 0 and at most 1, not {capacity}; the paper's is 0.125.")
        if predictor_hidden < 0:
            raise ConfigError(f"predictor_hidden must be at least 0, not {predictor_hidden}.")
        if not predictor_loss > 0:
            raise ConfigError(
                f"predictor_loss={predictor_loss} would never teach the predictor, which alone decides in evaluation; "
                "it must be above 0."
            )
        if not 0 < threshold < 1:
            raise ConfigError(f"threshold must be between 0 and 1, not {threshold}.")
        self.num_experts = self.k = 1
        self.capacity, self.weight, self.threshold = capacity, weight, threshold
        self.predictor_loss = predictor_loss
        self.gate = LinearGate(dim, 1, init_std=init_std)
        self.hidden = LinearGate(dim, predictor_hidden, bias=True, init_std=init_std) if predictor_hidden else None
        self.predictor = LinearGate(predictor_hidden or dim, 1, bias=True, init_std=init_std)

    @property
    def rows_per_token(self) -> float:
        """c."""
        return self.capacity

    def slots(self, num_tokens: int) -> int:
        """``ceil(c n)``: tokens taken of n in training. 1e-9 absorbs binary fractions: 0.1 * 30 must not become 4."""
        return math.ceil(num_tokens * self.capacity - 1e-9)

    def slots_of(self, num_tokens: Tensor) -> Tensor:
        """The same for int64 counts. In fp64, as Python counts: in fp32, 0.3 * 50 is above 15."""
        return (num_tokens.double() * self.capacity - 1e-9).ceil().long()

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """One row per token, to the block (expert 0) or nowhere (1)."""
        score_T1 = self.gate(x_TD)
        predicted_T = self._predict(x_TD.detach())
        gate = Gate(score_T1, score_T1.sigmoid(), extra={"predicted_T": predicted_T})
        if self.training:
            chosen_T = self._best(score_T1.detach(), ctx)
        else:
            chosen_T = predicted_T > math.log(self.threshold / (1 - self.threshold))
        expert_T1 = torch.where(chosen_T, 0, 1)[:, None]
        # Rules are about experts, not about depth, so ``allowed_TE`` stays out.
        return from_topk(expert_T1, self.weigh(gate, expert_T1), 1, valid_T=ctx.valid_T, gate=gate)

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """r or its sigmoid, (T, 1)."""
        return gate.logits_TE if self.weight == "score" else gate.probs_TE

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """The score, and the predictor (which training runs too)."""
        P = options.get("predictor_hidden", 64)
        matrices = D + (D * P + P if P else D)
        return Cost(2 * T * matrices, matrices + P + 1)

    def own_losses(self, plan: RoutingPlan | SoftPlan, outcome: Outcome) -> dict[str, Tensor]:
        """Cross entropy of the predictor against what training chose, over real tokens."""
        assert isinstance(plan, RoutingPlan)
        assert plan.gate is not None
        wanted_T = (plan.choice_N == 0).to(plan.weight_N.dtype)
        loss_T = F.binary_cross_entropy_with_logits(plan.gate.extra["predicted_T"], wanted_T, reduction="none")
        if plan.valid_T is not None:
            loss_T = torch.where(plan.valid_T, loss_T, 0.0)
        total = outcome.peers.total
        mean = total(loss_T.sum()) / total(plan.num_valid).clamp(min=1)
        return {"depth_predictor": self.predictor_loss * mean / outcome.num_layers}

    def _predict(self, x_TD: Tensor) -> Tensor:
        """Logits (T,)."""
        hidden_TP = x_TD if self.hidden is None else F.silu(self.hidden(x_TD))
        return self.predictor(hidden_TP)[:, 0]

    def _best(self, score_T1: Tensor, ctx: TokenContext) -> Tensor:
        """bool (T,): the tokens of largest score of each sequence."""
        B, S = ctx.shape(len(score_T1))
        score_BS = score_T1.view(B, S)
        number_B1 = torch.full((B, 1), S, device=score_BS.device)
        if ctx.valid_T is not None:
            valid_BS = ctx.valid_T.view(B, S)
            score_BS = score_BS.masked_fill(~valid_BS, float("-inf"))
            number_B1 = valid_BS.sum(dim=1, keepdim=True)
        order_BS = torch.sort(score_BS, dim=1, descending=True, stable=True).indices
        place_BS = order_BS.argsort(dim=1)
        return (place_BS < self.slots_of(number_B1)).flatten()


DEPTH_ROUTERS: dict[str, type[DepthRouter]] = {"mixture_of_depths": DepthRouter}
