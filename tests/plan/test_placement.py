"""Placements by hand: slots, homes, replicas, the way of every row, JSON, and what is refused."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.plan.placement import Placement

# Expert 0 on ranks 0 and 2, expert 2 twice on rank 1; rank 3 holds nothing.
WORKED = Placement(((0, 1), (2, 3, 2), (0,), ()), 4)


def test_even_is_contiguous_with_sizes_that_differ_by_one_at_most() -> None:
    assert Placement.even(8, 2).slots == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert Placement.even(10, 4).slots == ((0, 1), (2, 3, 4), (5, 6), (7, 8, 9))
    assert Placement.even(2, 4).slots == ((), (0,), (), (1,))
    assert Placement.even(1, 1).slots == ((0,),)


@given(st.integers(1, 40), st.integers(1, 12))
def test_even_of_any_sizes(E: int, P: int) -> None:
    even = Placement.even(E, P)
    assert even.expert_of_slot == list(range(E))
    assert max(even.slots_per_rank) - min(even.slots_per_rank) <= 1
    assert not even.replicated


def test_readings() -> None:
    assert (WORKED.num_ranks, WORKED.num_slots, WORKED.slots_per_rank) == (4, 6, (2, 3, 1, 0))
    assert WORKED.first_slots == (0, 2, 5, 6, 6)
    assert WORKED.expert_of_slot == [0, 1, 2, 3, 2, 0]
    assert WORKED.slots_of_expert == ((0, 5), (1,), (2, 4), (3,))
    assert WORKED.replicas_E == (2, 1, 2, 1)
    assert WORKED.replicated
    assert [WORKED.home(slot) for slot in range(6)] == [0, 0, 1, 1, 1, 2]
    assert Placement(((), (0,)), 1).home(0) == 1
    for slot in (-1, 6):
        with pytest.raises(ConfigError, match=f"no slot {slot} among 6"):
            WORKED.home(slot)


def test_rows_prefer_replicas_of_their_own_rank_and_else_go_round_by_token() -> None:
    expert_N = torch.tensor([0, 1, 2, 0, 2, 3, 4, 0])
    token_N = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    slots = {
        0: [0, 1, 2, 0, 4, 3, 6, 0],  # expert 0 here; expert 2 by parity of the token
        1: [0, 1, 2, 5, 4, 3, 6, 0],  # expert 2 here, twice: by parity; expert 0 on ranks 0 and 2 in turn
        2: [5, 1, 2, 5, 4, 3, 6, 5],
        3: [0, 1, 2, 5, 4, 3, 6, 0],
    }
    for rank, wanted in slots.items():
        chosen_N = WORKED.choose(expert_N, token_N, rank)
        assert chosen_N.dtype == torch.int64
        assert chosen_N.tolist() == wanted


def test_rows_are_sent_without_looking_at_them() -> None:
    """On the meta device there is nothing to look at: no value may be waited for."""
    expert_N = torch.zeros(5, dtype=torch.int64, device="meta")
    for placement in (WORKED, Placement(((1,), (0,)), 2), Placement.even(3, 2)):
        slot_N = placement.choose(expert_N, expert_N, 0)
        assert (slot_N.device.type, slot_N.dtype, slot_N.shape) == ("meta", torch.int64, (5,))


def test_without_replicas_a_row_has_one_slot() -> None:
    swapped = Placement(((2, 0), (1,)), 3)
    assert swapped.choose(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 5]), 1).tolist() == [1, 2, 0, 3]
    expert_N = torch.tensor([0, 3, 2])
    assert Placement.even(3, 2).choose(expert_N, expert_N, 0) is expert_N  # slots are experts: nothing to look up
    assert WORKED.choose(expert_N[:0], expert_N[:0], 0).shape == (0,)


@given(st.data())
def test_every_row_reaches_a_slot_of_its_expert_and_a_local_one_where_there_is_one(data: st.DataObject) -> None:
    E, P = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    ranks: list[list[int]] = [[] for _ in range(P)]
    for expert in [*range(E), *data.draw(st.lists(st.integers(0, E - 1), max_size=5))]:
        ranks[data.draw(st.integers(0, P - 1))].append(expert)
    placement = Placement(tuple(map(tuple, ranks)), E)
    experts = data.draw(st.lists(st.integers(0, E), max_size=12))
    rank = data.draw(st.integers(0, P - 1))
    slots = placement.choose(torch.tensor(experts, dtype=torch.int64), torch.arange(len(experts)), rank).tolist()
    for expert, slot in zip(experts, slots, strict=True):
        if expert == E:
            assert slot == placement.num_slots
        else:
            assert placement.expert_of_slot[slot] == expert
            assert placement.home(slot) == rank or expert not in placement.slots[rank]


def test_replicas_share_rows_evenly() -> None:
    token_N = torch.arange(1000)
    counts = torch.bincount(WORKED.choose(torch.zeros_like(token_N), token_N, 1), minlength=6)
    assert counts.tolist() == [500, 0, 0, 0, 0, 500]


def test_json_and_pickle_in_and_out() -> None:
    assert WORKED.to_list() == [[0, 1], [2, 3, 2], [0], []]
    back = Placement.from_list(json.loads(json.dumps(WORKED.to_list())), 4)
    assert back == WORKED
    assert hash(back) == hash(WORKED)
    WORKED.choose(torch.tensor([0]), torch.tensor([0]), 0)
    assert pickle.loads(pickle.dumps(WORKED)) == back  # noqa: S301 - our own
    assert Placement(((0,), (1,)), 2) != Placement(((1,), (0,)), 2)


@pytest.mark.parametrize(
    ("slots", "num_experts", "words"),
    [
        (((0,), (2,)), 3, "no slot for expert 1 of 3"),
        (((0, 3), (1, 2)), 3, "names expert 3, but experts go from 0 to 2"),
        (((0, -1),), 1, "names expert -1"),
        ((), 2, "at least one rank and one expert, not 0 and 2"),
        (((),), 0, "at least one rank and one expert, not 1 and 0"),
    ],
)
def test_impossible_placements_are_refused(slots: tuple[tuple[int, ...], ...], num_experts: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Placement(slots, num_experts)


@pytest.mark.parametrize("lists", [None, "01", {"0": [0]}, [0, 1], [[0], (1,)], [[0, True]], [[0.0, 1]], [["0"]]])
def test_json_of_something_else_is_refused(lists: object) -> None:
    with pytest.raises(ConfigError, match="A placement (is a list|lists experts)"):
        Placement.from_list(lists, 2)


def test_even_over_no_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one rank"):
        Placement.even(4, 0)
