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

_Found = tuple[tuple[int, ...], str]  # numbers that grow on the way, kinds and layers first; what is wrong there


def check_finite(
    model: nn.Module,
    loss: float,
    grad_norm: float,
    step: int,
    run_again: Callable[[], Any],
    agreement: Agreement | None = None,
) -> None:
    """Raise ``NonFiniteError`` unless loss and gradient norm are finite.

    Args:
        run_again: repeats the forward pass, so that hooks can find the first layer with a non-finite output.
        agreement: with the other processes of the run: all refuse the step or none, in the same words, which name the rank
            where it began.
    """
    agreement = agreement or Agreement()
    if agreement.finite(math.isfinite(loss) and math.isfinite(grad_norm)):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {grad_norm}"
    where = agreement.first(_culprit(model, run_again))
    where = where or "no layer's output or gradient is non-finite by itself, so a sum overflowed"
    raise NonFiniteError(
        f"Step {step}: {what}; {where}. The weights were not updated; resume from the last checkpoint "
        "with a lower optim.lr, a longer optim.warmup or a smaller optim.clip."
    )


def _culprit(model: nn.Module, run_again: Callable[[], Any]) -> _Found | None:
    """What is wrong here, and how early: parameters, then outputs from the first layer on, then gradients from the last."""
    broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(local(p)).all())]
    found: list[_Found] = []
    handles, calls = [], itertools.count()
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            handles.append(module.register_forward_hook(_noter(name, calls, found)))
    try:
        with torch.no_grad():
            run_again()  # whatever was found: the other ranks are at it, too
    finally:
        for handle in handles:
            handle.remove()
    if broken:
        return (0, _depth(broken[0])), f"the parameter {broken[0]} already holds a non-finite value"
    if found:
        return found[0]
    # Backward runs from the head down, so the deepest layer with a bad gradient is where it began.
    bad = [
        n for n, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(local(p.grad)).all())
    ]
    if bad:
        words = f"outputs are finite, and the first non-finite gradient (from the head down) is that of {bad[-1]}"
        return (2, -_depth(bad[-1])), words
    return None


def _depth(name: str) -> int:
    """Where a module lies: its block, before the first (-1) or after the last."""
    found = re.match(r"blocks\.(\d+)", name)
    return int(found[1]) if found else -1 if name.startswith("embedding") else 10**9


def _noter(name: str, calls: Iterator[int], found: list[_Found]) -> Callable[..., None]:
    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        order = next(calls)
        if not found and any(not bool(torch.isfinite(t).all()) for t in _floats(output)):
            found.append(((1, _depth(name), order), f"the first non-finite value came out of {name}"))

    return note


def _floats(output: Any) -> Iterator[Tensor]:
    for leaf in _pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield local(leaf)
