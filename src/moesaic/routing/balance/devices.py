"""DeepSeek-V2's three balance losses: over experts, over the devices that hold them, and over what devices receive.

Per sequence, averaged over sequences (``seq_aux`` of the release). With T tokens of a sequence, E experts, K per token, and
E_1..E_D the experts of D devices:

| loss | formula | alpha |
|---|---|---|
| v2_expert | sum_i f_i P_i, f_i = E / (K T) * rows of i, P_i = mean score of i | 0.003 |
| v2_device | sum_d f'_d P'_d, f'_d = mean of f over E_d, P'_d = sum of P over E_d | 0.05 |
| v2_communication | sum_d f''_d P'_d, f''_d = D / (M T) * tokens sent to d | 0.02 |

M is the most devices a token may reach. At balance each is 1. V2 takes softmax scores as they are; sigmoid scores do not
sum to 1, and neither does the value here then (use "sequence"). K T is counted from the plan. Devices hold contiguous experts,
expert e on device ``e * D // E``, as group-limited routing has it.

Legend: T tokens, B sequences of S, N rows, E experts, D devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.plan.plan import RoutingPlan
from moesaic.routing.balance.context import (
    PLAIN,
    LossContext,
    counts_by_sequence,
    gate_of,
    masked,
    mean_over_sequences,
    valid_by_sequence,
)


def v2_expert_loss(plan: RoutingPlan, ctx: LossContext = PLAIN) -> Tensor:
    """Balance over experts: the sequence-wise Switch loss on scores as they are."""
    return _mean_of_sequences(plan, ctx, (_loads(plan, ctx) * _scores(plan, ctx)).sum(dim=1))


def v2_device_loss(plan: RoutingPlan, ctx: LossContext = PLAIN, *, devices: int) -> Tensor:
    """Balance over devices: blind to how load lies within one."""
    home_E = device_of(plan.num_experts, devices, plan.expert_N.device)
    loads_BD = _by_device(_loads(plan, ctx), home_E, devices) / home_E.bincount(minlength=devices)
    return _mean_of_sequences(plan, ctx, (loads_BD * _by_device(_scores(plan, ctx), home_E, devices)).sum(dim=1))


def v2_communication_loss(plan: RoutingPlan, ctx: LossContext = PLAIN, *, devices: int, limit: int) -> Tensor:
    """Balance over what devices receive: a token is sent to a device once, however many of its experts are there.

    Args:
        limit: M, ``groups_kept`` of a group-limited router.
    """
    E, B, scores_BE = plan.num_experts, ctx.sequences, _scores(plan, ctx)
    home_E = device_of(E, devices, plan.expert_N.device)
    nowhere_E1 = torch.cat([home_E, home_E.new_full((1,), devices)])
    reached_TD = torch.zeros(plan.num_tokens, devices + 1, dtype=torch.bool, device=home_E.device)
    reached_TD[plan.token_N, nowhere_E1[plan.choice_N]] = True
    sent_BD = reached_TD[:, :devices].view(B, plan.num_tokens // B, devices).sum(dim=1)
    tokens_B1 = valid_by_sequence(plan, B).clamp(min=1)[:, None]
    share_BD = sent_BD.to(scores_BE.dtype) * devices / (limit * tokens_B1)
    return _mean_of_sequences(plan, ctx, (share_BD * _by_device(scores_BE, home_E, devices)).sum(dim=1))


def device_of(num_experts: int, devices: int, device: torch.device | None = None) -> Tensor:
    """int64 (E,): which of D devices holds each expert; contiguous, sizes differing by one at most."""
    return torch.arange(num_experts, device=device) * devices // num_experts


def _loads(plan: RoutingPlan, ctx: LossContext) -> Tensor:
    """(B, E): f, 1 for every expert at balance."""
    counts_BE = counts_by_sequence(plan, ctx.sequences).to(gate_of(plan).probs_TE.dtype)
    return counts_BE * plan.num_experts / counts_BE.sum(dim=1, keepdim=True).clamp(min=1)


def _scores(plan: RoutingPlan, ctx: LossContext) -> Tensor:
    """(B, E): P, the mean score of each expert over the sequence's tokens."""
    B, E = ctx.sequences, plan.num_experts
    sums_BE = masked(gate_of(plan).probs_TE, plan.valid_T).view(B, plan.num_tokens // B, E).sum(dim=1)
    return sums_BE / valid_by_sequence(plan, B).clamp(min=1)[:, None]


def _by_device(values_BE: Tensor, home_E: Tensor, devices: int) -> Tensor:
    return values_BE.new_zeros(values_BE.shape[0], devices).index_add(1, home_E, values_BE)


def _mean_of_sequences(plan: RoutingPlan, ctx: LossContext, loss_B: Tensor) -> Tensor:
    return mean_over_sequences(loss_B, valid_by_sequence(plan, ctx.sequences), ctx.peers)
