"""Pipeline schedules in numbers: which layers a rank holds, how many micro-batches it keeps at once, how long it idles.

"1f1b" and "interleaved" are what moesaic runs (``torch.distributed.pipelining``). "dualpipe" is DeepSeek-V3's, for forecasts
alone: stage i lies on ranks i and P - 1 - i, so every rank holds two (its report, table 2).

Legend: P ranks along pp, M micro-batches of a step, V stages of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Pipeline = Literal["1f1b", "interleaved", "dualpipe"]


@dataclass(frozen=True)
class Stage:
    """A stage on one rank.

    Attributes:
        number: among all stages, in the order of the layers.
        layers: the blocks it holds.
        micro_batches: of a step that pass it here; of DualPipe's two copies of a stage each takes half.
        kept: micro-batches whose activations it keeps at once, at most; a mean where stages of a rank share a maximum.
        first, last: whether it holds the embedding, and the final norm and head.
    """

    number: int
    layers: range
    micro_batches: Fraction
    kept: Fraction
    first: bool
    last: bool


def even_stages(num_layers: int, stages: int) -> tuple[range, ...]:
    """Consecutive layers, as many in every stage; training cuts by what layers cost (``parallel/stages.py``)."""
    return tuple(range(s * num_layers // stages, (s + 1) * num_layers // stages) for s in range(stages))


def stages_of(ranges: Sequence[range], P: int, accumulate: int, pipeline: Pipeline) -> tuple[tuple[Stage, ...], ...]:
    """The stages of every rank along pp, from the layers of every stage."""
    total = len(ranges)
    V = total // P
    found = []
    for rank in range(P):
        numbers = [rank + v * P for v in range(V)] if pipeline != "dualpipe" else [rank, P - 1 - rank]
        kept = Fraction(kept_at_once(pipeline, P, rank, accumulate, V), len(numbers))
        passing = Fraction(accumulate, 2 if pipeline == "dualpipe" else 1)
        found.append(tuple(Stage(s, ranges[s], passing, kept, s == 0, s == total - 1) for s in numbers))
    return tuple(found)


def kept_at_once(pipeline: Pipeline, P: int, rank: int, M: int, V: int = 1) -> int:
    """Forwards of single stages that ``rank`` has done and not yet undone, at most.

    1F1B: the first stage runs ahead by all others; with fewer micro-batches than ranks all forwards come first. Interleaved, as
    torch counts its warm-up: ``(V - 1) * R + 2 * (P - 1 - rank)`` forwards and one more, R being ``M / max(1, M // P)``.
    DualPipe: P + 1.
    """
    if pipeline == "dualpipe":
        return min(P + 1, M)
    if pipeline == "1f1b":
        return M if M < P else P - rank
    ahead = (V - 1) * (M // max(1, M // P)) + 2 * (P - 1 - rank)
    return min(ahead + 1, M * V)


def bubble(pipeline: Pipeline, P: int, M: int, V: int = 1) -> float:
    """Share of a step in which a rank waits for others to fill and drain the pipeline, all stages taking equally long.

    1F1B and interleaved: ``(P - 1) / (V M + P - 1)``. DualPipe: ``(P/2 - 1)(F&B + B - 3W)`` over it and ``M (F + B)``, with a
    backward of two forwards (B = 2F), half of it for weights (W = F), and nothing gained by overlapping (F&B = F + B).
    """
    if P == 1:
        return 0.0
    if pipeline == "dualpipe":
        idle = (P / 2 - 1) * (3 + 2 - 3)
        return idle / (idle + 3 * M)
    return (P - 1) / (V * M + P - 1)
