"""Routers that balance by transport: BASE layers (exactly) and Sinkhorn (approximately). Both look at the whole batch.

| | training chooses | weight | evaluation |
|---|---|---|---|
| ``base`` (Lewis et al. 2021) | the balanced assignment of greatest ``sum_t z[t, e(t)]`` | sigmoid(z) | argmax |
| ``sinkhorn`` (Clark et al. 2022) | the k largest of the transport plan of exp(z) | softmax(z), k=1: sigmoid(z) | top-k |

The choice carries no gradient; scores learn through the weights of the chosen. No auxiliary loss is needed. A token's expert
depends on all tokens of the batch, later ones included: a causal decoder trained so has seen the future and then decodes by
another rule, so it must be asked for by name (``allow_leak``).

Padding, and tokens to which rules permit no expert, take no place: the load is balanced over the others. Pairs that rules
forbid score below every permitted one, by the range of scores; if balance still needs one, the plan sends that row nowhere.

Legend: T tokens, D model width, E experts, K experts per token, R tokens that take a place.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError, one_of
from moesaic.plan.plan import Gate, RoutingPlan
from moesaic.routing.assignment import assign_balanced
from moesaic.routing.auction import auction
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import LinearGate, Router, check_k, choose, ruled, score

FACTS = Facts(
    causal=False,
    batch_invariant=False,
    inference="other rule",
    inference_rule="each token's best experts, unbalanced",
    infer_causal=True,
    infer_batch_invariant=True,
)


class Base(Router):
    """BASE layers: balanced assignment of single experts. Loads differ by at most one token.

    The paper's output is ``h + sigmoid(h . w) FFN(LN(h))`` with the norm inside the expert; here the block's norm is shared by
    router and experts and the residual is the block's. Its workers each solve for the tokens they hold, after a random shuffle
    between workers that breaks the correlation within documents; one solver that sees the whole batch has no use for that.
    Further of the paper: 1 to 3 such layers in the middle of the stack, one expert per worker, the experts' last matrix zero.

    Args:
        gain: of the orthogonal initialisation of the experts' centroids w.
        solver: "exact" (``assignment.py``), or the paper's "auction" (``auction.py``), within T * epsilon of it.
        epsilon: of the auction, relative to the range of scores.
    """

    facts = replace(FACTS, balance="exact", experts="1", source="Lewis et al. 2021 (BASE layers)")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        gain: float = 0.1,
        solver: Literal["exact", "auction"] = "exact",
        epsilon: float = 1e-3,
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        if k != 1:
            raise ConfigError(f'Router "base" gives every token one expert, so k must be 1, not {k}; use "sinkhorn".')
        if not gain > 0:
            raise ConfigError(
                f"gain must be above 0, not {gain}: with equal centroids the assignment would be arbitrary."
            )
        one_of("solver", solver, ("exact", "auction"))
        if not epsilon > 0:
            raise ConfigError(
                f"epsilon must be above 0, not {epsilon}: without it an auction of equal bids never ends."
            )
        self.num_experts, self.k = num_experts, k
        self.solver, self.epsilon = solver, epsilon
        self.gate = LinearGate(dim, num_experts, init_std=0.0)
        nn.init.orthogonal_(self.gate.weight, gain=gain)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; one row each."""
        logits_TE = ruled(self.gate(x_TD), ctx)
        gate = Gate(logits_TE, score(logits_TE, "sigmoid"))
        if self.training:
            expert_T1 = torch.full((len(x_TD), 1), self.num_experts, device=x_TD.device)
            place_R, scores_RE = placed(logits_TE, ctx)
            exact = self.solver == "exact"
            expert_T1[place_R, 0] = assign_balanced(scores_RE) if exact else auction(scores_RE, self.epsilon).expert_T
        else:
            expert_T1 = choose(logits_TE, 1, ctx.allowed_TE)
        return self.plan(expert_T1, self.weigh(gate, expert_T1), ctx, gate)

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """Sigmoid of the chosen scores."""
        return gate.probs_TE.gather(1, expert_TK.clamp(max=self.num_experts - 1))

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """The plain gate."""
        return Cost(2 * T * D * E, D * E, "balanced assignment: about 10 softmaxes of T * E, then paths on the host")


