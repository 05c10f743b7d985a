"""The k best scores of every row, best first, with one order on ties on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.ops.kernel import call as kernel


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """int64 (T, K): columns of the k best; ties go to the lowest, NaN counts as the highest. Carries no gradient.

    ``torch.topk`` promises no order on equal values, and CPU and GPU differ, hence a stable sort, or a selection in C that
    equals its beginning: sorting 512 scores to find 8 took half of a router's time.
    """
    scores_TE = scores_TE.detach()
    if (
        scores_TE.dtype == torch.float32
        and scores_TE.dim() == 2
        and 0 < k <= min(kernel.MOST_OF_TOP, scores_TE.shape[1])
        and not torch.compiler.is_compiling()
        and kernel.plain(scores_TE)
    ):
        return kernel.top(scores_TE, k)
    return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[..., :k]
