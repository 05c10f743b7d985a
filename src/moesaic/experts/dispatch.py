"""Execute a plan on this device: group rows by expert, compute, combine. ``(x_TD, plan, experts) -> y_TD``.

A dispatcher is any callable of that signature; the all-to-all one and the wrappers (recomputation, offload) are interchangeable
with this one.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from moesaic.ops.fused import Sources
from moesaic.ops.permute import combine_rows, gather_rows, group_rows
from moesaic.ops.phases import phase
from moesaic.plan.plan import RoutingPlan, SoftPlan


class Experts(Protocol):
    """Rows grouped by expert to rows grouped by expert.

    Experts with a method ``fuses(x) -> bool`` may, where it says so, be called with ``sources`` as well, to go from tokens to
    tokens with gather and combine included (``StackedExperts.forward``).
    """

    def __call__(self, x_ND: Tensor, counts_E: Tensor) -> Tensor: ...


class Dispatcher(Protocol):
    """Moves tokens to experts and back."""

    def __call__(self, x_TD: Tensor, plan: RoutingPlan | SoftPlan, experts: Experts) -> Tensor: ...


def dispatch_local(x_TD: Tensor, plan: RoutingPlan | SoftPlan, experts: Experts) -> Tensor:
    """All experts here. (T, D) to (T, D) in ``x``'s dtype; sums over a token's experts run in fp32."""
    if isinstance(plan, SoftPlan):
        return plan.combine(experts(plan.gather(x_TD), plan.counts_E))
    with phase("grouping"):
        grouping = group_rows(plan.expert_N, plan.num_experts)
    fuses = getattr(experts, "fuses", None)
    if plan.input_weight_N is None and fuses is not None and fuses(x_TD):
        fused: Any = experts
        return fused(x_TD, grouping.counts_E, Sources(plan.token_N, plan.weight_N, grouping.order_N))
    x_ND = gather_rows(x_TD, plan.token_N, grouping, plan.per_token)
    if plan.input_weight_N is not None:
        x_ND = (x_ND * plan.input_weight_N[grouping.order_N][:, None]).to(x_TD.dtype)
    y_ND = experts(x_ND, grouping.counts_E)
    # 0 * NaN is NaN: a padding token's row must not reach the sum even if its vector is not finite.
    weight_N = torch.where(plan.kept_N, plan.weight_N, 0.0)
    return combine_rows(y_ND, weight_N, plan.token_N, grouping, plan.num_tokens, plan.per_token)
