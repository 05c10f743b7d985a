"""A rough time of one step from a forecast and three rates: what is computed, what is sent, how long ranks wait.

>>> step_time(found, Rates(flops=400e12, network=50e9, node=160e9), ranks_per_node=8)

Rates are what products and exchanges reach, not what a data sheet says. Sending waits for computing and the other way round;
where they overlap, a step takes as little as the longer of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.cost.forecast import Forecast, RankForecast
from moesaic.layout import Axis, Layout


@dataclass(frozen=True)
class Rates:
    """What one rank reaches.

    Attributes:
        flops: floating-point operations a second.
        network: bytes a second that it sends to ranks of other nodes.
        node: bytes a second within a node; None is ``network``.
    """

    flops: float
    network: float
    node: float | None = None


@dataclass(frozen=True)
class StepTime:
    """Seconds of the slowest rank.

    Attributes:
        compute: of products. sends: of each kind of traffic. bubble: waiting for the pipeline to fill and drain.
    """

    compute: float
    sends: dict[str, float]
    bubble: float

    @property
    def apart(self) -> float:
        """Nothing overlaps."""
        return self.compute + sum(self.sends.values()) + self.bubble

    @property
    def overlapped(self) -> float:
        """Everything that is sent is sent while something is computed."""
        return max(self.compute, sum(self.sends.values())) + self.bubble


def step_time(found: Forecast, rates: Rates, ranks_per_node: int | None = None) -> StepTime:
    """Of the rank that takes longest. Traffic of an axis whose groups lie within nodes goes at the node's rate.

    Args:
        ranks_per_node: None is one rank each.
    """
    return max(
        (_of_rank(group, found, rates, ranks_per_node or 1) for group in found.groups), key=lambda time: time.apart
    )


def _of_rank(group: RankForecast, found: Forecast, rates: Rates, per_node: int) -> StepTime:
    def rate(axis: Axis) -> float:
        return (rates.node or rates.network) if within_nodes(found.layout, axis, per_node) else rates.network

    traffic = group.traffic
    sends = {
        "exchange": traffic.exchange / rate("ep"),
        "gradients": traffic.gradients / rate("dp"),
        "weights": traffic.weights / rate("dp"),
        "slices": traffic.slices / rate("tp"),
        "stages": traffic.stages / rate("pp"),
    }
    compute = group.flops / rates.flops
    busy = compute + sum(sends.values())
    return StepTime(compute, sends, busy * found.bubble / (1 - found.bubble))


def within_nodes(layout: Layout, axis: Axis, per_node: int) -> bool:
    """Whether every group of an axis lies on one node of consecutive ranks."""
    if layout.size(axis) == 1:
        return True
    return all(len({rank // per_node for rank in group}) == 1 for group in layout.groups(axis))
