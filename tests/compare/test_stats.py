"""Means and intervals by hand, and against SciPy."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from moesaic.compare.stats import estimate, median, paired


def test_three_values_by_hand() -> None:
    # mean 2, deviation 1, t(2) = 4.303: half = 4.303 / sqrt(3)
    found = estimate([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.303 / math.sqrt(3))


@pytest.mark.parametrize("count", [2, 3, 5, 11, 31])
def test_against_scipy(count: int) -> None:
    values = [math.sin(7 * i) for i in range(count)]
    found = estimate([*values, None, math.nan])
    low, high = stats.t.interval(0.95, count - 1, loc=sum(values) / count, scale=stats.sem(values))
    assert found is not None
    assert found.half == pytest.approx((high - low) / 2, rel=1e-3)


def test_one_value_has_no_interval_and_none_no_estimate() -> None:
    assert estimate([4.0, None]).record() == {"mean": 4.0, "interval": None, "runs": 1}  # type: ignore[union-attr]
    assert estimate([None, math.inf]) is None


def test_pairs_cancel_what_a_seed_does_to_both() -> None:
    ours, theirs = [5.1, 7.1, None, 9.1], [5.0, 7.0, 8.0, 9.0]
    found = paired(ours, theirs)
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    assert found.half == pytest.approx(0.0, abs=1e-9)
    assert found.count == 3


def test_median() -> None:
    assert median([3.0, None, 1.0]) == 2.0
    assert median([3.0, 5.0, 1.0]) == 3.0
    assert median([]) is None
