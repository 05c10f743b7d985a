"""The NaN guard: stop before the update, and say which layer went wrong first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from moesaic.errors import NonFiniteError


def check_finite(model: nn.Module, loss: float, grad_norm: float, step: int, run_again: Callable[[], Any]) -> None:
    """Raise ``NonFiniteError`` unless loss and gradient norm are finite.

    Args:
        run_again: repeats the forward pass, so that hooks can find the first layer with a non-finite output.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {grad_norm}"
    raise NonFiniteError(
        f"Step {step}: {what}; {_culprit(model, run_again)}. The weights were not updated; resume from the last checkpoint "
        "with a lower optim.lr, a longer optim.warmup or a smaller optim.clip."
    )


def _culprit(model: nn.Module, run_again: Callable[[], Any]) -> str:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"the parameter {name} already holds a non-finite value"
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            handles.append(module.register_forward_hook(_noter(name, found)))
    try:
        with torch.no_grad():
            run_again()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"the first non-finite value came out of {found[0]}"
    # Backward runs from the head down, so the deepest layer with a bad gradient is where it began.
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    if bad:
        return f"outputs are finite, and the first non-finite gradient (from the head down) is that of {bad[-1]}"
    return "no layer's output or gradient is non-finite by itself, so a sum overflowed"


def _noter(name: str, found: list[str]) -> Callable[..., None]:
    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not found and any(not bool(torch.isfinite(t).all()) for t in _floats(output)):
            found.append(name)

    return note


def _floats(output: Any) -> Iterator[Tensor]:
    for leaf in _pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf
