"""Normalisation with fp32 statistics whatever the activation dtype."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.ops.norm import rms_norm

NormKind = Literal["rmsnorm", "layernorm"]


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D), in ``x``'s dtype."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Mean and variance normalisation with gain and bias (Ba et al. 2016)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D), in ``x``'s dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        weight, bias = self.weight.type_as(wide), self.bias.type_as(wide)
        return F.layer_norm(wide, weight.shape, weight, bias, self.eps).type_as(x)


def make_norm(kind: NormKind, dim: int, eps: float) -> nn.Module:
    """RMSNorm or LayerNorm by name."""
    return RMSNorm(dim, eps) if kind == "rmsnorm" else LayerNorm(dim, eps)
