"""A linear layer that computes in its input's dtype.

Parameters may stay fp32 while activations are bf16: the weight is cast at use, its gradient comes back in fp32. That makes
mixed precision explicit, with no autocast state that recomputation or compilation could miss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.ops.linear import linear


class Linear(nn.Linear):
    """``x W^T + b``. Weight (out, in)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in ``x``'s dtype."""
        return linear(x, self.weight, self.bias)


def init_fan_in_(weight: Tensor, fan_in: int, scale: float = 1.0, generator: torch.Generator | None = None) -> None:
    """Truncated normal in place, ``std = sqrt(scale / fan_in)``, cut at two standard deviations (Switch Transformer: 0.1).

    ``fan_in`` is given because PyTorch would read it off a stacked (E, D, H) tensor wrongly.
    """
    std = (scale / fan_in) ** 0.5
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
