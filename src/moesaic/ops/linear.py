"""A linear map in its input's dtype; for a few rows without gradient, a product that reads the weights at memory's speed.

Decoding one token multiplies every weight once, so it can be no faster than reading them. PyTorch's bf16 matrix-vector product
on the processor reaches about a quarter of that, and casting fp32 weights to bf16 first would read and write them all again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.ops.kernel import call as kernel


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., in) to (..., out) in ``x``'s dtype; weight (out, in) and bias (out,) of any float dtype, cast at use."""
    if (
        kernel.usable(x, weight)  # first: under tracing even a comparison of sizes is recorded
        and x.numel() <= kernel.FEW_ROWS * x.shape[-1]
        and not (torch.is_grad_enabled() and _needs_gradient(x, weight, bias))
        and not torch.compiler.is_compiling()
        and x.numel()
        and x.shape[-1] == weight.shape[-1]  # otherwise the refusal is PyTorch's
    ):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = kernel.linear(rows, weight.contiguous(), None if bias is None else bias.float().contiguous())
        return y.view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
