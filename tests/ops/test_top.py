"""The selection in C against the beginning of a stable sort: ties, zeros of both signs, NaN, infinities, every width."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moesaic.ops.kernel import build
from moesaic.ops.top import top_k


@pytest.fixture(params=build.supported())
def isa(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MOESAIC_KERNEL", request.param)
    build.forget()
    yield request.param
    build.forget()


@pytest.mark.parametrize("width", [1, 2, 7, 8, 15, 16, 17, 64, 100, 513])
def test_it_is_the_beginning_of_a_stable_sort(isa: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    few = torch.randint(-3, 4, (50, width), generator=generator).float()  # ties everywhere
    signs = torch.where(torch.rand(50, width, generator=generator) < 0.5, -0.0, 0.0)
    odd = few.clone()
    odd[odd == 3] = torch.nan
    odd[odd == -3] = -torch.inf
    odd[odd == 2] = torch.inf
    for scores_TE in (torch.randn(50, width, generator=generator), few, signs, odd, torch.full((3, width), torch.nan)):
        for k in {1, min(8, width), min(64, width)}:
            want_TK = torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[:, :k]
            assert torch.equal(top_k(scores_TE, k), want_TK)


def test_other_inputs_take_the_sort() -> None:
    scores_TE = torch.randn(4, 100, dtype=torch.float64)
    assert torch.equal(top_k(scores_TE, 3), scores_TE.sort(descending=True, stable=True).indices[:, :3])
    assert top_k(torch.randn(4, 100), 65).shape == (4, 65)
    assert top_k(torch.randn(0, 8), 2).shape == (0, 2)
    strided_TE = torch.randn(100, 4).T
    assert torch.equal(top_k(strided_TE, 5), strided_TE.sort(descending=True, stable=True).indices[:, :5])
