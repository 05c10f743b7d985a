"""Experts, their execution, and the MoE layer."""

from moesaic.experts.dispatch import Dispatcher, dispatch_local
from moesaic.experts.layer import MoE
from moesaic.experts.multi_head import MultiHeadMoE
from moesaic.experts.neurons import NeuronExperts
from moesaic.experts.special import SharedExperts, WithSpecialExperts
from moesaic.experts.stacked import StackedExperts

__all__ = [
    "Dispatcher",
    "MoE",
    "MultiHeadMoE",
    "NeuronExperts",
    "SharedExperts",
    "StackedExperts",
    "WithSpecialExperts",
    "dispatch_local",
]
