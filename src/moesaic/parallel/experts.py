"""A rank's part of the experts of a layer: the slots a placement gives it, cut out of the stacked parameters from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moesaic.experts import StackedExperts
from moesaic.experts.layer import MoE
from moesaic.experts.neurons import NeuronExperts
from moesaic.experts.special import WithSpecialExperts
from moesaic.parallel.held import Held, rows
from moesaic.plan.placement import Placement

STACKS = (StackedExperts, NeuronExperts)


def stack_of(layer: MoE) -> StackedExperts | NeuronExperts:
    """The feed-forward experts of a layer."""
    experts: Any = layer.experts
    stack: StackedExperts | NeuronExperts = experts.stacked if isinstance(experts, WithSpecialExperts) else experts
    return stack


def stack_name(layer: MoE, prefix: str) -> str:
    """Where they are: "blocks.3.ffn.experts", or ".stacked" of it."""
    return f"{prefix}.experts.stacked" if isinstance(layer.experts, WithSpecialExperts) else f"{prefix}.experts"


def keep_slots(layer: MoE, prefix: str, placement: Placement, rank: int, held: dict[str, Held]) -> None:
    """Of a layer that holds all experts, keep those in the slots of ``rank``; ``held`` follows. In place."""
    stack = stack_of(layer)
    order = placement.slots[rank]
    special = layer.experts.num_experts - stack.num_experts
    index = torch.tensor(order, dtype=torch.int64, device=stack.w_in.device)
    for name, parameter in list(stack.named_parameters()):
        full = f"{stack_name(layer, prefix)}.{name}"
        kept = nn.Parameter(parameter.detach().index_select(0, index), requires_grad=parameter.requires_grad)
        setattr(stack, name, kept)
        held[full] = rows(held[full], order)
    stack.num_experts = len(order)
    if isinstance(layer.experts, WithSpecialExperts):
        layer.experts.num_experts = len(order) + special
