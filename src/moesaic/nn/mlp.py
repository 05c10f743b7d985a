"""Activations by name, and the dense feed-forward network, plain or gated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.nn.linear import Linear, init_fan_in_

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "squared_relu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
}


class MLP(nn.Module):
    """Gated ``(act(x Wg) * (x Wu)) Wd`` or plain ``act(x W1) W2``; no biases.

    Args:
        dim, hidden: D and H.
        activation: name of the non-linearity; "silu" gated is SwiGLU, "gelu" gated GEGLU.
    """

    def __init__(self, dim: int, hidden: int, activation: Activation = "silu", gated: bool = True) -> None:
        super().__init__()
        self.activation, self.gated = activation, gated
        self.w_in = Linear(dim, hidden * (2 if gated else 1), bias=False)
        self.w_out = Linear(hidden, dim, bias=False)

    def reset_parameters(self, scale: float, out_scale: float) -> None:
        """Fan-in initialisation; ``out_scale`` multiplies the variance of the output projection (depth scaling)."""
        init_fan_in_(self.w_in.weight, self.w_in.in_features, scale)
        init_fan_in_(self.w_out.weight, self.w_out.in_features, scale * out_scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.w_out(apply_activation(self.w_in(x), self.activation, self.gated))


def apply_activation(hidden: Tensor, activation: Activation, gated: bool) -> Tensor:
    """``act(gate) * up`` for gated networks ([gate | up] side by side in the last dimension), else ``act(hidden)``."""
    if not gated:
        return ACTIVATIONS[activation](hidden)
    gate, up = hidden.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up
