"""Activations by name, alone or gating."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "squared_relu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
}

_aten = torch.ops.aten
# (gradient of the output, input) to gradient of the input: what autograd calls, for operators that run below autograd.
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": _aten.silu_backward,
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    "relu": lambda grad, x: _aten.threshold_backward(grad, x, 0),
    "squared_relu": lambda grad, x: 2 * grad * F.relu(x),
}


def apply_activation(hidden: Tensor, activation: str, gated: bool) -> Tensor:
    """``act(gate) * up`` for gated networks ([gate | up] side by side in the last dimension), else ``act(hidden)``."""
    if not gated:
        return ACTIVATIONS[activation](hidden)
    gate, up = hidden.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def activation_backward(grad: Tensor, hidden: Tensor, activation: str, gated: bool) -> Tensor:
    """Gradient of ``hidden`` from that of ``apply_activation(hidden, activation, gated)``."""
    backward = _BACKWARD[activation]
    if not gated:
        return backward(grad, hidden)
    gate, up = hidden.chunk(2, dim=-1)
    return torch.cat([backward(grad * up, gate), grad * ACTIVATIONS[activation](gate)], dim=-1)
