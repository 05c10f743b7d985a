"""Large pages for large weights: a token reads a few experts somewhere in gigabytes, and with pages of 4 KiB finding each page
costs a read of memory of its own (a quarter of the time of decoding a 1.3B model). Linux only; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import cast

from torch import Tensor

_HUGEPAGE, _COLLAPSE = 14, 25  # of madvise(2)
_LEAST = 4 << 20  # bytes below which it is not worth a call


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return cast(Callable[[int, int, int], int], function)


def prefer_huge(tensor: Tensor, written: bool = False) -> Tensor:
    """Ask for large pages under a tensor on the processor; ``written``: move what it already holds there too.

    Only ever a wish: systems that refuse change nothing but speed. Returns the tensor.
    """
    size = tensor.numel() * tensor.element_size()
    madvise = _madvise()
    if madvise is None or size < _LEAST or tensor.device.type != "cpu" or tensor.is_meta:
        return tensor
    if not tensor.data_ptr():  # FSDP's: the numbers lie in a tensor inside
        return tensor
    first = -(-tensor.data_ptr() // 4096) * 4096
    length = (tensor.data_ptr() + size) // 4096 * 4096 - first
    if madvise(first, length, _HUGEPAGE) == 0 and written:
        madvise(first, length, _COLLAPSE)
    return tensor
