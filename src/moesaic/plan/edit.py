"""Edits: functions plan -> plan. Knockout, replay and forced balance live here, not as flags inside routers.

Capacity, the largest edit, has its own pages: ``capacity.py`` and ``overflow.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from moesaic.errors import ConfigError, one_of
from moesaic.plan.overflow import renormalized
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan

Weigh = Callable[[Gate, Tensor], Tensor]


def restrict(plan: RoutingPlan | SoftPlan, allowed_TE: Tensor) -> RoutingPlan | SoftPlan:
    """Permit these experts only: rows elsewhere go nowhere, now and in every later edit (``RoutingPlan.allowed_TE``).

    In a ``SoftPlan`` the forbidden experts' slots neither read the token nor are read by it; what is left is rescaled to sum
    to 1 again, where anything is left.
    """
    if isinstance(plan, SoftPlan):
        G, T, S = plan.dispatch_GTS.shape
        allowed_GTS = allowed_TE.repeat_interleave(S // plan.num_experts, dim=1).view(G, T, S)
        dispatch_GTS = torch.where(allowed_GTS, plan.dispatch_GTS, 0.0)
        combine_GTS = torch.where(allowed_GTS, plan.combine_GTS, 0.0)
        return replace(
            plan,
            dispatch_GTS=dispatch_GTS / dispatch_GTS.sum(dim=1, keepdim=True).clamp(min=1e-20),
            combine_GTS=combine_GTS / combine_GTS.sum(dim=2, keepdim=True).clamp(min=1e-20),
        )
    if plan.allowed_TE is not None:
        allowed_TE = allowed_TE & plan.allowed_TE
    return replace(plan, allowed_TE=allowed_TE).send(plan.expert_N)


def force_balanced(plan: RoutingPlan) -> RoutingPlan:
    """Spread the rows evenly (round robin over valid tokens), weights untouched: for benchmarks and smoke tests.

    Loads differ by at most one. A token's K experts stay distinct because K <= E.
    """
    k = plan.per_token
    if k is None:
        seat_N = plan.kept_N.cumsum(0) - 1
        return plan.send(torch.where(plan.kept_N, seat_N % plan.num_experts, plan.num_experts))
    device = plan.token_N.device
    valid_T = plan.valid_T if plan.valid_T is not None else torch.ones(plan.num_tokens, dtype=torch.bool, device=device)
    seat_TK = (valid_T.cumsum(0) - 1)[:, None] * k + torch.arange(k, device=device)
    expert_TK = torch.where(valid_T[:, None], seat_TK % plan.num_experts, plan.num_experts)
    return plan.send(expert_TK.reshape(-1))


def replay(plan: RoutingPlan, recorded: RoutingPlan, weigh: Weigh | None = None) -> RoutingPlan:
    """Use the experts of a recorded plan.

    Args:
        weigh: ``(gate, expert_TK) -> weight_TK`` of the live router (``Router.weigh``): weights are then computed from today's
            scores of the recorded choice and carry gradient (router replay in reinforcement learning). None: recorded weights.

    Raises ``ConfigError`` when the two plans are of different shape, and for live weights of a token for which the router
    itself left a slot empty (GShard's rejected second expert): the plan does not say which expert its weights were
    normalised with.
    """
    if (recorded.num_tokens, recorded.num_experts, recorded.num_rows) != (
        plan.num_tokens,
        plan.num_experts,
        plan.num_rows,
    ):
        raise ConfigError(
            f"Cannot replay a plan of {recorded.num_tokens} tokens, {recorded.num_experts} experts and {recorded.num_rows} "
            f"rows on one of {plan.num_tokens}, {plan.num_experts} and {plan.num_rows}; record it on the same input."
        )
    if weigh is None:
        weight_N = recorded.weight_N
    else:
        if plan.gate is None:
            raise ConfigError("Replay with live weights needs the router's scores, and this plan carries none.")
        empty_N = recorded.choice_N == plan.num_experts
        if recorded.valid_T is not None:
            empty_N = empty_N & recorded.valid_T[recorded.token_N]
        if bool(empty_N.any()):
            raise ConfigError(
                "The recorded router left slots empty, so live weights are unknown; replay recorded weights."
            )
        # Of the recorded choice: rows lost to capacity still count in the router's normalisation, as they did when live.
        inside_TK = recorded.choice_TK.clamp(max=plan.num_experts - 1)
        weight_N = weigh(plan.gate, inside_TK).reshape(-1)
    edited = replace(plan, token_N=recorded.token_N, per_token=recorded.per_token)
    return edited.send(recorded.expert_N, weight_N)


def mask_experts(
    plan: RoutingPlan,
    experts: Sequence[int],
    *,
    policy: Literal["drop", "next_best"] = "drop",
    renormalize: bool = False,
) -> RoutingPlan:
    """Knock experts out.

    Args:
        policy: "drop": their rows go nowhere; "next_best": their rows go to the token's best expert that is neither knocked
            out nor already used, with the weight unchanged (needs ``plan.gate``).
        renormalize: rescale a token's surviving weights to their sum before the knockout.
    """
    E = plan.num_experts
    one_of("policy", policy, ("drop", "next_best"))
    wrong = [e for e in experts if not 0 <= e < E]
    if wrong:
        raise ConfigError(f"There is no expert {wrong[0]}: this layer has experts 0 to {E - 1}.")
    out_E = torch.zeros(E + 1, dtype=torch.bool, device=plan.expert_N.device)
    out_E[list(experts)] = True
    hit_N = out_E[plan.expert_N]
    expert_N = torch.where(hit_N, E, plan.expert_N)
    if policy == "next_best":
        expert_N = _next_best(plan, expert_N, hit_N, out_E[:E])
    weight_N = plan.weight_N
    if renormalize:
        weight_N = renormalized(plan, expert_N)
    return plan.send(expert_N, weight_N)


def _next_best(plan: RoutingPlan, expert_N: Tensor, hit_N: Tensor, out_E: Tensor) -> Tensor:
    if plan.gate is None or plan.per_token is None:
        raise ConfigError('policy="next_best" needs a router that gives every token scores for all experts.')
    T, E = plan.num_tokens, plan.num_experts
    scores_TE = plan.gate.probs_TE.detach().masked_fill(out_E, float("-inf"))
    used_TE = torch.zeros(T, E + 1, dtype=torch.bool, device=expert_N.device)
    used_TE.scatter_(1, expert_N.view(T, -1), True)
    scores_TE = scores_TE.masked_fill(used_TE[:, :E], float("-inf"))
    ranked = torch.sort(scores_TE, dim=1, descending=True, stable=True)
    hit_TK = hit_N.view(T, -1)
    # The first hit row takes the best free expert, the next the 2nd.
    nth_TK = (hit_TK.cumsum(1) - 1).clamp(min=0, max=E - 1)
    offer_TK = torch.where(ranked.values.gather(1, nth_TK).isfinite(), ranked.indices.gather(1, nth_TK), E)
    return torch.where(hit_TK, offer_TK, expert_N.view(T, -1)).reshape(-1)


def mask_padding(plan: RoutingPlan, valid_T: Tensor) -> RoutingPlan:
    """Send the rows of padding tokens nowhere and leave them out of every statistic (``choice_N`` is cleared too)."""
    keep_N = valid_T[plan.token_N]
    E = plan.num_experts
    both_T = valid_T if plan.valid_T is None else plan.valid_T & valid_T
    plan = replace(plan, choice_N=torch.where(keep_N, plan.choice_N, E), valid_T=both_T)
    return plan.send(torch.where(keep_N, plan.expert_N, E))
