"""Counts of tokens and pairs: against plain loops over documents, whatever the block, and sampled evenly over a cap."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from moesaic.data.split import TokenView
from moesaic.data.statistics import count_pairs, count_tokens

V = 11


def view(sizes: list[int], seed: int = 0) -> TokenView:
    """Documents of these sizes, in the store in reverse order and with gaps between them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, sum(sizes) + 3 * len(sizes)).astype(np.uint16)
    start = np.cumsum([0, *[size + 3 for size in sizes[:-1]]])[::-1].astype(np.int64).copy()
    end = start + np.array(sizes[::-1], dtype=np.int64)
    return TokenView(tokens, start, end, np.zeros(len(sizes), dtype=np.int64), ("all",))


@pytest.mark.parametrize("block", [1, 4, 7, 1000])
def test_tokens_against_plain_loops(block: int) -> None:
    text = view([5, 1, 9, 2, 30])
    expected = Counter(int(token) for d in range(5) for token in text.document(d))
    found = count_tokens(text, V, block=block)
    assert found.dtype == torch.int64
    assert found.tolist() == [expected[token] for token in range(V)]


def pairs_by_hand(documents: list[list[int]]) -> torch.Tensor:
    found = torch.zeros(V, V, dtype=torch.int64)
    for document in documents:
        for first, second in itertools.pairwise(document):
            found[first, second] += 1
    return found


def test_pairs_against_plain_loops() -> None:
    text = view([5, 1, 9, 2, 30])
    documents = [[int(t) for t in text.document(d)] for d in range(5)]
    found = count_pairs(text, V)
    assert found.is_sparse
    assert found.is_coalesced()
    assert torch.equal(found.to_dense(), pairs_by_hand(documents))
    assert int(found.values().sum()) == 47 - 5  # one fewer than its tokens in every document


def test_a_pair_across_two_blocks_is_left_out() -> None:
    text = view([12])
    ids = [int(t) for t in text.document(0)]
    blocks = [ids[0:5], ids[5:10], ids[10:12]]
    assert torch.equal(count_pairs(text, V, block=5).to_dense(), pairs_by_hand(blocks))


def test_above_the_cap_blocks_are_spread_from_beginning_to_end() -> None:
    text = view([100])
    ids = [int(t) for t in text.document(0)]
    # Blocks of 10, at most 35 tokens: three of the ten, numbers 0, 4.5 -> 4 (to even), 9.
    kept = [ids[0:10], ids[40:50], ids[90:100]]
    assert count_tokens(text, V, most=35, block=10).tolist() == [sum(part.count(t) for part in kept) for t in range(V)]
    assert torch.equal(count_pairs(text, V, most=35, block=10).to_dense(), pairs_by_hand(kept))
    assert int(count_tokens(text, V, most=3, block=10).sum()) == 10  # never less than one block


def test_a_large_vocabulary_does_not_overflow() -> None:
    V_large = 200_000
    text = TokenView(
        np.array([199_999, 199_998, 0], dtype=np.uint32), np.array([0]), np.array([3]), np.array([0]), ("all",)
    )
    found = count_pairs(text, V_large)
    assert found.indices().T.tolist() == [[199_998, 0], [199_999, 199_998]]
    assert found.values().tolist() == [1, 1]
