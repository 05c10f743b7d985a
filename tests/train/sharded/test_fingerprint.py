"""Fingerprints: a loop over elements in plain Python is the specification; parts add up; changes show."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesaic.train.sharded import fingerprint as module
from moesaic.train.sharded.fingerprint import FIRST, GOLDEN, SECOND, add, fingerprint
from moesaic.train.sharded.regions import all_of, slices

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def slow(x: Tensor) -> int:
    """Element by element, with Python's whole numbers."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = 0
    for i, bits in enumerate(x.contiguous().view(integers[x.element_size()]).flatten().tolist()):
        word = (bits + (i + 1) * GOLDEN) % 2**64
        word = word * FIRST % 2**64
        word ^= word >> 32
        word = word * SECOND % 2**64
        word ^= word >> 29
        total += word
    return total % 2**64


def whole(x: Tensor) -> int:
    return fingerprint(x, all_of(x.shape), x.shape)


def some(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 100
    return x > 0 if dtype is torch.bool else x.to(dtype)


def test_one_number_by_hand() -> None:
    bits = struct.unpack("<i", struct.pack("<f", 1.0))[0]
    assert bits == 0x3F800000
    word = ((bits + GOLDEN) * FIRST) % 2**64
    word ^= word >> 32
    word = word * SECOND % 2**64
    assert whole(torch.tensor(1.0)) == word ^ (word >> 29) == 0xD3DA44550BDC3E9A


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_loop(dtype: torch.dtype) -> None:
    for shape in ((), (1,), (7, 5), (3, 4, 5), (0, 3)):
        x = some(shape, dtype)
        assert whole(x) == slow(x)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 0.0]).to(dtype)
    assert whole(special) == slow(special)


def test_chunks_are_no_part_of_the_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    x = some((6, 1, 50, 3), torch.float32)
    found = {whole(x)}
    for chunk in (1, 2, 7, 149, 151, 900):
        monkeypatch.setattr(module, "_CHUNK", {"cpu": chunk})
        found.add(whole(x))
    assert found == {slow(x)}


@given(st.data())
def test_parts_add_up(data: st.DataObject) -> None:
    x = some((4, 6, 5), data.draw(st.sampled_from(DTYPES)))
    dim = data.draw(st.integers(0, 2))
    cuts = sorted({0, x.shape[dim], *data.draw(st.lists(st.integers(0, x.shape[dim]), max_size=3))})
    regions = [
        tuple((low, high) if d == dim else (0, size) for d, size in enumerate(x.shape)) for low, high in pairwise(cuts)
    ]
    assert add(fingerprint(x[slices(region)], region, x.shape) for region in reversed(regions)) == whole(x)


@given(st.data())
def test_a_flipped_bit_and_exchanged_elements_show(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64]))
    x = some((5, 7), dtype)
    i = data.draw(st.integers(0, x.numel() - 1))
    changed = x.clone()
    flat = changed.view(torch.uint8).flatten()
    bit = data.draw(st.integers(0, 8 * x.element_size() - 1))
    flat[i * x.element_size() + bit // 8] ^= 1 << (bit % 8)
    assert whole(changed) != whole(x)
    j = data.draw(st.integers(0, x.numel() - 1))
    order = torch.arange(x.numel())
    order[i], order[j] = j, i
    exchanged = x.flatten()[order].view(x.shape)
    assert (whole(exchanged) == whole(x)) == torch.equal(exchanged, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_structured_changes_show(dtype: torch.dtype) -> None:
    """What a checksum that is linear in bits or places lets pass."""
    x = torch.eye(64, dtype=dtype)
    swapped = x[[1, 0, *range(2, 64)]]
    assert len({whole(x), whole(swapped), whole(x.flip(0)), whole(x.roll(1024)), whole(x * 2), whole(-x)}) == 6
    ones = torch.ones(4096, dtype=dtype)
    ones[0] = 2
    assert len({whole(ones.roll(k)) for k in (0, 1, 1024, 2048, 3072)}) == 5
    assert whole(some((6, 6), dtype)) != whole(some((6, 6), dtype).T)


def test_memory_that_is_not_contiguous() -> None:
    x = some((8, 6), torch.float32)
    assert whole(x.T) == slow(x.T.contiguous())
    region = ((2, 7), (1, 4))
    assert fingerprint(x[2:7, 1:4], region, x.shape) == fingerprint(x[2:7, 1:4].contiguous(), region, x.shape)
