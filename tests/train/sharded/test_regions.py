"""Regions: worked by hand, and against a mask of elements."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moesaic.parallel.held import Ranges
from moesaic.train.sharded.regions import all_of, common, disjoint, shift, slices, subtract, volume, within

SHAPE = (5, 4, 6)
SIDES = [
    st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda ends: (min(ends), max(ends))) for size in SHAPE
]
BOXES = st.tuples(*SIDES)


def mask(region: Ranges) -> np.ndarray:
    elements = np.zeros(SHAPE, dtype=int)
    elements[slices(region)] = 1
    return elements


def test_by_hand() -> None:
    assert volume(((0, 4), (2, 5))) == 12
    assert volume(()) == 1
    assert volume(((3, 3), (0, 5))) == 0
    assert common(((0, 4),), ((2, 6),)) == ((2, 4),)
    assert common(((0, 2),), ((2, 6),)) is None
    assert common((), ()) == ()
    assert subtract(((0, 4), (0, 6)), ((1, 2), (0, 6))) == [((0, 1), (0, 6)), ((2, 4), (0, 6))]
    assert subtract(((0, 2), (0, 2)), ((1, 3), (1, 3))) == [((0, 1), (0, 2)), ((1, 2), (0, 1))]
    assert subtract((), ()) == []
    assert shift(((2, 4), (5, 6)), (1, 5)) == ((1, 3), (0, 1))
    assert disjoint([((0, 4),), ((2, 6),)]) == [(((0, 4),), 0), (((4, 6),), 1)]
    assert disjoint([((0, 4),), ((0, 4),)]) == [(((0, 4),), 0)]
    assert disjoint([(), ()]) == [((), 0)]
    assert disjoint([((2, 2),)]) == disjoint([]) == []


@given(BOXES, BOXES)
def test_difference_and_intersection_make_up_the_whole(a: Ranges, b: Ranges) -> None:
    both = common(a, b)
    parts = subtract(a, b) + ([both] if both else [])
    assert (sum((mask(part) for part in parts), np.zeros(SHAPE, dtype=int)) == mask(a)).all()
    assert all(within(part, a) for part in parts)
    assert all(volume(part) for part in parts) or not volume(a)


@given(st.lists(BOXES, max_size=8))
def test_disjoint_regions_cover_every_element_once(boxes: list[Ranges]) -> None:
    cut = disjoint(boxes)
    covered = sum((mask(region) for region, _ in cut), np.zeros(SHAPE, dtype=int))
    wanted = sum((mask(box) for box in boxes), np.zeros(SHAPE, dtype=int)) > 0
    assert (covered == wanted).all()
    assert all(within(region, boxes[i]) and volume(region) for region, i in cut)


def test_slices_of_thousands_of_ranks_take_no_time() -> None:
    """A quadratic cut would compare 16 million pairs."""
    boxes = [((i * 3, i * 3 + 3), (0, 7)) for i in range(4000)]
    assert [region for region, _ in disjoint(boxes)] == boxes
    assert math.prod(end for _, end in all_of((12000, 7))) == sum(map(volume, boxes))
