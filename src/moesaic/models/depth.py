"""A Mixture-of-Depths block: chosen tokens go through it, the others pass by (Raposo et al. 2024).

``x' = x + r f(x)`` for chosen tokens, ``x' = x`` for the others. f is what the whole block adds: attention among the chosen
tokens, at their original positions and within their documents, then the feed-forward or sparse layer. So the decision about
depth comes first and routing second, and a router inside sees chosen tokens only.

| | compute | who is attended to |
|---|---|---|
| training | ``ceil(capacity * S)`` tokens of each row are gathered, and only they are computed | the chosen |
| evaluation | as many as the row with most chosen tokens has (one host synchronisation); none if none is | the chosen |
| generation | the same | the chosen of this forward and of all earlier ones (``KVCache.held``) |

To the router inside, skipped tokens do not exist: it counts positions among the chosen ones of a document. Its plan comes back
in the batch's numbering (``plan/lift.py``), and what it hands to the next sparse layer's router by token
(``gate.extra``) passes a skipping token by unchanged, as the residual stream does. Where no token of a batch is chosen, a
sparse layer is still asked for its plan, with one padding token per row: its experts compute nothing (shared experts see
the padding).

Legend: B rows, S positions, C tokens gathered per row, L keys, D model width, T = B * S.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from moesaic.experts.layer import MoE
from moesaic.models.block import Block
from moesaic.nn.attention import Attention, AttentionContext
from moesaic.nn.mlp import MLP
from moesaic.plan.lift import Part, per_token
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan
from moesaic.routing import TokenContext
from moesaic.routing.depth import DepthRouter


class DepthBlock(Block):
    """A ``Block`` with a depth router in front; the names of its other parameters are a block's own."""

    def __init__(
        self,
        attention: Attention,
        ffn: MLP | MoE,
        norm1: nn.Module,
        norm2: nn.Module,
        placement: Literal["pre", "post"],
        depth: DepthRouter,
    ) -> None:
        super().__init__(attention, ffn, norm1, norm2, placement)
        self.depth = depth

    def forward(
        self, x_BSD: Tensor, attention: AttentionContext, tokens: TokenContext
    ) -> tuple[Tensor, RoutingPlan | SoftPlan | None, RoutingPlan | None]:
        """(B, S, D) to (B, S, D), the plan of a sparse block in the batch's numbering, and which tokens took the block."""
        B, S, D = x_BSD.shape
        tokens = replace(tokens, num_sequences=B)
        decision = self.depth(x_BSD.flatten(0, 1), tokens)
        chosen_BS = decision.kept_N.view(B, S)
        C = self.depth.slots(S) if self.training else int(chosen_BS.sum(dim=1).amax()) if S else 0
        # Chosen tokens first, in their order; rows with fewer than C are filled up with skipped ones, marked as padding.
        index_BS = torch.sort((~chosen_BS).long(), dim=1, stable=True).indices
        earlier_B1: Tensor | int = 0
        if attention.cache is not None:
            assert isinstance(attention.place, slice)
            earlier_B1 = attention.cache.hold(self.attention.layer, attention.place, chosen_BS)
        inside = _inside(tokens, index_BS[:, : max(C, 1)], chosen_BS, earlier_B1)
        if C == 0:
            plan = self.ffn(x_BSD[:, :1], inside)[1] if isinstance(self.ffn, MoE) else None
            return x_BSD, _carry(plan, tokens.previous, chosen_BS), decision
        index_BC = index_BS[:, :C]
        index_BCD = index_BC[:, :, None].expand(B, C, D)
        x_BCD = x_BSD.gather(1, index_BCD)
        y_BCD, plan, _ = super().forward(x_BCD, self._attention(attention, index_BC, chosen_BS), inside)
        weight_BC1 = decision.weight_N.view(B, S).gather(1, index_BC)[:, :, None]
        changed_BCD = x_BCD + (y_BCD - x_BCD) * weight_BC1  # in the weight's fp32
        changed_BCD = torch.where(chosen_BS.gather(1, index_BC)[:, :, None], changed_BCD, x_BCD)
        x_BSD = x_BSD.scatter(1, index_BCD, changed_BCD.to(x_BSD.dtype))
        return x_BSD, _carry(plan, tokens.previous, chosen_BS), decision

    def _attention(self, ctx: AttentionContext, index_BC: Tensor, chosen_BS: Tensor) -> AttentionContext:
        """Rotary tables, mask and cache places of the gathered tokens."""
        B, C = index_BC.shape
        index_BCR = index_BC[:, None, :, None].expand(B, 1, C, ctx.cos.shape[-1])
        cos, sin = (table.expand(B, -1, -1, -1).gather(2, index_BCR) for table in (ctx.cos, ctx.sin))
        mask, place_BC, window = ctx.masks[self.attention.window], None, self.attention.window
        if ctx.cache is not None:
            assert isinstance(ctx.place, slice)
            place_BC = index_BC + ctx.place.start
            mask = _rows(mask, index_BC, place_BC, ctx.cache.length)
            mask = _among(mask, ctx.cache.held[self.attention.layer][:, : ctx.cache.length], place_BC)
        elif mask is not None:
            mask = _rows(mask, index_BC, index_BC, mask.shape[-1])
            mask = mask.gather(3, index_BC[:, None, None, :].expand(B, 1, C, C))
            seat_C = torch.arange(C, device=index_BC.device).expand(B, C)
            mask = _among(mask, chosen_BS.gather(1, index_BC), seat_C)
        # Without a mask attention is causal over the gathered, and what fills a row up stands behind all that is chosen.
        return AttentionContext(cos, sin, {window: mask}, ctx.cache, place_BC)


