"""Multi-head MoE: a token is cut into sub-tokens, each of which finds its own experts (Wu et al. 2024, arXiv 2404.15045).

``u = x W_mh``; u is cut into h sub-tokens of width D/h, sub-token j the j-th slice; one router and one set of experts of width
D/h serve all of them; their outputs are put side by side again, and ``y = concat(...) W_merge``.

Equal compute: with the same k and H a sub-token costs 1/h of a token and there are h of them, so experts, router, rows times
width (hence traffic) cost what they cost in ``MoE``; what comes on top is 2 D^2 weights per token for the two projections.
Experts of H - 2D/(3k) (gated; H - D/k plain) make up for it. Each expert has 1/h of the parameters: h times as many experts
restore the total. That is the parity of the follow-up paper (Huang et al. 2024, arXiv 2411.16205).

The plan is about T * h sub-tokens, those of a token in a row. Everything that is known of a token is repeated for its
sub-tokens, except positions: the j-th sub-token of position p has position ``p h + j``. So routers that look back (convolution,
attention, recurrence) see one longer sequence, in which only the first sub-token of a document is at position 0; causal ones
stay causal over tokens, and what they keep in ``ctx.state`` continues. A router that reads the previous sparse layer's gate
needs a multi-head layer of the same h there. One that goes by ids or tasks sends all sub-tokens of a token the same way.

Legend: T tokens, D model width, h heads, H expert width, K experts per sub-token.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.experts.layer import MoE
from moesaic.nn.linear import Linear, init_fan_in_
from moesaic.plan.plan import RoutingPlan, SoftPlan
from moesaic.routing import Router, TokenContext


class MultiHeadMoE(MoE):
    """A sparse feed-forward layer over sub-tokens.

    Args:
        dim: D, the width of the layer's input and output.
        hidden: H, the width of each expert (which is D/h wide at both ends).
        heads: h, which must divide D. With 1 this is ``MoE`` between two matrices.
        settings: the other arguments of ``MoE``; shared experts work on sub-tokens too. A ready router must be D/h wide.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        k: int = 2,
        router: str | Router = "topk",
        router_options: dict[str, Any] | None = None,
        *,
        heads: int,
        **settings: Any,
    ) -> None:
        if heads < 1 or dim % heads:
            raise ConfigError(
                f"heads={heads} must divide the width dim={dim}, so that every sub-token is equally wide."
            )
        super().__init__(dim // heads, hidden, experts, k, router, router_options, **settings)
        self.dim, self.heads = dim, heads
        self.split = Linear(dim, dim, bias=False)
        self.merge = Linear(dim, dim, bias=False)

    def reset_parameters(self, scale: float = 1.0, out_scale: float = 1.0) -> None:
        """Fan-in initialisation; ``out_scale`` goes to the last matrix before the residual stream, which is ``merge``."""
        super().reset_parameters(scale)
        init_fan_in_(self.split.weight, self.dim, scale)
        init_fan_in_(self.merge.weight, self.dim, scale * out_scale)

    def active_parameters(self) -> int:
        """Parameters one token uses, those used by each of its sub-tokens counted h times: half of its FLOPs, as in ``MoE``."""
        return self.heads * super().active_parameters() + self.split.weight.numel() + self.merge.weight.numel()

    def compute(self, x_TD: Tensor, ctx: TokenContext) -> tuple[Tensor, RoutingPlan | SoftPlan]:
        """(T, D) to (T, D) by way of (T * h, D/h), and the plan of the sub-tokens."""
        T, h = len(x_TD), self.heads
        y_SR, plan = super().compute(self.split(x_TD).view(T * h, self.dim // h), sub_tokens(ctx, h))
        return self.merge(y_SR.view(T, self.dim)), plan


def sub_tokens(ctx: TokenContext, heads: int) -> TokenContext:
    """What is known of the sub-tokens; fields that have one entry per token are told by their names (``..._T``, ``..._TE``)."""
    if heads == 1:
        return ctx
    repeated = {
        f.name: getattr(ctx, f.name).repeat_interleave(heads, dim=0)
        for f in fields(ctx)
        if f.name.endswith(("_T", "_TE")) and getattr(ctx, f.name) is not None
    }
    metadata = {name: fact_T.repeat_interleave(heads, dim=0) for name, fact_T in ctx.metadata.items()}
    inside = replace(ctx, **repeated, metadata=metadata)
    if ctx.position_T is None:
        return inside
    place_H = torch.arange(heads, device=ctx.position_T.device)
    return inside.renumbered((ctx.position_T[:, None] * heads + place_H).flatten())
