"""What a rank holds of a tensor, as a value: boxes of the logical tensor and where they lie in the local one.

Expert parallelism, tensor parallelism, replicas and FSDP are all cuts. Each is a function ``Held -> Held``; gradient norms,
checkpoints, migration and consolidation read the result and know nothing of how it came about.

>>> held = whole("blocks.3.ffn.experts.w_in", (8, 16, 64), "experts")
>>> held = rows(held, (4, 5, 0))         # experts 4, 5 and a copy of 0, in this order
>>> held = keep(held, 1, 0, 8, "edp")    # of each the first 8 of 16 local rows: one rank's part under FSDP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moesaic.layout import Axis

Ranges = tuple[tuple[int, int], ...]  # (start, stop) per dimension
Kind = Literal["dense", "experts"]


@dataclass(frozen=True)
class Box:
    """A box of the logical tensor and the box of the local tensor that holds it; both of the same extents."""

    logical: Ranges
    local: Ranges

    @property
    def extents(self) -> tuple[int, ...]:
        """Size per dimension."""
        return tuple(stop - start for start, stop in self.logical)

    @property
    def logical_slices(self) -> tuple[slice, ...]:
        """Index of the box in the logical tensor."""
        return tuple(slice(*ends) for ends in self.logical)

    @property
    def local_slices(self) -> tuple[slice, ...]:
        """Index of the box in the local tensor."""
        return tuple(slice(*ends) for ends in self.local)


@dataclass(frozen=True)
class Held:
    """What this rank holds of one parameter or buffer.

    Attributes:
        name: of the tensor in a model of one process ("blocks.3.ffn.experts.w_in").
        shape: the logical shape.
        kind: "experts": lies on the grid of experts (edp, ep, etp); "dense": on that of dense layers (dp, tp).
        boxes: where its parts lie; empty where this rank holds none. Two boxes over one logical region are replicas.
        cut: axes along which ranks hold different parts; along all others of the kind's grid they hold the same.
        local: shape of the local tensor.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    boxes: tuple[Box, ...]
    cut: frozenset[Axis]
    local: tuple[int, ...]

    @property
    def replicated(self) -> bool:
        """Whether some logical region lies here twice."""
        seen = [box.logical for box in self.boxes]
        return len(set(seen)) < len(seen)


def whole(name: str, shape: Sequence[int], kind: Kind) -> Held:
    """All of a tensor."""
    ends = tuple((0, size) for size in shape)
    return Held(name, tuple(shape), kind, (Box(ends, ends),), frozenset(), tuple(shape))


def rows(held: Held, order: Sequence[int], axis: Axis = "ep") -> Held:
    """Of a whole tensor the rows ``order`` of dimension 0, in that order; a row may come twice."""
    rest = tuple((0, size) for size in held.shape[1:])
    boxes = tuple(Box(((row, row + 1), *rest), ((i, i + 1), *rest)) for i, row in enumerate(order))
    return replace(held, boxes=boxes, cut=held.cut | {axis}, local=(len(order), *held.shape[1:]))


def other_rows(held: Held, order: Sequence[int]) -> Held:
    """After ``rows``, and whatever has been cut along other dimensions since: other rows, cut alike.

    Raises ``ValueError`` where the rank held no row, but parts of some would have been cut: nothing says how.
    """
    cuts = [box for box in held.boxes if box.local[0] == (0, 1)]
    if not cuts and order:
        if held.local[1:] != held.shape[1:]:
            raise ValueError(f"no row of {held.name} lies here that would show how rows are cut")
        cuts = list(rows(held, order[:1]).boxes)
    boxes = tuple(
        Box(((row, row + 1), *cut.logical[1:]), ((i, i + 1), *cut.local[1:]))
        for cut in cuts
        for i, row in enumerate(order)
    )
    return replace(held, boxes=boxes, local=(len(order), *held.local[1:]))


def keep(held: Held, dim: int, start: int, stop: int, axis: Axis) -> Held:
    """Of the local tensor the part ``start`` to ``stop`` along ``dim``."""
    return pick(held, dim, [(start, stop)], axis)


def pick(held: Held, dim: int, spans: Sequence[tuple[int, int]], axis: Axis) -> Held:
    """Of the local tensor several spans along ``dim``, laid side by side."""
    boxes = []
    place = 0
    for start, stop in spans:
        for box in held.boxes:
            low, high = box.local[dim]
            first, last = max(low, start), min(high, stop)
            if first >= last:
                continue
            shift = box.logical[dim][0] - low
            boxes.append(
                Box(
                    _put(box.logical, dim, (first + shift, last + shift)),
                    _put(box.local, dim, (first - start + place, last - start + place)),
                )
            )
        place += max(stop - start, 0)
    local = tuple(place if i == dim else size for i, size in enumerate(held.local))
    return replace(held, boxes=tuple(boxes), cut=held.cut | {axis}, local=local)


def _put(ranges: Ranges, dim: int, ends: tuple[int, int]) -> Ranges:
    return tuple(ends if i == dim else old for i, old in enumerate(ranges))
