"""C kernels for the processor, compiled at first use with the system's compiler; without one, everything runs on PyTorch alone.

>>> status()
Status(in_use=True, isa='avx512_bf16', threads=2, reason='compiled with gcc for avx512_bf16')

``MOESAIC_KERNEL`` in the environment chooses: "auto" (default), "off", or an instruction set of ``build.FLAGS`` by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesaic.ops.kernel.build import available


@dataclass(frozen=True)
class Status:
    """Whether the kernels run here, for which instruction set, on how many threads, and why (not)."""

    in_use: bool
    isa: str | None
    threads: int | None
    reason: str


def status() -> Status:
    """The state of the kernels, compiling them if nobody has yet (a few seconds, once per machine).

    Raises ``ConfigError`` if ``MOESAIC_KERNEL`` names no instruction set, or one this processor lacks.
    """
    library = available()
    if library.functions is None:
        return Status(False, None, None, library.reason)
    threads = torch.get_num_threads() if library.threaded else 1
    return Status(True, library.isa, threads, library.reason)


__all__ = ["Status", "status"]
