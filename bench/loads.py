"""Inputs that make a real router spread its tokens as wanted: balanced, or skewed by Zipf's law.

The router's rows are unit vectors, at right angles to each other where D allows it. A token is noise, plus the rows of the k
experts it shall choose, each times 6 to 7. Its logits are then those factors at the chosen experts and about 0 elsewhere, so
that every router that computes softmax and top-k, in fp32 or bf16, chooses the same experts by real arithmetic. With E > D the
rows overlap and the loads are only nearly the wanted ones; benchmarks report what was reached.

Legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOADS = ("balanced", "zipf")


def draw_router(num_experts: int, dim: int, generator: torch.Generator) -> Tensor:
    """(E, D) fp32 router weights: unit rows, orthogonal where E <= D, rounded to bf16 so that every dtype holds them."""
    rows_ED = torch.randn(num_experts, dim, generator=generator)
    if num_experts <= dim:
        rows_ED = torch.linalg.qr(rows_ED.T).Q.T
    unit_ED: Tensor = rows_ED / rows_ED.norm(dim=1, keepdim=True)
    return unit_ED.bfloat16().float()


def draw_choice(load: str, tokens: int, num_experts: int, k: int, generator: torch.Generator) -> Tensor:
    """int64 (T, K) distinct experts per token.

    "balanced": loads differ by one row at most. "zipf": experts are drawn without replacement with probability
    proportional to 1 / rank, ranks dealt at random (exponent 1).
    """
    if load == "zipf":
        popularity_E = 1.0 / (torch.randperm(num_experts, generator=generator) + 1.0)
        return torch.multinomial(popularity_E.expand(tokens, -1), k, generator=generator)
    if num_experts % k:  # consecutive places of one shuffled ring: distinct, as k <= E
        ring_E = torch.randperm(num_experts, generator=generator)
        return ring_E[torch.arange(tokens * k).view(tokens, k) % num_experts]
    decks = -(-tokens * k // num_experts)
    dealt = torch.cat([torch.randperm(num_experts, generator=generator) for _ in range(decks)])
    choice_TK = dealt.view(-1, k)[:tokens]
    return choice_TK[torch.randperm(tokens, generator=generator)]


def draw_input(router_ED: Tensor, choice_TK: Tensor, generator: torch.Generator) -> Tensor:
    """(T, D) fp32 tokens that this router sends to these experts."""
    tokens, k = choice_TK.shape
    num_experts, dim = router_ED.shape
    x_TD = torch.randn(tokens, dim, generator=generator)
    if num_experts <= dim:  # rows are orthonormal, so this leaves noise that the router does not see
        x_TD -= x_TD @ router_ED.T @ router_ED
    factor_TK = 6.0 + torch.rand(tokens, k, generator=generator)
    for place in range(k):
        x_TD += factor_TK[:, place, None] * router_ED[choice_TK[:, place]]
    return x_TD


def skew(counts_E: Tensor) -> float:
    """Rows of the busiest expert over the mean; 1 is balanced."""
    return float(counts_E.max()) / max(float(counts_E.float().mean()), 1e-9)
