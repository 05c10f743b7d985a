"""A plan of some of a batch's tokens, written in the numbering of the whole batch, and back.

Where only a part of the tokens reaches a sparse layer (Mixture-of-Depths), its router, capacity and experts see that part
alone. Everybody else (losses, readings, traces, edits) speaks of the batch: to them a token that never arrived is like padding.

>>> whole = lift(plan, Part(place_T, num_tokens=B * S))     # token i of the plan is token place_T[i] of the batch
>>> plan = lower(whole, part)                               # for an edit of the whole to be executed

Both are pure and differentiable. Multi-head layers route h sub-tokens of every token; places are those of tokens all the same.

Legend: T tokens of the part, N rows, K rows per token, E experts, G groups and S slots of a soft plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan


@dataclass(frozen=True, eq=False)
class Part:
    """Some tokens of a batch.

    Attributes:
        place_T: int64, the place of each among all; no two alike.
        num_tokens: tokens of the batch.
    """

    place_T: Tensor
    num_tokens: int

    def sub_tokens(self, rows: int) -> Part:
        """The same for tensors of ``rows`` = h T sub-tokens, those of a token in a row."""
        h = rows // len(self.place_T) if len(self.place_T) else 1
        if h == 1:
            return self
        place_Th = self.place_T[:, None] * h + torch.arange(h, device=self.place_T.device)
        return Part(place_Th.flatten(), self.num_tokens * h)


@overload
def lift(plan: RoutingPlan, part: Part) -> RoutingPlan: ...
@overload
def lift(plan: SoftPlan, part: Part) -> SoftPlan: ...
def lift(plan: RoutingPlan | SoftPlan, part: Part) -> RoutingPlan | SoftPlan:
    """The plan about all tokens of the batch. ``valid_T`` marks those that are in the part (and no padding in it); the others
    go nowhere, and their scores are 0. Plans of K rows per token stay so; loose rows keep their number and order.
    """
    part = part.sub_tokens(plan.num_tokens)
    valid_T = plan.valid_T
    if valid_T is None:
        valid_T = torch.ones(plan.num_tokens, dtype=torch.bool, device=part.place_T.device)
    about = {"valid_T": _spread(valid_T, part), "gate": None if plan.gate is None else lift_gate(plan.gate, part)}
    if isinstance(plan, SoftPlan):
        G, S = plan.dispatch_GTS.shape[0], plan.dispatch_GTS.shape[2]
        dispatch_GTS, combine_GTS = (
            _spread(weights_GTS.flatten(0, 1), part).view(G, part.num_tokens // G, S)
            for weights_GTS in (plan.dispatch_GTS, plan.combine_GTS)
        )
        return replace(plan, dispatch_GTS=dispatch_GTS, combine_GTS=combine_GTS, **about)  # type: ignore[arg-type]
    allowed_TE = None if plan.allowed_TE is None else _spread(plan.allowed_TE, part)
    moved = replace(plan, num_tokens=part.num_tokens, allowed_TE=allowed_TE, **about)  # type: ignore[arg-type]
    if plan.per_token is None:
        return replace(moved, token_N=part.place_T[plan.token_N])
    K, E = plan.per_token, plan.num_experts
    scale_N = plan.input_weight_N
    return replace(
        moved,
        token_N=torch.arange(part.num_tokens, device=plan.token_N.device).repeat_interleave(K),
        expert_N=_spread(plan.expert_TK, part, E).flatten(),
        choice_N=_spread(plan.choice_TK, part, E).flatten(),
        weight_N=_spread(plan.weight_TK, part).flatten(),
        input_weight_N=None if scale_N is None else _spread(scale_N.view(-1, K), part).flatten(),
    )


@overload
def lower(plan: RoutingPlan, part: Part) -> RoutingPlan: ...
@overload
def lower(plan: SoftPlan, part: Part) -> SoftPlan: ...
def lower(plan: RoutingPlan | SoftPlan, part: Part) -> RoutingPlan | SoftPlan:
    """The plan about the part alone, in its order. Loose rows of tokens outside go nowhere."""
    part = part.sub_tokens(plan.num_tokens * len(part.place_T) // max(part.num_tokens, 1))
    place_T = part.place_T
    about = {
        "valid_T": None if plan.valid_T is None else plan.valid_T[place_T],
        "gate": None if plan.gate is None else lower_gate(plan.gate, part),
    }
    if isinstance(plan, SoftPlan):
        G, S = plan.dispatch_GTS.shape[0], plan.dispatch_GTS.shape[2]
        dispatch_GTS, combine_GTS = (
            weights_GTS.flatten(0, 1)[place_T].view(G, len(place_T) // G, S)
            for weights_GTS in (plan.dispatch_GTS, plan.combine_GTS)
        )
        return replace(plan, dispatch_GTS=dispatch_GTS, combine_GTS=combine_GTS, **about)  # type: ignore[arg-type]
    allowed_TE = None if plan.allowed_TE is None else plan.allowed_TE[place_T]
    moved = replace(plan, num_tokens=len(place_T), allowed_TE=allowed_TE, **about)  # type: ignore[arg-type]
    E = plan.num_experts
    if plan.per_token is None:
        seat_T = torch.full((part.num_tokens,), -1, device=place_T.device)
        seat_T[place_T] = torch.arange(len(place_T), device=place_T.device)
        token_N = seat_T[plan.token_N]
        expert_N, choice_N = (torch.where(token_N >= 0, ids_N, E) for ids_N in (plan.expert_N, plan.choice_N))
        return replace(moved, token_N=token_N.clamp(min=0), choice_N=choice_N).send(expert_N)
    scale_N = plan.input_weight_N
    return replace(
        moved,
        token_N=torch.arange(len(place_T), device=place_T.device).repeat_interleave(plan.per_token),
        expert_N=plan.expert_TK[place_T].flatten(),
        choice_N=plan.choice_TK[place_T].flatten(),
        weight_N=plan.weight_TK[place_T].flatten(),
        input_weight_N=None if scale_N is None else scale_N.view(-1, plan.per_token)[place_T].flatten(),
    )


def lift_gate(gate: Gate, part: Part) -> Gate:
    """The evidence in the batch's numbering, 0 for tokens outside the part."""
    part = part.sub_tokens(len(gate.logits_TE))
    return _each_tensor(gate, lambda rows: _spread(rows, part))


def lower_gate(gate: Gate, part: Part) -> Gate:
    """The evidence of the part's tokens."""
    part = part.sub_tokens(len(gate.logits_TE) * len(part.place_T) // max(part.num_tokens, 1))
    return _each_tensor(gate, lambda rows: rows[part.place_T])


def per_token(name: str) -> bool:
    """Whether a tensor of this name has one entry per token: its shape letters (after the last underscore) begin with T."""
    return name.rpartition("_")[2].startswith("T") and "_" in name


def _each_tensor(gate: Gate, move: Callable[[Tensor], Tensor]) -> Gate:
    load, noisy = gate.load_probs_TE, gate.noisy_TE
    return Gate(
        move(gate.logits_TE),
        move(gate.probs_TE),
        None if load is None else move(load),
        None if noisy is None else move(noisy),
        {name: move(tensor) if per_token(name) else tensor for name, tensor in gate.extra.items()},
    )


def _spread(rows: Tensor, part: Part, fill: int = 0) -> Tensor:
    """(T, ...) rows at their places among all; the other rows hold ``fill``."""
    whole = rows.new_full((part.num_tokens, *rows.shape[1:]), fill)
    return whole.index_copy(0, part.place_T, rows)
