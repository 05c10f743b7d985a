"""The NaN guard: stop before the update, and say which layer went wrong first.

With several processes all decide alike, look alike (a forward pass has collectives), and raise the same words: those of the
rank that found the earliest layer, since what went wrong on one comes to the others with the exchange.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from moesaic.errors import NonFiniteError
from moesaic.parallel.agree import Agreement
from moesaic.parallel.gradients import local

_Found = tuple[tuple[int, int], str]  # layer and a number that grows on the way; what is wrong there


def check_finite(
    model: nn.Module,
    loss: float,
    grad_norm: float,
    step: int,
    run_again: Callable[[], Any],
    agreement: Agreement | None = None,
) -> None:
    """Raise ``NonFiniteError`` unless loss and gradient norm are finite, on all ranks.

    Args:
        run_again: repeats the forward pass, so that hooks can find the first layer with a non-finite output.
        agreement: of all ranks, every one of which must call; None is one process.
    """
    agreement = agreement or Agreement()
    if agreement.finite(math.isfinite(loss) and math.isfinite(grad_norm)):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {grad_norm}"
    raise NonFiniteError(
        f"Step {step}: {what}; {_culprit(model, run_again, agreement)}. The weights were not updated; resume from the last "
        "checkpoint with a lower optim.lr, a longer optim.warmup or a smaller optim.clip."
    )


def _culprit(model: nn.Module, run_again: Callable[[], Any], agreement: Agreement) -> str:
    broken = [
        (_place(name, i), f"the parameter {name} already holds a non-finite value")
        for i, (name, parameter) in enumerate(model.named_parameters())
        if not bool(torch.isfinite(local(parameter)).all())
    ]
    if words := agreement.first(broken[0] if broken else None):
        return words
    found: list[_Found] = []
    calls = itertools.count()
    handles = []
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            handles.append(module.register_forward_hook(_noter(name, calls, found)))
    try:
        with torch.no_grad():
            run_again()
    finally:
        for handle in handles:
            handle.remove()
    if words := agreement.first(found[0] if found else None):
        return words
    # Backward runs from the head down, so the deepest layer with a bad gradient is where it began.
    bad = [
        (name, i)
        for i, (name, p) in enumerate(model.named_parameters())
        if p.grad is not None and not bool(torch.isfinite(local(p.grad)).all())
    ]
    last = None
    if bad:
        (layer, order), name = _place(*bad[-1]), bad[-1][0]
        words = f"outputs are finite, and the first non-finite gradient (from the head down) is that of {name}"
        last = ((-layer, -order), words)
    return agreement.first(last) or "no layer's output or gradient is non-finite by itself, so a sum overflowed"


def _place(name: str, order: int) -> tuple[int, int]:
    """Where a parameter or module is on the way through the whole model, also in a part of one."""
    layer = re.match(r"blocks\.(\d+)\.", f"{name}.")
    if layer is not None:
        return int(layer[1]), order
    return (-1 if name.startswith("embedding") else 1 << 30), order


def _noter(name: str, calls: Iterator[int], found: list[_Found]) -> Callable[..., None]:
    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        order = next(calls)
        if not found and any(not bool(torch.isfinite(t).all()) for t in _floats(output)):
            found.append((_place(name, order), f"the first non-finite value came out of {name}"))

    return note


def _floats(output: Any) -> Iterator[Tensor]:
    for leaf in _pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield local(leaf)
