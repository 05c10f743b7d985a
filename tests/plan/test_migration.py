"""Moves between placements by hand, and carried out on arrays."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.plan.migration import Move, migration, migration_bytes
from moesaic.plan.placement import Placement


def test_a_swap_by_hand() -> None:
    old, new = Placement(((0, 1), (2, 3)), 4), Placement(((0, 2), (1, 3)), 4)
    moves = migration(old, new)
    assert moves == [Move(2, 1, 0, 0, 1), Move(1, 0, 1, 1, 0)]
    assert migration_bytes(moves, 100, ranks=2) == [100, 100]
    assert migration(old, old) == []


def test_near_sources_first_then_those_that_send_least() -> None:
    old = Placement(((0, 1), (2, 3), (0, 4), (5, 6)), 7)
    # Expert 0 to rank 3, whose node holds it on rank 2; without nodes the first of its homes.
    new = Placement(((0, 1), (2, 3), (0, 4), (5, 6, 0)), 7)
    assert migration(old, new) == [Move(0, 0, 0, 3, 2)]
    assert migration(old, new, ranks_per_node=2) == [Move(0, 2, 0, 3, 2)]
    # To all other ranks: the two homes share the sending.
    everywhere = Placement(((0, 1), (2, 3, 0), (0, 4), (5, 6, 0)), 7)
    assert [move.from_rank for move in migration(old, everywhere)] == [0, 2]
    # Within a rank nothing is sent.
    turned = migration(old, Placement(((1, 0), (2, 3), (0, 4), (5, 6)), 7))
    assert turned == [Move(1, 0, 1, 0, 0), Move(0, 0, 0, 0, 1)]
    assert all(move.local for move in turned)
    assert migration_bytes(turned, 100, ranks=4) == [0, 0, 0, 0]


def test_other_models_and_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="not from 4 experts on 2 ranks to 4 on 1"):
        migration(Placement.even(4, 2), Placement.even(4, 1))
    with pytest.raises(ConfigError, match="to 5 on 2"):
        migration(Placement.even(4, 2), Placement.even(5, 2))


@st.composite
def _two_placements(draw: Any) -> tuple[Placement, Placement]:
    E, P = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    found = []
    for _ in range(2):
        ranks: list[list[int]] = [[] for _ in range(P)]
        for expert in draw(st.permutations([*range(E), *draw(st.lists(st.integers(0, E - 1), max_size=4))])):
            ranks[draw(st.integers(0, P - 1))].append(expert)
        found.append(Placement(tuple(map(tuple, ranks)), E))
    return found[0], found[1]


@given(_two_placements(), st.sampled_from([None, 1, 2]))
def test_moves_realise_the_new_placement(pair: tuple[Placement, Placement], ranks_per_node: int | None) -> None:
    old, new = pair
    stacks = [[f"expert {expert}" for expert in rank] for rank in old.slots]
    after = [(stacks[rank] + [""] * len(experts))[: len(experts)] for rank, experts in enumerate(new.slots)]
    moves = migration(old, new, ranks_per_node)
    for move in moves:
        after[move.to_rank][move.to_slot] = stacks[move.from_rank][move.from_slot]
    assert after == [[f"expert {expert}" for expert in rank] for rank in new.slots]
    for move in moves:
        assert move.local == (move.expert in old.slots[move.to_rank])  # never sent where it already is
        assert old.slots[move.to_rank][move.to_slot : move.to_slot + 1] != (move.expert,)  # nor copied onto itself
    assert sum(migration_bytes(moves, 3, new.num_ranks)) == 3 * sum(not move.local for move in moves)
