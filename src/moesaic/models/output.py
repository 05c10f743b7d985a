"""What a model returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.utils import _pytree

from moesaic.nn.cache import KVCache
from moesaic.plan.plan import RoutingPlan, SoftPlan


@dataclass(frozen=True, eq=False)
class Output:
    """Result of one forward.

    Attributes:
        logits: (B, S, V) in the activation dtype.
        plans: sparse layer index -> the plan that was executed.
        depth: index of each Mixture-of-Depths block -> which tokens took it, a plan with the block as its one expert.
        cache: the key/value cache that was passed in, now longer; or None.
    """

    logits: Tensor
    plans: dict[int, RoutingPlan | SoftPlan]
    cache: KVCache | None = None
    depth: dict[int, RoutingPlan] = field(default_factory=dict)


_pytree.register_dataclass(Output)