def _rows(mask: Tensor | None, index_BC: Tensor, place_BC: Tensor, keys: int) -> Tensor:
    """bool (B, 1, C, L): the gathered queries' rows of a mask; of the causal one where there is none."""
    if mask is None:
        return (torch.arange(keys, device=place_BC.device) <= place_BC[:, :, None])[:, None]
    B, C = index_BC.shape
    return mask.expand(B, 1, -1, keys).gather(2, index_BC[:, None, :, None].expand(B, 1, C, keys))


def _among(mask: Tensor, key_BL: Tensor, own_BC: Tensor) -> Tensor:
    """The mask with these keys only; every query keeps itself, so that no softmax is over nothing."""
    own_BCL = torch.arange(key_BL.shape[1], device=own_BC.device) == own_BC[:, :, None]
    return (mask & key_BL[:, None, None, :]) | own_BCL[:, None]


def _inside(tokens: TokenContext, index_BC: Tensor, chosen_BS: Tensor, earlier_B1: Tensor | int) -> TokenContext:
    """What the router inside is told: the gathered tokens, positions counted among the chosen ones of each document."""
    B, S = chosen_BS.shape
    before_BS = chosen_BS.long().cumsum(dim=1) - chosen_BS.long()
    document_BS = tokens.documents(B * S, chosen_BS.device)
    begins_BS = document_BS.diff(dim=1, prepend=document_BS[:, :1]) != 0
    position_BS = before_BS - torch.where(begins_BS, before_BS, 0).cummax(dim=1).values
    position_BS = position_BS + torch.where(document_BS == 0, earlier_B1, 0)
    place_T = (index_BC + torch.arange(B, device=index_BC.device)[:, None] * S).flatten()
    inside = tokens.of(Part(place_T, B * S)).renumbered(position_BS.gather(1, index_BC).flatten())
    return replace(inside, valid_T=chosen_BS.flatten()[place_T])


def _carry(
    plan: RoutingPlan | SoftPlan | None, previous: Gate | None, chosen_BS: Tensor
) -> RoutingPlan | SoftPlan | None:
    """The plan, whose skipped tokens hand on what the previous sparse layer's router handed to them."""
    if plan is None or plan.gate is None or previous is None:
        return plan
    extra = dict(plan.gate.extra)
    for name, new in extra.items():
        old = previous.extra.get(name)
        if per_token(name) and old is not None and old.shape == new.shape:
            took_T = chosen_BS.flatten().repeat_interleave(len(new) // max(chosen_BS.numel(), 1))
            extra[name] = torch.where(took_T.view(-1, *[1] * (new.dim() - 1)), new, old)
    return replace(plan, gate=replace(plan.gate, extra=extra))
