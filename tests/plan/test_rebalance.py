"""EPLB's published example, its parts by hand, and placements that are never worse and move little."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import CheckpointError, ConfigError
from moesaic.plan.placement import Placement
from moesaic.plan.rebalance import LoadAverage, balanced_packing, eplb, improve, rank_loads, replicate
from moesaic.plan.settle import exchanged, settled

# The example in DeepSeek's README, recomputed: fieldguide section 9, vector 19.
PUBLISHED = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def test_the_published_example() -> None:
    first, second = eplb(PUBLISHED, slots=16, groups=4, nodes=2, ranks=8)
    assert first.expert_of_slot == [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]
    assert second.expert_of_slot == [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]
    assert rank_loads(first, PUBLISHED[0]) == [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152]
    assert first.slots_per_rank == second.slots_per_rank == (2,) * 8
    assert first.replicas_E == (1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1)
    assert first.slots_of_expert[5] == (0, 2)


def test_groups_share_a_node_only_where_nodes_divide_them() -> None:
    # Two groups over two nodes stay whole; three groups do not fit, and all experts go anywhere.
    (placement,) = eplb([[9, 1, 1, 9, 1, 1]], slots=6, groups=2, nodes=2, ranks=2)
    assert [sorted(rank) for rank in placement.slots] == [[0, 1, 2], [3, 4, 5]]
    # 9 -> 0, 9 -> 1, then the ones in turn: 1, 2, 4, 5.
    (placement,) = eplb([[9, 1, 1, 9, 1, 1]], slots=6, groups=3, nodes=2, ranks=2)
    assert placement.slots == ((0, 1, 4), (3, 2, 5))


def test_packing_by_hand() -> None:
    # 7 -> 0, 6 -> 1, 5 -> 1 (6 < 7), 4 -> 0 (7 < 11), 3 -> 0 (the first of 11 and 11), 2 -> 1, which has room.
    assert balanced_packing([3, 7, 5, 4, 6, 2], [3, 3]) == [[1, 3, 0], [4, 2, 5]]
    assert balanced_packing([1, 9, 5], [1, 1, 1]) == [[0], [1], [2]]  # one each: as they come
    assert balanced_packing([4, 4, 1], [1, 2]) == [[0], [1, 2]]
    assert balanced_packing([1, 2], [2, 0]) == [[1, 0], []]
    # Two replicas of 8 each: EPLB lays them on one pack where that is the lighter one, with kinds they part.
    assert balanced_packing([20, 8, 8, 1], [2, 2]) == [[0, 3], [1, 2]]
    assert balanced_packing([20, 8, 8, 1], [2, 2], [0, 1, 1, 2]) == [[0, 2], [1, 3]]


def test_replicas_go_to_the_most_load_per_replica() -> None:
    # 60 -> 30 each, then 40 -> 20, then 60 -> 20, then the first of 20, 20.
    assert replicate([40, 60, 10], 3) == [0, 1, 2]
    assert replicate([40, 60, 10], 6) == [0, 1, 2, 1, 0, 1]
    assert replicate([40, 60, 10], 7) == [0, 1, 2, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"slots": 15}, "a multiple of 8 ranks as slots, at least one per expert \\(12\\), not 15"),
        ({"slots": 8}, "not 8"),
        ({"groups": 5}, "5 groups of 12 experts"),
        ({"nodes": 3}, "3 nodes of 8 ranks"),
        ({"ranks": 0}, "0 ranks"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        eplb(PUBLISHED, **({"slots": 16, "groups": 4, "nodes": 2, "ranks": 8} | sizes))


@pytest.mark.parametrize("load", [[1.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_loads_that_are_none_are_refused(load: list[float]) -> None:
    with pytest.raises(ConfigError, match="A load is a finite number of at least 0 for each of 2 experts"):
        improve(Placement.even(2, 2), load)


# ---- improve -------------------------------------------------------------------------------------------------------


def test_one_swap_by_hand() -> None:
    # Loads 8 + 7 and 1 + 2. Swapping 8 with 2 leaves 9 and 9, as good as it gets: 2 slots change.
    current = Placement.even(4, 2)
    found = improve(current, [8, 7, 1, 2])
    assert found.slots == ((3, 1), (2, 0))
    assert rank_loads(current, [8, 7, 1, 2]) == [15, 3]
    assert rank_loads(found, [8, 7, 1, 2]) == [9, 9]


def test_a_replica_of_the_busiest_takes_the_slot_of_one_that_is_not_needed() -> None:
    # Expert 2 has two slots with 1 each, expert 0 all of 12: its replica takes over the second slot of expert 2.
    current = Placement(((0, 1), (2, 3), (2, 4)), 5)
    found = improve(current, [12, 1, 2, 3, 3], slack=0.2)
    assert found.slots == ((0, 1), (0, 3), (2, 4))
    assert rank_loads(found, [12, 1, 2, 3, 3]) == [7, 9, 5]


def test_what_cannot_be_bettered_stays() -> None:
    current = Placement(((0,), (1,)), 2)
    assert improve(current, [5, 1]) is current
    assert improve(current, [0, 0]) is current
    even = Placement.even(4, 2)
    assert improve(even, [5, 4, 4, 3], least_gain=0.2) is even  # 9 to 8 is a ninth
    assert improve(even, [5, 4, 4, 3], least_gain=0.1) is not even


def test_slots_for_replicas_are_spread_evenly() -> None:
    found = improve(Placement.even(10, 4), [1.0] * 10, slots=14)
    assert found.slots_per_rank == (3, 4, 3, 4)
    assert found.replicas_E == (2, 2, 2, 2, 1, 1, 1, 1, 1, 1)
    assert all(len(set(rank)) == len(rank) for rank in found.slots)
    assert improve(found, [1.0] * 10, slots=10).slots_per_rank == (2, 3, 2, 3)
    with pytest.raises(ConfigError, match="9 slots cannot hold 10 experts"):
        improve(found, [1.0] * 10, slots=9)
    with pytest.raises(ConfigError, match="at least one group of experts and one node, not 0 and 1"):
        improve(found, [1.0] * 10, groups=0)


def test_groups_stay_on_their_nodes() -> None:
    current = eplb(PUBLISHED[:1], slots=16, groups=4, nodes=2, ranks=8)[0]
    found = improve(current, PUBLISHED[1], groups=4, nodes=2)
    assert max(rank_loads(found, PUBLISHED[1])) < max(rank_loads(current, PUBLISHED[1]))
    nodes = [{expert for rank in found.slots[n : n + 4] for expert in rank} for n in (0, 4)]
    assert all(len({expert // 3 for expert in node}) == 2 for node in nodes)
    assert not nodes[0] & nodes[1]


@st.composite
def _situations(draw: Any) -> tuple[Placement, list[int], int, int]:
    """A placement with spare slots anywhere, a load, and nodes and groups that may or may not fit."""
    E, P = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 3, 4]))
    ranks: list[list[int]] = [[] for _ in range(P)]
    for expert in [*range(E), *draw(st.lists(st.integers(0, E - 1), max_size=6))]:
        ranks[draw(st.integers(0, P - 1))].append(expert)
    load = draw(st.lists(st.integers(0, 1000), min_size=E, max_size=E))
    placement = Placement(tuple(map(tuple, ranks)), E)
    return placement, load, draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))


@given(_situations())
def test_never_worse_and_of_the_same_shape(situation: tuple[Placement, list[int], int, int]) -> None:
    current, load, nodes, groups = situation
    found = improve(current, load, nodes=nodes, groups=groups)
    assert found.slots_per_rank == current.slots_per_rank
    assert set(found.expert_of_slot) == set(range(current.num_experts))
    assert found is current or max(rank_loads(found, load)) < max(rank_loads(current, load))
    assert sum(rank_loads(found, load)) == pytest.approx(sum(load))


@given(_situations(), st.integers(0, 8))
def test_any_number_of_slots(situation: tuple[Placement, list[int], int, int], spare: int) -> None:
    current, load, nodes, groups = situation
    slots = current.num_experts + spare
    found = improve(current, load, slots=slots, nodes=nodes, groups=groups)
    assert found.num_slots == slots
    assert max(found.slots_per_rank) - min(found.slots_per_rank) <= 1


@given(_situations())
def test_names_of_ranks_change_no_load_and_lose_no_stay(situation: tuple[Placement, list[int], int, int]) -> None:
    current, load, _, _ = situation
    turned = tuple(tuple(reversed(rank)) for rank in reversed(current.slots))
    found = settled(turned, current.slots)
    before = sorted(rank_loads(Placement(turned, current.num_experts), load))
    assert sorted(rank_loads(Placement(found, current.num_experts), load)) == pytest.approx(before)
    if [len(rank) for rank in turned] == [len(rank) for rank in current.slots]:
        together = [(Counter(a) & Counter(b)).total() for a, b in zip(turned, current.slots, strict=True)]
        stays = sum(
            a == b for new, old in zip(found, current.slots, strict=True) for a, b in zip(new, old, strict=True)
        )
        assert stays >= max(together)


def test_a_placement_with_its_ranks_renamed_is_the_same_placement() -> None:
    before = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11))
    assert settled(((11, 10, 9), (2, 0, 1), (4, 5, 3), (7, 8, 6)), before) == before
    # Within nodes of two ranks: nodes change places as a whole, then ranks.
    assert settled(((8, 7, 6), (9, 10, 11), (3, 5, 4), (0, 1, 2)), before, nodes=2) == before
    # Ranks of other sizes keep their places.
    assert settled(((3, 4), (0, 1, 2)), ((0, 1), (3, 4, 2))) == ((3, 4), (0, 1, 2))


def test_exchanges_reach_eplb_with_a_fraction_of_its_moves() -> None:
    rng = random.Random(0)
    for _ in range(5):
        load = [1 / (i + 1) for i in range(64)]
        rng.shuffle(load)
        current = improve(improve(Placement.even(64, 8), [1.0] * 64, slots=72), load)
        load = [x * rng.uniform(0.7, 1.4) for x in load]
        anew = eplb([load], 72, 1, 1, 8)[0]
        found = improve(current, load)
        assert max(rank_loads(found, load)) <= 1.021 * max(rank_loads(anew, load))
        moved = sum(a != b for a, b in zip(found.expert_of_slot, current.expert_of_slot, strict=True))
        assert moved <= 16  # of 72; EPLB's own, even with ranks renamed, about 50


def test_exchanges_end_where_none_helps() -> None:
    assert exchanged(((0,), (1,)), [5.0, 5.0], goal=0.0) == ((0,), (1,))
    assert exchanged(((0, 1), ()), [5.0, 5.0], goal=0.0) == ((0, 1), ())  # no slot to swap with
    # Within nodes of one rank nothing can be exchanged.
    assert exchanged(((0, 1), (2, 3)), [9.0, 9.0, 1.0, 1.0], goal=0.0, nodes=2) == ((0, 1), (2, 3))


# ---- load over time ------------------------------------------------------------------------------------------------


def test_average_by_hand() -> None:
    average = LoadAverage(2, decay=0.5)
    assert average.load_E.tolist() == [0, 0]
    average.update(torch.tensor([4, 0]))
    assert average.load_E.tolist() == [4, 0]  # not 2: the start at zero is divided out
    average.update(torch.tensor([1, 3], dtype=torch.int32))
    assert average.load_E.tolist() == pytest.approx([2, 2])  # (4/4 + 1/2) / (3/4), (3/2) / (3/4)
    last = LoadAverage(2, decay=0.0)
    last.update(torch.tensor([4, 0]))
    last.update(torch.tensor([1, 3]))
    assert last.load_E.tolist() == [1, 3]


def test_average_goes_on_from_its_state() -> None:
    one, other = LoadAverage(3), LoadAverage(3)
    for counts in ([5, 1, 0], [2, 2, 2]):
        one.update(torch.tensor(counts))
    other.load_state_dict(one.state_dict())
    for average in (one, other):
        average.update(torch.tensor([0, 7, 1]))
    assert torch.equal(one.load_E, other.load_E)
    with pytest.raises(CheckpointError, match=r"shape \(3,\), not of 2 experts"):
        LoadAverage(2).load_state_dict(one.state_dict())
    with pytest.raises(CheckpointError, match='"sum" and "weight"'):
        LoadAverage(3).load_state_dict({"sum": [1, 2, 3], "weight": 1.0})
    with pytest.raises(ConfigError, match="decay must be at least 0 and below 1, not 1.0"):
        LoadAverage(3, decay=1.0)
