"""The linear map for a few rows in C against ``F.linear``: every height and instruction set, odd sizes, dtypes, gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moesaic.ops.linear import linear
from tests.ops.kernels import BACKENDS, using

# The first test of an instruction set may have to compile it, on a machine that has other things to do.
pytestmark = pytest.mark.timeout(600)

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
OTHERS = [(torch.float64, torch.float64), (torch.float16, torch.float16), (torch.float32, torch.bfloat16)]
# fp32: another order of sums. bf16: one rounding of the result (2^-9) where weights are not rounded, products by PyTorch's
# own kernels and rounded weights otherwise.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 3e-3}


@pytest.fixture(params=BACKENDS, ids=lambda pair: pair[1], autouse=True)
def _isa(request: Any) -> Iterator[None]:
    with using(request.param[1]):
        yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES + OTHERS)
def test_it_is_the_linear_map(dtypes: Any, bias: bool) -> None:
    dtype, w_dtype = dtypes
    for rows in range(1, 10):
        for size, out in ((1, 1), (7, 3), (33, 5), (64, 16), (130, 65), (100, 400)):
            x, weight = torch.randn(rows, size).to(dtype), (torch.randn(out, size) / size**0.5).to(w_dtype)
            b = torch.randn(out).to(w_dtype) if bias else None
            want = F.linear(x.double(), weight.double(), None if b is None else b.double())
            for mode in (torch.no_grad(), torch.enable_grad()):
                with mode:
                    y = linear(x, weight, b)
                assert y.dtype == dtype
                bound = TOLERANCE[dtype] * max(1.0, float(want.abs().max()))
                torch.testing.assert_close(y.double(), want, atol=bound, rtol=0)
            assert torch.equal(linear(x, weight, b), y)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (1, 1, 1, 5), (0, 5), (3, 0, 5), (9, 5)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(4, 5), torch.randn(4)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-6, rtol=1e-6)


def test_strides() -> None:
    x, weight = torch.randn(7, 4).T, torch.randn(7, 6).T
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
)
def test_every_gradient_that_is_wanted(needs: tuple[bool, ...]) -> None:
    """Also the bias's alone, with everything else frozen."""
    inputs = [
        torch.randn(shape).requires_grad_(need) for shape, need in zip([(3, 8), (4, 8), (4,)], needs, strict=True)
    ]
    linear(*inputs).square().sum().backward()
    twins = [t.detach().clone().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
    F.linear(*twins).square().sum().backward()
    for ours, theirs, need in zip(inputs, twins, needs, strict=True):
        assert (ours.grad is not None) == need
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert not linear(*inputs).requires_grad


def test_bits_do_not_depend_on_threads_or_run() -> None:
    x, weight = torch.randn(3, 257), torch.randn(301, 257)
    torch.set_num_threads(1)
    want = linear(x, weight)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        assert torch.equal(linear(x, weight), want)


@pytest.mark.parametrize("rows", [1, 9])
def test_widths_that_do_not_fit_are_refused(rows: int) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(rows, 5), torch.randn(4, 8))


def test_what_is_not_finite_stays_with_its_row() -> None:
    x, weight = torch.randn(3, 40), torch.randn(20, 40)
    x[1, 39] = torch.nan
    y = linear(x, weight)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_the_default_dtype_does_not_matter() -> None:
    x, weight = torch.randn(3, 40).bfloat16(), torch.randn(500, 40).bfloat16()
    want = linear(x, weight)
    torch.set_default_dtype(torch.bfloat16)
    assert torch.equal(linear(x, weight), want)
