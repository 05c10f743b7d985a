"""Saving that fails: all ranks raise one sentence, an older checkpoint stays, nothing is left over."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.parallel.held import keep, whole
from moesaic.train.sharded.checkpoint import open_sharded
from moesaic.train.sharded.entries import entries_of, expert_name
from moesaic.train.sharded.save import save_sharded
from moesaic.train.sharded.storage import ShardedWriter
from tests.checkpoint.test_atomic import file_size_limit, tree
from tests.distributed import run_distributed
from tests.train.sharded.damage import NAME
from tests.train.sharded.layouts import CUTS, everyone, held_by

EP = CUTS[2]["ep uneven"]


def _fails(rank: int, folder: str, how: str) -> dict[str, Tensor]:
    group, tensors = everyone(), dict(held_by(EP, rank))
    save_sharded(folder, tensors, {"good": True}, group=group)
    before = tree(Path(folder).parent)
    tensors = dict(held_by(EP, rank, seed=1))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    held, x = tensors[NAME]
    if how == "dtype" and rank == 1:
        tensors[NAME] = held, x.double()
    elif how == "missing" and rank == 1:
        for name in [name for name in tensors if name.endswith("experts.w_in")]:
            del tensors[name]
    elif how == "half":
        tensors[NAME] = keep(held, 0, 0, 5, "dp"), x[:5]
    elif how == "shape" and rank == 1:
        tensors[NAME] = held, x[:5]
    elif how == "crash" and rank == 1:
        ShardedWriter._finished = _crash  # type: ignore[method-assign]
    files = {"sharded.json": b""} if how == "name" else {}
    extra = {"state": object()} if how == "json" else {}
    with pytest.raises(CheckpointError) as caught, file_size_limit(2000 if how == "disk" and rank == 1 else 2**30):
        save_sharded(folder, tensors, extra, group=group, files=files)
    assert rank == 1 or tree(Path(folder).parent) == before  # the first rank clears up
    return {"sentence": torch.tensor(list(str(caught.value).encode()))}


def _crash(writer: ShardedWriter, path: Path) -> None:
    raise ZeroDivisionError(f"in {path.name}")


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (
            "disk",
            "Rank 1: Cannot write to {folder}: the file would be larger than this system allows; choose another folder.",
        ),
        (
            "dtype",
            'Rank 0: The ranks disagree on "embedding.weight": ((10, 6), torch.float32) or ((10, 6), torch.float64).',
        ),
        (
            "missing",
            'Rank 0: No rank holds "blocks.1.ffn.experts.3.w_in", or not all of them as one of experts, so it cannot be saved '
            "whole.",
        ),
        ("half", 'Rank 0: The ranks hold 30 of the 60 elements of "embedding.weight", so it cannot be saved whole.'),
        ("shape", "Rank 1: ValueError: embedding.weight is [5, 6] here and [10, 6] by its Held"),
        ("crash", "Rank 1: ZeroDivisionError: in rank-00001.safetensors"),
        ("name", "Rank 0: The extra file cannot be called sharded.json: a checkpoint uses that name itself."),
        ("json", "Rank 0: TypeError: Object of type object is not JSON serializable"),
    ],
)
def test_one_rank_fails_and_all_say_why(tmp_path: Path, how: str, sentence: str) -> None:
    folder = tmp_path / "run" / "step"
    first, second = run_distributed(2, _fails, str(folder), how)
    words = bytes(first["sentence"].tolist()).decode()
    assert words == bytes(second["sentence"].tolist()).decode()
    assert words == sentence.format(folder=folder)
    assert open_sharded(folder).extra == {"good": True}


def _dies(rank: int, folder: str) -> dict[str, Tensor]:
    if rank == 1:
        ShardedWriter._finished = lambda writer, path: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    save_sharded(folder, held_by(EP, rank), {}, group=everyone())
    return {}


def test_a_rank_that_dies_in_the_middle_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="failed"):
        run_distributed(2, _dies, str(tmp_path / "step"))
    assert not (tmp_path / "step").exists()
    save_sharded(tmp_path / "step", held_by(CUTS[1]["alone"], 0), {}, group=everyone())
    assert [path.name for path in tmp_path.iterdir()] == ["step"]  # what the dead left is cleared up


def test_names_of_experts() -> None:
    assert expert_name("blocks.3.ffn.experts.w_in", 7) == "blocks.3.ffn.experts.7.w_in"
    assert (
        expert_name("optimizer/exp_avg/blocks.3.ffn.experts.w_in", 7) == "optimizer/exp_avg/blocks.3.ffn.experts.7.w_in"
    )
    assert expert_name("optimizer/exp_avg/w", 0) == "optimizer/exp_avg/0.w"
    assert expert_name("w", 12) == "12.w"


def test_entries_that_could_be_mixed_up_are_refused() -> None:
    stacked, x = whole("a.w", (3, 2), "experts"), torch.zeros(3, 2)
    one = whole("a.1.w", (2,), "dense")
    assert list(entries_of({"a.w": (stacked, x)})) == ["a.0.w", "a.1.w", "a.2.w"]
    with pytest.raises(CheckpointError, match=r"a.1.w and a.w would both be stored as a.1.w"):
        entries_of({"a.w": (stacked, x), "a.1.w": (one, x[0])})
    for name in ("", "a\nb", "a[0:1]"):
        with pytest.raises(CheckpointError, match="cannot be called"):
            entries_of({name: (one, x[0])})


def test_a_replaced_checkpoint_is_the_new_one_alone(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_sharded(
            tmp_path / "step", held_by(CUTS[1]["alone"], 0, seed), {"seed": seed}, group=everyone(), layout="one"
        )
    checkpoint = open_sharded(tmp_path / "step")
    assert (checkpoint.extra, checkpoint.layout, checkpoint.world) == ({"seed": 1}, "one", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
