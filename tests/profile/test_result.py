"""From laps to rows, shares, limits and the tax, on numbers worked by hand; and what words make of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moesaic.profile.clock import Lap, Slot
from moesaic.profile.measure import Times, Work
from moesaic.profile.page import sheets
from moesaic.profile.result import COMPUTING, MOVING, Side, middle, side, tax
from moesaic.profile.run import Pair, Profile
from moesaic.profile.words import bar, meaning, milliseconds, notes, percent, scaled, sentences, table

PARTS = {
    Slot("forward", "attention", 0): 1.0,
    Slot("backward", "attention", 0): 2.0,
    Slot("forward", "router", 0): 0.5,
    Slot("forward", "products", 0): 1.0,
    Slot("backward", "products", 0): 3.0,
    Slot("forward", "gather", 0): 0.5,
    Slot("step", "other", None): 2.0,
}
WORK = {"attention": 6.0, "router": 1.0, "experts": 8.0, "head": 5.0}


def times(*plain: float, parts: dict[Slot, float] = PARTS) -> Times:
    """Plain runs of these lengths, each with a traced one a tenth longer."""
    total = sum(parts.values())
    laps = [Lap(1.1 * t, {slot: s * 1.1 * t / total for slot, s in parts.items()}, 0.25) for t in plain]
    return Times(list(plain), laps, [])


def ours() -> Side:
    return side(times(9.0, 10.0, 14.0), WORK, per_second=4.0)


def test_rows_add_up_to_the_traced_run_of_median_length() -> None:
    found = ours()
    assert (found.seconds, found.least, found.most) == (10.0, 9.0, 14.0)
    assert found.traced == pytest.approx(11.0)
    assert found.overhead == pytest.approx(0.1)
    assert found.own == 0.25
    assert sum(row.seconds for row in found.rows) == pytest.approx(found.traced)
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert [row.part for row in found.rows] == ["attention", "router", "gather", "products", "other"]
    attention = found.rows[0]
    assert (attention.forward, attention.backward, attention.seconds) == pytest.approx((1.1, 2.2, 3.3))
    assert middle([Lap(s, {}) for s in (3.0, 1.0, 4.0, 2.0)]).seconds == 2.0


def test_limits_by_hand() -> None:
    found = ours()
    assert (found.work, found.limit_seconds, found.of_limit) == (20.0, 5.0, 0.5)
    rows = {row.part: row for row in found.rows}
    assert rows["attention"].of_limit == pytest.approx(6 / 4 / 3.3)
    # The experts' arithmetic is done in their products, which are told apart here.
    assert (rows["products"].work, rows["gather"].work, rows["other"].of_limit) == (8.0, None, None)
    assert found.group(COMPUTING) == pytest.approx(0.4)
    assert found.limit_of(COMPUTING) == pytest.approx(8 / 4 / 4.4)
    assert found.limit_of(MOVING) is None


@pytest.mark.parametrize(("part", "seen"), [("experts", "experts"), ("dispatch", "dispatch")])
def test_work_of_experts_that_are_not_told_apart(part: str, seen: str) -> None:
    parts = {Slot("forward", part, 0): 1.0, Slot("forward", "other", None): 1.0}
    found = side(times(2.0, parts=parts), {"experts": 6.0, "mixing": 2.0}, 1.0)
    assert {row.part: row.work for row in found.rows} == {seen: 8.0, "other": None}
    assert meaning(part, found) != meaning(part, ours())


def test_the_tax_is_a_median_of_ratios_and_counts_layers_alone() -> None:
    dense = {Slot("forward", "attention", 0): 3.0, Slot("forward", "feed-forward", 0): 2.0}
    twin = times(10.0, 4.0, 7.0, parts=dense)
    found = tax(times(9.0, 10.0, 14.0), twin, [0], 1.05)
    assert (found.least, found.ratio, found.most) == (0.9, 2.0, 2.5)
    # Median laps of 11 and 7.7 s: half of ours is in the sparse layer, two fifths of the twin's in the dense one.
    assert found.layers == pytest.approx(11 * 0.5 / (7.7 * 0.4))
    assert found.by_layer == {0: pytest.approx(found.layers)}
    assert found.work == 1.05


def profile(**changes: object) -> Profile:
    pair = Pair(
        ours(), side(times(5.0, 5.0, 5.0), WORK, 4.0), tax(times(9.0, 10.0, 14.0), times(5.0, 5.0, 5.0), [0], 1.0)
    )
    work = Work(batch=2, seq=50, prompt=10, new_tokens=4, rounds=3)
    values: dict[str, Any] = {"training": pair, "prompt": pair, "token": pair} | changes
    values |= {"rows_per_token": (2.0,), "cache_bytes": 3e6}
    return Profile("run", 100, 50, work, 1, "compiled with cc", 4e-9, 4e-9, **values)


def test_the_reading_says_what_the_numbers_say() -> None:
    said = sentences(profile())
    assert said[0] == (
        "A training step of 100 tokens takes 10,000 ms (10 tokens/s), its dense twin's step 5,000 ms: a sparsity tax of 2.00 "
        "(1.80 to 2.80)."
    )
    assert said[1].startswith("40% of it is in experts, at 45% of the measured arithmetic; the router takes 5%, ")
    assert "50% of the limit" in said[3]
    assert "attention takes most: 30%" in said[3]
    assert said[4].startswith("A decoded token takes 10,000 ms")
    assert len(said) == 8
    alone = Pair(ours(), None, None)
    dense = sentences(profile(training=alone, token=None))
    assert dense[0] == "A training step of 100 tokens takes 10,000 ms (10 tokens/s)."
    assert "feed-forward layers" in dense[1]
    assert len(dense) == 3


def test_more_than_the_limit_is_explained() -> None:
    pair = Pair(replace(ours(), of_limit=1.2), None, None)
    assert any(
        "stay in the processor's cache" in sentence for sentence in sentences(profile(training=None, token=pair))
    )


def test_notes_show_what_tracing_cost() -> None:
    said = " ".join(notes(profile()))
    assert "The traced step took 11,000 ms, 10% longer than the plain one; 250 ms of bookkeeping are left out." in said
    assert "3 MB" in said


def test_the_picture_has_the_twin_and_the_limit() -> None:
    found = sheets(profile())
    assert [sheet.anchor for sheet in found] == ["training", "token", "prompt"]
    assert [bar.name for bar in found[0].bars] == ["this model", "dense twin", "arithmetic at 0 GFLOP/s"]
    assert [bar.seconds for bar in found[0].bars] == pytest.approx([10, 5, 5])  # plain runs, whatever tracing added
    assert all(len(row) == len(sheet.columns) for sheet in found for row in sheet.rows)


def test_small_words() -> None:
    assert [milliseconds(s) for s in (1.2345, 0.0456, 0.00123, 0.00001)] == [
        "1,234 ms",
        "45.6 ms",
        "1.23 ms",
        "0.010 ms",
    ]
    assert [percent(s) for s in (1.234, 0.5, 0.0042, 0.00001, 0)] == ["123%", "50%", "0.4%", "<0.1%", "0%"]
    assert [scaled(n, "B") for n in (12, 999.9e3, 2.5e9)] == ["12 B", "1 MB", "2.5 GB"]
    assert [bar(s, 2) for s in (1.0, 0.5, 0.3125, 0.0, 7.0)] == ["██", "█", "▋", "", "██"]
    lines = table(ours())
    assert lines[0][:5] == ("attention", "1,100", "2,200", "3,300", "30%")
    assert len(lines[3][5]) == 20
