"""The tensors of a foreign checkpoint as they are meant, whatever form they are stored in.

Quantised ones are dequantised when they are read, one expert or strip of rows at a time: block-scaled FP8 (DeepSeek-V3) and
MXFP4 (gpt-oss). Of both the result is bf16 by default: these models are made for it, it holds E2M1 times a power of two as is,
and DeepSeek's own conversion makes it. Asked for fp32, E4M3 times its fp32 factor is not rounded to eight bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.lowbit import E8M0_NAN, MX_GROUP, from_block_fp8, from_mxfp4
from moesaic.checkpoint.shards import TensorInfo, read_tensor
from moesaic.checkpoint.untrusted import show
from moesaic.convert.keys import Keys
from moesaic.errors import CheckpointError, ConfigError

_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_FP8 = torch.float8_e4m3fn
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Stored:
    """One tensor of the checkpoint.

    Attributes:
        dtype, shape: as it will be read.
        raw: names of the stored tensors it is made of (a quantised one: its blocks and scales).
        load: reads it, in memory of its own.
        wide: reads a quantised one in fp32; None where ``load`` gives all there is.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    raw: tuple[str, ...]
    load: Callable[[], Tensor]
    wide: Callable[[], Tensor] | None = None

    def load_for(self, dtype: torch.dtype) -> Tensor:
        """Read it to be converted to ``dtype``: with no more rounding than that needs."""
        return self.load() if self.wide is None or dtype.itemsize < 4 else self.wide()


def stored_tensors(infos: Mapping[str, TensorInfo], quantisation: Any = None) -> dict[str, Stored]:
    """Every tensor of the checkpoint by its name, from the headers alone.

    ``quantisation``: the ``quantization_config`` of the checkpoint, if it has one. Raises ``ConfigError`` for one that is not
    understood to the last key, ``CheckpointError`` naming a tensor without its scales, scales without their tensor, or either
    of the wrong shape or type.
    """
    if quantisation is None:
        _refuse_unscaled(infos)
        return {name: _plain(name, info) for name, info in infos.items()}
    keys = _keys(quantisation)
    method = keys.text("quant_method")
    if method not in _METHODS:
        raise ConfigError(
            f"{keys.where}: weights quantised by {show(method)} are not read, only {' and '.join(_METHODS)}; use the "
            "checkpoint it was made from, or dequantise it with the tool that made it."
        )
    return _METHODS[method](infos, keys)


def _keys(quantisation: Any) -> Keys:
    if not isinstance(quantisation, dict):
        raise ConfigError(f"quantization_config must be a table of settings, not {show(quantisation)}.")
    keys = Keys(quantisation, "quantization_config")
    # Which tensors are quantised shows in their types; the others say how somebody else computes with them.
    keys.carry(
        "modules_to_not_convert", "ignored_layers", "modules_to_convert", "dequantize", "_load_in_8bit", "_load_in_4bit"
    )
    return keys


def _plain(name: str, info: TensorInfo) -> Stored:
    return Stored(info.dtype, info.shape, (name,), partial(read_tensor, info))


def _refuse_unscaled(infos: Mapping[str, TensorInfo]) -> None:
    for name, info in infos.items():
        if info.dtype in _EIGHT_BITS:
            raise CheckpointError(
                f"{info.file}: the tensor {show(name)} is {info.dtype}, and no scale says what its numbers stand for."
            )


def _block_fp8(infos: Mapping[str, TensorInfo], keys: Keys) -> dict[str, Stored]:
    keys.fixed("fmt", "e4m3")
    keys.fixed(
        "activation_scheme", "dynamic"
    )  # how activations are rounded when it runs in FP8, which it does not here
    keys.fixed("scale_fmt", "float", "ue8m0")  # what values the fp32 factors were rounded to
    keys.fixed("expert_dtype", "fp8")
    block = keys.wholes("weight_block_size")
    keys.finish()
    if len(block) != 2 or min(block) < 1:
        raise ConfigError(f"{keys.where}: weight_block_size must be two numbers of at least 1, not {list(block)}.")
    found = {}
    for name, info in infos.items():
        if info.dtype == _FP8:
            scale = infos.get(name + _SCALE)
            if scale is None:
                raise CheckpointError(f"{info.file}: the tensor {show(name)} lacks its scale {show(name + _SCALE)}.")
            found[name] = _scaled(name, info, scale, (block[0], block[1]))
        elif not name.endswith(_SCALE):
            found[name] = _plain(name, info)
        elif name.removesuffix(_SCALE) not in infos or infos[name.removesuffix(_SCALE)].dtype != _FP8:
            raise CheckpointError(
                f"{info.file}: the scale {show(name)} belongs to no FP8 tensor; was its tensor lost or already dequantised?"
            )
    _refuse_unscaled({name: infos[name] for name in found if infos[name].dtype != _FP8})
    return found


