"""The fused experts on PyTorch alone: expert by expert through gather, product, activation, product, weighted sum.

What ``ops/kernel/`` does in C, for machines without a compiler, for fp64 and fp16, for AMX, for biases and gates that C does
not know, and as a second opinion in tests.

Legend: as in ``ops/fused.py``; M rows of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.ops.activations import activation_backward, apply_activation
from moesaic.ops.grouped import rows_times, transposed_times
from moesaic.ops.kernel.call import Rows, Shape
from moesaic.ops.phases import phase


class Biases(NamedTuple):
    """Of the two products, (E, W) and (E, D) in any float dtype; or None."""

    b_in: Tensor | None = None
    b_out: Tensor | None = None

    def of(self, expert: int) -> tuple[Tensor | None, Tensor | None]:
        """One expert's."""
        return None if self.b_in is None else self.b_in[expert], None if self.b_out is None else self.b_out[expert]


def _groups(rows: Rows) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """(expert, its grouped places, its natural rows, their tokens) of every expert that has rows."""
    start = 0
    for expert, count in enumerate(rows.counts_E.tolist()):
        if count:
            places = slice(start, start + count)
            natural_M = rows.order_N[places]
            yield expert, places, natural_M, rows.token_N[natural_M]
            start += count


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights and sums: fp32, or fp64 beside fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(x_ND: Tensor, w_DH: Tensor, bias_H: Tensor | None = None, out_NH: Tensor | None = None) -> Tensor:
    y_NH = x_ND.new_empty(x_ND.shape[0], w_DH.shape[1]) if out_NH is None else out_NH
    rows_times(x_ND, w_DH, y_NH)
    return y_NH if bias_H is None else y_NH.add_(bias_H)


def forward(
    x_TD: Tensor, w_in: Tensor, w_out: Tensor, weight_N: Tensor, rows: Rows, shape: Shape, keep: bool,
    biases: Biases,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As ``ops/kernel/call.py``, and with biases. Weights of another dtype are cast expert by expert, where there are rows."""
    sum_TD = torch.zeros_like(x_TD, dtype=wide(x_TD.dtype), memory_format=torch.contiguous_format)
    pre_NW = x_TD.new_empty(rows.token_N.shape[0], w_in.shape[2]) if keep else None
    for expert, places, natural_M, token_M in _groups(rows):
        in_W, out_D = biases.of(expert)
        with phase("gather"):
            x_MD = x_TD.index_select(0, token_M)
        with phase("products"):
            pre_MW = _product(x_MD, w_in[expert].to(x_TD.dtype), in_W, None if pre_NW is None else pre_NW[places])
        with phase("activation"):
            hidden_MH = apply_activation(pre_MW, *shape)
        with phase("products"):
            y_MD = _product(hidden_MH, w_out[expert].to(x_TD.dtype), out_D)
        with phase("combine"):
            sum_TD.index_add_(0, token_M, y_MD * weight_N[natural_M][:, None])
    return sum_TD.to(x_TD.dtype), pre_NW


def backward(
    dy_TD: Tensor, x_TD: Tensor, w_in: Tensor, w_out: Tensor, weight_N: Tensor, rows: Rows, shape: Shape,
    pre_NW: Tensor, needs: Sequence[bool], biases: Biases,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As ``ops/kernel/call.py``, and with biases, whose gradients come last: six in all."""
    db_in, db_out = (
        torch.zeros_like(bias) if bias is not None and need else None
        for bias, need in zip(biases, needs[4:], strict=True)
    )
    sum_TD = torch.zeros_like(x_TD, dtype=wide(x_TD.dtype)) if needs[0] else None
    dw_in = torch.empty_like(w_in) if needs[1] else None
    dw_out = torch.empty_like(w_out) if needs[2] else None
    dweight_N = torch.zeros_like(weight_N)
    for gradient in (dw_in, dw_out):
        if gradient is not None:
            for expert in (rows.counts_E == 0).nonzero().flatten().tolist():
                gradient[expert].zero_()
    for expert, places, natural_M, token_M in _groups(rows):
        with phase("gather"):
            dy_MD = dy_TD.index_select(0, token_M)
        with phase("products"):
            g_MH = _product(dy_MD, w_out[expert].T)  # gradient of the hidden row before its weight
        with phase("activation"):
            weight_M1 = weight_N[natural_M][:, None]
            hidden_MH = apply_activation(pre_NW[places], *shape)
            dpre_MW = activation_backward((g_MH * weight_M1).to(g_MH.dtype), pre_NW[places], *shape)
            dweight_M = (g_MH.to(weight_N.dtype) * hidden_MH).sum(dim=1)
            if biases.b_out is not None:
                dweight_M += dy_MD.to(weight_N.dtype) @ biases.b_out[expert].to(weight_N.dtype)
            dweight_N[natural_M] = dweight_M
        if db_in is not None:
            db_in[expert] = dpre_MW.sum(dim=0, dtype=weight_N.dtype)
        if db_out is not None:
            db_out[expert] = weight_N[natural_M] @ dy_MD.to(weight_N.dtype)
        if dw_out is not None:
            with phase("products"):
                transposed_times((hidden_MH * weight_M1).to(x_TD.dtype), dy_MD, dw_out[expert])
        if dw_in is not None:
            with phase("products"):
                transposed_times(x_TD.index_select(0, token_M), dpre_MW, dw_in[expert])
        if sum_TD is not None:
            with phase("products"):
                dx_MD = _product(dpre_MW, w_in[expert].T)
            with phase("combine"):
                sum_TD.index_add_(0, token_M, dx_MD.to(sum_TD.dtype))
    dx_TD = None if sum_TD is None else sum_TD.to(x_TD.dtype)
    return dx_TD, dw_in, dw_out, dweight_N if needs[3] else None, db_in, db_out
