"""RMSNorm without gradient against the one with: every instruction set, dtype and odd width."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moesaic.ops.kernel import build
from moesaic.ops.norm import rms_norm


@pytest.mark.parametrize("isa", build.supported())
@pytest.mark.parametrize("dim", [1, 7, 16, 33, 1024])
@pytest.mark.parametrize(
    ("x_dtype", "w_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_it_is_the_norm(isa: str, dim: int, x_dtype: Any, w_dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_KERNEL", isa)
    build.forget()
    x, weight = torch.randn(2, 90, dim).to(x_dtype), torch.rand(dim).to(w_dtype)
    x[0, 0] = 0
    with torch.no_grad():
        got = rms_norm(x, weight, 1e-6)
        strided = rms_norm(x.transpose(0, 1), weight, 1e-6)
    build.forget()
    want = torch.nn.functional.rms_norm(x.double(), (dim,), weight.double(), 1e-6)
    limit = 1e-6 if x_dtype == torch.float32 else 2**-8  # one rounding
    torch.testing.assert_close(got.double(), want, rtol=limit, atol=1e-6)
    assert torch.equal(strided, got.transpose(0, 1))
    assert got.dtype == x_dtype


def test_with_gradient_it_is_the_same_to_rounding() -> None:
    x, weight = torch.randn(3, 64), torch.rand(64, requires_grad=True)
    with torch.no_grad():
        without = rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), without)
    assert rms_norm(x[:0], weight.detach(), 1e-6).shape == (0, 64)
