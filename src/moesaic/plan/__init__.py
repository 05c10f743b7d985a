"""Routing as a value: the plan, edits of plans, readings of plans, and the trace on disk."""

from moesaic.plan.capacity import AdaptiveFactor, CapacityRule
from moesaic.plan.edit import force_balanced, mask_experts, mask_padding, replay, restrict
from moesaic.plan.lift import Part, lift, lower
from moesaic.plan.overflow import drop_over_capacity
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan, count_experts, from_rows, from_topk
from moesaic.plan.store import TraceWriter, load_trace, save_trace

__all__ = [
    "AdaptiveFactor",
    "CapacityRule",
    "Gate",
    "Part",
    "RoutingPlan",
    "SoftPlan",
    "TraceWriter",
    "count_experts",
    "drop_over_capacity",
    "force_balanced",
    "from_rows",
    "from_topk",
    "lift",
    "load_trace",
    "lower",
    "mask_experts",
    "mask_padding",
    "replay",
    "restrict",
    "save_trace",
]
