"""Quick measured speeds of this machine: matrix multiply in a number format, and reading memory.

>>> matmul_gflops(torch.bfloat16)   # about 0.15 s
>>> read_gb_per_s(256 << 20)
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Clock = Callable[[], float]


def best_rate(run: Callable[[], object], amount: float, budget_s: float, clock: Clock = time.perf_counter) -> float:
    """``amount`` per second of the fastest call of ``run`` within about ``budget_s`` seconds, after one warm-up call.

    The fastest, not the mean: other work on the machine only ever makes a call slower. Always times at least one call.
    """
    run()
    best, end = float("inf"), clock() + budget_s
    while True:
        start = clock()
        run()
        stop = clock()
        best = min(best, stop - start)
        if stop >= end:
            # A clock too coarse to see one call says 0; one nanosecond keeps the answer finite.
            return amount / max(best, 1e-9)


def matmul_gflops(dtype: torch.dtype, budget_s: float = 0.15, device: str = "cpu") -> float:
    """10^9 floating-point operations a second of a square ``dtype`` product (2 n^3 operations), on all torch threads.

    The size doubles from 128 up to 1024 (4096 on a GPU) while one product stays short, so that a format the machine
    only emulates does not take minutes.
    """
    n, largest = 128, 1024 if device == "cpu" else 4096
    while True:
        a_NN = torch.full((n, n), 0.5, dtype=dtype, device=device)

        def product(a_NN: torch.Tensor = a_NN) -> None:
            a_NN @ a_NN
            _wait(device)

        # One slow trial may be another program's doing; the best of a few is the machine's.
        if n == largest or 1 / best_rate(product, 1, budget_s / 8) > budget_s / 32:
            return best_rate(product, 2 * n**3, budget_s) / 1e9
        n *= 2


def read_gb_per_s(num_bytes: int = 256 << 20, budget_s: float = 0.15, device: str = "cpu") -> float:
    """10^9 bytes a second that summing an fp32 vector of ``num_bytes`` reads, on all torch threads.

    ``num_bytes`` should be several times the last-level cache; what the cache holds counts as memory otherwise.
    """
    x_N = torch.ones(num_bytes // 4, device=device)

    def total() -> None:
        x_N.sum()
        _wait(device)

    return best_rate(total, x_N.numel() * 4, budget_s) / 1e9


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
