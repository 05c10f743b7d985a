"""The feed of text in memory: the sampler's rows, shared out in order, resumed by anybody."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moesaic.data.feed import RowFeed
from moesaic.data.packing import PackedRows, RowSampler
from moesaic.data.split import TokenView
from moesaic.errors import CheckpointError, ConfigError, DataError


def rows() -> PackedRows:
    """25 rows of 4 positions."""
    return PackedRows(TokenView(np.arange(1, 102), np.array([0]), np.array([101]), np.array([0]), ("all",)), 4)


def test_steps_are_the_sampler_s_rows_in_order() -> None:
    feed, sampler = RowFeed(rows(), batch_size=3, accumulate=2, seed=5), RowSampler(25, 6, seed=5)
    for _ in range(6):
        micro = feed.next_step()
        drawn = sampler.next()
        assert [len(batch.ids_BS) for batch in micro] == [3, 3]
        assert torch.equal(torch.cat([batch.ids_BS for batch in micro])[:, 0], 4 * drawn + 1)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_together_are_the_whole_and_resume_each_other(parts: int) -> None:
    """Five parts of three rows: two have none."""
    alone = RowFeed(rows(), 3, 2, seed=0)
    alone.next_step()
    feeds = [RowFeed(rows(), 3, 2, seed=0) for _ in range(parts)]
    for feed in feeds:
        feed.load_state_dict(alone.state_dict())
    for _ in range(5):
        shares = [feed.next_step(part, parts) for part, feed in enumerate(feeds)]
        for micro, batch in enumerate(alone.next_step()):
            found = torch.cat([share[micro].ids_BS for share in shares])
            assert torch.equal(found, batch.ids_BS)
            assert [len(share[micro].ids_BS) for share in shares] == [
                len(x) for x in torch.arange(3).tensor_split(parts)
            ]
    progress = [feed.progress() for feed in feeds]
    assert feeds[-1].state_dict(progress) == alone.state_dict() == {"position": 36}


def test_what_cannot_be_is_refused() -> None:
    feed, other = RowFeed(rows(), 3, 2, seed=0), RowFeed(rows(), 3, 2, seed=0)
    other.next_step()
    with pytest.raises(DataError, match="drew different numbers of rows"):
        feed.state_dict([feed.progress(), other.progress()])
    with pytest.raises(ConfigError, match=r"part is 3, but it must lie in 0..2 \(parts 3\)"):
        feed.next_step(3, 3)
    with pytest.raises(CheckpointError, match="position"):
        feed.load_state_dict({"steps": 1})
