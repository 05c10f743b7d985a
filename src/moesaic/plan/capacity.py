"""Capacity: how many rows an expert may take, who goes first, and what happens to the rest. A plan edit.

>>> rule = CapacityRule(factor=1.25)
>>> plan = drop_over_capacity(plan, rule.slots(num_tokens=1024, k=2, num_experts=16), priority="position")

Legend: T tokens, N rows, E experts, K rows per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from moesaic.errors import ConfigError, one_of
from moesaic.plan.plan import RoutingPlan

Priority = Literal["position", "probability", "batch", "random"]
Overflow = Literal["residual", "shared", "fallback_expert", "next_best", "reroute_to_free"]
Rounding = Literal["ceil", "floor", "round"]


@dataclass(frozen=True)
class CapacityRule:
    """How many slots C an expert has for T tokens: ``clip(round(factor * k * T / E), minimum, T)``.

    The defaults follow most code bases (fieldguide 2.9); the other fields reproduce the ones that differ:
    mesh-tf ``rounding="floor", count_k=False``; Megatron ``minimum=0``; V-MoE ``multiple_of=4``; DeepSpeed the default.

    Attributes:
        factor, eval_factor: capacity factor in training and in evaluation; None in evaluation means dropless, the default,
            because drops there depend on batch mates (GShard and ST-MoE evaluate with 2.0).
        minimum: least slots in training (0 disables).
        multiple_of: round C up to a multiple, for kernels; T still bounds it.
        priority: who goes first, see ``drop_over_capacity``.
        overflow: what happens to the others, see ``drop_over_capacity``.
        fallback_expert: the catch-all expert of ``overflow="fallback_expert"``.
        groups: routing groups of equal size (GShard); each group has its own slots.
        renormalize: rescale a token's surviving weights to their sum before the drop.
        tau: slots of a feed-forward expert over those of a zero-computation one (MoE++: 0.75), see ``split_slots``; None
            gives all experts the same.
    """

    factor: float = 1.25
    eval_factor: float | None = None
    rounding: Rounding = "ceil"
    count_k: bool = True
    minimum: int = 4
    multiple_of: int = 1
    priority: Priority = "position"
    overflow: Overflow = "residual"
    fallback_expert: int | None = None
    groups: int = 1
    renormalize: bool = False
    tau: float | None = None

    def __post_init__(self) -> None:
        one_of("capacity.rounding", self.rounding, get_args(Rounding))
        one_of("capacity.priority", self.priority, get_args(Priority))
        one_of("capacity.overflow", self.overflow, get_args(Overflow))
        for name in ("factor", "eval_factor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"capacity.{name} must be above 0, not {value}; 1.25 is usual in training.")
        if self.multiple_of < 1 or self.groups < 1 or self.minimum < 0:
            raise ConfigError(
                "capacity.multiple_of and capacity.groups must be at least 1 and capacity.minimum at least 0."
            )
        if (self.overflow == "fallback_expert") != (self.fallback_expert is not None):
            raise ConfigError('capacity.fallback_expert goes with overflow="fallback_expert": set both or neither.')
        if self.tau is not None and not 0 < self.tau <= 1:
            raise ConfigError(f"capacity.tau must be above 0 and at most 1, not {self.tau}; 0.75 is MoE++'s.")
        if self.tau is not None and self.overflow not in ("residual", "shared"):
            raise ConfigError(
                f'capacity.tau gives kinds of experts unequal room, so overflow="{self.overflow}" cannot move rows between '
                'them; use overflow="residual".'
            )

    def slots(self, num_tokens: int, k: int, num_experts: float, training: bool = True) -> int | None:
        """C for one routing group of ``num_tokens`` tokens; None means no limit."""
        factor = self.factor if training else self.eval_factor
        if factor is None:
            return None
        ideal = factor * num_tokens * (k if self.count_k else 1) / num_experts
        # 1e-9 absorbs binary fractions: 1.1 * 10 must not become 12 slots.
        rounded = {"ceil": math.ceil(ideal - 1e-9), "floor": math.floor(ideal + 1e-9)}
        rounded["round"] = math.floor(ideal + 0.5)
        slots = rounded[self.rounding]
        slots = max(slots, self.minimum if training else 0)
        slots = -(-slots // self.multiple_of) * self.multiple_of
        return min(slots, num_tokens)

    def split_slots(
        self, num_tokens: int, k: int, num_experts: int, num_special: int, training: bool = True
    ) -> tuple[int, int] | None:
        """C of a feed-forward and of a zero-computation expert (MoE++, Jin et al. 2025, eq. 8); None means no limit.

        With F and Z of them: ``factor k T tau / (tau F + Z)`` and ``factor k T / (tau F + Z)``, rounded like ``slots``. (The
        paper has no k: ``count_k=False``.)
        """
        tau = 1.0 if self.tau is None else self.tau
        as_many = tau * (num_experts - num_special) + num_special  # experts, counted in zero-computation ones
        true, special = (self.slots(num_tokens, k, e, training) for e in (as_many / tau, as_many))
        return None if true is None or special is None else (true, special)

    def apply(self, plan: RoutingPlan, training: bool, *, k: int | None = None, num_special: int = 0) -> RoutingPlan:
        """Drop what this rule does not let through. Padding neither takes slots nor counts towards T.

        Args:
            k: experts a token uses on average; None is the rows it owns, of which adaptive routers leave many empty.
            num_special: the last so many experts are zero-computation ones, to which ``tau`` gives more room.
        """
        num_valid = plan.num_tokens if plan.valid_T is None else int(plan.valid_T.sum())
        if k is None:
            k = plan.per_token or max(1, round(plan.num_rows / max(plan.num_tokens, 1)))
        group = math.ceil(num_valid / self.groups)
        if self.tau is not None and num_special:
            split = self.split_slots(group, k, plan.num_experts, num_special, training)
            return plan if split is None else self._drop_by_kind(plan, split, plan.num_experts - num_special)
        slots = self.slots(group, k, plan.num_experts, training)
        if slots is None:
            return plan
        return drop_over_capacity(
            plan,
            slots,
            priority=self.priority,
            overflow=self.overflow,
            fallback_expert=self.fallback_expert,
            groups=self.groups,
            renormalize=self.renormalize,
        )

    def _drop_by_kind(self, plan: RoutingPlan, slots: tuple[int, int], num_true: int) -> RoutingPlan:
        # Dropped rows go nowhere, so no expert's queue depends on another's: each kind can be read off a drop of its own.
        true, special = (drop_over_capacity(plan, c, priority=self.priority, groups=self.groups) for c in slots)
        expert_N = torch.where(plan.expert_N < num_true, true.expert_N, special.expert_N)
        return plan.send(expert_N, renormalized(plan, expert_N) if self.renormalize else None)


def drop_over_capacity(
    plan: RoutingPlan,
    slots: int,
    *,
    priority: Priority = "position",
    overflow: Overflow = "residual",
    fallback_expert: int | None = None,
    groups: int = 1,
    renormalize: bool = False,
    generator: torch.Generator | None = None,
) -> RoutingPlan:
    """Keep at most ``slots`` rows per expert (and routing group); the rest overflow.

    Args:
        priority: "position": all first choices in token order, then all second choices (GShard); "probability": largest
            weight first (Megatron); "batch": tokens sorted by their largest weight, then choice by choice (Batch Prioritized
            Routing, V-MoE); "random" (DeepSpeed). Only "position" with k=1 never lets a later token displace an earlier one:
            with k of 2 a later first choice still goes before an earlier second choice.
        overflow: "residual" and "shared": the row goes nowhere, so only the residual stream (and shared experts, where there
            are any) carry the token; "fallback_expert": to that expert, which has no limit; "next_best": to the token's next
            best expert with a free slot (No-Token-Left-Behind; needs ``plan.gate``); "reroute_to_free": to any free slot.
        groups: valid tokens are split into this many consecutive groups, each with its own slots.
        renormalize: rescale the surviving weights of a token to their sum before the drop (DeepSpeed normalises after
            dropping, GShard before).

    Raises ``ConfigError`` where the plan lacks what the policy needs.
    """
    E = plan.num_experts
    one_of("priority", priority, get_args(Priority))
    one_of("overflow", overflow, get_args(Overflow))
    if overflow == "next_best" and (plan.gate is None or plan.per_token is None):
        raise ConfigError('overflow="next_best" needs a router that gives every token scores for all experts.')
    if overflow == "fallback_expert" and (fallback_expert is None or not 0 <= fallback_expert < E):
        raise ConfigError(f"fallback_expert must name one of the {E} experts, not {fallback_expert}.")
    order_N = _priority_order(plan, priority, generator)
    group_N = _groups(plan, groups)
    expert_N = _keep_first(plan.expert_N, group_N, order_N, slots, E, exempt=fallback_expert)
    lost_N = plan.kept_N & (expert_N == E)

    if overflow == "fallback_expert" and fallback_expert is not None:
        expert_N = torch.where(lost_N, fallback_expert, expert_N)
    elif overflow == "next_best":
        expert_N = _offer_next_best(plan, expert_N, lost_N, group_N, order_N, slots)
    elif overflow == "reroute_to_free":
        expert_N = _fill_free_slots(plan, expert_N, lost_N, group_N, order_N, slots, groups)
    weight_N = plan.weight_N
    if renormalize:
        weight_N = renormalized(plan, expert_N)
    return plan.send(expert_N, weight_N)


def _groups(plan: RoutingPlan, groups: int) -> Tensor:
    """int64 (N,): routing group of each row. Padding is not counted, or it would crowd real tokens into fewer groups."""
    if plan.valid_T is None:
        return plan.token_N * groups // max(plan.num_tokens, 1)
    seat_T = (plan.valid_T.cumsum(0) - 1).clamp(min=0)
    return (seat_T * groups // plan.num_valid.clamp(min=1))[plan.token_N]


def _priority_order(plan: RoutingPlan, priority: Priority, generator: torch.Generator | None) -> Tensor:
    """Row indices, most important first. Rows that go nowhere may stand anywhere: they take no slot."""
    N, device = plan.num_rows, plan.token_N.device
    if priority == "random":
        return torch.randperm(N, generator=generator).to(device)
    if priority == "probability":
        return torch.sort(plan.weight_N.detach(), descending=True, stable=True).indices
    if plan.per_token is None:
        if priority == "batch":
            return torch.sort(plan.weight_N.detach(), descending=True, stable=True).indices
        return torch.sort(plan.token_N, stable=True).indices
    rows_TK = torch.arange(N, device=device).view(plan.num_tokens, plan.per_token)
    if priority == "batch":
        best_T = plan.weight_TK.detach().amax(dim=1)
        rows_TK = rows_TK[torch.sort(best_T, descending=True, stable=True).indices]
    return rows_TK.T.reshape(-1)


def _keep_first(
    expert_N: Tensor, group_N: Tensor, order_N: Tensor, slots: int, E: int, exempt: int | None = None
) -> Tensor:
    """``expert_N`` with every row beyond the first ``slots`` of its (group, expert), in priority order, sent to E."""
    bucket_N = (group_N * (E + 1) + expert_N)[order_N]
    sorted_N, by_bucket_N = torch.sort(bucket_N, stable=True)
    start_N = torch.searchsorted(sorted_N, sorted_N)  # left side: where this row's bucket begins
    place_N = torch.empty_like(start_N)
    place_N[order_N[by_bucket_N]] = torch.arange(len(start_N), device=start_N.device) - start_N
    keep_N = place_N < slots
    if exempt is not None:
        keep_N |= expert_N == exempt
    return torch.where(keep_N, expert_N, E)


def _offer_next_best(
    plan: RoutingPlan, expert_N: Tensor, lost_N: Tensor, group_N: Tensor, order_N: Tensor, slots: int
) -> Tensor:
    """No-Token-Left-Behind: offer lost rows the token's 1st, 2nd, ... best expert it does not already use."""
    assert plan.gate is not None and plan.per_token is not None
    T, K, E = plan.num_tokens, plan.per_token, plan.num_experts
    ranking_TE = torch.sort(plan.gate.probs_TE.detach(), dim=1, descending=True, stable=True).indices
    for rank in range(ranking_TE.shape[1]):
        offer_N = ranking_TE[:, rank].repeat_interleave(K)
        uses_N = (expert_N.view(T, K) == ranking_TE[:, rank, None]).any(dim=1).repeat_interleave(K)
        # Only a token's first lost row takes this offer, or two rows would land on one expert.
        first_lost_N = (lost_N.view(T, K) & (lost_N.view(T, K).cumsum(1) == 1)).view(-1)
        trying_N = first_lost_N & ~uses_N
        if plan.allowed_TE is not None:  # a forbidden offer would take a seat and then go nowhere
            trying_N = trying_N & plan.allowed_TE[plan.token_N, offer_N]
        tried_N = torch.where(trying_N, offer_N, expert_N)
        # Seated rows come first, so an offer never evicts anybody.
        seated_first_N = order_N[torch.sort(trying_N[order_N].int(), stable=True).indices]
        expert_N = _keep_first(tried_N, group_N, seated_first_N, slots, E)
        lost_N = lost_N & (expert_N == E)
    return expert_N


