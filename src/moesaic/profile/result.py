"""From times to the answer: rows by part, shares of the machine's limits, the sparsity tax. Plain data, JSON as it stands.

The rows of a ``Side`` are those of the traced run of median length, so that they add up to it exactly; ``seconds`` is the
median of the plain runs, which is what the model really takes, and ``overhead`` what tracing added.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moesaic.profile.clock import Lap, Slot
from moesaic.profile.measure import Times

# Part -> what it is counted with in sentences and in the picture. Phases nobody here knows move rows.
MOVING = "grouping, gather, combine"
COMPUTING = "experts, feed-forward"
GROUPS = {
    "attention": "attention",
    "router": "router",
    "depth router": "router",
    "grouping": MOVING,
    "gather": MOVING,
    "combine": MOVING,
    "dispatch": MOVING,
    "head projections": COMPUTING,
    "products": COMPUTING,
    "activation": COMPUTING,
    "wait": COMPUTING,
    "experts": COMPUTING,
    "shared experts": COMPUTING,
    "feed-forward": COMPUTING,
    "head": "head",
    "loss": "loss",
    "clipping": "optimiser",
    "optimiser": "optimiser",
    "sampling": "sampling",
    "norm": "everything else",
    "embedding": "everything else",
    "other": "everything else",
}
ORDER = tuple(GROUPS)
ALL_GROUPS = (*dict.fromkeys(g for g in GROUPS.values()),)
_OUTSIDE = ("attention", "norm", "depth router")  # of a block, not of its feed-forward layer


@dataclass(frozen=True)
class Row:
    """One part: seconds in forward, backward and outside both, its share of the whole, and of the limit while it ran.

    Attributes:
        work: FLOPs it must compute, or bytes it must read; None where neither is counted.
        of_limit: the speed that makes, over the speed measured on this machine; None without ``work``.
    """

    part: str
    group: str
    seconds: float
    forward: float
    backward: float
    share: float
    work: float | None
    of_limit: float | None


@dataclass(frozen=True)
class Side:
    """One model doing one thing.

    Attributes:
        seconds, least, most: median, shortest and longest plain run.
        traced, overhead: the traced run shown in ``rows``, and that over the median plain one, less 1.
        own: seconds of the profiler's own bookkeeping, in none of the others.
        work, limit_seconds, of_limit: FLOPs or bytes it needs, seconds those take at the measured speed, share reached.
    """

    rows: tuple[Row, ...]
    seconds: float
    least: float
    most: float
    traced: float
    overhead: float
    own: float
    work: float
    limit_seconds: float
    of_limit: float

    def group(self, name: str) -> float:
        """Share of the traced run that this group's parts take."""
        return sum(row.share for row in self.rows if row.group == name)

    def limit_of(self, name: str) -> float | None:
        """Share of the limit that a group's parts reach together; None if nothing of it is counted."""
        rows = [row for row in self.rows if row.group == name]
        work, spent = sum(row.work or 0.0 for row in rows), sum(row.seconds for row in rows)
        return work / self.work * self.limit_seconds / spent if work and spent else None


@dataclass(frozen=True)
class Tax:
    """Time of the sparse model over that of its dense twin, median and range over rounds.

    Attributes:
        layers: seconds of all sparse layers over those of the feed-forward layers in their place, traced.
        by_layer: the same for each.
        work: FLOPs (bytes when decoding) of the sparse model over those of the twin: what a perfect ratio would be.
    """

    ratio: float
    least: float
    most: float
    layers: float
    by_layer: dict[int, float]
    work: float


def side(times: Times, work: Mapping[str, float], per_second: float) -> Side:
    """A model's times against a limit.

    Args:
        work: FLOPs or bytes by part, of the whole run.
        per_second: of these, as measured.
    """
    lap = middle(times.laps)
    parts: dict[str, dict[str, float]] = {}
    for slot, seconds in lap.parts.items():
        directions = parts.setdefault(slot.part, {})
        directions[slot.direction] = directions.get(slot.direction, 0.0) + seconds
    mine = _placed(work, parts)
    rows = []
    for part in sorted(parts, key=lambda part: ORDER.index(part) if part in ORDER else ORDER.index("combine")):
        spent = sum(parts[part].values())
        amount = mine.get(part)
        rows.append(
            Row(
                part=part,
                group=GROUPS.get(part, MOVING),
                seconds=spent,
                forward=parts[part].get("forward", 0.0),
                backward=parts[part].get("backward", 0.0),
                share=spent / lap.seconds,
                work=amount,
                of_limit=amount / per_second / spent if amount and spent else None,
            )
        )
    total = sum(work.values())
    median = statistics.median(times.plain)
    return Side(
        rows=tuple(rows),
        seconds=median,
        least=min(times.plain),
        most=max(times.plain),
        traced=lap.seconds,
        overhead=lap.seconds / median - 1,
        own=lap.own,
        work=total,
        limit_seconds=total / per_second,
        of_limit=total / per_second / median,
    )


def tax(sparse: Times, dense: Times, layers: Iterable[int], work: float) -> Tax:
    """What the sparse model takes over its twin; ``layers`` are the sparse ones."""
    ratios = [a / b for a, b in zip(sparse.plain, dense.plain, strict=True)]
    ours, theirs = _by_layer(middle(sparse.laps)), _by_layer(middle(dense.laps))
    pairs = {layer: (ours[layer], theirs[layer]) for layer in layers}
    return Tax(
        ratio=statistics.median(ratios),
        least=min(ratios),
        most=max(ratios),
        layers=sum(a for a, _ in pairs.values()) / sum(b for _, b in pairs.values()),
        by_layer={layer: a / b for layer, (a, b) in pairs.items()},
        work=work,
    )


def middle(laps: Sequence[Lap]) -> Lap:
    """The lap of median length (of an even number the shorter of the two in the middle)."""
    return sorted(laps, key=lambda lap: lap.seconds)[(len(laps) - 1) // 2]


def _by_layer(lap: Lap) -> dict[int, float]:
    """Seconds of each block's feed-forward or sparse layer."""
    seconds: dict[int, float] = {}
    for slot, spent in lap.parts.items():
        if slot.layer is not None and slot.part not in _OUTSIDE:
            seconds[slot.layer] = seconds.get(slot.layer, 0.0) + spent
    return seconds


def _placed(work: Mapping[str, float], parts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Work under the names of the parts that do it: the experts' is where most of their time goes, told apart or not."""
    placed = dict(work)
    experts = placed.pop("experts", 0.0) + placed.pop("mixing", 0.0)
    doing = [part for part in ("products", "experts", "dispatch") if part in parts]
    if experts and doing:
        placed[max(doing, key=lambda part: sum(parts[part].values()))] = experts
    return {part: amount for part, amount in placed.items() if part in parts}


__all__ = ["ALL_GROUPS", "COMPUTING", "GROUPS", "MOVING", "Row", "Side", "Slot", "Tax", "middle", "side", "tax"]
