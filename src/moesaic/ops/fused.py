"""The experts of a layer from tokens to tokens: ``y[t] = sum over rows n of token t: weight[n] * expert(e[n], x[t])``.

>>> grouping = group_rows(expert_N, E)
>>> y_TD = experts_mlp(x_TD, w_in, w_out, grouping.counts_E, Sources(token_N, weight_N, grouping.order_N))

Two back ends of one meaning, for any plan: "kernel" (C, ``ops/kernel/``: fp32 and bf16 on the processor) and "tiles" (PyTorch
alone, expert by expert in small buffers; any float dtype, any device, biases, ``clamped_swiglu``). Neither stores anything of
the size (rows, dim), except for an expert that takes them all. Backward keeps x and the products before the activation,
recomputes the cheap rest, and gets the gradient of a row's weight from ``<dy W_out^T, h>`` (and ``<dy, b_out>``) instead of
from the row's output (as SonicMoE does). Sums over a token's experts run in fp32.

Under ``torch.compile`` both are one opaque operator each way, which always keeps what backward needs and computes all
gradients. First derivatives only; a second one raises.

Legend: T tokens, N rows, E experts, D model width, H expert width, W columns of ``w_in`` (2H gated, H plain).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.ops import tiles
from moesaic.ops.activations import GATES
from moesaic.ops.first_order import first_order
from moesaic.ops.kernel import call as kernel
from moesaic.ops.kernel.build import has_amx
from moesaic.ops.kernel.call import Rows, Shape
from moesaic.ops.tiles import Biases

FusedBackend = Literal["kernel", "tiles"]


class Sources(NamedTuple):
    """Where rows grouped by expert come from and how much they count.

    ``token_N``, ``weight_N``: token (int64) and weight (fp32; fp64 beside fp64) of each natural row; ``order_N`` (int64): the
    natural row at each grouped place.
    """

    token_N: Tensor
    weight_N: Tensor
    order_N: Tensor


def as_they_are(x_ND: Tensor) -> Sources:
    """Rows that are grouped already: each its own token, at weight 1."""
    place_N = torch.arange(x_ND.shape[0], device=x_ND.device)
    ones_N = torch.ones(x_ND.shape[0], dtype=tiles.wide(x_ND.dtype), device=x_ND.device)
    return Sources(place_N, ones_N, place_N)


def pick_fused(x_TD: Tensor, w_in: Tensor, rows: int) -> FusedBackend:
    """What "auto" means on the processor: the kernel where it exists and is the faster one.

    PyTorch's bf16 products use AMX tiles where there are any, several times faster than the kernel's instructions, once
    there are enough rows to be worth a product.
    """
    if not kernel.usable(x_TD, w_in):
        return "tiles"
    many = rows >= 16 * w_in.shape[0]
    if many and not kernel.threaded() and torch.get_num_threads() > 1:
        return "tiles"  # PyTorch's products on all cores beat the kernel on one
    if x_TD.dtype == torch.bfloat16 and has_amx() and many:
        return "tiles"
    return "kernel"


def experts_mlp(
    x_TD: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    counts_E: Tensor,
    sources: Sources,
    activation: str = "silu",
    gated: bool = True,
    backend: FusedBackend | None = None,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
) -> Tensor:
    """Feed-forward experts on the tokens a plan sends them.

    Args:
        x_TD: tokens.
        w_in, w_out: (E, D, W) and (E, H, D), in ``x``'s dtype; on the kernel also fp32 beside bf16 tokens, rounded at use
            (except where few rows read them in place).
        counts_E: int64 rows per expert; rows past the last group are not computed.
        sources: of the rows.
        b_in, b_out: biases of the products, (E, W) and (E, D) in any float dtype, both or none; not on the kernel, which has no
            "clamped_swiglu" either.

    Returns (T, D) in ``x``'s dtype; tokens without rows get zeros, experts without rows a zero gradient. Raises
    ``ValueError`` on mismatched shapes and ``ConfigError`` for a kernel that cannot be.
    """
    token_N, weight_N, order_N = _checked(x_TD, w_in, w_out, counts_E, sources, gated)
    if (b_in is None) != (b_out is None) or (
        b_in is not None and b_out is not None and (b_in.shape, b_out.shape) != (w_in.shape[::2], w_out.shape[::2])
    ):
        shapes = [None if bias is None else tuple(bias.shape) for bias in (b_in, b_out)]
        raise ValueError(f"experts need biases (E, W) and (E, D) or neither; got {shapes[0]} and {shapes[1]}")
    if backend == "kernel" and not (kernel.takes(x_TD.dtype) and x_TD.device.type == "cpu" and kernel.loaded()):
        raise ConfigError(
            f'backend="kernel" computes fp32 and bf16 on the processor, with a C compiler; here it has {x_TD.dtype} on '
            f"{x_TD.device.type}, and the kernel {'is there' if kernel.loaded() else 'is not'} (`moesaic doctor` says "
            'why). Use backend="auto".'
        )
    if b_in is not None or activation in GATES:
        if backend == "kernel":
            raise ConfigError('backend="kernel" knows neither biases nor "clamped_swiglu"; use backend="auto".')
        backend = "tiles"
    if backend == "kernel" and not kernel.usable(x_TD, w_in):
        backend = "tiles"  # tensors that C cannot read: traced, counted, transformed
    backend = backend or pick_fused(x_TD, w_in, token_N.shape[0])
    leaves = (x_TD, w_in, w_out, weight_N, b_in, b_out)
    learns = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    casts = (
        learns or torch.compiler.is_compiling()
    )  # else tiles cast the experts that have rows: with one token, k of them
    if casts if backend == "tiles" else w_in.dtype not in (x_TD.dtype, torch.float32) or w_out.dtype != w_in.dtype:
        w_in, w_out = w_in.to(x_TD.dtype), w_out.to(x_TD.dtype)
    inputs = [x_TD, w_in, w_out, weight_N, b_in, b_out, token_N, order_N, counts_E.to(torch.int64)]
    if torch.compiler.is_compiling():
        opaque_TD: Tensor = _opaque(*inputs, activation, gated, backend == "kernel")[0]
        return opaque_TD
    shape = Shape(activation, gated)
    inputs = _contiguous(inputs)
    if not learns:
        return _forward(inputs, shape, backend == "kernel", keep=False)[0]
    y_TD: Tensor = _Experts.apply(*inputs, shape, backend == "kernel")
    return y_TD


def _checked(
    x_TD: Tensor, w_in: Tensor, w_out: Tensor, counts_E: Tensor, sources: Sources, gated: bool
) -> Sources:  # fmt: skip
    """``sources`` in the dtypes that back ends take, after a look at every shape: C reads where it is told to."""
    token_N, weight_N, order_N = sources
    E, H, D = w_out.shape
    if (
        x_TD.dim() != 2
        or x_TD.shape[1] != D
        or w_in.shape != (E, D, 2 * H if gated else H)
        or counts_E.shape != (E,)
        or not token_N.shape == weight_N.shape == order_N.shape == (token_N.numel(),)
    ):
        raise ValueError(
            f"experts need x (T, D), w_in (E, D, {'2H' if gated else 'H'}), w_out (E, H, D), counts (E,) and one token, "
            f"weight and place per row; got {tuple(x_TD.shape)}, {tuple(w_in.shape)}, {tuple(w_out.shape)}, "
            f"{tuple(counts_E.shape)} and {tuple(token_N.shape)}, {tuple(weight_N.shape)}, {tuple(order_N.shape)}"
        )
    return Sources(token_N.to(torch.int64), weight_N.to(tiles.wide(x_TD.dtype)), order_N.to(torch.int64))


def _contiguous(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in inputs]


def _forward(inputs: list[Any], shape: Shape, use_kernel: bool, keep: bool) -> tuple[Tensor, Tensor | None]:
    x_TD, w_in, w_out, weight_N, b_in, b_out, *rows = inputs
    if use_kernel:
        return kernel.forward(x_TD, w_in, w_out, weight_N, Rows(*rows), shape, keep)
    return tiles.forward(x_TD, w_in, w_out, weight_N, Rows(*rows), shape, keep, Biases(b_in, b_out))


def _backward(
    dy_TD: Tensor, inputs: list[Any], pre_NW: Tensor, shape: Shape, use_kernel: bool, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the first six inputs."""
    x_TD, w_in, w_out, weight_N, b_in, b_out, *rows = inputs
    if use_kernel:
        four = (needs[0], needs[1], needs[2], needs[3])
        return *kernel.backward(dy_TD, x_TD, w_in, w_out, weight_N, Rows(*rows), shape, pre_NW, four), None, None
    biases = Biases(b_in, b_out)
    return tiles.backward(dy_TD, x_TD, w_in, w_out, weight_N, Rows(*rows), shape, pre_NW, needs, biases)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.shape, ctx.use_kernel = inputs
        y_TD, pre_NW = _forward(tensors, ctx.shape, ctx.use_kernel, keep=True)
        ctx.save_for_backward(*tensors, pre_NW)
        return y_TD

    @staticmethod
    @first_order
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, pre_NW = ctx.saved_tensors
        needs = ctx.needs_input_grad[:6]
        gradients = _backward(dy_TD.contiguous(), tensors, pre_NW, ctx.shape, ctx.use_kernel, needs)
        return *gradients, None, None, None, None, None


