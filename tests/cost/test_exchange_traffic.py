"""Bytes between ranks by hand: from plans, against the formula of uniform load, over two levels, once per node."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesaic.cost.traffic import Sent, rows_to_nodes, sent_bytes, two_level_rows
from moesaic.errors import ConfigError
from moesaic.plan.placement import Placement
from moesaic.plan.predict import rows_between


def _topk(*tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The rows of tokens that choose these experts."""
    rows = [(expert, token) for token, experts in enumerate(tokens) for expert in experts]
    return torch.tensor([expert for expert, _ in rows]), torch.tensor([token for _, token in rows])


def test_bytes_by_hand() -> None:
    placement = Placement(((0, 1), (2,)), 3)
    rows_RR = rows_between(placement, [_topk((0, 2), (2, 3), (1, 2)), _topk((0, 1))])
    assert rows_RR.tolist() == [[2, 3], [2, 0]]  # expert 3 is nowhere
    sent = sent_bytes(rows_RR, 0, row_bytes=10, back_bytes=100)
    assert sent == Sent(dispatch=(0, 30), combine=(0, 200), combine_backward=(0, 300), dispatch_backward=(0, 20))
    assert sent.total() == 550
    assert sent.total(recompute=True) == 780
    other = sent_bytes(rows_RR, 1, row_bytes=10)
    assert other == Sent(dispatch=(20, 0), combine=(30, 0), combine_backward=(20, 0), dispatch_backward=(30, 0))


@pytest.mark.parametrize(("E", "k", "P"), [(8, 2, 4), (12, 3, 2), (6, 1, 6)])
def test_uniform_load_gives_the_formula(E: int, k: int, P: int) -> None:
    """4 T k d b (P - 1) / P, twice more for the forward when recomputed: fieldguide 4.2."""
    T, d, b = E * 2, 16, 2
    tokens = [tuple((token + j) % E for j in range(k)) for token in range(T)]
    rows_RR = rows_between(Placement.even(E, P), [_topk(*tokens)] * P)
    for rank in range(P):
        sent = sent_bytes(rows_RR, rank, d * b)
        assert sent.total() * P == 4 * T * k * d * b * (P - 1)
        assert sent.total(recompute=True) * P == 6 * T * k * d * b * (P - 1)


def test_two_levels_by_hand() -> None:
    # Two nodes of two ranks. Rank 0 sends r = 1, 2, 3, 4 rows; rank 1 sends 10 times, rank 2 100 times as many, rank 3 none.
    rows_RR = torch.tensor([[1, 2, 3, 4], [10, 20, 30, 40], [100, 200, 300, 400], [0, 0, 0, 0]])
    within_RR, between_RR = two_level_rows(rows_RR, 2)
    # What is for place 0 (ranks 0 and 2), then for place 1 (ranks 1 and 3).
    assert within_RR.tolist() == [[4, 6, 0, 0], [40, 60, 0, 0], [0, 0, 400, 600], [0, 0, 0, 0]]
    # Rank 0 passes on 1 + 10 to itself and 3 + 30 to rank 2; rank 1 the rows for ranks 1 and 3.
    assert between_RR.tolist() == [[11, 0, 33, 0], [0, 22, 0, 44], [100, 0, 300, 0], [0, 200, 0, 400]]
    assert sent_bytes(within_RR, 0, 1).dispatch == (0, 6, 0, 0)
    assert sent_bytes(between_RR, 0, 1).combine == (0, 0, 100, 0)


@given(st.sampled_from([(1, 4), (2, 2), (3, 2), (4, 1)]), st.integers(0, 10**6))
def test_two_levels_lose_nothing(grid: tuple[int, int], seed: int) -> None:
    nodes, G = grid
    R = nodes * G
    rows_RR = torch.randint(0, 9, (R, R), generator=torch.Generator().manual_seed(seed))
    within_RR, between_RR = two_level_rows(rows_RR, G)
    assert torch.equal(within_RR.sum(1), rows_RR.sum(1))  # all leave their source
    assert torch.equal(within_RR.sum(0), between_RR.sum(1))  # what was collected is passed on
    assert torch.equal(between_RR.sum(0), rows_RR.sum(0))  # and arrives

    def per_node(matrix_RR: Tensor) -> Tensor:
        return matrix_RR.view(nodes, G, nodes, G).sum(dim=(1, 3))

    assert torch.equal(per_node(between_RR), per_node(rows_RR))
    assert int(per_node(within_RR).fill_diagonal_(0).sum()) == 0


def test_each_node_once_by_hand() -> None:
    """Four ranks of two experts, two nodes: experts 0 to 3 and 4 to 7."""
    placement = Placement.even(8, 4)
    routed = [
        _topk((0, 1, 2), (3, 4, 5), (6, 7, 8)),  # the own node, both, the other one
        _topk((4, 6, 7)),
        _topk((8, 8, 8)),
        _topk((0, 7, 2), (0, 1, 3)),
    ]
    assert rows_to_nodes(placement, routed, 2).tolist() == [[2, 2], [0, 1], [0, 0], [2, 1]]
    assert rows_to_nodes(placement, routed, 4).flatten().tolist() == [3, 1, 0, 2]
    # With nodes of one rank it is each rank once: 0 and 1 lie together, as do 4 and 5, 6 and 7.
    assert rows_to_nodes(placement, routed, 1)[0].tolist() == [1, 2, 1, 1]


def test_nodes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 ranks cannot be spread over nodes of 3"):
        two_level_rows(torch.zeros(4, 4, dtype=torch.int64), 3)
    with pytest.raises(ConfigError, match="nodes of 0"):
        rows_to_nodes(Placement.even(4, 4), [], 0)
