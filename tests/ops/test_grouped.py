"""Grouped products: every back end against the dumb loop, output and both gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesaic.ops import reference
from moesaic.ops.grouped import BACKENDS, grouped_mm
from moesaic.ops.permute import group_rows

COUNTS = [
    [3, 0, 2, 4],  # an empty expert
    [9, 0, 0, 0],
    [0, 0, 0, 9],
    [0, 0, 0, 0],  # rows, but nobody's
    [2, 1, 0, 3],  # rows past the last group
    [1, 1, 1, 1],
]


def _run(backend: Any, x_ND: Tensor, w_EDH: Tensor, counts_E: Tensor, grad_NH: Tensor) -> list[Tensor]:
    x_ND, w_EDH = x_ND.clone().requires_grad_(), w_EDH.clone().requires_grad_()
    y_NH = grouped_mm(x_ND, w_EDH, counts_E, backend)
    return [y_NH.detach(), *torch.autograd.grad(y_NH, (x_ND, w_EDH), grad_NH)]


def _inputs(N: int, E: int, dtype: torch.dtype, D: int = 8, H: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(N, D, dtype=dtype), torch.randn(E, D, H, dtype=dtype), torch.randn(N, H, dtype=dtype)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("loop", torch.float64, 1e-12),
        ("loop", torch.float32, 1e-5),
        ("grouped_mm", torch.float32, 1e-5),
        ("grouped_mm", torch.float64, 1e-12),  # falls back to the loop
        ("auto", torch.float32, 1e-5),
    ],
)
def test_back_ends_are_the_reference(backend: str, dtype: torch.dtype, tolerance: float, counts: list[int]) -> None:
    x_ND, w_EDH, grad_NH = _inputs(9, 4, dtype)
    counts_E = torch.tensor(counts)
    x_ND[counts_E.sum() :] = float("nan")  # rows of nobody may hold anything
    got = _run(backend, x_ND, w_EDH, counts_E, grad_NH)
    x_ND[counts_E.sum() :] = 0.0
    want = _run("reference", x_ND, w_EDH, counts_E, grad_NH)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    assert (got[0][counts_E.sum() :] == 0).all()
    assert (got[1][counts_E.sum() :] == 0).all()
    assert (got[2][counts_E == 0] == 0).all()


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_bf16_is_the_rounded_product(backend: str) -> None:
    x_ND, w_EDH, grad_NH = _inputs(9, 4, torch.bfloat16, H=8)
    counts_E = torch.tensor([3, 0, 2, 3])
    got = _run(backend, x_ND, w_EDH, counts_E, grad_NH)
    want = _run("reference", x_ND.double(), w_EDH.double(), counts_E, grad_NH.double())
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("N", "E", "H"), [(0, 3, 4), (5, 1, 4), (5, 2, 3), (1, 1, 1)])
def test_odd_shapes(backend: str, N: int, E: int, H: int) -> None:
    x_ND, w_EDH, grad_NH = _inputs(N, E, torch.float32, H=H)
    counts_E = torch.zeros(E, dtype=torch.int64)
    counts_E[-1] = N
    y_NH, grad_x_ND, grad_w_EDH = _run(backend, x_ND, w_EDH, counts_E, grad_NH)
    torch.testing.assert_close(y_NH, x_ND @ w_EDH[-1])
    torch.testing.assert_close(grad_x_ND, grad_NH @ w_EDH[-1].T)
    expected = torch.zeros_like(w_EDH)
    expected[-1] = x_ND.T @ grad_NH
    torch.testing.assert_close(grad_w_EDH, expected)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_strided_inputs_and_expanded_gradients(backend: str) -> None:
    x_ND, w_EDH, _ = _inputs(12, 3, torch.float32, D=8, H=8)
    counts_E = torch.tensor([5, 4, 3])
    strided = (x_ND.T.contiguous().T, w_EDH.transpose(1, 2).contiguous().transpose(1, 2))
    grad_NH = torch.ones(()).expand(12, 8)  # what .sum().backward() sends
    want = _run("reference", x_ND, w_EDH, counts_E, grad_NH)
    leaves = [tensor.requires_grad_() for tensor in strided]
    y_NH = grouped_mm(*leaves, counts_E, backend)  # type: ignore[arg-type]
    got = [y_NH, *torch.autograd.grad(y_NH.sum(), leaves)]
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_only_the_gradients_asked_for(backend: Any) -> None:
    x_ND, w_EDH, grad_NH = _inputs(6, 2, torch.float32)
    counts_E = torch.tensor([2, 4])
    both = _run(backend, x_ND, w_EDH, counts_E, grad_NH)
    leaf = x_ND.clone().requires_grad_()
    (only_x,) = torch.autograd.grad(grouped_mm(leaf, w_EDH, counts_E, backend), leaf, grad_NH)
    assert torch.equal(only_x, both[1])
    leaf = w_EDH.clone().requires_grad_()
    (only_w,) = torch.autograd.grad(grouped_mm(x_ND, leaf, counts_E, backend), leaf, grad_NH)
    assert torch.equal(only_w, both[2])


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_back_ends_give_the_same_bits(backend: Any, dtype: torch.dtype) -> None:
    x_ND, w_EDH, grad_NH = _inputs(6, 3, dtype)

    def run(x_ND: Tensor, w_EDH: Tensor, counts_E: Tensor) -> Tensor:
        return grouped_mm(x_ND, w_EDH, counts_E, backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for counts in ([1, 0, 4], [0, 6, 0]):
        counts_E = torch.tensor(counts)
        want = _run(backend, x_ND, w_EDH, counts_E, grad_NH)
        leaves = x_ND.clone().requires_grad_(), w_EDH.clone().requires_grad_()
        y_NH = compiled(*leaves, counts_E)
        got = [y_NH.detach(), *torch.autograd.grad(y_NH, leaves, grad_NH)]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))


def test_mismatched_shapes_and_dtypes_are_refused() -> None:
    x_ND, w_EDH, _ = _inputs(6, 2, torch.float32)
    counts_E = torch.tensor([2, 4])
    with pytest.raises(ValueError, match="needs x"):
        grouped_mm(x_ND[:, :4], w_EDH, counts_E)
    with pytest.raises(ValueError, match="needs x"):
        grouped_mm(x_ND, w_EDH, torch.tensor([2, 2, 2]))
    with pytest.raises(ValueError, match="one dtype"):
        grouped_mm(x_ND.bfloat16(), w_EDH, counts_E)


@given(ids=st.lists(st.integers(0, 4), max_size=14))
def test_grouping_is_the_reference_grouping(ids: list[int]) -> None:
    expert_N = torch.tensor(ids, dtype=torch.int64)
    order_N, inverse_N, counts_E = group_rows(expert_N, 4)
    want_order_N, want_counts_E = reference.group_rows(expert_N, 4)
    assert torch.equal(order_N, want_order_N)
    assert torch.equal(counts_E, want_counts_E)
    assert torch.equal(inverse_N[order_N], torch.arange(len(ids)))
