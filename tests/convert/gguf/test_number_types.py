"""Types of tensors, sizes and bytes, by hand and against the package's own table."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moesaic.convert.gguf.number_types import BLOCKS, FILE_TYPES, KINDS, Kind, bytes_of, encode, type_of
from moesaic.errors import MoesaicError

gguf = pytest.importorskip("gguf")


def _bytes(tensor: torch.Tensor, kind: str) -> bytes:
    return b"".join(encode(tensor, kind, "t", gguf))


def test_blocks_and_file_types_are_those_of_the_package() -> None:
    assert {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in BLOCKS} == BLOCKS
    names = {"f32": "ALL_F32", "mxfp4": "MOSTLY_MXFP4_MOE"}
    assert {kind: gguf.LlamaFileType[names.get(kind, f"MOSTLY_{kind.upper()}")] for kind in KINDS} == FILE_TYPES


@pytest.mark.parametrize(
    ("name", "shape", "kind", "exact", "expected"),
    [
        ("blk.0.attn_q.weight", (8, 64), "q4_0", False, ("Q4_0", False)),
        ("blk.0.attn_q.weight", (8, 48), "q4_0", False, ("F16", True)),
        ("blk.0.attn_q.weight", (8, 48), "bf16", False, ("BF16", False)),
        ("blk.0.ffn_gate_inp.weight", (8, 64), "q8_0", True, ("F32", False)),
        ("output_norm.weight", (64,), "f16", False, ("F32", False)),
        ("blk.0.ffn_up_exps.weight", (4, 8, 64), "mxfp4", False, ("MXFP4", False)),
        ("blk.0.ffn_up_exps.weight", (4, 8, 40), "mxfp4", False, ("F16", True)),
        ("blk.0.attn_q.weight", (8, 64), "mxfp4", False, ("BF16", False)),
    ],
)
def test_type_of(name: str, shape: tuple[int, ...], kind: Kind, exact: bool, expected: tuple[str, bool]) -> None:
    assert type_of(name, shape, kind, exact) == expected


def test_bytes_of_quantised_rows() -> None:
    assert bytes_of((3, 64), "Q8_0") == 3 * 2 * 34
    assert bytes_of((2, 3, 64), "Q4_0") == 2 * 3 * 2 * 18
    assert bytes_of((5,), "F32") == 20


def test_q8_0_by_hand() -> None:
    """One block: d = 127 / 127 = 1 as fp16, then the numbers themselves as int8."""
    row = torch.zeros(1, 32)
    row[0, :4] = torch.tensor([127.0, -3.0, 2.4, -0.6])
    data = _bytes(row, "Q8_0")
    assert data[:2] == np.float16(1).tobytes()
    assert np.frombuffer(data[2:], np.int8).tolist() == [127, -3, 2, -1] + [0] * 28


def test_q4_0_by_hand() -> None:
    """d = -8 / -8 = 1; number i of the first half shares a byte with number i of the second, the first in the low bits."""
    row = torch.zeros(1, 32)
    row[0, 0], row[0, 1], row[0, 16] = -8.0, 3.0, 5.0
    data = _bytes(row, "Q4_0")
    assert data[:2] == np.float16(1).tobytes()
    assert list(data[2:]) == [(5 + 8) << 4 | 0, 8 << 4 | (3 + 8)] + [8 << 4 | 8] * 14


def test_mxfp4_numbers_come_back_exactly() -> None:
    """A checkpoint stored in MXFP4 (gpt-oss) loses nothing by being read, exported and read again."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    generator = torch.Generator().manual_seed(0)
    picked = values[torch.randint(8, (16, 64), generator=generator)] * (
        torch.randint(2, (16, 64), generator=generator) * 2 - 1
    )
    scale = 2.0 ** torch.randint(-12, 4, (16, 2), generator=generator).repeat_interleave(32, dim=1)
    data = np.frombuffer(_bytes(picked * scale, "MXFP4"), np.uint8).reshape(16, -1)
    back = gguf.dequantize(data, gguf.GGMLQuantizationType.MXFP4)
    assert torch.equal(torch.from_numpy(back), picked * scale)


def test_bf16_and_fp32_pass_bit_for_bit() -> None:
    tensor = torch.randn(7, 33, dtype=torch.bfloat16)
    assert _bytes(tensor, "BF16") == tensor.view(torch.int16).numpy().tobytes()
    wide = torch.randn(7, 33)
    assert _bytes(wide, "F32") == wide.numpy().tobytes()


def test_pieces_do_not_change_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(3, 64, 20).transpose(1, 2)  # experts are not contiguous
    whole = {kind: _bytes(tensor, kind) for kind in BLOCKS}
    monkeypatch.setattr("moesaic.convert.gguf.number_types._PIECE", 64 * 7)
    assert {kind: _bytes(tensor, kind) for kind in BLOCKS} == whole
    assert len(list(encode(tensor, "F32", "t", gguf))) == 3 * 3


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(kind: str, bad: float) -> None:
    tensor = torch.ones(2, 32)
    tensor[1, 5] = bad
    with pytest.raises(MoesaicError, match="The tensor t holds NaN or infinity"):
        _bytes(tensor, kind)


def test_a_number_too_large_for_f16_is_refused_by_name() -> None:
    with pytest.raises(MoesaicError, match=r"The tensor t holds 70000, more than F16 can .*bf16 or f32"):
        _bytes(torch.full((2, 32), 7e4), "F16")
    _bytes(torch.full((2, 32), 65504.0), "F16")
