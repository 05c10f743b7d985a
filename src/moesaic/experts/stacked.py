"""Feed-forward experts as stacked parameters: ``w_in`` (E, D, 2H or H) and ``w_out`` (E, H, D).

Contract of everything that computes experts: ``forward(x_ND, counts_E) -> y_ND`` on rows grouped by expert; rows past the last
group give zeros; an expert without rows keeps a zero gradient. Those that offer ``fuses`` may be called with a third argument,
``sources``, to go from tokens to the weighted sum of each token's rows without the rows in between (``ops/fused.py``).

Legend: N rows, E experts, D model width, H expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import ConfigError, one_of
from moesaic.nn.linear import init_fan_in_
from moesaic.nn.mlp import ACTIVATIONS, GATES, Activation, apply_activation
from moesaic.ops.fused import Sources, as_they_are, experts_mlp
from moesaic.ops.grouped import BACKENDS, Backend, grouped_mm
from moesaic.ops.pages import prefer_huge
from moesaic.ops.permute import add_rows


class StackedExperts(nn.Module):
    """E feed-forward networks of one shape, gated ``(act(x Wg) * (x Wu)) Wd`` or plain ``act(x W1) W2``.

    Args:
        num_experts, dim, hidden: E, D, H.
        activation, gated: as in ``nn.MLP``; gate and up share ``w_in`` side by side, so that one product feeds both.
        backend: "kernel" or "tiles" (``ops/fused.py``); "loop", "grouped_mm" or "reference" products (``ops/grouped.py``);
            "auto" takes the kernel on the processor where there is one, else tiles; and ``grouped_mm`` on a GPU.
        dropout: in training, share of hidden units set to 0 (Switch fine-tunes with 0.4 here and 0.1 elsewhere).
        bias: ``b_in`` (E, 2H or H) and ``b_out`` (E, D) after the products (gpt-oss); the kernel knows none, nor
            "clamped_swiglu".
        slots: the experts of those E whose weights are made here, by number and in order; None makes all. Each is drawn as it
            would be among all.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        activation: Activation = "silu",
        gated: bool = True,
        backend: Backend = "auto",
        dropout: float = 0.0,
        bias: bool = False,
        slots: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ConfigError(f"Dropout inside experts must be at least 0 and below 1, not {dropout}.")
        one_of("activation", activation, [*ACTIVATIONS, *(GATES if gated else ())])
        one_of("backend", backend, BACKENDS)
        if backend == "kernel" and (bias or activation in GATES):
            what = "biases" if bias else f'"{activation}"'
            raise ConfigError(f'backend="kernel" does not know {what} of experts; use backend="auto".')
        self._numbers = range(num_experts) if slots is None else tuple(slots)  # as made; experts may move later
        self.num_experts = num_experts = len(self._numbers)
        self.dim, self.hidden = dim, hidden
        self.activation, self.gated = activation, gated
        self.backend: Backend = backend
        self.dropout = dropout
        self.w_in = nn.Parameter(prefer_huge(torch.empty(num_experts, dim, hidden * (2 if gated else 1))))
        self.w_out = nn.Parameter(prefer_huge(torch.empty(num_experts, hidden, dim)))
        self.b_in = nn.Parameter(torch.zeros(num_experts, self.w_in.shape[2])) if bias else None
        self.b_out = nn.Parameter(torch.zeros(num_experts, dim)) if bias else None
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StackedExperts:
        """Casts and moves make new tensors, whose pages are to be large again."""

        def with_pages(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved is tensor else prefer_huge(moved, written=not tensor.is_meta)

        applied: StackedExperts = super()._apply(with_pages, recurse)
        return applied

    def reset_parameters(self, scale: float = 1.0, out_scale: float = 1.0) -> None:
        """Fan-in initialisation per expert, each from its own seed, so that a rank holding expert e draws the same values."""
        if self.w_in.is_meta:
            return
        base = int(torch.randint(2**31, ()))
        for number, w_in, w_out in zip(self._numbers, self.w_in.data, self.w_out.data, strict=True):
            generator = torch.Generator(self.w_in.device).manual_seed(base + number)
            init_fan_in_(w_in, self.dim, scale, generator)
            init_fan_in_(w_out, self.hidden, scale * out_scale, generator)
        for bias in (self.b_in, self.b_out):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, counts_E: Tensor, sources: Sources | None = None) -> Tensor:
        """Rows grouped by expert, (N, D) to (N, D), in ``x``'s dtype; with ``sources`` tokens to tokens, (T, D) to (T, D)."""
        if sources is not None or self.fuses(x):
            return experts_mlp(
                x, self.w_in, self.w_out, counts_E, sources or as_they_are(x), self.activation, self.gated,
                "kernel" if self.backend == "kernel" else "tiles" if self.backend == "tiles" else None,
                self.b_in, self.b_out,
            )  # fmt: skip
        hidden = _shifted(grouped_mm(x, self.w_in.to(x.dtype), counts_E, self.backend), self.b_in, counts_E)
        hidden = apply_activation(hidden, self.activation, self.gated)
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        return _shifted(grouped_mm(hidden, self.w_out.to(x.dtype), counts_E, self.backend), self.b_out, counts_E)

    def fuses(self, x: Tensor) -> bool:
        """Whether gather, experts and combine of such tokens are one operation here: ``forward`` with ``sources``."""
        if (self.dropout and self.training) or type(self).forward is not StackedExperts.forward:
            return False  # a subclass with a forward of its own knows rows alone
        return self.backend in ("kernel", "tiles") or (self.backend == "auto" and x.device.type == "cpu")

    def expert(self, index: int) -> dict[str, Tensor]:
        """Named views of one expert's matrices: ``gate`` and ``up`` (D, H) or ``in`` (D, H), and ``out`` (H, D).

        With biases also ``gate_bias`` and ``up_bias`` (H,) or ``in_bias``, and ``out_bias`` (D,).
        """
        if not 0 <= index < self.num_experts:
            raise ConfigError(f"There is no expert {index}: this layer has experts 0 to {self.num_experts - 1}.")
        names = ("gate", "up") if self.gated else ("in",)
        views = dict(zip(names, self.w_in[index].chunk(len(names), dim=-1), strict=True)) | {"out": self.w_out[index]}
        if self.b_in is not None and self.b_out is not None:
            biases = zip(names, self.b_in[index].chunk(len(names)), strict=True)
            views |= {f"{name}_bias": bias for name, bias in biases} | {"out_bias": self.b_out[index]}
        return views

    def compute_one(self, index: int, x_ND: Tensor) -> Tensor:
        """One expert on rows (N, D), by plain products: the specification of ``forward`` for a single group, dropout aside."""
        hidden = x_ND @ self.w_in[index].to(x_ND.dtype)
        if self.b_in is not None:
            hidden = hidden + self.b_in[index].to(x_ND.dtype)
        y_ND = apply_activation(hidden, self.activation, self.gated) @ self.w_out[index].to(x_ND.dtype)
        return y_ND if self.b_out is None else y_ND + self.b_out[index].to(x_ND.dtype)


