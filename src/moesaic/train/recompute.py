"""Activation checkpointing that cannot flip a routing decision, applied to a finished model from outside.

Attention, dense and shared feed-forward layers and the *execution* of plans (gather, experts, combine) are recomputed in the
backward pass; the router stays outside every recomputed region. So a decision is made once per forward and its plan is what
the recomputation executes: near-ties cannot flip, load is counted once, router noise is drawn once. This holds for any router,
present or future, by construction. Price: each sparse layer keeps its normalised input and its scores besides the block input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.experts.dispatch import Dispatcher, Experts
from moesaic.experts.layer import MoE
from moesaic.models.decoder import Decoder
from moesaic.plan.plan import RoutingPlan, SoftPlan


def recompute_activations(model: Decoder) -> None:
    """Make ``model`` recompute activations in its backward pass. Parameter names stay; calling twice is harmless."""
    for block in model.blocks:
        _recompute_forward(block.attention)
        if isinstance(block.ffn, MoE):
            if not isinstance(block.ffn.dispatcher, RecomputedDispatch):
                block.ffn.dispatcher = RecomputedDispatch(block.ffn.dispatcher)
            if block.ffn.shared is not None:
                _recompute_forward(block.ffn.shared)
        else:
            _recompute_forward(block.ffn)


def keep_activations(model: Decoder) -> None:
    """The inverse: keep activations again. Harmless for a model that does."""
    for block in model.blocks:
        ffn = block.ffn
        if isinstance(ffn, MoE) and isinstance(ffn.dispatcher, RecomputedDispatch):
            ffn.dispatcher = ffn.dispatcher.inner
        parts: list[Any] = [block.attention, ffn, *([ffn.shared] if isinstance(ffn, MoE) else [])]
        for module in parts:
            if module is not None and isinstance(module.forward, RecomputedForward):
                del module.forward  # what was set on the instance; the class's own is behind it


class RecomputedDispatch:
    """Any dispatcher, with its activations recomputed from the same input and the same plan."""

    def __init__(self, inner: Dispatcher) -> None:
        self.inner = inner

    def __call__(self, x_TD: Tensor, plan: RoutingPlan | SoftPlan, experts: Experts) -> Tensor:
        """(T, D) to (T, D), as ``inner`` does."""
        y_TD: Tensor = checkpoint(self.inner, x_TD, plan, experts, use_reentrant=False)
        return y_TD


class RecomputedForward:
    """A module's forward, with its activations recomputed from the same arguments."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner

    def __call__(self, *args: Any, **named: Any) -> Any:
        return checkpoint(self.inner, *args, use_reentrant=False, **named)


def _recompute_forward(module: Any) -> None:
    if not isinstance(module.forward, RecomputedForward):
        module.forward = RecomputedForward(module.forward)
