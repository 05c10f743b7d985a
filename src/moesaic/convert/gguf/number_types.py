"""GGUF's number types: which one a tensor gets, how many bytes that is, and the bytes, a piece at a time.

| type | block | bytes | value |
|---|---|---|---|
| F32, F16, BF16 | 1 | 4, 2, 2 | itself |
| Q8_0 | 32 | 34 | ``d * q``, q in -127..127, d = max abs / 127 as fp16 |
| Q4_0 | 32 | 18 | ``d * (q - 8)``, q in 0..15, d = the value of largest magnitude / -8 as fp16 |
| MXFP4 | 32 | 17 | ``2^(e - 127) * q``, q one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moesaic.errors import MoesaicError

Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "mxfp4"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# type -> (numbers in a block, its bytes)
BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "MXFP4": (32, 17)}
# kind -> ``general.file_type``
FILE_TYPES: dict[Kind, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32, "mxfp4": 38}

_F16_MOST = 65504.0
_PIECE = 1 << 22  # numbers converted at once, so that the fp32 copy stays small


def type_of(name: str, shape: tuple[int, ...], kind: Kind, exact: bool) -> tuple[str, bool]:
    """The type of a GGUF tensor, and whether it is F16 only because its rows are no whole number of blocks.

    "mxfp4" stores experts so, and the rest in BF16, as gpt-oss does.
    """
    if exact or len(shape) < 2:
        return "F32", False
    wanted = kind.upper()
    if kind == "mxfp4" and "_exps." not in name:
        wanted = "BF16"
    if shape[-1] % BLOCKS[wanted][0]:
        return "F16", True
    return wanted, False


def bytes_of(shape: tuple[int, ...], kind: str) -> int:
    """Size of the data."""
    block, size = BLOCKS[kind]
    return int(torch.Size(shape).numel()) // block * size


def encode(tensor: Tensor, kind: str, name: str, gguf: Any) -> Iterator[memoryview]:
    """The bytes of ``tensor`` in order, rows along its last dimension, a few million numbers at a time.

    Raises ``MoesaicError`` naming the tensor that holds NaN or infinity, or a number too large for F16.
    """
    number_type = gguf.GGMLQuantizationType[kind]
    for numbers in _checked(tensor, kind, name):
        yield gguf.quantize(numbers.numpy(), number_type).reshape(-1).view("uint8").data


def check_numbers(tensor: Tensor, kind: str, name: str) -> None:
    """Raise what ``encode`` would."""
    for _ in _checked(tensor, kind, name):
        pass


def _checked(tensor: Tensor, kind: str, name: str) -> Iterator[Tensor]:
    """fp32, piece by piece, each found to hold nothing but numbers that ``kind`` has."""
    for piece in _pieces(tensor.detach()):
        numbers = piece.to(device="cpu", dtype=torch.float32).contiguous()
        most = float(numbers.abs().max()) if numbers.numel() else 0.0
        if not most < float("inf"):
            raise MoesaicError(f"The tensor {name} holds NaN or infinity, so nothing was exported.")
        if kind == "F16" and most > _F16_MOST:
            raise MoesaicError(
                f"The tensor {name} holds {most:g}, more than F16 can ({_F16_MOST:g}); export as bf16 or f32."
            )
        yield numbers


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Parts of at most ``_PIECE`` numbers, or one row."""
    if tensor.dim() == 3:
        for matrix in tensor:
            yield from _pieces(matrix)
    elif tensor.dim() < 2:
        yield tensor
    else:
        yield from tensor.split(max(1, _PIECE // max(1, tensor.shape[1])))
