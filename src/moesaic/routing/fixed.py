"""Routers that learn nothing and look at no vector: the baselines every learned router has to beat.

| router | experts of a token |
|---|---|
| ``random`` | training: k different ones drawn uniformly anew; evaluation: k picked by a hash of position and token id |
| ``round_robin`` | position p takes (p k), (p k + 1), ..., (p k + k - 1), modulo E |

Weights are 1/k. There is no gate: no balancing loss can act on them, and neither has parameters.

Legend: T tokens, D model width, E experts, K experts per token, B sequences of S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.plan.plan import RoutingPlan, at_least_fp32
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import Router, check_k, choose


class RandomRouter(Router):
    """Uniformly random experts (the random baseline of Roller et al. 2021, and half of THOR, Zuo et al. 2021).

    Training draws k different experts for every token, independently, with ``ctx.generator``. Evaluation must not depend on
    chance or on company, so there every (token, expert) pair gets a number from a hash of the token's position in its
    document, its vocabulary id (0 where the caller gave no ids) and the expert, and the k largest win: the same text is routed
    the same way alone, packed, in a batch or decoded one token at a time. ``seed`` chooses another such hash.

    Loads are equal in expectation only: with n tokens an expert's share has standard deviation ``sqrt(k/E (1 - k/E) / n)``.
    Under rules the draw is over the permitted experts.
    """

    facts = Facts(
        noisy=True,
        balance="approximate",
        has_gate=False,
        teaches="none",
        inference="other rule",
        inference_rule="a hash of position and token id chooses, instead of chance",
        source="baseline; Roller et al. 2021, Zuo et al. 2021",
    )

    def __init__(self, dim: int, num_experts: int, k: int, *, seed: int = 0) -> None:
        super().__init__()
        check_k(k, num_experts)
        self.num_experts, self.k, self.seed = num_experts, k, seed

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens, K rows each, by no property of the vectors."""
        T, device = x_TD.shape[0], x_TD.device
        if self.training:
            scores_TE = torch.empty(T, self.num_experts, device=device).uniform_(generator=ctx.generator)
        else:
            scores_TE = self._hashed(T, ctx, device)
        expert_TK = choose(scores_TE, self.k, ctx.allowed_TE)
        return self.plan(expert_TK, _equal_weights(expert_TK, x_TD), ctx)

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """Nothing."""
        return Cost(0, 0)

    def _hashed(self, T: int, ctx: TokenContext, device: torch.device) -> Tensor:
        """fp32 (T, E) in [0, 1): the same number for the same position, id, expert and seed."""
        word_T = _mix(ctx.positions(T, device).reshape(-1) + self.seed * 0x9E3779B1)
        if ctx.ids_T is not None:
            word_T = _mix(word_T ^ ctx.ids_T)
        word_TE = _mix(word_T[:, None] ^ _mix(torch.arange(1, self.num_experts + 1, device=device)))
        return (word_TE & 0xFFFFFF).float() / 2**24  # 24 bits are exact in fp32


class RoundRobin(Router):
    """Experts by position (the position hash of Roller et al. 2021): token p of a document takes the next k in turn.

    A document of L tokens loads any two experts to within one row. Every document begins at expert 0, so many documents
    shorter than E/k favour the first experts.
    """

    facts = Facts(
        balance="approximate", has_gate=False, teaches="none", source='baseline; "position" of Roller et al. 2021'
    )

    def __init__(self, dim: int, num_experts: int, k: int) -> None:
        super().__init__()
        check_k(k, num_experts)
        self.num_experts, self.k = num_experts, k

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; K rows each, different because K <= E."""
        position_T = ctx.positions(x_TD.shape[0], x_TD.device).reshape(-1)
        seat_TK = position_T[:, None] * self.k + torch.arange(self.k, device=x_TD.device)
        expert_TK = seat_TK % self.num_experts
        return self.plan(expert_TK, _equal_weights(expert_TK, x_TD), ctx)

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """Nothing."""
        return Cost(0, 0)


def _equal_weights(expert_TK: Tensor, x_TD: Tensor) -> Tensor:
    """1/K each, in fp32, or fp64 where the tokens are."""
    return at_least_fp32(x_TD.new_full(expert_TK.shape, 1)) / expert_TK.shape[1]


def _mix(word: Tensor) -> Tensor:
    """int64 to int64, every input bit stirred into every output bit (the finaliser of SplitMix64; products wrap around)."""
    word = (word ^ (word >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as a signed number
    word = (word ^ (word >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return word ^ (word >> 31 & 0x1FFFFFFFF)
