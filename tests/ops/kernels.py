"""The back ends that can run here, and the C kernel of one instruction set for the length of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from moesaic.ops.kernel import build

HAVE_COMPILER = build.find_compiler() is not None
ISAS = build.supported() if HAVE_COMPILER else []
# (name for tests, back end, instruction set)
BACKENDS = [("tiles", "off"), *(("kernel", isa) for isa in ISAS)]
KERNELS = [pytest.param(("kernel", isa), id=isa) for isa in ISAS] or [
    pytest.param(None, marks=pytest.mark.skip(reason="needs a C compiler"))
]
needs_compiler = pytest.mark.skipif(not HAVE_COMPILER, reason="needs a C compiler")


@contextmanager
def using(isa: str) -> Iterator[None]:
    """``MOESAIC_KERNEL=isa`` ("off" for none) until the block ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESAIC_KERNEL", isa)
        build.forget()
        yield
    build.forget()


def every_back_end() -> list[tuple[str, str, torch.dtype, torch.dtype]]:
    """(back end, instruction set, dtype of tokens, dtype of weights) of all that can be combined."""
    wide, short = torch.float32, torch.bfloat16
    pairs = [(wide, wide), (short, short), (short, wide)]
    found = [("tiles", "off", torch.float64, torch.float64), *(("tiles", "off", *pair) for pair in pairs)]
    return found + [("kernel", isa, *pair) for isa in ISAS for pair in pairs]


def id_of(case: tuple[str, str, torch.dtype, torch.dtype]) -> str:
    backend, isa, dtype, w_dtype = case
    short = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
    return f"{isa if backend == 'kernel' else backend}-{short[dtype]}-{short[w_dtype]}"
