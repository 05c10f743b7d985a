"""Rotary position embedding (Su et al. 2021), half-split layout as in Llama and Hugging Face.

Legend: B batch, S positions, R head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(position_BS: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 (B, 1, S, R), of angle ``position * theta^(-2i/R)`` for i in 0..R/2.

    The first half of sin is negative: ``rotate`` would otherwise negate half of every query and key in every layer.
    """
    exponent = torch.arange(0, head_dim, 2, device=position_BS.device, dtype=torch.float32) / head_dim
    angle_BSR = position_BS[:, :, None].float() * theta**-exponent
    cos_BSR, sin_BSR = angle_BSR.cos(), angle_BSR.sin()
    return torch.cat([cos_BSR, cos_BSR], dim=-1)[:, None], torch.cat([-sin_BSR, sin_BSR], dim=-1)[:, None]


def rotate(x_BHSR: Tensor, cos_B1SR: Tensor, sin_B1SR: Tensor) -> Tensor:
    """Rotate queries or keys (B, heads, S, R); computed in fp32, returned in the input's dtype."""
    wide = x_BHSR if x_BHSR.dtype == torch.float64 else x_BHSR.float()
    first, second = wide.chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1)
    return (wide * cos_B1SR + swapped * sin_B1SR).type_as(x_BHSR)
