"""The helper that runs gloo processes: answers, failures and hangs."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import run_distributed


def _sum(rank: int, offset: int) -> dict[str, Tensor]:
    total = torch.tensor([float(rank + offset)])
    dist.all_reduce(total)
    return {"total": total, "rank": torch.tensor(rank)}


def _fail(rank: int) -> dict[str, Tensor]:
    if rank == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()
    return {}


def _hang(rank: int) -> dict[str, Tensor]:
    time.sleep(60)
    return {}


def test_every_rank_answers() -> None:
    answers = run_distributed(2, _sum, 10)
    assert [float(answer["total"]) for answer in answers] == [21.0, 21.0]
    assert [int(answer["rank"]) for answer in answers] == [0, 1]


def test_a_failure_comes_with_its_traceback_and_without_delay() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank one is unwell"):
        run_distributed(2, _fail)
    assert time.monotonic() - start < 30


def test_a_hang_is_stopped() -> None:
    with pytest.raises(RuntimeError, match=r"\[0, 1\] were stopped"):
        run_distributed(2, _hang, timeout=3.0)
