"""Routers that look at more than the token's own vector: earlier tokens (conv, attention) or earlier layers (recurrent).

Each computes ``z_t = c_t W`` from a context vector ``c_t`` and then chooses as the plain top-k router does:

| router | context vector ``c_t`` of a token with input ``x_t`` |
|---|---|
| ``conv`` | ``sum_{j<w} a_j * x_{t-j}``, one tap per offset and channel (a depthwise causal convolution) |
| ``attention`` | ``x_t + o_t V`` or ``[x_t, o_t]``, ``o_t`` a causal attention head of width R over the inputs up to t |
| ``recurrent`` | ``h_l = GRU(x_t P, h_{l-1})``, over layers and not over tokens (RMoE, Qiu et al. 2024, arXiv 2408.06793) |

"Earlier" never crosses the beginning of a document, and padding is no token at all: offsets count real tokens. In generation
the first two keep what they looked at in ``ctx.state``. ``conv`` starts as the plain gate (its own tap 1, the others 0), and so
does ``attention`` with ``combine="add"`` (V starts at 0). The three differ from one another in what they can see; that looking
back helps routing is known to us for RMoE only, from its authors.

RMoE shares one GRU over all layers, with a projection and a gate per layer; here every layer has its own, so that layers stay
independent modules. Equal weights give the paper's model.

Legend: T tokens (B sequences of S), L tokens held and new, D model width, E experts, K experts per token, R width of the head
or of the hidden state, W taps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError, one_of
from moesaic.plan.plan import Gate, RoutingPlan
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import LinearGate, Router, check_k, choose, router_dtype, ruled

Weights = Literal["chosen", "none"]


class ContextRouter(Router):
    """Top-k over softmax scores whose logits a subclass computes from a context.

    Args of all subclasses:
        normalize: weights of the chosen are renormalised to sum to 1 ("chosen"), or their probabilities as they are ("none").
        init_std: of the gate's weights.
    """

    facts = Facts(losses={"switch": 1e-2, "z": 1e-3})

    def __init__(self, num_experts: int, k: int, normalize: Weights) -> None:
        super().__init__()
        check_k(k, num_experts)
        one_of("normalize", normalize, ("chosen", "none"))
        if k == 1 and normalize == "chosen" and num_experts > 1:
            raise ConfigError(
                'k=1 with normalize="chosen" makes every weight exactly 1, so the router gets no gradient; '
                'use normalize="none" or k of at least 2.'
            )
        self.num_experts, self.k, self.normalize = num_experts, k, normalize
        if normalize == "none":
            self.facts = replace(self.facts, teaches="all")  # every logit is in the softmax's denominator

    @abstractmethod
    def logits(self, x_TD: Tensor, ctx: TokenContext) -> tuple[Tensor, dict[str, Tensor]]:
        """(T, E) logits in at least fp32, and what ``gate.extra`` shall hold."""

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; K rows per token, best first."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE, extra = self.logits(x_TD.to(router_dtype_of(self)), ctx)
        logits_TE = ruled(logits_TE, ctx)
        gate = Gate(logits_TE, logits_TE.softmax(dim=-1), extra=extra)
        expert_TK = choose(gate.probs_TE, self.k, ctx.allowed_TE)
        return self.plan(expert_TK, self.weigh(gate, expert_TK), ctx, gate)

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """fp32 (T, K) weights of any choice of experts."""
        weight_TK = gate.probs_TE.gather(1, expert_TK)
        if self.normalize == "chosen":
            weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return weight_TK


class Conv(ContextRouter):
    """A causal depthwise convolution over router inputs, then the gate.

    Args:
        width: taps W; the token itself and the W - 1 before it. A tap that would reach over the document's start is left out.

    ``ctx.state["inputs"]`` holds each row's last W - 1 inputs (B, W - 1, D), newest last.
    """

    facts = replace(ContextRouter.facts, source="depthwise convolution of the router's input; no canonical paper")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        width: int = 4,
        normalize: Weights = "chosen",
        init_std: float = 0.02,
    ) -> None:
        super().__init__(num_experts, k, normalize)
        if width < 2:
            raise ConfigError(f'width={width} taps see no earlier token; use at least 2, or the router "topk".')
        self.width = width
        self.tap_WD = nn.Parameter(torch.zeros(width, dim, dtype=router_dtype()))
        nn.init.ones_(self.tap_WD[0])
        self.gate = LinearGate(dim, num_experts, init_std=init_std)

    def logits(self, x_TD: Tensor, ctx: TokenContext) -> tuple[Tensor, dict[str, Tensor]]:
        """The gate of the convolved inputs."""
        B, S = ctx.shape(len(x_TD))
        x_BSD, position_BS = x_TD.view(B, S, x_TD.shape[1]), ctx.positions(len(x_TD), x_TD.device)
        held = self.width - 1
        past_BWD = None if ctx.state is None else ctx.state.get("inputs")
        if past_BWD is None:
            past_BWD = x_BSD.new_zeros(B, held, x_BSD.shape[2])  # never read: no position reaches back so far
        x_BLD = torch.cat([past_BWD, x_BSD], dim=1)
        place_BS = torch.arange(held, held + S, device=x_TD.device).expand(B, S)
        if ctx.valid_T is not None:
            x_BLD, place_BS = _without_padding(x_BLD, ctx.valid_T.view(B, S))
        if ctx.state is not None:
            ctx.state["inputs"] = x_BLD[:, x_BLD.shape[1] - held :].detach()
        mixed_BSD = torch.zeros_like(x_BSD)
        for offset, tap_D in enumerate(self.tap_WD):
            index_BSD = (place_BS - offset).clamp(min=0)[:, :, None].expand(x_BSD.shape)
            inside_BS1 = (position_BS >= offset)[:, :, None]
            mixed_BSD = mixed_BSD + torch.where(inside_BS1, x_BLD.gather(1, index_BSD), 0.0) * tap_D
        return self.gate(mixed_BSD.flatten(0, 1)), {}

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """The gate; the taps are elementwise."""
        width = options.get("width", 4)
        return Cost(2 * T * D * E, D * E + width * D, other="2 T D width of taps")


class AttentionRouter(ContextRouter):
    """One causal attention head over the router inputs of the document, read together with the token's own vector.

    Args:
        head_dim: width R of queries, keys and values.
        combine: "add": values are projected back to D and added to the token's vector; "concat": the gate reads both side by
            side.

    The head has no positions of its own: it sees what was said before, not where. ``ctx.state`` holds ``keys`` and ``values``
    (B, L, R) of all earlier tokens and ``seen`` (bool (B, L), False on padding and on documents that have ended). Scores are
    (B, S, L) in fp32: price grows with the square of a sequence, as attention's does.
    """

    facts = replace(ContextRouter.facts, source="an attention head before the gate; relatives: Yuan 2.0-M32 (2024)")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        head_dim: int = 16,
        combine: Literal["add", "concat"] = "add",
        normalize: Weights = "chosen",
        init_std: float = 0.02,
    ) -> None:
        super().__init__(num_experts, k, normalize)
        one_of("combine", combine, ("add", "concat"))
        if head_dim < 1:
            raise ConfigError(f"head_dim must be at least 1, not {head_dim}.")
        self.combine = combine
        std = 1 / math.sqrt(dim)
        self.query, self.key, self.value = (LinearGate(dim, head_dim, init_std=std) for _ in range(3))
        self.back = LinearGate(head_dim, dim, init_std=0.0) if combine == "add" else None
        self.gate = LinearGate(dim + (head_dim if combine == "concat" else 0), num_experts, init_std=init_std)

    def logits(self, x_TD: Tensor, ctx: TokenContext) -> tuple[Tensor, dict[str, Tensor]]:
        """The gate of the token's vector and what the head read."""
        T, device = len(x_TD), x_TD.device
        B, S = ctx.shape(T)
        query_BSR, key_BLR, value_BLR = (
            part(x_TD).view(B, S, part.weight.shape[0]) for part in (self.query, self.key, self.value)
        )
        document_BS = ctx.documents(T, device)
        valid_BS = torch.ones(B, S, dtype=torch.bool, device=device) if ctx.valid_T is None else ctx.valid_T.view(B, S)
        may_BSL = (document_BS[:, :, None] == document_BS[:, None, :]) & valid_BS[:, None, :]
        may_BSL = may_BSL & torch.ones(S, S, dtype=torch.bool, device=device).tril()
        may_BSL = may_BSL | torch.eye(S, dtype=torch.bool, device=device)  # padding too: no softmax over nothing
        if ctx.state is not None:
            seen_BL = valid_BS & (document_BS == document_BS[:, -1:])
            if "keys" in ctx.state:
                going_on_BS1 = (document_BS == 0)[:, :, None]
                may_BSL = torch.cat([ctx.state["seen"][:, None, :] & going_on_BS1, may_BSL], dim=2)
                key_BLR = torch.cat([ctx.state["keys"], key_BLR], dim=1)
                value_BLR = torch.cat([ctx.state["values"], value_BLR], dim=1)
                ended_B1 = (document_BS > 0).any(dim=1, keepdim=True)
                seen_BL = torch.cat([ctx.state["seen"] & ~ended_B1, seen_BL], dim=1)
            ctx.state.update(keys=key_BLR.detach(), values=value_BLR.detach(), seen=seen_BL)
        score_BSL = query_BSR @ key_BLR.mT / math.sqrt(query_BSR.shape[2])
        read_TR = (score_BSL.masked_fill(~may_BSL, float("-inf")).softmax(dim=2) @ value_BLR).flatten(0, 1)
        if self.back is not None:
            return self.gate(x_TD + self.back(read_TR)), {}
        return self.gate(torch.cat([x_TD, read_TR], dim=1)), {}

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """Three projections, the head over one sequence of T tokens, the way back, the gate."""
        R, add = options.get("head_dim", 16), options.get("combine", "add") == "add"
        matrices = 3 * D * R + (R * D + D * E if add else (D + R) * E)
        return Cost(2 * T * matrices + 4 * T * T * R, matrices)


