"""Root mean square normalisation with fp32 statistics; without gradient in one pass over each row while it is in cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.ops.kernel import call as kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension D, in ``x``'s dtype; weight (D,)."""
    if (
        kernel.usable(x, weight)
        and x.numel()
        and x.shape[-1:] == weight.shape
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.compiler.is_compiling()
    ):
        return kernel.rms_norm(x, weight, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    return F.rms_norm(wide, weight.shape, weight.type_as(wide), eps).type_as(x)
