"""The tensors of a foreign checkpoint as they are meant, whatever form they are stored in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.shards import TensorInfo, read_tensor


@dataclass(frozen=True)
class Stored:
    """One tensor of the checkpoint.

    Attributes:
        dtype, shape: as it will be read.
        raw: names of the stored tensors it is made of (a quantised one: its blocks and scales).
        load: reads it, in memory of its own.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    raw: tuple[str, ...]
    load: Callable[[], Tensor]


def stored_tensors(infos: Mapping[str, TensorInfo], quantisation: Mapping[str, Any] | None = None) -> dict[str, Stored]:
    """Every tensor of the checkpoint by its name, from the headers alone.

    ``quantisation``: the ``quantization_config`` of the checkpoint, if it has one.
    """
    return {name: Stored(info.dtype, info.shape, (name,), partial(read_tensor, info)) for name, info in infos.items()}
