"""Fused experts held against the dumb loops in fp64: inputs of hard loads, the reference, and tolerances by dtype.

Legend: T tokens, N rows, E experts, D model width, H expert width, W columns of ``w_in``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.ops import reference
from moesaic.ops.activations import apply_activation
from moesaic.ops.fused import Sources, experts_mlp
from moesaic.ops.permute import group_rows

# Of the largest number in the tensor that is compared. fp32: sums of up to a few thousand products in another order, and an
# erf to 1.5e-7. bf16: inputs are rounded before the reference sees them, so what is left is the rounding (2^-9 each) of the
# product before the activation, of the hidden row or its gradient, and of the result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2}


@dataclass
class Batch:
    """One call: tensors that may need gradients, the expert of each natural row, and the gradient that comes back."""

    x_TD: Tensor
    w_in: Tensor
    w_out: Tensor
    weight_N: Tensor
    token_N: Tensor
    expert_N: Tensor
    dy_TD: Tensor
    activation: str = "silu"
    gated: bool = True
    b_in: Tensor | None = None
    b_out: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """x, w_in, w_out, weight, and the biases where there are any."""
        biases = [bias for bias in (self.b_in, self.b_out) if bias is not None]
        return [self.x_TD, self.w_in, self.w_out, self.weight_N, *biases]


def some_batch(
    expert_N: Tensor, T: int, E: int, D: int, H: int, dtype: torch.dtype = torch.float32,
    w_dtype: torch.dtype | None = None, activation: str = "silu", gated: bool = True, token_N: Tensor | None = None,
    bias: bool = False,
) -> Batch:  # fmt: skip
    """Random numbers of everyday sizes. Rows go to random tokens unless ``token_N`` says otherwise."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if token_N is None:
        token_N = torch.randint(0, max(T, 1), expert_N.shape)
    w_in, w_out = torch.randn(E, D, H * (2 if gated else 1)) / D**0.5, torch.randn(E, H, D) / H**0.5
    tensors = [torch.randn(T, D), w_in, w_out, torch.rand(expert_N.shape) - 0.3, torch.randn(T, D)]
    dtypes = [dtype, w_dtype or dtype, w_dtype or dtype, wide, dtype]
    x_TD, w_in, w_out, weight_N, dy_TD = (t.to(to) for t, to in zip(tensors, dtypes, strict=True))
    batch = Batch(x_TD, w_in, w_out, weight_N, token_N, expert_N, dy_TD, activation, gated)
    if bias:
        batch.b_in, batch.b_out = (torch.randn(E, w.shape[2]).to(w.dtype) for w in (w_in, w_out))
    return batch


def run(batch: Batch, backend: Any, needs: tuple[bool, ...] | None = None) -> list[Tensor | None]:
    """Output and the gradients of all leaves, each None where ``needs`` says so."""
    needs = needs or (True,) * len(batch.leaves)
    leaves = [t.detach().clone().requires_grad_(need) for t, need in zip(batch.leaves, needs, strict=True)]
    y_TD = call(batch, backend, *leaves)
    found: list[Tensor | None] = [y_TD.detach()]
    if any(needs):
        y_TD.backward(batch.dy_TD)
    return found + [leaf.grad for leaf in leaves]


def call(batch: Batch, backend: Any, *leaves: Tensor) -> Tensor:
    """``experts_mlp`` on ``leaves`` (the batch's own by default)."""
    x_TD, w_in, w_out, weight_N, *biases = leaves or batch.leaves
    grouping = group_rows(batch.expert_N, w_in.shape[0])
    sources = Sources(batch.token_N, weight_N, grouping.order_N)
    return experts_mlp(x_TD, w_in, w_out, grouping.counts_E, sources, batch.activation, batch.gated, backend, *biases)


def truth(batch: Batch) -> list[Tensor]:
    """The same by ``ops/reference.moe`` and plain autograd in fp64; weights beside bf16 tokens are rounded to bf16 first."""
    dtype = batch.x_TD.dtype
    x_TD, w_in, w_out, weight_N, *biases = leaves = [
        (t.detach().to(dtype) if n in (1, 2) else t.detach()).double().clone().requires_grad_()
        for n, t in enumerate(batch.leaves)
    ]

    def expert(e: int, x_D: Tensor) -> Tensor:
        b_in, b_out = (bias[e] for bias in biases) if biases else (0.0, 0.0)
        return apply_activation(x_D @ w_in[e] + b_in, batch.activation, batch.gated) @ w_out[e] + b_out

    y_TD = reference.moe(x_TD, batch.token_N, batch.expert_N, weight_N, expert, w_in.shape[0])
    # "+ 0": a tensor that no row touches has a zero gradient, not None.
    total = (y_TD * batch.dy_TD.double()).sum() + 0.0 * sum(t.nan_to_num().sum() for t in leaves)
    total.backward()
    return [y_TD.detach(), *(t.grad for t in leaves if t.grad is not None)]


NAMES = ("output", "x", "w_in", "w_out", "weight", "b_in", "b_out")


def assert_close(got: list[Tensor | None], want: list[Tensor], dtype: torch.dtype, scale: float = 1.0) -> None:
    """Each tensor within the tolerance of its largest number (of 1 where that is smaller)."""
    assert len(got) == len(want)
    for name, ours, theirs in zip(NAMES, got, want, strict=False):
        assert ours is not None, name
        assert ours.shape == theirs.shape
        if theirs.numel():
            largest = max(1.0, float(theirs.nan_to_num().abs().max()))
            torch.testing.assert_close(
                ours.double(),
                theirs,
                atol=TOLERANCE[dtype] * largest * scale,
                rtol=0,
                msg=lambda m, n=name: f"{n}: {m}",
            )
