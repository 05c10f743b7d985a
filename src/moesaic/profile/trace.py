"""Tell a clock which part of a model is at work, forward and backward, from outside: the model's code knows nothing of it.

Forward: hooks of modules. Backward: every node that the forward leaves in autograd's graph is given to the part that made it,
by its sequence number, and says so when it runs; nodes run one after another, so the time between two belongs to the first.
What lies between the end of a model's forward and the first of its nodes is the loss, forward and backward.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from moesaic.experts.layer import MoE
from moesaic.models.decoder import Decoder
from moesaic.models.output import Output
from moesaic.profile.clock import DISPATCH, EXPERTS, Clock, Place

# Before the first block: checks, rotary tables, masks, the lookup itself.
EMBEDDING = Place("embedding")
OTHER = Place("other")
LOSS = Place("loss")
CLIPPING = Place("clipping")
OPTIMISER = Place("optimiser")
SAMPLING = Place("sampling")


def places(model: Decoder) -> dict[nn.Module, Place]:
    """Modules whose forward is a part of its own."""
    found: dict[nn.Module, Place] = {model.norm: Place("norm"), model.head: Place("head")}
    depth = model.depth_routers()
    for layer, block in enumerate(model.blocks):
        found[block.norm1] = found[block.norm2] = Place("norm", layer)  # type: ignore[index]
        found[block.attention] = Place("attention", layer)  # type: ignore[index]
        if layer in depth:
            found[depth[layer]] = Place("depth router", layer)
        ffn = block.ffn
        if not isinstance(ffn, MoE):
            found[ffn] = Place("feed-forward", layer)  # type: ignore[index]
            continue
        found[ffn] = Place(DISPATCH, layer)
        found[ffn.router] = Place("router", layer)
        found[ffn.experts] = Place(EXPERTS, layer)
        if ffn.shared is not None:
            found[ffn.shared] = Place("shared experts", layer)
        for name in ("split", "merge"):  # of multi-head layers
            if isinstance(projection := getattr(ffn, name, None), nn.Module):
                found[projection] = Place("head projections", layer)
    return found


@contextmanager
def traced(model: Decoder, clock: Clock, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """While the block runs, ``clock`` (if running) learns of every part of ``model``, of its backward, and of ``optimizer``."""
    hooks = _Hooks(model, clock)
    handles: list[Any] = []
    for module, place in places(model).items():
        handles.append(module.register_forward_pre_hook(partial(hooks.enter, place)))
        handles.append(module.register_forward_hook(hooks.leave))
    # Prepended: a block's own hooks, if anybody has set some, belong to the block.
    handles.append(model.register_forward_pre_hook(partial(hooks.enter, EMBEDDING), prepend=True))
    handles.append(model.blocks[0].register_forward_pre_hook(hooks.embedded, prepend=True))
    handles.append(model.register_forward_hook(hooks.finished))
    if optimizer is not None:
        handles.append(optimizer.register_step_pre_hook(lambda *_: clock.change(OPTIMISER, "step")))
        handles.append(optimizer.register_step_post_hook(lambda *_: clock.change(OTHER, "step")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Hooks:
    """The hooks of one model, and which sequence numbers each part's nodes have."""

    def __init__(self, model: Decoder, clock: Clock) -> None:
        self.clock = clock
        self.numbers: list[int] = []
        self.makers: list[Place] = []
        self.inside: list[Place] = []
        self.to_come = False
        self.owner = _owners(model)

    def enter(self, place: Place, *_: Any) -> None:
        """The part's forward begins."""
        if place == EMBEDDING:
            self.numbers, self.makers, self.inside = [], [], []
            self.clock.enter(place)
            self.clock.direction = "forward"
        else:  # in the backward too, where activations are recomputed
            self.clock.enter(place)
        self.inside.append(place)
        self._note()

    def leave(self, *_: Any) -> None:
        """It ends."""
        self.clock.leave()
        self.inside.pop()
        self._note()

    def embedded(self, *_: Any) -> None:
        """The first block begins: what is left of the model's forward is nobody's."""
        self.inside[-1] = OTHER
        self.clock.change(OTHER, self.clock.direction)
        self._note()

    def finished(self, _module: nn.Module, _args: Any, output: Output) -> None:
        """The model's forward is over."""
        self.leave()
        self.clock.direction = "step"
        if not torch.is_grad_enabled():
            return
        self.clock.change(LOSS, "step")
        self.clock.aside(lambda: self._watch(output))

    def _note(self) -> None:
        if not torch.is_grad_enabled():
            return
        self.numbers.append(torch._C._autograd._get_sequence_nr())
        self.makers.append(self.inside[-1] if self.inside else LOSS)

    def _watch(self, output: Output) -> None:
        """Have every node behind ``output`` announce itself."""
        self.to_come = True
        roots = [leaf.grad_fn for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        pending: list[Node] = [node for node in roots if node is not None]
        seen: set[Node] = set()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            node.register_prehook(self._announcer(self._maker(node)))
            pending += [above for above, _ in node.next_functions if above is not None]

    def _maker(self, node: Node) -> Place:
        parameter = getattr(node, "variable", None)  # where gradients are added up
        if parameter is not None:
            return self.owner.get(id(parameter), OTHER)
        return self.makers[max(0, bisect_right(self.numbers, node._sequence_nr()) - 1)]

    def _announcer(self, place: Place) -> Callable[[Any], None]:
        def announce(_gradients: Any) -> None:
            if self.to_come:
                self.to_come = False
                torch.autograd.Variable._execution_engine.queue_callback(self._backward_over)
            if self.clock.running:
                self.clock.change(place, "backward")

        return announce

    def _backward_over(self) -> None:
        if self.clock.running:
            self.clock.change(CLIPPING, "step")


def _owners(model: Decoder) -> dict[int, Place]:
    """id of a parameter -> the part that holds it; the innermost where parts nest."""
    owner = {id(p): Place("embedding") for p in model.embedding.parameters()}
    for module, place in places(model).items():  # a layer comes before what it holds
        for parameter in module.parameters():
            if parameter is not model.embedding.weight:  # a tied head's gradient is added where the embedding's is
                owner[id(parameter)] = place
    return owner
