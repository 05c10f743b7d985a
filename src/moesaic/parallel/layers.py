"""Tells the watch which layer a model is in, forward and backward, by hooks.

The backward calls no modules, but when it begins with a block, the gradient of the block's output is there. The hooks go before
all others: FSDP gathers a block's weights in a hook of its own, and a failure in there belongs to the block.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moesaic.models.decoder import Decoder
from moesaic.parallel.watch import Watch


def name_layers(model: Decoder, watch: Watch) -> list[RemovableHandle]:
    """Set ``watch.layer`` to where ``model`` is, from here on. Call it last, on the model as it will run, or on a part of one.

    Forward "the embedding", "layer 0" to "the head" and "the loss"; backward the same with "the backward of" before it. What
    follows the backward has to say so itself.
    """
    names: dict[nn.Module, str] = {block: f"layer {index}" for index, block in model.layers()}
    for part in ("norm", "head"):  # a stage of a pipeline may lack them
        if hasattr(model, part):
            names[getattr(model, part)] = "the head"
    handles = [model.register_forward_pre_hook(_enter(watch, "the embedding"), prepend=True)]
    for module, name in names.items():
        handles.append(module.register_forward_pre_hook(_enter(watch, name), prepend=True))
        handles.append(module.register_forward_hook(_leave(watch, name), prepend=True))
    for index, block in model.layers():
        handles.append(block.register_forward_pre_hook(_begin(watch, index), prepend=True))
        break
    return handles


def _enter(watch: Watch, name: str) -> Any:
    def enter(module: nn.Module, inputs: Any) -> None:
        watch.layer = name

    return enter


def _leave(watch: Watch, name: str) -> Any:
    """Ready for the backward to come back."""

    def note(grad: Tensor) -> None:
        watch.layer = f"the backward of {name}"

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output  # the gradient of a plan may be there much earlier
        if x.requires_grad:
            x.register_hook(note)
        if name == "the head":
            watch.layer = "the loss"

    return leave


def _begin(watch: Watch, index: int) -> Any:
    """Where the backward comes out of the first block."""
    name = f"the backward of {'the embedding' if index == 0 else f'what lies before layer {index}'}"

    def note(grad: Tensor) -> None:
        watch.layer = name

    def begin(module: nn.Module, inputs: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].requires_grad:
            inputs[0].register_hook(note)

    return begin
