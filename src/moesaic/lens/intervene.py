"""Record and edit routing from outside; model code knows nothing of it.

>>> with trace(model) as t: model(ids)                 # t.plans: one {layer: plan} per forward
>>> with edit(model, layer=3, knockout=[5]): model(ids)
>>> with edit(model, replay=t.plans[0]): model(ids)    # the same experts again, whatever the router now says
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from moesaic.errors import ConfigError
from moesaic.experts.layer import MoE
from moesaic.models.decoder import Decoder
from moesaic.plan import RoutingPlan, SoftPlan, force_balanced, mask_experts
from moesaic.plan import replay as replay_edit

Plan = RoutingPlan | SoftPlan


@dataclass
class Trace:
    """What ``trace`` recorded.

    Attributes:
        plans: for each forward of the model, sparse layer -> detached plan (scores included).
    """

    plans: list[dict[int, Plan]] = field(default_factory=list)

    def layer(self, index: int) -> list[Plan]:
        """One layer's plans, forward by forward."""
        return [plans[index] for plans in self.plans if index in plans]


@contextmanager
def trace(model: Decoder) -> Iterator[Trace]:
    """Record the plan of every sparse layer in every forward of ``model`` inside the block.

    A sparse layer called by itself, outside any forward of the model, gets a record of its own.
    """
    recorded = Trace()
    layers = model.moe_layers()
    inside = False

    def begin(_module: nn.Module, _inputs: Any) -> None:
        nonlocal inside
        inside = True
        recorded.plans.append({})

    def end(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        nonlocal inside
        inside = False

    def note(layer: int, _module: nn.Module, _inputs: Any, output: tuple[Any, Plan]) -> None:
        if not inside:
            recorded.plans.append({})
        recorded.plans[-1][layer] = output[1].detach()

    handles = [sparse.register_forward_hook(partial(note, layer)) for layer, sparse in layers.items()]
    if layers:
        handles += [model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True)]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def edit(
    model: Decoder,
    layer: int | Sequence[int] | None = None,
    *,
    knockout: Sequence[int] = (),
    reroute: bool = False,
    renormalize: bool = False,
    balanced: bool = False,
    replay: Mapping[int, RoutingPlan] | None = None,
    live_weights: bool = False,
    fn: Callable[[Any], Any] | None = None,
) -> Iterator[None]:
    """Edit the plans of sparse layers inside the block; nested blocks add up, inner ones last.

    Args:
        layer: block index or indices; None is every sparse layer.
        knockout: experts to switch off. ``reroute`` sends their tokens to the next best expert instead of nowhere;
            ``renormalize`` rescales the surviving weights of a token.
        balanced: spread rows evenly, for benchmarks.
        replay: recorded plans by layer; layers not among them route as always. ``live_weights`` takes weights from today's
            scores.
        fn: any function plan -> plan.

    Raises ``ConfigError`` for a layer that is not sparse, an expert that does not exist, or no edit at all.
    """
    sparse = model.moe_layers()
    wanted = sorted(sparse) if layer is None else [layer] if isinstance(layer, int) else list(layer)
    for index in wanted:
        if index not in sparse:
            raise ConfigError(f"Layer {index} is not a sparse layer; this model's sparse layers are {sorted(sparse)}.")
    if not (knockout or balanced or replay or fn):
        raise ConfigError("Nothing to edit: give knockout, balanced, replay or fn.")
    if replay and not any(index in replay for index in wanted):
        raise ConfigError(f"The recorded plans cover layers {sorted(replay)}, none of those to be edited.")
    before = {index: sparse[index].edits for index in wanted}
    after: dict[int, tuple[Callable[[Any], Any], ...]] = {}
    for index in wanted:
        moe = sparse[index]
        edits: list[Callable[[Any], Any]] = []
        if replay and index in replay:
            edits.append(partial(replay_edit, recorded=replay[index], weigh=moe.router.weigh if live_weights else None))
        if balanced:
            edits.append(force_balanced)
        if knockout:
            _check_experts(moe, index, knockout)
            edits.append(
                partial(
                    mask_experts,
                    experts=list(knockout),
                    policy="next_best" if reroute else "drop",
                    renormalize=renormalize,
                )
            )
        if fn is not None:
            edits.append(fn)
        after[index] = (*before[index], *edits)
    try:
        for index, edits_after in after.items():  # once all were found good
            sparse[index].edits = edits_after
        yield
    finally:
        for index, edits_before in before.items():
            sparse[index].edits = edits_before


def _check_experts(moe: MoE, layer: int, experts: Sequence[int]) -> None:
    for expert in experts:
        if not 0 <= expert < moe.router.num_experts:
            raise ConfigError(
                f"Layer {layer} has no expert {expert}; it has experts 0 to {moe.router.num_experts - 1}."
            )
