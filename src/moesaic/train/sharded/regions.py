"""Regions of a tensor, as (start, stop) per dimension: what is common to two, what is left of one, and cuts without overlap.

>>> left = subtract(((0, 4), (0, 6)), ((1, 2), (0, 6)))      # rows 0, and rows 2 and 3
>>> disjoint([((0, 4),), ((2, 6),)])                          # [(((0, 4),), 0), (((4, 6),), 1)]

The region of a tensor without dimensions is ``()``, and its volume 1. Regions without volume are nothing to these functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from moesaic.parallel.held import Ranges


def volume(region: Ranges) -> int:
    """Number of elements."""
    return math.prod(max(stop - start, 0) for start, stop in region)


def all_of(shape: Sequence[int]) -> Ranges:
    """The region that is the whole tensor."""
    return tuple((0, size) for size in shape)


def common(a: Ranges, b: Ranges) -> Ranges | None:
    """What lies in both, or None."""
    both = tuple((max(low, start), min(high, stop)) for (low, high), (start, stop) in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def within(inner: Ranges, outer: Ranges) -> bool:
    """Whether all of ``inner`` lies in ``outer``."""
    return all(low <= start and stop <= high for (start, stop), (low, high) in zip(inner, outer, strict=True))


def shift(region: Ranges, offsets: Sequence[int]) -> Ranges:
    """The region in coordinates that start at ``offsets``."""
    return tuple((start - offset, stop - offset) for (start, stop), offset in zip(region, offsets, strict=True))


def slices(region: Ranges) -> tuple[slice, ...]:
    """The index of the region."""
    return tuple(slice(*ends) for ends in region)


def subtract(a: Ranges, b: Ranges) -> list[Ranges]:
    """Regions without overlap that together are what ``a`` has and ``b`` has not."""
    both = common(a, b)
    if both is None:
        return [a]
    left = []
    for dim, ((low, high), (start, stop)) in enumerate(zip(a, both, strict=True)):
        # Dimensions before this one are cut to what both have already; the ones after it are still whole.
        for ends in ((low, start), (stop, high)):
            if ends[0] < ends[1]:
                left.append((*both[:dim], ends, *a[dim + 1 :]))
    return left


def disjoint(boxes: Sequence[Ranges]) -> list[tuple[Ranges, int]]:
    """Regions without overlap that together cover the boxes, each with the index of a box that it lies in.

    A box that overlaps no other stays whole. Boxes are gone through along the dimension that cuts them most often, so that each
    meets only its neighbours there: thousands of slices of one tensor are no thousands squared.
    """
    if len(boxes) < 2:  # most tensors of most layouts
        return [(box, 0) for box in boxes if volume(box)]
    dims = len(boxes[0])
    sweep = max(range(dims), key=lambda dim: len({box[dim][0] for box in boxes}), default=None)
    order = sorted((i for i, box in enumerate(boxes) if volume(box)), key=lambda i: (boxes[i], i))
    if sweep is not None:
        order.sort(key=lambda i: boxes[i][sweep][0])
    done: list[tuple[Ranges, int]] = []
    near: list[Ranges] = []
    for i in order:
        box = boxes[i]
        if sweep is not None:
            near = [region for region in near if region[sweep][1] > box[sweep][0]]
        left = [box]
        for region in near:
            left = [rest for part in left for rest in subtract(part, region)]
        done += [(part, i) for part in left]
        near += left
    return done
