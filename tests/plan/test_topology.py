"""Experts by co-activation: small graphs by hand, planted clusters, never worse than the even placement."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan import from_topk
from moesaic.plan.placement import Placement
from moesaic.plan.read import co_activation
from moesaic.plan.topology import by_coactivation, cut


def _ties(E: int, pairs: dict[tuple[int, int], float]) -> Tensor:
    """Each pair in one direction only: both are added up."""
    tie_EE = torch.zeros(E, E)
    for (i, j), weight in pairs.items():
        tie_EE[i, j] = weight
    return tie_EE


def test_two_pairs_by_hand() -> None:
    tie_EE = _ties(4, {(0, 3): 5, (2, 1): 4, (0, 1): 1})
    even = Placement.even(4, 2)
    assert cut(even, tie_EE) == pytest.approx(9 / 10)  # only 0-1 lies together
    found = by_coactivation(tie_EE, ranks=2)
    assert sorted(found.slots) == [(0, 3), (1, 2)]
    assert cut(found, tie_EE) == pytest.approx(1 / 10)


def test_nodes_of_two_ranks() -> None:
    # 0, 2, 4, 6 and 1, 3, 5, 7 belong together; within them 0-4, 2-6, 1-5 and 3-7 most.
    pairs = {(i, j): 1.0 for i, j in itertools.combinations(range(8), 2) if (i - j) % 2 == 0}
    pairs |= {(i, i + 4): 3.0 for i in range(4)}
    tie_EE = _ties(8, pairs)
    found = by_coactivation(tie_EE, ranks=4, nodes=2)
    assert cut(found, tie_EE, nodes=2) == 0
    assert sorted(found.slots) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert {tuple(sorted(found.slots[0] + found.slots[1])), tuple(sorted(found.slots[2] + found.slots[3]))} == {
        (0, 2, 4, 6),
        (1, 3, 5, 7),
    }


def test_replicas_bring_experts_together() -> None:
    tie_EE = _ties(3, {(0, 1): 1, (0, 2): 1})
    assert cut(Placement(((0, 1), (2,)), 3), tie_EE) == 0.5
    assert cut(Placement(((0, 1), (2, 0)), 3), tie_EE) == 0
    assert cut(Placement.even(3, 2), torch.zeros(3, 3)) == 0


def test_planted_clusters_are_found() -> None:
    """Tokens choose three experts, nine times in ten of one cluster; clusters are spread over all expert numbers."""
    torch.manual_seed(0)
    E, P, T, k = 32, 4, 4000, 3
    cluster_E = torch.randperm(E) % P
    own_T = torch.randint(0, P, (T,))
    weight_TE = torch.where(cluster_E[None] == own_T[:, None], 0.9 / (E // P), 0.1 / (E - E // P))
    expert_TK = torch.multinomial(weight_TE, k)
    plan = from_topk(expert_TK, torch.ones(T, k), E)
    found = by_coactivation(co_activation(plan), ranks=P)
    parts = sorted(sorted(rank) for rank in found.slots)
    assert parts == sorted((cluster_E == c).nonzero().flatten().tolist() for c in range(P))
    even_cut, found_cut = cut(Placement.even(E, P), co_activation(plan)), cut(found, co_activation(plan))
    assert even_cut == pytest.approx(0.75, abs=0.1)
    assert found_cut < 0.4 * even_cut


@settings(max_examples=50)
@given(st.integers(1, 14), st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (4, 4), (6, 3)]), st.integers(0, 10**6))
def test_never_worse_than_even_and_of_its_sizes(E: int, grid: tuple[int, int], seed: int) -> None:
    ranks, nodes = grid
    tie_EE = torch.rand(E, E, generator=torch.Generator().manual_seed(seed)) ** 4
    even, found = Placement.even(E, ranks), by_coactivation(tie_EE, ranks, nodes)
    assert found.slots_per_rank == even.slots_per_rank
    assert not found.replicated
    assert cut(found, tie_EE, nodes) <= cut(even, tie_EE, nodes) + 1e-12


@pytest.mark.parametrize(
    ("matrix", "ranks", "nodes", "words"),
    [
        (torch.zeros(3, 4), 1, 1, r"not a tensor of shape \(3, 4\)"),
        (torch.zeros(0, 0), 1, 1, r"not a tensor of shape \(0, 0\)"),
        (torch.full((2, 2), -1.0), 1, 1, "at least 0"),
        (torch.full((2, 2), float("nan")), 1, 1, "at least 0"),
        (torch.zeros(4, 4), 4, 3, "4 ranks cannot be spread over 3 nodes"),
        (torch.zeros(4, 4), 4, 0, "over 0 nodes"),
    ],
)
def test_what_is_none_is_refused(matrix: Tensor, ranks: int, nodes: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        by_coactivation(matrix, ranks, nodes)