# ---- the same as operators, for torch.compile ----------------------------------------------------------------------------


@torch.library.custom_op("moesaic::experts_mlp", mutates_args=())
def _opaque(
    x_TD: Tensor, w_in: Tensor, w_out: Tensor, weight_N: Tensor, b_in: Tensor | None, b_out: Tensor | None,
    token_N: Tensor, order_N: Tensor, counts_E: Tensor, activation: str, gated: bool, use_kernel: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = _contiguous([x_TD, w_in, w_out, weight_N, b_in, b_out, token_N, order_N, counts_E])
    y_TD, pre_NW = _forward(inputs, Shape(activation, gated), use_kernel, keep=True)
    assert pre_NW is not None
    return y_TD, pre_NW


@_opaque.register_fake
def _(
    x_TD: Tensor, w_in: Tensor, w_out: Tensor, weight_N: Tensor, b_in: Tensor | None, b_out: Tensor | None,
    token_N: Tensor, order_N: Tensor, counts_E: Tensor, activation: str, gated: bool, use_kernel: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(token_N.shape[0], w_in.shape[2])


@torch.library.custom_op("moesaic::experts_mlp_backward", mutates_args=())
def _opaque_backward(
    dy_TD: Tensor, pre_NW: Tensor, x_TD: Tensor, w_in: Tensor, w_out: Tensor, weight_N: Tensor,
    b_in: Tensor | None, b_out: Tensor | None, token_N: Tensor, order_N: Tensor, counts_E: Tensor,
    activation: str, gated: bool, use_kernel: bool,
) -> list[Tensor]:  # fmt: skip
    """Of the biases too where there are any: four gradients or six."""
    inputs = _contiguous([x_TD, w_in, w_out, weight_N, b_in, b_out, token_N, order_N, counts_E])
    shape, needs = Shape(activation, gated), (True,) * 6
    gradients = _backward(dy_TD.contiguous(), inputs, pre_NW.contiguous(), shape, use_kernel, needs)
    return [gradient for gradient in gradients if gradient is not None]


@_opaque_backward.register_fake
def _(
    dy_TD: Tensor, pre_NW: Tensor, x_TD: Tensor, w_in: Tensor, w_out: Tensor, weight_N: Tensor,
    b_in: Tensor | None, b_out: Tensor | None, token_N: Tensor, order_N: Tensor, counts_E: Tensor,
    activation: str, gated: bool, use_kernel: bool,
) -> list[Tensor]:  # fmt: skip
    like = (x_TD, w_in, w_out, weight_N, b_in, b_out)
    return [tensor.new_empty(tensor.shape) for tensor in like if tensor is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:9])
    ctx.rest = inputs[9:]


def _compiled_backward(ctx: Any, dy_TD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = _opaque_backward(dy_TD, *ctx.saved_tensors, *ctx.rest)
    return *gradients, *(None,) * (12 - len(gradients))


_opaque.register_autograd(_compiled_backward, setup_context=_save)
