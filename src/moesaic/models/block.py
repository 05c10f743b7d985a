"""One Transformer block: attention, then a dense or sparse feed-forward layer, with pre- or post-normalisation.

Legend: B batch, S positions, D model width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from moesaic.experts.layer import MoE
from moesaic.nn.attention import Attention, AttentionContext
from moesaic.nn.latent import LatentAttention
from moesaic.nn.mlp import MLP
from moesaic.plan.plan import RoutingPlan, SoftPlan
from moesaic.routing import TokenContext


class Block(nn.Module):
    """``x + attn(norm(x))`` then ``x + ffn(norm(x))`` ("pre"), or ``norm(x + ...)`` each ("post").

    The router sees the normalised input, the same tensor the experts see.
    """

    def __init__(
        self,
        attention: Attention | LatentAttention,
        ffn: MLP | MoE,
        norm1: nn.Module,
        norm2: nn.Module,
        placement: Literal["pre", "post"],
    ) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.ffn = norm1, attention, norm2, ffn
        self.pre = placement == "pre"

    def forward(
        self, x_BSD: Tensor, attention: AttentionContext, tokens: TokenContext
    ) -> tuple[Tensor, RoutingPlan | SoftPlan | None, RoutingPlan | None]:
        """(B, S, D) to (B, S, D), the plan of a sparse block (None for a dense one), and which tokens took the block (None: all
        did; see ``models/depth.py``).
        """
        if self.pre:
            x_BSD = x_BSD + self.attention(self.norm1(x_BSD), attention)
            y_BSD, plan = self._ffn(self.norm2(x_BSD), tokens)
            return x_BSD + y_BSD, plan, None
        x_BSD = self.norm1(x_BSD + self.attention(x_BSD, attention))
        y_BSD, plan = self._ffn(x_BSD, tokens)
        return self.norm2(x_BSD + y_BSD), plan, None

    def _ffn(self, x_BSD: Tensor, tokens: TokenContext) -> tuple[Tensor, RoutingPlan | SoftPlan | None]:
        if isinstance(self.ffn, MoE):
            y_BSD, plan = self.ffn(x_BSD, tokens)
            return y_BSD, plan
        return self.ffn(x_BSD), None
