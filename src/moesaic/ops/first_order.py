"""Backward passes that can be run but not differentiated: a second derivative raises instead of being silently wrong.

``torch.autograd.function.once_differentiable`` notices only second derivatives with respect to the incoming gradient. Those
with respect to the saved inputs (Hessian-vector products, gradient penalties) it computes as zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order(backward: Backward) -> Backward:
    """Decorate ``backward(ctx, *grads)`` of a ``torch.autograd.Function`` that saved its inputs in ``ctx``."""

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return gradients
        found = [gradient for gradient in gradients if gradient is not None]
        marked = iter(_NoFurther.apply(len(found), *found, *grads, *ctx.saved_tensors))
        return tuple(None if gradient is None else next(marked) for gradient in gradients)

    return guarded


class _NoFurther(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "Second derivatives through moesaic's fast experts are not implemented; build the layer with "
            'backend="reference" where they are needed.'
        )
