"""The dense feed-forward network, plain or gated."""

from __future__ import annotations

from torch import Tensor, nn

from moesaic.nn.linear import Linear, init_fan_in_
from moesaic.ops.activations import ACTIVATIONS, GATES, Activation, apply_activation

__all__ = ["ACTIVATIONS", "GATES", "MLP", "Activation", "apply_activation"]


class MLP(nn.Module):
    """Gated ``(act(x Wg) * (x Wu)) Wd`` or plain ``act(x W1) W2``.

    Args:
        dim, hidden: D and H.
        activation: name of the non-linearity; "silu" gated is SwiGLU, "gelu" gated GEGLU.
        bias: of both products.
    """

    def __init__(
        self, dim: int, hidden: int, activation: Activation = "silu", gated: bool = True, bias: bool = False
    ) -> None:
        super().__init__()
        self.activation, self.gated = activation, gated
        self.w_in = Linear(dim, hidden * (2 if gated else 1), bias=bias)
        self.w_out = Linear(hidden, dim, bias=bias)

    def reset_parameters(self, scale: float, out_scale: float) -> None:
        """Fan-in initialisation; ``out_scale`` multiplies the variance of the output projection (depth scaling)."""
        init_fan_in_(self.w_in.weight, self.w_in.in_features, scale)
        init_fan_in_(self.w_out.weight, self.w_out.in_features, scale * out_scale)
        for linear in (self.w_in, self.w_out):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.w_out(apply_activation(self.w_in(x), self.activation, self.gated))
