"""Rows and their order: every token a target once, no row across documents, the same order however it is resumed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data.packing import IGNORE, PackedRows, RowSampler
from moesaic.data.split import TokenView
from moesaic.errors import CheckpointError, ConfigError, DataError


def view_of(*documents: list[int], labels: list[int] | None = None) -> TokenView:
    """Documents with unused tokens between them, so that a view is not simply the whole store."""
    tokens, start, end = [], [], []
    for document in documents:
        tokens += [9999, 9998]
        start.append(len(tokens))
        tokens += document
        end.append(len(tokens))
    label_D = np.array(labels or [0] * len(documents), dtype=np.int64)
    return TokenView(np.array(tokens, np.uint16), np.array(start), np.array(end), label_D, ("a", "b", "c"))


def test_rows_worked_by_hand() -> None:
    rows = PackedRows(view_of([10, 11, 0], [20, 0], [30, 31, 32, 0], labels=[2, 0, 1]), seq_len=5)
    assert len(rows) == 2
    batch = rows.batch(torch.tensor([0, 1]))
    assert batch.ids_BS.tolist() == [[10, 11, 0, 20, 0], [30, 31, 32, 0, 0]]
    assert batch.targets_BS.tolist() == [[11, 0, IGNORE, 0, IGNORE], [31, 32, 0, IGNORE, IGNORE]]
    assert batch.valid_BS.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert batch.document_BS.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert batch.label_BS.tolist() == [[2, 2, 2, 0, 0], [1, 1, 1, 1, -1]]


def test_types_and_order_of_rows() -> None:
    rows = PackedRows(view_of(list(range(1, 40))), seq_len=4)
    batch = rows.batch(torch.tensor([3, 0, 3]))
    assert batch.ids_BS.tolist() == [[13, 14, 15, 16], [1, 2, 3, 4], [13, 14, 15, 16]]
    assert batch.valid_BS.dtype == torch.bool
    for tensor in (batch.ids_BS, batch.targets_BS, batch.document_BS, batch.label_BS):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    assert batch.to("cpu").ids_BS.tolist() == batch.ids_BS.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 23), min_size=1, max_size=12), st.integers(1, 17))
def test_every_token_but_the_first_of_a_document_is_a_target_once(sizes: list[int], seq_len: int) -> None:
    documents, number = [], 1
    for size in sizes:  # every token of the corpus is a different number
        documents.append(list(range(number, number + size)))
        number += size
    owner = {token: n for n, document in enumerate(documents) for token in document}
    rows = PackedRows(view_of(*documents), seq_len)
    batch = rows.batch(torch.arange(len(rows)))
    targets = Counter(batch.targets_BS[batch.targets_BS != IGNORE].tolist())
    assert targets == Counter(token for document in documents for token in document[1:])
    for ids, target, document, valid in zip(
        batch.ids_BS.tolist(),
        batch.targets_BS.tolist(),
        batch.document_BS.tolist(),
        batch.valid_BS.tolist(),
        strict=True,
    ):
        known = [(token, number) for token, number, ok in zip(ids, document, valid, strict=True) if ok]
        # Equal numbers in a row are exactly equal documents, and a target belongs to the document that predicts it.
        assert len({(owner[token], number) for token, number in known}) == len({number for _, number in known})
        assert all(aim in (IGNORE, token + 1) for token, aim in zip(ids, target, strict=True))
        padding = {number for number, ok in zip(document, valid, strict=True) if not ok}
        assert not padding & {number for _, number in known}
    assert batch.valid_BS[:-1].all()
    assert batch.valid_BS[-1, 0]


def test_a_view_shorter_than_a_row() -> None:
    batch = PackedRows(view_of([5, 0]), seq_len=8).batch(torch.tensor([0]))
    assert batch.ids_BS.tolist() == [[5, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.targets_BS.tolist() == [[0] + [IGNORE] * 7]
    assert batch.valid_BS.tolist() == [[True, True] + [False] * 6]


def test_impossible_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="seq_len is 0"):
        PackedRows(view_of([1, 2]), 0)
    with pytest.raises(DataError, match="too few"):
        PackedRows(view_of([1]), 4)
    rows = PackedRows(view_of([1, 2, 3]), 1)
    for bad in (-1, 2):
        with pytest.raises(IndexError, match="of 2 rows"):
            rows.batch(torch.tensor([bad]))


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def draw(sampler: RowSampler, steps: int) -> list[list[int]]:
    return [sampler.next().tolist() for _ in range(steps)]


def test_an_epoch_draws_every_row_once_and_differs_from_the_next() -> None:
    drawn = flat(draw(RowSampler(12, 4, seed=0), 6))
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == list(range(12))
    assert drawn[:12] != drawn[12:]


def test_order_depends_on_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    assert draw(RowSampler(50, 4, seed=1), 20) == draw(RowSampler(50, 4, seed=1), 20)
    assert draw(RowSampler(50, 4, seed=1), 20) != draw(RowSampler(50, 4, seed=2), 20)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("num_rows", [1, 3, 7, 100])
@pytest.mark.parametrize("done", [0, 1, 5])
def test_resuming_goes_on_exactly(num_rows: int, done: int) -> None:
    whole = draw(RowSampler(num_rows, 8, seed=5), 12)
    stopped = RowSampler(num_rows, 8, seed=5)
    draw(stopped, done)
    state = stopped.state_dict()
    assert state == {"position": done * 8}
    resumed = RowSampler(num_rows, 8, seed=5)
    draw(resumed, 3)
    resumed.load_state_dict(state)
    assert draw(resumed, 12 - done) == whole[done:]


def test_batches_cross_epochs_without_losing_rows() -> None:
    sampler = RowSampler(7, 4, seed=0)
    drawn = flat(draw(sampler, 7))
    assert all(sorted(drawn[n : n + 7]) == list(range(7)) for n in range(0, 28, 7))
    assert sampler.epoch == 4.0


def test_impossible_samplers_are_refused() -> None:
    for arguments, match in [
        ((0, 1, 0), r"Rows \(0\)"),
        ((1, 0, 0), r"batch_size \(0\)"),
    ]:
        with pytest.raises(ConfigError, match=match):
            RowSampler(*arguments)
    for state in ({}, {"position": -1}, {"position": "8"}, {"position": True}):
        with pytest.raises(CheckpointError, match="position"):
            RowSampler(9, 3, 0).load_state_dict(state)
