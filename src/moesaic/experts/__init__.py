"""Experts, their execution, and the MoE layer."""

from moesaic.experts.dispatch import Dispatcher, dispatch_local
from moesaic.experts.layer import MoE
from moesaic.experts.special import SharedExperts, WithSpecialExperts
from moesaic.experts.stacked import StackedExperts

__all__ = ["Dispatcher", "MoE", "SharedExperts", "StackedExperts", "WithSpecialExperts", "dispatch_local"]
