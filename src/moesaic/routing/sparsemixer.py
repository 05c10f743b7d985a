"""SparseMixer (Liu, Gao, Chen 2023) and SparseMixer-v2 (GRIN, Liu et al. 2024): numerical integration as a gradient.

One expert D is drawn from p and its output is scaled by p_D. With l_i(m) the loss if expert i's output is scaled by m, the
expected loss is ``sum_i p_i l_i(p_i)`` and its exact gradient

    sum_i p_i l_i'(p_i) dp_i  +  sum_i (l_i(p_i) - l_i(0)) dp_i          (all l_i(0) are equal and sum_i dp_i = 0).

The first sum is what any gate learns from. The second, the gradient of the choice, needs every expert's loss; both routers
estimate the difference in it from the derivative at one point, which the drawn expert has anyway:

| router | points c of the weight c p_D | gradient | what it estimates |
|---|---|---|---|
| ``sparsemixer`` | 1 or 1/2, evenly | 2 dp_D | both sums, the second by the mid-point rule: exact for quadratic l |
| ``sparsemixer_v2`` | 1 (1/4) or 1/3 (3/4) | dp_D | the second sum, by Heun's third-order rule: exact for cubic l |

For the most probable expert c is always 1 (Euler's rule, exact if l is linear), so that training sees it as inference does.
Experts whose logit is far below the best, ``max - z > 2 jitter * max(|z|, max)``, are never drawn: these are the ones that
the input jitter of Switch could not bring to the top. p is the softmax over the others.

Written from the papers and checked against github.com/microsoft/SparseMixer, whose v2 file does not run as shipped. Left out:
v1's trained factor per channel after the experts; it is the same function as scaling the rows of their last matrices.

Legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan.plan import Gate, RoutingPlan
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.estimators import gumbel_noise, with_gradient_of
from moesaic.routing.facts import Facts
from moesaic.routing.gate import LinearGate, Router, check_k, choose, ruled


class SparseMixer(Router):
    """Top-1 by sampling; weight c p_D with c in {1, 1/2} and the gradient of 2 p_D. Evaluation: argmax, weight p.

    Args:
        jitter: how far below the best logit an expert may lie and still be drawn (see above); ``gate.probs_TE`` is the
            softmax over those experts.
    """

    facts = Facts(
        noisy=True,
        experts="1",
        teaches="estimated",
        inference="noise off",
        losses={"switch": 1e-2},
        source="Liu et al. 2023",
    )

    def __init__(self, dim: int, num_experts: int, k: int = 1, *, jitter: float = 0.1, init_std: float = 0.02) -> None:
        super().__init__()
        check_k(k, num_experts)
        if k != 1:
            raise ConfigError(
                f'Router "sparsemixer" draws one expert per token, so k must be 1, not {k}; use "sparsemixer_v2".'
            )
        _check_jitter(jitter)
        self.num_experts, self.k, self.jitter = num_experts, k, jitter
        self.gate = LinearGate(dim, num_experts, init_std=init_std)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens, one row each."""
        logits_TE = ruled(self.gate(x_TD), ctx)
        drawn_T1, p_TE, c_T1 = _draw(logits_TE, self.jitter, self.training, ctx, share=1 / 2, inner=1 / 2)
        p_T1 = p_TE.gather(1, drawn_T1)
        weight_T1 = with_gradient_of(c_T1 * p_T1, 2 * p_T1) if self.training else p_T1
        return self.plan(drawn_T1, weight_T1, ctx, Gate(logits_TE, p_TE))


