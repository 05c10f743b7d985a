"""From tensors to the C kernels: addresses, sizes and which case a call is. No autograd here; see ``ops/fused.py``.

Legend: T tokens, N rows, E experts, D model width, H expert width, W columns of ``w_in`` (2H gated, H plain).
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moesaic.ops import phases
from moesaic.ops.kernel.build import available

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "squared_relu": 4}
FEW_ROWS = 4  # of the busiest expert, up to which weights are read where they lie instead of being packed
MOST_OF_TOP = 64
_KEPT_SUMS = 16 << 20  # numbers; 64 MiB
_PHASES = ("gather", "products", "activation", "combine", "wait")


class _Job(ctypes.Structure):
    """``job`` of job.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "dim", "hidden", "experts", "gated", "activation")),
        *((name, ctypes.c_int64) for name in ("threads", "x_type", "w_type")),
        *((name, ctypes.c_void_p) for name in ("x", "w_in", "w_out", "token", "order", "counts", "weight")),
        *((name, ctypes.c_void_p) for name in ("pre", "sum", "out", "dy", "dw_in", "dw_out", "dweight", "seconds")),
    )


class Rows(NamedTuple):
    """Where rows come from: the token of each natural row, natural rows in expert order, rows per expert; all int64."""

    token_N: Tensor
    order_N: Tensor
    counts_E: Tensor


class Shape(NamedTuple):
    """What of a call is not a tensor: activation by name, whether gated."""

    activation: str
    gated: bool


@torch.compiler.assume_constant_result
def loaded() -> bool:
    """Whether there are kernels to call (compiling them now if nobody has)."""
    return available().functions is not None


@torch.compiler.assume_constant_result
def threaded() -> bool:
    """Whether the kernels use all of torch's threads."""
    return available().threaded


def takes(dtype: torch.dtype) -> bool:
    """Whether the kernels compute in this dtype."""
    return dtype in _TYPES


_PLAIN = (Tensor, torch.nn.Parameter)


