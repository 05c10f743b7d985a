"""Means with 95% intervals over a few seeds, and paired differences: what may honestly be said of n runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, 97.5%, for 1..30 degrees of freedom; 1.96 beyond.
_T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean over runs.

    Attributes:
        mean: of the runs that have the figure. half: half the width of its 95% interval (Student's t); None for one run.
        count: runs it is over.
    """

    mean: float
    half: float | None
    count: int

    def record(self) -> dict[str, float | int | None]:
        """Plain JSON data."""
        return {"mean": self.mean, "interval": self.half, "runs": self.count}


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Mean and interval of the finite values; None if there is none."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return None
    count, mean = len(known), math.fsum(known) / len(known)
    if count == 1:
        return Estimate(mean, None, 1)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (count - 1))
    t = _T975[count - 2] if count <= len(_T975) + 1 else 1.96
    return Estimate(mean, t * deviation / math.sqrt(count), count)


def paired(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Estimate | None:
    """Estimate of ours - theirs over the pairs in which both are known (same seed, same data order)."""
    return estimate([a - b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None])


def median(values: Sequence[float | None]) -> float | None:
    """Median of the finite values; None if there is none."""
    known = sorted(v for v in values if v is not None and math.isfinite(v))
    if not known:
        return None
    middle = len(known) // 2
    return known[middle] if len(known) % 2 else (known[middle - 1] + known[middle]) / 2