class SparseMixerV2(Router):
    """k experts drawn one after the other without replacement; each weighs c p_D with c in {1, 1/3} and the gradient of p_D.

    p is renewed for every draw, over the experts not yet taken. Evaluation: the best logit first, then the next, the same
    weights with c = 1. The source was tried with k = 1 and k = 2 (GRIN); nothing here depends on it.

    Args:
        jitter: how far below the best remaining logit an expert may lie and still be drawn.
        scale_forward: True, as in the authors' code: the forward weight is c p_D. False: it stays p_D and the gradient is
            scaled by c instead, as the paper has been quoted; the derivative is then always taken at p_D, so it is Euler's
            rule at half size for all but the best expert, and inference sees the weights that training saw.

    ``gate.probs_TE`` is the softmax over all experts.
    """

    facts = Facts(
        noisy=True,
        teaches="estimated",
        inference="noise off",
        losses={"switch": 1e-2},
        source="Liu et al. 2024 (GRIN)",
    )

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        jitter: float = 0.1,
        scale_forward: bool = True,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        _check_jitter(jitter)
        self.num_experts, self.k, self.jitter, self.scale_forward = num_experts, k, jitter, scale_forward
        self.gate = LinearGate(dim, num_experts, init_std=init_std)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; K rows each, in the order drawn."""
        logits_TE = ruled(self.gate(x_TD), ctx)
        permitted_TE = torch.ones_like(logits_TE, dtype=torch.bool) if ctx.allowed_TE is None else ctx.allowed_TE
        taken_TE = torch.zeros_like(permitted_TE)
        experts, weights = [], []
        for _ in range(self.k):
            free_TE = permitted_TE & ~taken_TE
            # Rules that leave nothing: any expert not yet taken fills the place, and the plan sends it nowhere.
            some_T1 = free_TE.any(dim=1, keepdim=True)
            shut_TE = ~torch.where(some_T1, free_TE, ~taken_TE)
            left_TE = torch.where(some_T1, logits_TE, 0.0).masked_fill(shut_TE, float("-inf"))
            drawn_T1, p_TE, c_T1 = _draw(left_TE, self.jitter, self.training, ctx, share=3 / 4, inner=1 / 3)
            p_T1 = p_TE.gather(1, drawn_T1)
            # In evaluation c is 1, and both lines are p itself.
            scaled = (c_T1 * p_T1, p_T1) if self.scale_forward else (p_T1, c_T1 * p_T1)
            experts.append(drawn_T1)
            weights.append(with_gradient_of(*scaled))
            taken_TE = taken_TE.scatter(1, drawn_T1, True)
        gate = Gate(logits_TE, logits_TE.softmax(dim=-1))
        return self.plan(torch.cat(experts, dim=1), torch.cat(weights, dim=1), ctx, gate)


def _draw(
    logits_TE: Tensor, jitter: float, training: bool, ctx: TokenContext, *, share: float, inner: float
) -> tuple[Tensor, Tensor, Tensor]:
    """An expert for every token.

    Returns its index (T, 1), p (T, E), and the point c (T, 1) at which its derivative is taken: ``inner`` for this share of the
    draws, else 1; always 1 for the most probable expert, which evaluation always takes.
    """
    z_TE = logits_TE.detach()
    best_T1 = z_TE.amax(dim=-1, keepdim=True)
    # Not as a quotient: all logits at 0 would give 0 / 0.
    far_TE = best_T1 - z_TE > 2 * jitter * torch.maximum(z_TE.abs(), best_T1)
    near_TE = logits_TE.masked_fill(far_TE, float("-inf"))
    p_TE, first_T1 = near_TE.softmax(dim=-1), choose(z_TE, 1)
    if not training:
        return first_T1, p_TE, torch.ones_like(best_T1)
    drawn_T1 = choose(near_TE + gumbel_noise(near_TE, ctx.generator), 1)
    coin_T1 = torch.empty_like(best_T1).uniform_(generator=ctx.generator)
    c_T1 = torch.ones_like(best_T1).masked_fill((drawn_T1 != first_T1) & (coin_T1 < share), inner)
    return drawn_T1, p_TE, c_T1


def _check_jitter(jitter: float) -> None:
    if not jitter > 0:
        raise ConfigError(f"jitter must be above 0, not {jitter}: no expert but the best would ever be drawn.")
