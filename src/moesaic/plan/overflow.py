"""Who goes first at a full expert, and what happens to the rest: the plan edit behind every capacity rule.

| priority | who goes first |
|---|---|
| position | all first choices in token order, then all second choices, ... (GShard, Switch) |
| probability | the largest weight (Megatron-LM) |
| batch | tokens by their best score, or the sum over their choices; then choice by choice (Batch Prioritized Routing, V-MoE) |
| random | anybody (DeepSpeed) |

| overflow | where the others go |
|---|---|
| residual | nowhere: the residual stream carries the token, and shared experts where there are any |
| shared | the same plan; it says that shared experts are meant to carry such tokens (``moesaic lint`` asks for some) |
| fallback_expert | to one expert without limit |
| next_best | to the token's next best expert with room, rank by rank, weight unchanged (No-Token-Left-Behind, Switch) |
| reroute_to_free | to the lowest expert with room |

Only "position" with one choice per token never lets a later token displace an earlier one: with two, a later first choice
still goes before an earlier second choice. Nobody is sent where ``plan.allowed_TE`` forbids, and no token twice to one expert.

Legend: T tokens, N rows, E experts, K rows per token.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from moesaic.errors import ConfigError, one_of
from moesaic.plan.plan import RoutingPlan, count_experts

Priority = Literal["position", "probability", "batch", "random"]
Overflow = Literal["residual", "shared", "fallback_expert", "next_best", "reroute_to_free"]
BatchScore = Literal["max", "sum"]


def drop_over_capacity(
    plan: RoutingPlan,
    slots: int,
    *,
    priority: Priority = "position",
    overflow: Overflow = "residual",
    fallback_expert: int | None = None,
    groups: int = 1,
    renormalize: bool = False,
    batch_score: BatchScore = "max",
    generator: torch.Generator | None = None,
) -> RoutingPlan:
    """Keep at most ``slots`` rows per expert (and routing group); the rest overflow.

    Args:
        priority, overflow: see the tables above.
        groups: valid tokens are split into this many consecutive groups, each with its own slots.
        renormalize: rescale the surviving weights of a token to their sum before the drop (DeepSpeed normalises after
            dropping, GShard before).
        batch_score: of priority "batch": a token's best gate score, or the sum over its choices. Scores are the gate's, which
            renormalised weights have lost (their sum is always 1); without a gate they are the weights.

    Raises ``ConfigError`` where the plan lacks what the policy needs.
    """
    expert_N = seat_rows(
        plan,
        slots,
        priority=priority,
        overflow=overflow,
        fallback_expert=fallback_expert,
        groups=groups,
        batch_score=batch_score,
        generator=generator,
    )
    return plan.send(expert_N, renormalized(plan, expert_N) if renormalize else None)


def seat_rows(
    plan: RoutingPlan,
    slots: int,
    *,
    priority: Priority = "position",
    overflow: Overflow = "residual",
    fallback_expert: int | None = None,
    groups: int = 1,
    batch_score: BatchScore = "max",
    generator: torch.Generator | None = None,
) -> Tensor:
    """int64 (N,): the expert at which each row finds a place; the decision behind ``drop_over_capacity``."""
    E = plan.num_experts
    one_of("priority", priority, get_args(Priority))
    one_of("overflow", overflow, get_args(Overflow))
    one_of("batch_score", batch_score, get_args(BatchScore))
    if overflow == "next_best" and plan.gate is None:
        raise ConfigError('overflow="next_best" needs a router that gives every token scores for all experts.')
    if overflow == "fallback_expert" and (fallback_expert is None or not 0 <= fallback_expert < E):
        raise ConfigError(f"fallback_expert must name one of the {E} experts, not {fallback_expert}.")
    order_N = _priority_order(plan, priority, batch_score, generator)
    group_N = _groups(plan, groups)
    expert_N = _keep_first(plan.expert_N, group_N, order_N, slots, E, exempt=fallback_expert)
    lost_N = plan.kept_N & (expert_N == E)

    if overflow == "fallback_expert" and fallback_expert is not None:
        expert_N = torch.where(lost_N, fallback_expert, expert_N)
    elif overflow == "next_best":
        expert_N = _offer_next_best(plan, expert_N, lost_N, group_N, order_N, slots)
    elif overflow == "reroute_to_free":
        expert_N = _fill_free_slots(plan, expert_N, lost_N, group_N, order_N, slots, groups)
    return expert_N


def fullest(plan: RoutingPlan, groups: int = 1) -> int:
    """Rows of the fullest expert of any routing group: the fewest slots with which nothing is dropped. Asks the device."""
    E = plan.num_experts
    cell_N = torch.where(plan.kept_N, _groups(plan, groups) * E + plan.expert_N, groups * E)
    return int(count_experts(cell_N, groups * E).amax())


def _groups(plan: RoutingPlan, groups: int) -> Tensor:
    """int64 (N,): routing group of each row. Padding is not counted, or it would crowd real tokens into fewer groups."""
    if plan.valid_T is None:
        return plan.token_N * groups // max(plan.num_tokens, 1)
    seat_T = (plan.valid_T.cumsum(0) - 1).clamp(min=0)
    return (seat_T * groups // plan.num_valid.clamp(min=1))[plan.token_N]


def _priority_order(
    plan: RoutingPlan, priority: Priority, batch_score: BatchScore, generator: torch.Generator | None
) -> Tensor:
    """Row indices, most important first. Rows that go nowhere may stand anywhere: they take no slot."""
    device = plan.token_N.device
    if priority == "random":
        drawn_on = device if generator is None else generator.device
        return torch.randperm(plan.num_rows, generator=generator, device=drawn_on).to(device)
    if priority == "probability":
        return torch.sort(plan.weight_N.detach(), descending=True, stable=True).indices
    order_N = torch.sort(plan.token_N, stable=True).indices
    if priority == "batch":
        score_T = _token_scores(plan, batch_score)
        order_N = order_N[torch.sort(score_T[plan.token_N[order_N]], descending=True, stable=True).indices]
    return order_N[torch.sort(_choice_ranks(plan)[order_N], stable=True).indices]


def _choice_ranks(plan: RoutingPlan) -> Tensor:
    """int64 (N,): 0 for a token's first choice, 1 for its second. Loose rows rank by weight, rows that go nowhere last."""
    row_N = torch.arange(plan.num_rows, device=plan.token_N.device)
    if plan.per_token is not None:
        return row_N % plan.per_token
    by_weight_N = torch.sort(
        torch.where(plan.kept_N, plan.weight_N.detach(), -torch.inf), descending=True, stable=True
    ).indices
    by_token_N = by_weight_N[torch.sort(plan.token_N[by_weight_N], stable=True).indices]
    token_N = plan.token_N[by_token_N]
    rank_N = torch.empty_like(row_N)
    rank_N[by_token_N] = row_N - torch.searchsorted(token_N, token_N)
    return rank_N


