"""Weights in four and eight bits as numbers: the two formats that released checkpoints use, as pure functions of tensors.

MXFP4 (gpt-oss; OCP Microscaling Formats 1.0): 32 numbers of E2M1, two in a byte, the first in its low half, share one scale, a
power of two (E8M0). FP8 (DeepSeek-V3): numbers of E4M3, and an fp32 factor for every block of rows and columns.

Legend: R rows, C columns, G groups of 32 columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

MX_GROUP = 32
# By the four bits: sign, two of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_NAN = 255
_ROWS = 256


def from_mxfp4(blocks_RGB: Tensor, scales_RG: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(R, G * 32) numbers of uint8 blocks (R, G, 16) and uint8 exponents (R, G), biased by 127.

    In bf16 every product is exact, but for those above 3.4e38, which become infinite. A scale of 255 is no number in E8M0;
    as in transformers it counts as 2^128.
    """
    pairs = torch.tensor([(E2M1[byte & 15], E2M1[byte >> 4]) for byte in range(256)], dtype=dtype)
    out_RGC = torch.empty(*scales_RG.shape, MX_GROUP, dtype=dtype, device=blocks_RGB.device)
    # Some rows at a time: indices and products in fp32 take ten times the memory of the blocks.
    for start in range(0, len(blocks_RGB), _ROWS):
        rows = slice(start, start + _ROWS)
        values_RGC = pairs[blocks_RGB[rows].int()].flatten(-2)
        out_RGC[rows] = torch.ldexp(values_RGC, scales_RG[rows].to(torch.int32)[..., None] - 127)
    return out_RGC.flatten(-2)


def from_block_fp8(
    weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Numbers of float8 (..., R, C) times the factor of their block, (..., ceil(R / rows), ceil(C / columns)) fp32.

    The last blocks may be smaller. The product is made in fp32 and rounded once, to ``dtype``.
    """
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    rows, columns = block
    width = weight.shape[-1]
    # A strip of rows at a time: in fp32 the whole would take four times the memory of what is stored.
    for i, start in enumerate(range(0, weight.shape[-2], rows)):
        wide = weight[..., start : start + rows, :].float()
        factor = scale[..., i, :].float().repeat_interleave(columns, dim=-1)[..., :width]
        out[..., start : start + rows, :] = wide * factor[..., None, :]
    return out