def _fill_free_slots(
    plan: RoutingPlan, expert_N: Tensor, lost_N: Tensor, group_N: Tensor, order_N: Tensor, slots: int, groups: int
) -> Tensor:
    """Hand lost rows, in priority order, a free slot of their group: the lowest expert their token may and does not yet use.

    A row with no such expert stays lost. Overflow is the exception, so this walks the lost rows one by one on the host.
    """
    E = plan.num_experts
    free = torch.full((groups, E + 1), slots)
    cells, taken = (group_N * (E + 1) + expert_N).cpu().unique(return_counts=True)
    free.view(-1)[cells] -= taken
    slots_left: list[list[int]] = free[:, :E].tolist()
    filled_N = expert_N.cpu().clone()
    rows = order_N[lost_N[order_N]].tolist()
    tokens, row_groups = plan.token_N.cpu(), group_N.tolist()
    used: dict[int, set[int]] = {int(tokens[row]): set() for row in rows}
    for token, expert in zip(tokens.tolist(), filled_N.tolist(), strict=True):
        if token in used:
            used[token].add(expert)
    if plan.allowed_TE is not None:
        forbidden = (~plan.allowed_TE).cpu()
        for token, mine in used.items():
            mine.update(forbidden[token].nonzero()[:, 0].tolist())
    for row in rows:
        left, mine = slots_left[row_groups[row]], used[int(tokens[row])]
        expert = next((e for e in range(E) if left[e] > 0 and e not in mine), E)
        if expert < E:
            left[expert] -= 1
            mine.add(expert)
            filled_N[row] = expert
    return filled_N.to(expert_N.device)


def renormalized(plan: RoutingPlan, expert_N: Tensor) -> Tensor:
    """fp32 (N,) weights: those rows that still reach an expert, rescaled to the token's weight sum before the edit."""
    kept_N = (expert_N < plan.num_experts).to(plan.weight_N.dtype)
    zeros_T = plan.weight_N.new_zeros(plan.num_tokens)
    before_T = zeros_T.index_add(0, plan.token_N, plan.weight_N)
    after_T = zeros_T.index_add(0, plan.token_N, plan.weight_N * kept_N)
    ratio_T = torch.where(after_T > 0, before_T / after_T.clamp(min=1e-20), 1.0)
    return plan.weight_N * ratio_T[plan.token_N]
