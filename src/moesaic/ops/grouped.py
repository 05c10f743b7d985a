"""Grouped matrix product: rows sorted by expert, each group times its expert's matrix. Fast paths behind one signature.

>>> y_NH = grouped_mm(x_ND, w_EDH, counts_E)            # backend="auto"

Back ends: "loop" (one ``torch.mm`` per non-empty expert straight into the output and gradient buffers; the fastest on CPU
today, any float dtype), "grouped_mm" (``torch.nn.functional.grouped_mm``; no host synchronisation; fp32/bf16/fp16),
"reference" (``ops/reference.py``). All give zeros for rows past the last group and a zero gradient to experts without rows.

Under ``torch.compile`` both fast back ends are one opaque operator each way, except ``grouped_mm`` in bf16, which traces: the
loop reads counts on the host, and torch 2.13 has a shape rule for ``F.grouped_mm`` in bf16 only.

Legend: N rows, E experts, D and H matrix widths.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.ops import reference
from moesaic.ops.first_order import first_order

# "kernel" and "tiles" are back ends of whole experts (ops/fused.py); for a product alone they mean "auto".
Backend = Literal["auto", "kernel", "tiles", "loop", "grouped_mm", "reference"]
BACKENDS = get_args(Backend)


def grouped_mm(x_ND: Tensor, w_EDH: Tensor, counts_E: Tensor, backend: Backend = "auto") -> Tensor:
    """Product of each group with its matrix.

    Args:
        x_ND: rows grouped by expert; rows past ``counts_E.sum()`` belong to nobody.
        w_EDH: stacked matrices of the same dtype as ``x``.
        counts_E: int64 rows per expert, non-negative, summing to at most N.

    Returns (N, H) in ``x``'s dtype, zeros past the last group. Raises ``ValueError`` on mismatched shapes or dtypes.
    """
    if x_ND.dim() != 2 or w_EDH.dim() != 3 or x_ND.shape[1] != w_EDH.shape[1] or counts_E.shape != w_EDH.shape[:1]:
        raise ValueError(
            f"grouped_mm needs x (N, D), w (E, D, H), counts (E,); got {tuple(x_ND.shape)}, {tuple(w_EDH.shape)}, "
            f"{tuple(counts_E.shape)}"
        )
    if x_ND.dtype != w_EDH.dtype:
        raise ValueError(f"grouped_mm needs x and w of one dtype; got {x_ND.dtype} and {w_EDH.dtype}")
    if backend in ("auto", "kernel", "tiles"):
        backend = pick_backend(x_ND, w_EDH)
    if backend == "reference":
        return reference.grouped_mm(x_ND, w_EDH, counts_E)
    if backend == "grouped_mm" and not _aligned(x_ND, w_EDH):
        backend = "loop"
    if torch.compiler.is_compiling() and (backend == "loop" or x_ND.dtype != torch.bfloat16):
        opaque_NH: Tensor = _opaque(x_ND, w_EDH, counts_E, backend == "loop")
        return opaque_NH
    function = _Loop if backend == "loop" else _Grouped
    y_NH: Tensor = function.apply(x_ND, w_EDH, counts_E)
    return y_NH


def pick_backend(x_ND: Tensor, w_EDH: Tensor) -> Literal["loop", "grouped_mm"]:
    """What "auto" means here: the loop on CPU, ``grouped_mm`` on other devices."""
    if x_ND.is_cuda and _aligned(x_ND, w_EDH):
        return "grouped_mm"
    return "loop"


def _aligned(x_ND: Tensor, w_EDH: Tensor) -> bool:
    # F.grouped_mm: no fp64, row strides must be multiples of 16 bytes, and it has nothing to do on zero rows.
    if x_ND.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x_ND.shape[0] == 0:
        return False
    return all(width * x_ND.element_size() % 16 == 0 for width in w_EDH.shape[1:])


# PyTorch's half-precision products on CPU compile a kernel for every new shape (milliseconds each, kept in a cache), and
# expert loads are new numbers at every step. Row counts are therefore cut or padded to multiples of this.
_ROWS = 64


def _compiles_per_shape(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def rows_times(x_ND: Tensor, w_DH: Tensor, out_NH: Tensor) -> None:
    """``out = x @ w``."""
    whole = x_ND.shape[0] // _ROWS * _ROWS
    if not _compiles_per_shape(x_ND) or whole in (0, x_ND.shape[0]):
        torch.mm(x_ND, w_DH, out=out_NH)
        return
    torch.mm(x_ND[:whole], w_DH, out=out_NH[:whole])
    torch.mm(x_ND[whole:], w_DH, out=out_NH[whole:])


def transposed_times(x_ND: Tensor, grad_NH: Tensor, out_DH: Tensor) -> None:
    """``out = x^T @ grad``: one product over zero-padded rows, because adding two would round twice."""
    short = -x_ND.shape[0] % _ROWS
    if _compiles_per_shape(x_ND) and short and x_ND.shape[0] > _ROWS:
        x_ND, grad_NH = F.pad(x_ND, (0, 0, 0, short)), F.pad(grad_NH, (0, 0, 0, short))
    torch.mm(x_ND.T, grad_NH, out=out_DH)


def _loop(x_ND: Tensor, w_EDH: Tensor, counts: list[int]) -> Tensor:
    y_NH = x_ND.new_empty(x_ND.shape[0], w_EDH.shape[2])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            rows_times(x_ND[rows], w_EDH[expert], y_NH[rows])
            start += count
    y_NH[start:].zero_()
    return y_NH


def _loop_backward(
    grad_NH: Tensor, x_ND: Tensor, w_EDH: Tensor, counts: list[int], needs_x: bool, needs_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    grad_NH = grad_NH.contiguous()
    grad_x_ND = torch.empty_like(x_ND) if needs_x else None
    grad_w_EDH = torch.empty_like(w_EDH, memory_format=torch.contiguous_format) if needs_w else None
    start = 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        if count and grad_x_ND is not None:
            rows_times(grad_NH[rows], w_EDH[expert].T, grad_x_ND[rows])
        if grad_w_EDH is not None:
            if count:
                transposed_times(x_ND[rows], grad_NH[rows], grad_w_EDH[expert])
            else:
                grad_w_EDH[expert].zero_()
        start += count
    if grad_x_ND is not None:
        grad_x_ND[start:].zero_()
    return grad_x_ND, grad_w_EDH


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w_EDH: Tensor, counts_E: Tensor) -> Tensor:
        x_ND = x_ND.contiguous()
        ctx.save_for_backward(x_ND, w_EDH)
        ctx.counts = counts_E.tolist()
        return _loop(x_ND, w_EDH, ctx.counts)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, w_EDH = ctx.saved_tensors
        return *_loop_backward(grad_NH, x_ND, w_EDH, ctx.counts, *ctx.needs_input_grad[:2]), None


def _grouped(x_ND: Tensor, w_EDH: Tensor, ends_E: Tensor, past_N1: Tensor) -> Tensor:
    y_NH = F.grouped_mm(x_ND.contiguous(), w_EDH.contiguous(), offs=ends_E)
    return torch.where(past_N1, 0.0, y_NH)


def _grouped_backward(
    grad_NH: Tensor, x_ND: Tensor, w_EDH: Tensor, ends_E: Tensor, past_N1: Tensor, needs_x: bool, needs_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    # Expanded (stride 0) gradients are refused by grouped_mm.
    grad_NH = grad_NH.contiguous()
    grad_x_ND = grad_w_EDH = None
    if needs_x:
        grad_x_ND = F.grouped_mm(grad_NH, w_EDH.transpose(-2, -1), offs=ends_E)
        grad_x_ND = torch.where(past_N1, 0.0, grad_x_ND)
    if needs_w:
        grad_w_EDH = F.grouped_mm(x_ND.contiguous().transpose(0, 1), grad_NH, offs=ends_E)
    return grad_x_ND, grad_w_EDH


def _bounds(x_ND: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
    ends_E = counts_E.cumsum(0).to(torch.int32)
    # Rows past the last group come back uninitialised (NaN seen), forwards and backwards: both are overwritten.
    return ends_E, torch.arange(x_ND.shape[0], device=x_ND.device)[:, None] >= ends_E[-1]


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w_EDH: Tensor, counts_E: Tensor) -> Tensor:
        ends_E, past_N1 = _bounds(x_ND, counts_E)
        ctx.save_for_backward(x_ND, w_EDH, ends_E, past_N1)
        return _grouped(x_ND, w_EDH, ends_E, past_N1)

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
        return *_grouped_backward(grad_NH, *ctx.saved_tensors, *ctx.needs_input_grad[:2]), None


@torch.library.custom_op("moesaic::grouped_mm", mutates_args=())
def _opaque(x_ND: Tensor, w_EDH: Tensor, counts_E: Tensor, loop: bool) -> Tensor:
    if loop:
        return _loop(x_ND, w_EDH, counts_E.tolist())
    return _grouped(x_ND, w_EDH, *_bounds(x_ND, counts_E))


@_opaque.register_fake
def _(x_ND: Tensor, w_EDH: Tensor, counts_E: Tensor, loop: bool) -> Tensor:
    return x_ND.new_empty(x_ND.shape[0], w_EDH.shape[2])


@torch.library.custom_op("moesaic::grouped_mm_backward", mutates_args=())
def _opaque_backward(
    grad_NH: Tensor, x_ND: Tensor, w_EDH: Tensor, counts_E: Tensor, loop: bool
) -> tuple[Tensor, Tensor]:
    if loop:
        grad_x_ND, grad_w_EDH = _loop_backward(grad_NH, x_ND, w_EDH, counts_E.tolist(), True, True)
    else:
        grad_x_ND, grad_w_EDH = _grouped_backward(grad_NH, x_ND, w_EDH, *_bounds(x_ND, counts_E), True, True)
    assert grad_x_ND is not None and grad_w_EDH is not None
    return grad_x_ND.contiguous(), grad_w_EDH.contiguous()


@_opaque_backward.register_fake
def _(grad_NH: Tensor, x_ND: Tensor, w_EDH: Tensor, counts_E: Tensor, loop: bool) -> tuple[Tensor, Tensor]:
    return x_ND.new_empty(x_ND.shape), w_EDH.new_empty(w_EDH.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.loop = inputs[3]


def _backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
    return *_opaque_backward(grad_NH, *ctx.saved_tensors, ctx.loop), None, None


_opaque.register_autograd(_backward, setup_context=_save)