class Sinkhorn(Router):
    """S-BASE: the k largest entries per token of the entropic transport plan between tokens and experts.

    The plan is balanced; its largest entries need not be. Where some experts' scores vary more than others', or tokens repeat,
    and scores are small against ``temperature``, as early in training, some expert gets two or three times its share.

    Args:
        temperature: the plan is that of ``exp(z / temperature)``; 1 is the paper's. Colder is better balanced, as long
            as the iterations suffice.
        tolerance: iterations end when the columns' log factors move less than this on average (Megatron-LM compares the
            factors themselves, whose size depends on the scores).
        max_iterations: and at the latest after this many.
        init_std: of the gate's weights.
    """

    facts = replace(FACTS, balance="approximate", source="Clark et al. 2022 (S-BASE)")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        temperature: float = 1.0,
        tolerance: float = 1e-4,
        max_iterations: int = 100,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        if not temperature > 0:
            raise ConfigError(f"temperature must be above 0, not {temperature}.")
        if not tolerance >= 0:
            raise ConfigError(f"tolerance must be at least 0, not {tolerance}.")
        if max_iterations < 1:
            raise ConfigError(f"max_iterations must be at least 1, not {max_iterations}.")
        self.num_experts, self.k = num_experts, k
        self.temperature, self.tolerance, self.max_iterations = temperature, tolerance, max_iterations
        if k > 1:
            self.facts = replace(self.facts, teaches="all")  # the softmax has every logit in its denominator
        self.gate = LinearGate(dim, num_experts, init_std=init_std)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; K rows each, largest of the plan first."""
        logits_TE = ruled(self.gate(x_TD), ctx)
        gate = Gate(logits_TE, score(logits_TE, "sigmoid" if self.k == 1 else "softmax"))
        choice_TE = logits_TE
        if self.training:
            place_R, scores_RE = placed(logits_TE, ctx)
            log_plan_RE = sinkhorn(scores_RE / self.temperature, self.tolerance, self.max_iterations)
            choice_TE = torch.zeros_like(logits_TE).index_copy_(0, place_R, log_plan_RE)
        expert_TK = choose(choice_TE, self.k, ctx.allowed_TE)
        return self.plan(expert_TK, self.weigh(gate, expert_TK), ctx, gate)

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """From the raw scores: sigmoid for k=1, else entries of the softmax, not renormalised (as in Megatron-LM)."""
        return gate.probs_TE.gather(1, expert_TK)

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """The plain gate."""
        return Cost(2 * T * D * E, D * E, "up to max_iterations times two logsumexp of T * E")


@torch.no_grad()
def sinkhorn(scores_TE: Tensor, tolerance: float = 1e-4, max_iterations: int = 100) -> Tensor:
    """``log P`` of the plan ``P = diag(u) exp(scores) diag(v)`` whose rows sum to 1/T (exactly) and columns to 1/E (nearly).

    In logarithms, so that no score over- or underflows: ``log u = -log T - logsumexp_e(z + log v)`` and the like for v.
    """
    T, E = scores_TE.shape
    if T == 0:
        return scores_TE
    log_v_E = scores_TE.new_zeros(E)
    for _ in range(max_iterations):
        log_u_T1 = -math.log(T) - (scores_TE + log_v_E).logsumexp(dim=1, keepdim=True)
        before_E, log_v_E = log_v_E, -math.log(E) - (scores_TE + log_u_T1).logsumexp(dim=0)
        if float((log_v_E - before_E).abs().mean()) <= tolerance:
            break
    return (scores_TE + log_v_E).log_softmax(dim=1) - math.log(T)


@torch.no_grad()
def placed(logits_TE: Tensor, ctx: TokenContext) -> tuple[Tensor, Tensor]:
    """int64 (R,) the tokens that take a place, and their finite scores (R, E).

    Those are the real tokens to which rules permit some expert. Forbidden pairs, at -inf, score one range below the rest; what
    else is not finite counts as the smallest score.
    """
    takes_T = torch.ones(len(logits_TE), dtype=torch.bool, device=logits_TE.device)
    if ctx.valid_T is not None:
        takes_T &= ctx.valid_T
    if ctx.allowed_TE is not None:
        takes_T &= ctx.allowed_TE.any(dim=1)
    place_R = takes_T.nonzero()[:, 0]
    scores_RE = logits_TE[place_R]
    finite_RE = scores_RE.isfinite()
    low = torch.where(finite_RE, scores_RE, torch.inf).amin() if len(place_R) else scores_RE.new_zeros(())
    high = torch.where(finite_RE, scores_RE, -torch.inf).amax() if len(place_R) else low
    low, high = (end.nan_to_num(posinf=0.0, neginf=0.0) for end in (low, high))
    scores_RE = torch.where(finite_RE, scores_RE, low)
    if ctx.allowed_TE is not None:
        scores_RE = torch.where(ctx.allowed_TE[place_R], scores_RE, 2 * low - high - 1)
    return place_R, scores_RE
