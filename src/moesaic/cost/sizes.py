"""Bytes of weights, of keys and values, and of the state of training, from counts alone (fieldguide 7.3).

>>> counts = count_config(preset("mixtral-8x7b"))
>>> weight_bytes(counts, "bf16")                             # 93.4e9
>>> cache_of(preset("deepseek-v3"), 4096).per_token          # 61 layers of (512 + 64) numbers of 2 bytes
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from moesaic.cost.count import ParameterCount
from moesaic.cost.traffic import cache_width
from moesaic.models.config import ModelConfig

Format = Literal["fp32", "fp16", "bf16", "fp8", "int4", "mxfp4"]


@dataclass(frozen=True)
class Storage:
    """How a format keeps a number.

    Attributes:
        bits: of one number, its share of a scale included.
        payload: of one number without scales.
        parts: the parts it is used for, the others staying bf16; None is all. Routers stay fp32 in any case.
        words: what of it is to be known.
    """

    bits: Fraction
    payload: int
    parts: frozenset[str] | None
    words: str


_MATRICES = frozenset({"attention", "feed-forward", "experts", "shared experts", "head projections"})
STORAGE: dict[str, Storage] = {
    "fp32": Storage(Fraction(32), 32, None, ""),
    "fp16": Storage(Fraction(16), 16, None, ""),
    "bf16": Storage(Fraction(16), 16, None, ""),
    "fp8": Storage(
        8 + Fraction(32, 128 * 128),
        8,
        _MATRICES,
        "an fp32 scale per 128 x 128; embeddings, head, norms bf16",
    ),
    "int4": Storage(4 + Fraction(16, 128), 4, _MATRICES, "a 16-bit scale per 128; embeddings, head, norms bf16"),
    "mxfp4": Storage(
        4 + Fraction(8, 32),
        4,
        frozenset({"experts"}),
        "experts alone, an 8-bit scale per 32; all else bf16",
    ),
}
_FP32_PARTS = ("router", "depth router")
# Of mixed precision training with AdamW: bf16 weight, fp32 master copy and two moments; the gradient on top, bf16 or fp32.
_STATE, _BF16_GRADIENT, _FP32_GRADIENT = 2 + 4 + 4 + 4, 2, 4
# As moesaic trains: fp32 parameter, gradient and two moments, whatever activations are in.
_OWN_STATE = 4 + 4 + 4 + 4


def weight_bytes(counts: ParameterCount, form: Format, *, scales: bool = True) -> int:
    """Bytes of all weights kept in a format. An estimate for formats with scales: rows that do not fill a block are not seen.

    ``scales``: whether to count those.
    """
    storage = STORAGE[form]
    bits = Fraction(0)
    for part, number in counts.parts.items():
        if part in _FP32_PARTS:
            bits += 32 * number
        elif storage.parts is None or part in storage.parts:
            bits += (storage.bits if scales else storage.payload) * number
        else:
            bits += 16 * number
    return round(bits / 8)


@dataclass(frozen=True)
class CacheSize:
    """Keys and values of one sequence, in bytes.

    Attributes:
        per_token: what one more token adds while no window is full.
        needed: for the whole context, of windowed layers only what their window reaches.
        held: what moesaic's cache takes, which keeps windowed layers whole.
    """

    per_token: int
    needed: int
    held: int


def cache_of(config: ModelConfig, context: int, itemsize: int = 2) -> CacheSize:
    """The cache of a sequence of ``context`` tokens, in numbers of ``itemsize`` bytes."""
    width = cache_width(config) * itemsize
    reached = sum(min(context, config.window(layer) or context) for layer in range(config.num_layers))
    return CacheSize(config.num_layers * width, reached * width, config.num_layers * context * width)


@dataclass(frozen=True)
class TrainingSize:
    """Bytes of weights, gradients and AdamW's state, activations left out.

    Attributes:
        mixed: bf16 weights and gradients, fp32 master copy and moments: 16 bytes a parameter.
        mixed_fp32_gradient: the same with fp32 gradients: 18.
        own: everything fp32, as ``moesaic train`` keeps it: 16.
    """

    mixed: int
    mixed_fp32_gradient: int
    own: int


def training_of(parameters: int) -> TrainingSize:
    """The state of training so many parameters."""
    return TrainingSize(
        parameters * (_STATE + _BF16_GRADIENT), parameters * (_STATE + _FP32_GRADIENT), parameters * _OWN_STATE
    )
