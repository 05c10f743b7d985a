"""Who reads what: every document in one lane of an epoch, every row of a step from one lane, whoever reads."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data.stream.lanes import Lanes, Places, Stripe, hash_order

small = st.integers(1, 12)


def test_dealing_by_hand() -> None:
    """The order of epoch 0 of seed 0, which may never change: runs are resumed with it."""
    assert hash_order(5, "shards", 0, 0) == (3, 4, 0, 1, 2)
    dealt = Lanes(shards=5, lanes=2, seed=0)
    assert dealt.stripes(0, 0) == [Stripe(3, 0, 1), Stripe(0, 0, 1), Stripe(2, 0, 1)]
    assert dealt.stripes(1, 0) == [Stripe(4, 0, 1), Stripe(1, 0, 1)]
    few = Lanes(shards=2, lanes=5, seed=0)
    assert few.parts == 3
    assert sorted(s for lane in range(5) for s in few.stripes(lane, 0)) == [
        Stripe(s, q, 3) for s in (0, 1) for q in (0, 1, 2)
    ]


def test_rows_by_hand() -> None:
    """Four rows from three lanes: lane 0 has rows 0 and 1 of a micro-batch."""
    places = Places(batch_size=4, accumulate=2, lanes=3)
    assert [places.locate(0, 0, row) for row in range(4)] == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert [places.locate(0, 1, row) for row in range(4)] == [(0, 2), (0, 3), (1, 1), (2, 1)]
    assert [places.locate(5, 0, row) for row in range(4)] == [(0, 20), (0, 21), (1, 10), (2, 10)]
    assert [places.rows_at(5, lane) for lane in range(3)] == [20, 10, 10]


@settings(max_examples=60, deadline=None)
@given(small, small, st.integers(0, 3), st.integers(0, 3), st.integers(0, 40))
def test_each_document_of_an_epoch_is_in_one_lane(
    shards: int, lanes: int, seed: int, epoch: int, document: int
) -> None:
    dealt = Lanes(shards, lanes, seed)
    all_stripes = [dealt.stripes(lane, epoch) for lane in range(lanes)]
    assert all(all_stripes)
    for shard in range(shards):
        owners = [s for lane in all_stripes for s in lane if s.shard == shard and document % s.parts == s.part]
        assert len(owners) == 1


@settings(max_examples=60, deadline=None)
@given(small, st.integers(1, 3), st.data())
def test_rows_count_on_in_every_lane(batch_size: int, accumulate: int, data: st.DataObject) -> None:
    lanes = data.draw(st.integers(1, batch_size))
    places = Places(batch_size, accumulate, lanes)
    given_rows: dict[int, list[int]] = {lane: [] for lane in range(lanes)}
    for step in range(3):
        assert all(places.rows_at(step, lane) == len(rows) for lane, rows in given_rows.items())
        for micro in range(accumulate):
            found = [places.locate(step, micro, row) for row in range(batch_size)]
            assert [lane for lane, _ in found] == sorted(lane for lane, _ in found)
            for lane, number in found:
                given_rows[lane].append(number)
    assert all(rows == list(range(len(rows))) for rows in given_rows.values())
    sizes = {len(rows) for rows in given_rows.values()}
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= 3 * accumulate  # one row more of each micro-batch at most


def test_epochs_and_seeds_are_dealt_differently() -> None:
    orders = {tuple(Lanes(20, 1, seed).stripes(0, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