class Recurrent(ContextRouter):
    """A GRU cell over layers: every sparse layer's router goes on from the hidden state of the one before (RMoE).

    Args:
        hidden: width R of the state.

    The state travels in ``gate.extra["recurrent_TR"]`` and is read from ``ctx.previous``; the first sparse layer, and one
    behind a router of another kind, starts from zeros. Gradients flow through all layers' states, as in the paper.
    """

    facts = replace(ContextRouter.facts, reads_previous=True, source="Qiu et al. 2024 (RMoE)")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        hidden: int = 64,
        normalize: Weights = "chosen",
        init_std: float = 0.02,
    ) -> None:
        super().__init__(num_experts, k, normalize)
        if hidden < 1:
            raise ConfigError(f"hidden must be at least 1, not {hidden}.")
        self.hidden = hidden
        self.project = LinearGate(dim, hidden, init_std=1 / math.sqrt(dim))
        self.cell = nn.GRUCell(hidden, hidden, dtype=router_dtype())
        self.gate = LinearGate(hidden, num_experts, init_std=init_std)

    def logits(self, x_TD: Tensor, ctx: TokenContext) -> tuple[Tensor, dict[str, Tensor]]:
        """The gate of the new state, and the state for the next layer."""
        state_TR = None if ctx.previous is None else ctx.previous.extra.get("recurrent_TR")
        if state_TR is None:
            state_TR = x_TD.new_zeros(len(x_TD), self.hidden)
        if state_TR.shape[1] != self.hidden:
            raise ConfigError(
                f"The layer before handed on a state {state_TR.shape[1]} wide, but this one's is hidden={self.hidden}; "
                "give all layers the same width."
            )
        state_TR = self.cell(self.project(x_TD), state_TR.to(x_TD.dtype))
        return self.gate(state_TR), {"recurrent_TR": state_TR}

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """Projection, the cell's six matrices and six biases, the gate."""
        R = options.get("hidden", 64)
        matrices = D * R + 6 * R * R + R * E
        return Cost(2 * T * matrices, matrices + 6 * R)


def router_dtype_of(router: Router) -> torch.dtype:
    """fp32, or fp64 where the whole router is."""
    return next(router.parameters()).dtype


def _without_padding(x_BLD: Tensor, valid_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with their padding moved to the front, order kept, and where each of the last S places went (int64 (B, S))."""
    B, S = valid_BS.shape
    held_BL = torch.cat([valid_BS.new_ones(B, x_BLD.shape[1] - S), valid_BS], dim=1)
    order_BL = torch.sort(held_BL.long(), dim=1, stable=True).indices
    moved_BLD = x_BLD.gather(1, order_BL[:, :, None].expand(x_BLD.shape))
    return moved_BLD, order_BL.argsort(dim=1)[:, x_BLD.shape[1] - S :]