def _shifted(y_NW: Tensor, bias_EW: Tensor | None, counts_E: Tensor) -> Tensor:
    """Rows plus their expert's bias; rows past the last group stay as they are. No host synchronisation."""
    if bias_EW is None:
        return y_NW
    row_N = torch.arange(y_NW.shape[0], device=y_NW.device)
    expert_N = torch.searchsorted(counts_E.cumsum(0), row_N, right=True)  # E past the last group
    shifted_NW: Tensor = _Shift.apply(y_NW, F.pad(bias_EW, (0, 0, 0, 1)), expert_N)
    return shifted_NW


class _Shift(torch.autograd.Function):
    """``y[n] + bias[expert[n]]``. A bias gets the gradients of all its rows, more than bf16 can count: summed in fp32."""

    @staticmethod
    def forward(ctx: Any, y_NW: Tensor, bias_EW: Tensor, expert_N: Tensor) -> Tensor:
        ctx.save_for_backward(expert_N)
        ctx.like = bias_EW.shape[0], bias_EW.dtype
        return y_NW + bias_EW.to(y_NW.dtype).index_select(0, expert_N)

    @staticmethod
    def backward(ctx: Any, grad_NW: Tensor) -> tuple[Tensor | None, ...]:
        (expert_N,) = ctx.saved_tensors
        E, dtype = ctx.like
        wide = torch.float64 if grad_NW.dtype == torch.float64 else torch.float32
        return grad_NW, add_rows(grad_NW.to(wide), expert_N, E).to(dtype), None