def _token_scores(plan: RoutingPlan, how: BatchScore) -> Tensor:
    """(T,): how important Batch Prioritized Routing takes a token to be."""
    score_N = plan.weight_N.detach()
    if plan.gate is not None:
        score_N = plan.gate.probs_TE.detach()[plan.token_N, plan.expert_N.clamp(max=plan.num_experts - 1)]
    score_N = torch.where(plan.kept_N, score_N, 0.0)
    zeros_T = score_N.new_zeros(plan.num_tokens)
    if how == "sum":
        return zeros_T.index_add(0, plan.token_N, score_N)
    return zeros_T.scatter_reduce(0, plan.token_N, score_N, "amax")


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
    """Offer lost rows the token's 1st, 2nd, ... best expert it does not already use."""
    assert plan.gate is not None
    E, token_N = plan.num_experts, plan.token_N
    row_N = torch.arange(plan.num_rows, device=token_N.device)
    ranking_TE = torch.sort(plan.gate.probs_TE.detach(), dim=1, descending=True, stable=True).indices
    for rank in range(E):
        offer_N = ranking_TE[token_N, rank]
        uses_TE = torch.zeros(plan.num_tokens, E + 1, dtype=torch.bool, device=token_N.device)
        uses_TE[token_N, expert_N] = True
        # Only a token's first lost row takes this offer, or two rows would land on one expert.
        first_T = torch.full_like(ranking_TE[:, 0], plan.num_rows)
        first_T = first_T.scatter_reduce(0, token_N, torch.where(lost_N, row_N, plan.num_rows), "amin")
        trying_N = lost_N & (row_N == first_T[token_N]) & ~uses_TE[token_N, offer_N]
        if plan.allowed_TE is not None:  # a forbidden offer would take a seat and then go nowhere
            trying_N = trying_N & plan.allowed_TE[token_N, offer_N]
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
