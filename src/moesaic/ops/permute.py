"""Move rows: group them by expert, gather tokens into that order, and combine expert outputs back into tokens.

Forward and backward are gathers plus a sum over K wherever every token owns K rows, so results do not depend on thread count
or run; no scatter-add of floats is involved. Plans with a varying number of rows per token use ``index_add`` (sequential and
hence deterministic on CPU; on CUDA ``index_put`` with accumulation, which sorts).

Legend: T tokens, N rows, E experts, K rows per token, D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.ops.kernel import call as kernel


class Grouping(NamedTuple):
    """How natural row order maps to expert order.

    ``order_N[i]`` is the natural row at grouped place i, ``inverse_N[n]`` the grouped place of natural row n;
    ``counts_E`` rows per expert (int64). Rows that go nowhere stand after the last group.
    """

    order_N: Tensor
    inverse_N: Tensor
    counts_E: Tensor


def group_rows(expert_N: Tensor, num_experts: int) -> Grouping:
    """Stable grouping of rows by expert id in [0, E]; E sorts last and is not counted. No host synchronisation."""
    if not torch.compiler.is_compiling() and kernel.plain(expert_N):
        return Grouping(*kernel.group(expert_N, num_experts))
    sorted_N, order_N = torch.sort(expert_N, stable=True)
    places_N = torch.arange(len(order_N), device=order_N.device)
    inverse_N = torch.empty_like(order_N).scatter_(0, order_N, places_N)
    bounds = torch.searchsorted(sorted_N, torch.arange(num_experts + 1, device=sorted_N.device))
    return Grouping(order_N, inverse_N, bounds.diff())


def gather_rows(x_TD: Tensor, token_N: Tensor, grouping: Grouping, per_token: int | None) -> Tensor:
    """Each row's token in expert order, (N, D)."""
    rows: Tensor = _Gather.apply(x_TD, token_N, grouping.order_N, grouping.inverse_N, per_token)
    return rows


def combine_rows(
    y_ND: Tensor, weight_N: Tensor, token_N: Tensor, grouping: Grouping, num_tokens: int, per_token: int | None
) -> Tensor:
    """Weighted sum of each token's rows, (T, D) in ``y``'s dtype.

    Args:
        y_ND: expert outputs in expert order.
        weight_N: weights in natural order, fp32 (or fp64); products and sums run in its dtype.
    """
    if per_token is not None:
        y_NtD = _Permute.apply(y_ND, grouping.inverse_N, grouping.order_N)
        y_TKD = y_NtD.view(num_tokens, per_token, y_ND.shape[1])  # not -1: ambiguous with zero tokens
        # einsum would round products to y's dtype; this keeps them in fp32 without an fp32 copy when y already is.
        y_TD = (y_TKD.to(weight_N.dtype) * weight_N.view(num_tokens, per_token, 1)).sum(dim=1)
        return y_TD.to(y_ND.dtype)
    rows_ND = y_ND.to(weight_N.dtype) * weight_N[grouping.order_N][:, None]
    return add_rows(rows_ND, token_N[grouping.order_N], num_tokens).to(y_ND.dtype)


def add_rows(rows_ND: Tensor, token_N: Tensor, num_tokens: int) -> Tensor:
    """Rows summed into the tokens they name, in their own dtype, (T, D); the same in every run."""
    total_TD = rows_ND.new_zeros(num_tokens, rows_ND.shape[1])
    if rows_ND.is_cuda:
        return total_TD.index_put((token_N,), rows_ND, accumulate=True)
    return total_TD.index_add(0, token_N, rows_ND)


class _Gather(torch.autograd.Function):
    """x[token][order]; the gradient sums each token's K rows after undoing the order."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, token_N: Tensor, order_N: Tensor, inverse_N: Tensor, per_token: int | None
    ) -> Tensor:
        ctx.per_token, ctx.num_tokens = per_token, x_TD.shape[0]
        source_N = token_N[order_N]
        ctx.save_for_backward(source_N, inverse_N)
        return x_TD.index_select(0, source_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        source_N, inverse_N = ctx.saved_tensors
        if ctx.per_token is None:
            return add_rows(grad_ND, source_N, ctx.num_tokens), None, None, None, None
        natural_ND = grad_ND.index_select(0, inverse_N)
        grad_TD = natural_ND.view(ctx.num_tokens, ctx.per_token, grad_ND.shape[1]).sum(dim=1)
        return grad_TD, None, None, None, None


class _Permute(torch.autograd.Function):
    """x[forward_index]; the gradient is the inverse gather instead of autograd's scatter-add."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, index_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return x_ND.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_N,) = ctx.saved_tensors
        return grad_ND.index_select(0, inverse_N), None, None
