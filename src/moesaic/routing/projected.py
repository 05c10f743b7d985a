"""Token choice by scores in a small space: a factorised gate, and cosine similarity with expert prototypes (X-MoE).

| router | logits | weights it trains |
|---|---|---|
| low_rank | ``(x A) B``, A (D, R), B (R, E) | R (D + E) instead of D E |
| cosine | ``s * (h . c_e) / (|h| |c_e|)``, ``h = x P``, P (D, R) | R (D + E) + 1 |

The plain gate is tiny next to the experts it serves (E columns against 3 H columns per expert), so a factorised one pays only
for very many experts; where it would not even save weights it is refused. Cosine scores ignore the length of x, which Chi et
al. found to keep representations from collapsing onto the prototypes; ``s = exp(min(t, log 100))`` with a trained t that starts
at ``log(1 / init_temperature)`` and prototypes that start at N(0, 0.01), as in Tutel (gates/cosine_top.py; its projection is
256 wide and has a bias, which the paper's has not). R = E / 2 is the paper's width [from memory, and so in a Megatron fork].

``perturb`` > 0 adds a constant to both norms, ``(h . c) / ((|h| + p) (|c| + p))``: Nguyen et al. 2024 (arXiv 2405.14131) show
that the experts of a cosine mixture are then estimated at polynomial instead of logarithmic rates. It also gives length a say.

Legend: T tokens, D model width, R width of the small space, E experts, K experts per token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.routing.context import TokenContext
from moesaic.routing.contextual import ContextRouter, Weights
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import LinearGate, router_dtype


def cosine_scores(h_TR: Tensor, prototype_ER: Tensor, perturb: float = 0.0) -> Tensor:
    """(T, E) cosines; a zero vector scores 0 with all (and its gradient is finite). ``perturb`` is added to the norms."""

    def unit(v: Tensor) -> Tensor:
        # The square of eps inside the root: unlike a clamped norm it has a finite slope at zero.
        return v / ((v.square().sum(dim=-1, keepdim=True) + 1e-12).sqrt() + perturb)

    with torch.autocast(h_TR.device.type, enabled=False):
        return F.linear(unit(h_TR), unit(prototype_ER))


class LowRank(ContextRouter):
    """A gate of rank R. Its logits start as spread as those of the plain gate (``init_std``).

    Args:
        rank: R; refused where R (D + E) weights are no fewer than the plain gate's D E.
        normalize: "chosen" rescales the weights of a token to sum to 1; "none" keeps the probabilities.
        init_std: of the plain gate whose spread of logits it imitates.
    """

    facts = Facts(losses={"switch": 1e-2, "z": 1e-3}, source="factorised gate; no single source")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        rank: int = 8,
        normalize: Weights = "chosen",
        init_std: float = 0.02,
    ) -> None:
        super().__init__(num_experts, k, normalize)
        most = (dim * num_experts - 1) // (dim + num_experts)
        if not 1 <= rank <= most:
            instead = f"choose rank between 1 and {most}" if most else 'use router "topk"'
            raise ConfigError(
                f"rank={rank} takes {rank * (dim + num_experts)} weights where the plain gate of {num_experts} experts on "
                f"width {dim} has {dim * num_experts}, so it saves nothing; {instead}."
            )
        self.down = LinearGate(dim, rank, init_std=dim**-0.5)
        self.up = LinearGate(rank, num_experts, init_std=init_std * math.sqrt(dim / rank))

    def logits(self, x_TD: Tensor, ctx: TokenContext) -> tuple[Tensor, dict[str, Tensor]]:
        """(T, E)."""
        return self.up(self.down(x_TD)), {}

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """R (D + E) weights, each used once per token."""
        weights = options.get("rank", 8) * (D + E)
        return Cost(2 * T * weights, weights)


class Cosine(ContextRouter):
    """Cosine similarity with one prototype per expert (Chi et al. 2022).

    Args:
        projection: R; None is half the number of experts, but at least 2 (in one dimension a cosine is a sign).
        init_temperature: the scores start divided by this.
        perturb: constant added to both norms; see the page.
        normalize: "chosen" rescales the weights of a token to sum to 1; "none" keeps the probabilities.
    """

    facts = Facts(losses={"switch": 1e-2}, source="Chi et al. 2022")

    MOST_LOG_SCALE = math.log(100.0)

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        projection: int | None = None,
        init_temperature: float = 0.5,
        perturb: float = 0.0,
        normalize: Weights = "chosen",
    ) -> None:
        super().__init__(num_experts, k, normalize)
        width = _width(num_experts, projection)
        if width < 2:
            raise ConfigError(f"projection={width} leaves only the sign of a cosine; choose at least 2.")
        if not 0.01 <= init_temperature < math.inf:
            raise ConfigError(
                f"init_temperature must be at least 0.01, not {init_temperature}: scores are capped at 100."
            )
        if not perturb >= 0:
            raise ConfigError(f"perturb must be at least 0, not {perturb}: it is added to norms.")
        self.perturb = perturb
        self.project = LinearGate(dim, width, init_std=dim**-0.5)
        self.prototype_ER = nn.Parameter(torch.empty(num_experts, width, dtype=router_dtype()).normal_(std=0.01))
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(init_temperature), dtype=router_dtype()))

    def logits(self, x_TD: Tensor, ctx: TokenContext) -> tuple[Tensor, dict[str, Tensor]]:
        """(T, E)."""
        cosine_TE = cosine_scores(self.project(x_TD), self.prototype_ER, self.perturb)
        return cosine_TE * self.log_scale.clamp(max=self.MOST_LOG_SCALE).exp(), {}

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """Projection and similarity; the temperature is one more weight."""
        weights = _width(E, options.get("projection")) * (D + E)
        return Cost(2 * T * weights, weights + 1)


def _width(num_experts: int, projection: int | None) -> int:
    return max(2, num_experts // 2) if projection is None else projection
