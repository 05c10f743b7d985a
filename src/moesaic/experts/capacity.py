"""A capacity factor that follows drops: the state behind ``CapacityRule.adapt``, one per sparse layer.

After each step, with d the moving average of the layer's drop rate over the whole step (all micro-batches and ranks, so that
ranks agree without asking): ``factor <- clip(factor * (1 + eta * (d - target)), lo, hi)``. The forward uses it rounded up to a
multiple of ``step``. Both numbers are buffers: checkpoints hold them, casts leave them alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.plan.capacity import CapacityRule
from moesaic.routing import StepStats
from moesaic.routing.gate import KeepsFp32


class AdaptedCapacity(KeepsFp32):
    """The factor of one layer, from ``rule.factor`` on."""

    def __init__(self, rule: CapacityRule) -> None:
        super().__init__()
        assert rule.adapt is not None and not isinstance(rule.factor, str)
        self.adapt = rule.adapt
        self.factor: Tensor
        self.drop_rate: Tensor
        self.register_buffer("factor", torch.tensor(rule.factor, dtype=torch.float32))
        # At the target: nothing moves before anything was seen.
        self.register_buffer("drop_rate", torch.tensor(rule.adapt.target, dtype=torch.float32))

    def in_use(self) -> float:
        """The factor for the next forward. Asks the device."""
        return self.adapt.in_use(self.factor.item())

    def after_step(self, stats: StepStats) -> None:
        """Follow the drops of one step."""
        adapt = self.adapt
        self.drop_rate.mul_(adapt.memory).add_((1 - adapt.memory) * stats.drop_rate)
        self.factor.mul_(1 + adapt.eta * (self.drop_rate - adapt.target)).clamp_(adapt.lo, adapt.hi)
