"""Saving in the background: values are those of the call, training's collectives go on, errors come at the next call."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.errors import CheckpointError, MoesaicError
from moesaic.parallel.comm import Group
from moesaic.train.sharded.background import AsyncSaver, saving_group
from moesaic.train.sharded.entries import Tensors
from moesaic.train.sharded.load import load_sharded
from moesaic.train.sharded.save import save_sharded
from tests.distributed import run_distributed
from tests.train.sharded.layouts import CUTS, everyone, held_by, same

EP = CUTS[2]["ep uneven"]


def _alone() -> AsyncSaver:
    return AsyncSaver(saving_group([0], 0))


def _write_to(folder: str | Path) -> Any:
    return lambda tensors, extra, group: save_sharded(folder, tensors, extra, group=group)


def _training_goes_on(rank: int, folder: str) -> dict[str, Tensor]:
    """Two saves, each followed at once by changes in place and a hundred collectives on the group of training."""
    with AsyncSaver(saving_group(range(2), rank)) as saver:
        for seed in range(2):
            tensors, extra = held_by(EP, rank, seed), {"seed": seed}
            saver.save(_write_to(f"{folder}/{seed}"), tensors, extra)
            extra["seed"] = 99
            for _, x in tensors.values():
                x.zero_()
            for _ in range(100):
                total = torch.ones(1000)
                dist.all_reduce(total)
                assert float(total[0]) == 2
    found = {}
    for seed in range(2):
        tensors = held_by(CUTS[2]["tp"], rank, None)
        extra = load_sharded(f"{folder}/{seed}", tensors, group=everyone())
        found[f"{seed}"] = torch.tensor(same(tensors, held_by(CUTS[2]["tp"], rank, seed)) and extra == {"seed": seed})
    return found


def test_what_is_saved_is_what_was_there_at_the_call(tmp_path: Path) -> None:
    for found in run_distributed(2, _training_goes_on, str(tmp_path)):
        assert all(found.values()), found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def _one_rank_fails(rank: int, folder: str) -> dict[str, Tensor]:
    sentences = []
    saver = AsyncSaver(saving_group(range(2), rank))

    def write(tensors: Tensors, extra: dict[str, Any], group: Group) -> None:
        if rank == 1:
            tensors = {name: (held, x) for name, (held, x) in tensors.items() if not name.startswith("emb")}
            tensors |= {"bad[name": tensors["blocks.0.norm.weight"]}
        save_sharded(f"{folder}/a", tensors, extra, group=group)

    saver.save(write, held_by(EP, rank), {})
    with pytest.raises(CheckpointError) as caught:
        saver.wait()
    sentences.append(str(caught.value))
    saver.save(write, held_by(EP, rank), {})
    with pytest.raises(CheckpointError) as caught:  # by the next save, which then saves nothing
        saver.save(_write_to(f"{folder}/b"), held_by(EP, rank), {})
    sentences.append(str(caught.value))
    saver.save(_write_to(f"{folder}/c"), held_by(EP, rank), {})  # said once, then it goes on
    saver.close()
    return {"sentences": torch.tensor(list("|".join(sentences).encode()))}


def test_an_error_of_one_rank_is_raised_by_all_at_the_next_call(tmp_path: Path) -> None:
    answers = run_distributed(2, _one_rank_fails, str(tmp_path))
    first, second = (bytes(answer["sentences"].tolist()).decode().split("|") for answer in answers)
    assert first == second
    assert first == ['Rank 1: A tensor cannot be called "bad[name" in a sharded checkpoint; rename it.'] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_one_save_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []
    gate = threading.Event()

    def slow(tensors: Tensors, extra: dict[str, Any], group: Group) -> None:
        gate.wait(20)
        order.append(extra["name"])

    saver = _alone()
    saver.save(slow, {}, {"name": "first"})
    assert saver.busy
    saver.check()  # does not wait
    threading.Timer(0.2, gate.set).start()
    saver.save(slow, {}, {"name": "second"})
    assert order[:1] == ["first"]
    saver.wait()
    assert order == ["first", "second"]
    assert not saver.busy
    saver.close()


def test_check_tells_of_a_failure_once(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    saver = _alone()
    saver.save(_write_to(blocked / "step"), held_by(CUTS[1]["alone"], 0), {})
    deadline = time.monotonic() + 20
    while saver.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(MoesaicError, match=r"Cannot write to .*file"):
        saver.check()
    saver.check()
    saver.close()


def test_what_is_handed_over_is_copied(tmp_path: Path) -> None:
    gate = threading.Event()
    seen: dict[str, Any] = {}

    def write(tensors: Tensors, extra: dict[str, Any], group: Group) -> None:
        gate.wait(20)
        seen.update(extra, x=tensors["x"][1])

    held, x = held_by(CUTS[1]["alone"], 0)["embedding.weight"]
    wanted, extra = x.clone(), {"list": [1]}
    with _alone() as saver:
        saver.save(write, {"x": (held, torch.nn.Parameter(x))}, extra)
        x.zero_()
        extra["list"].append(2)
        gate.set()
    assert torch.equal(seen["x"], wanted)
    assert not seen["x"].requires_grad
    assert seen["list"] == [1]


def test_an_error_of_the_caller_is_not_hidden() -> None:
    def write(tensors: Tensors, extra: dict[str, Any], group: Group) -> None:
        raise CheckpointError("the save failed")

    saver = _alone()

    def fail() -> None:
        with saver:
            saver.save(write, {}, {})
            raise ValueError("the caller's own")

    with pytest.raises(ValueError, match="the caller's own"):
        fail()


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    """While the second rank has not written, nothing is there under the name."""
    run_distributed(2, _late, str(tmp_path))
    assert json.loads((tmp_path / "step" / "training.json").read_text()) == {}


def _late(rank: int, folder: str) -> dict[str, Tensor]:
    saver = AsyncSaver(saving_group(range(2), rank))

    def write(tensors: Tensors, extra: dict[str, Any], group: Group) -> None:
        if rank == 1:
            time.sleep(1)
            assert not (Path(folder) / "step").exists()
        save_sharded(f"{folder}/step", tensors, extra, group=group)

    saver.save(write, held_by(EP, rank), {})
    saver.close()
    assert (Path(folder) / "step" / "manifest.json").exists()
    return {}
