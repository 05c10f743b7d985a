"""Activations by name, alone or gating."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "squared_relu", "clamped_swiglu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
}


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """``(up + 1) * gate * sigmoid(alpha * gate)`` with ``gate <= limit`` and ``|up| <= limit`` (gpt-oss)."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def _clamped_swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, alpha: float = 1.702, limit: float = 7.0
) -> Tensor:
    """Gradient of ``[gate | up]``; as autograd has it, clamps pass it on at the limit and stop it beyond."""
    low, inside = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = torch.sigmoid(alpha * low)
    to_gate = grad * (inside + 1) * sigmoid * (1 + alpha * low * (1 - sigmoid))
    to_up = grad * low * sigmoid
    return torch.cat([to_gate.masked_fill(gate > limit, 0), to_up.masked_fill(up.abs() > limit, 0)], dim=-1)


# Of gate and up together, where the product is not ``act(gate) * up``. The kernel in C does not know them.
GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"clamped_swiglu": clamped_swiglu}

_GATES_BACKWARD: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"clamped_swiglu": _clamped_swiglu_backward}

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
    return GATES[activation](gate, up) if activation in GATES else ACTIVATIONS[activation](gate) * up


def activation_backward(grad: Tensor, hidden: Tensor, activation: str, gated: bool) -> Tensor:
    """Gradient of ``hidden`` from that of ``apply_activation(hidden, activation, gated)``."""
    if not gated:
        return _BACKWARD[activation](grad, hidden)
    gate, up = hidden.chunk(2, dim=-1)
    if activation in GATES:
        return _GATES_BACKWARD[activation](grad, gate, up)
    backward = _BACKWARD[activation]
    return torch.cat([backward(grad * up, gate), grad * ACTIVATIONS[activation](gate)], dim=-1)