def plain(*tensors: Tensor) -> bool:
    """Whether C may read these: tensors of the processor's memory that nobody watches or stands in for.

    Fake tensors, tracing, dispatch modes (FLOP counters), functorch's transforms and forward-mode tangents need operators that
    PyTorch knows.
    """
    if torch.compiler.is_compiling():
        return all(tensor.device.type == "cpu" for tensor in tensors) and loaded()
    return (
        all(type(tensor) in _PLAIN and tensor.device.type == "cpu" for tensor in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and loaded()
    )


def usable(x_TD: Tensor, w_in: Tensor) -> bool:
    """Whether the kernels take these tensors: plain, fp32 or bf16, weights in the same dtype or fp32."""
    return x_TD.dtype in _TYPES and w_in.dtype in (x_TD.dtype, torch.float32) and plain(x_TD, w_in)


def _job(x_TD: Tensor, w_in: Tensor, w_out: Tensor, weight_N: Tensor, rows: Rows, shape: Shape) -> _Job:
    return _Job(
        x_TD.shape[0], rows.token_N.shape[0], w_in.shape[1], w_out.shape[1], w_in.shape[0], shape.gated,
        _ACTIVATIONS[shape.activation], torch.get_num_threads(), _TYPES[x_TD.dtype], _TYPES[w_in.dtype],
        x_TD.data_ptr(), w_in.data_ptr(), w_out.data_ptr(), rows.token_N.data_ptr(), rows.order_N.data_ptr(),
        rows.counts_E.data_ptr(), weight_N.data_ptr(),
    )  # fmt: skip


def _run(name: str, job: _Job) -> None:
    library = available().functions
    assert library is not None
    seconds = None
    if phases.listening():
        seconds = (ctypes.c_double * len(_PHASES))()
        job.seconds = ctypes.addressof(seconds)
    failed = getattr(library, name)(ctypes.byref(job))
    if failed == 2:
        raise ValueError("The experts were given rows that point outside: to a token or a place that is not there.")
    if failed:
        raise MemoryError("The experts' kernels found no memory for their buffers; free some, or use fewer threads.")
    if seconds is not None:
        for phase, taken in zip(_PHASES, seconds, strict=True):
            phases.add(phase, taken)


def _result(job: _Job, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
    """The result in x's dtype and, where its fp32 sums are too large to be kept by the kernel, memory for them."""
    out_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    job.out = out_TD.data_ptr()
    if x_TD.dtype == torch.float32 or x_TD.numel() <= _KEPT_SUMS:
        return out_TD, None
    sum_TD = x_TD.new_empty(x_TD.shape, dtype=torch.float32)
    job.sum = sum_TD.data_ptr()
    return out_TD, sum_TD


def forward(
    x_TD: Tensor, w_in: Tensor, w_out: Tensor, weight_N: Tensor, rows: Rows, shape: Shape,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(T, D) in x's dtype; with ``keep`` also what backward needs, (rows, W): products before the activation.

    All tensors contiguous; ``weight_N`` fp32, indices int64.
    """
    job = _job(x_TD, w_in, w_out, weight_N, rows, shape)
    out_TD, _sums_TD = _result(job, x_TD)  # named, so that the sums outlive the call
    pre_NW = None
    if keep:
        pre_NW = x_TD.new_empty(rows.token_N.shape[0], w_in.shape[2])
        job.pre = pre_NW.data_ptr()
    few = not keep and rows.token_N.shape[0] <= 128 * FEW_ROWS and int(rows.counts_E.max()) <= FEW_ROWS
    _run("moesaic_experts_few" if few else "moesaic_experts_forward", job)
    return out_TD, pre_NW


def backward(
    dy_TD: Tensor, x_TD: Tensor, w_in: Tensor, w_out: Tensor, weight_N: Tensor, rows: Rows,
    shape: Shape, pre_NW: Tensor, needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, w_in, w_out and weight_N, each None where ``needs`` says so."""
    job = _job(x_TD, w_in, w_out, weight_N, rows, shape)
    job.dy, job.pre = dy_TD.data_ptr(), pre_NW.data_ptr()
    out_TD = _sums_TD = dw_in = dw_out = dweight_N = None
    if needs[0]:
        out_TD, _sums_TD = _result(job, x_TD)
    if needs[1]:
        dw_in = torch.empty_like(w_in)
        job.dw_in = dw_in.data_ptr()
    if needs[2]:
        dw_out = torch.empty_like(w_out)
        job.dw_out = dw_out.data_ptr()
    if needs[3]:
        dweight_N = torch.zeros_like(weight_N)  # rows that go nowhere are never visited
        job.dweight = dweight_N.data_ptr()
    _run("moesaic_experts_backward", job)
    return out_TD, dw_in, dw_out, dweight_N


def linear(x_MD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` for up to ``FEW_ROWS`` rows, contiguous; weight (out, in) in x's dtype or fp32, bias fp32 or None."""
    library = available().functions
    assert library is not None
    rows, columns = x_MD.shape[0], weight.shape[0]
    y_MO = x_MD.new_empty(rows, columns)
    sums = y_MO if x_MD.dtype == torch.float32 else y_MO.new_empty(y_MO.shape, dtype=torch.float32)
    failed = library.moesaic_linear(
        x_MD.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y_MO.data_ptr(), sums.data_ptr(),
        rows, weight.shape[1], columns, _TYPES[x_MD.dtype], _TYPES[weight.dtype], torch.get_num_threads(),
    )  # fmt: skip
    assert not failed, "too many rows for the kernel"
    return y_MO


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in fp32; weight in x's dtype or fp32."""
    library = available().functions
    assert library is not None
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    library.moesaic_rms_norm(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // x.shape[-1], x.shape[-1], eps,
        _TYPES[x.dtype], _TYPES[weight.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


def top(scores_TE: Tensor, k: int) -> Tensor:
    """int64 (T, K): columns of the k <= ``MOST_OF_TOP`` best fp32 scores of each row; see ``ops/top.py``."""
    library = available().functions
    assert library is not None
    scores_TE = scores_TE.contiguous()
    best_TK = scores_TE.new_empty(scores_TE.shape[0], k, dtype=torch.int64)
    failed = library.moesaic_top(scores_TE.data_ptr(), *scores_TE.shape, k, best_TK.data_ptr(), torch.get_num_threads())
    assert not failed
    return best_TK


def group(expert_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order, inverse, counts) of a stable counting sort of int64 ids in [0, E]. Raises ``ValueError`` outside."""
    library = available().functions
    assert library is not None
    expert_N = expert_N.to(torch.int64).contiguous()
    found = torch.empty_like(expert_N), torch.empty_like(expert_N), expert_N.new_empty(num_experts)
    addresses = [tensor.data_ptr() for tensor in found]
    failed = library.moesaic_group(expert_N.data_ptr(), expert_N.shape[0], num_experts, *addresses)
    if failed:
        low, high = int(expert_N.min()), int(expert_N.max())
        raise ValueError(f"rows must name experts in 0 to {num_experts}; got {low} to {high}")
    return found