def _scaled(name: str, info: TensorInfo, scale: TensorInfo, block: tuple[int, int]) -> Stored:
    if len(info.shape) < 2:
        raise CheckpointError(
            f"{info.file}: the FP8 tensor {show(name)} has the shape {list(info.shape)}, not rows and columns."
        )
    *before, rows, columns = info.shape
    expected = (*before, -(-rows // block[0]), -(-columns // block[1]))
    if scale.shape != expected or scale.dtype != torch.float32:
        raise CheckpointError(
            f"{scale.file}: the scale {show(name + _SCALE)} is {scale.dtype} {list(scale.shape)}; blocks of {list(block)} in "
            f"{list(info.shape)} need torch.float32 {list(expected)}."
        )

    def load(dtype: torch.dtype) -> Tensor:
        return from_block_fp8(read_tensor(info), read_tensor(scale), block, dtype)

    both = (name, name + _SCALE)
    return Stored(torch.bfloat16, info.shape, both, partial(load, torch.bfloat16), partial(load, torch.float32))


def _mxfp4(infos: Mapping[str, TensorInfo], keys: Keys) -> dict[str, Stored]:
    keys.finish()
    _refuse_unscaled(infos)
    found = {}
    for name, info in infos.items():
        stem = name.removesuffix(_BLOCKS)
        if name != stem:
            scales = infos.get(stem + _SCALES)
            if scales is None:
                raise CheckpointError(f"{info.file}: the blocks {show(name)} lack their scales {show(stem + _SCALES)}.")
            if stem in infos:
                raise CheckpointError(
                    f"{info.file}: {show(stem)} is there both quantised and plain; which is meant is unclear."
                )
            found[stem] = _packed(stem, info, scales)
        elif not name.endswith(_SCALES):
            found[name] = _plain(name, info)
        elif name.removesuffix(_SCALES) + _BLOCKS not in infos:
            raise CheckpointError(f"{info.file}: the scales {show(name)} belong to no blocks; were these lost?")
    return found


def _packed(stem: str, blocks: TensorInfo, scales: TensorInfo) -> Stored:
    """Theirs: blocks (E, R, G, 16) and scales (E, R, G), of experts whose columns lie in memory one after the other. As meant:
    (E, G * 32, R).
    """
    if len(blocks.shape) != 4 or blocks.shape[3] != MX_GROUP // 2 or blocks.dtype != torch.uint8:
        raise CheckpointError(
            f"{blocks.file}: the blocks {show(stem + _BLOCKS)} are {blocks.dtype} {list(blocks.shape)}, not torch.uint8 "
            f"[experts, rows, groups, {MX_GROUP // 2}]."
        )
    if scales.shape != blocks.shape[:3] or scales.dtype != torch.uint8:
        raise CheckpointError(
            f"{scales.file}: the scales {show(stem + _SCALES)} are {scales.dtype} {list(scales.shape)}, not torch.uint8 "
            f"{list(blocks.shape[:3])} as their blocks."
        )
    experts, rows, groups, _ = blocks.shape

    def load() -> Tensor:
        out_ECR = torch.empty(experts, groups * MX_GROUP, rows, dtype=torch.bfloat16)
        for expert in range(experts):
            exponents = read_tensor(_slice(scales, expert))
            if (exponents == E8M0_NAN).any():
                raise CheckpointError(
                    f"{scales.file}: the scales {show(stem + _SCALES)} of expert {expert} hold {E8M0_NAN}, which is no number."
                )
            out_ECR[expert] = from_mxfp4(read_tensor(_slice(blocks, expert)), exponents).t()
        return out_ECR

    return Stored(torch.bfloat16, (experts, groups * MX_GROUP, rows), (stem + _BLOCKS, stem + _SCALES), load)


def _slice(info: TensorInfo, index: int) -> TensorInfo:
    """One entry of its first dimension, in the same file."""
    size = info.nbytes // info.shape[0]
    return replace(info, shape=info.shape[1:], start=info.start + index * size)


_METHODS: dict[str, Callable[[Mapping[str, TensorInfo], Keys], dict[str, Stored]]] = {
    "fp8": _block_fp8,
    "mxfp4": _mxfp4,
}
