"""Sharded checkpoints of a run: weights and optimizer under every layout, order and pointers, kills, one process again."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.checkpoint.atomic import verify_folder
from moesaic.checkpoint.native import load_model
from moesaic.checkpoint.parts import is_sharded
from moesaic.errors import CheckpointError
from moesaic.train.sharded.background import AsyncSaver, saving_group
from moesaic.train.sharded.consolidate import consolidate
from moesaic.train.sharded.optimizer import merge_optimizers, pack_optimizer
from moesaic.train.sharded.snapshots import newest_checkpoint, save_sharded_snapshot
from moesaic.train.snapshot import best_snapshot, latest_snapshot, resolve_model_folder, restore_snapshot, save_snapshot
from tests.distributed import run_distributed
from tests.train.sharded.layouts import everyone
from tests.train.sharded.runs import CUTS, one_step, part_of, restore, save, started


def _equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == x.dtype and torch.equal(found[name], x) for name, x in wanted.items()
    )


def _through_layouts(rank: int, run: str) -> dict[str, Tensor]:
    """From layout to layout in a ring, each loading what the one before saved."""
    model, optimizer = started(steps=3)
    cuts = ["one", "experts", "rows", "stages", "one"]
    save(run, 1, model, part_of(model, optimizer, cuts[0], rank), everyone())
    good = []
    for i, cut in enumerate(cuts[1:], 2):
        part = part_of(model, optimizer, cut, rank, blank=True)
        folder = newest_checkpoint(run, everyone())
        assert folder is not None
        assert folder.name == f"step-{i - 1:08d}"
        state = restore(folder, part, everyone())
        assert state == {"step_of_caller": i - 1, "step": i - 1}
        good.append(_equal(part.values(), part_of(model, optimizer, cut, rank).values()))
        save(run, i, model, part, everyone(), is_best=i == 2)
    return {"good": torch.tensor(good)}


def test_weights_and_optimizer_go_through_all_layouts_and_back_to_one_process(tmp_path: Path) -> None:
    for answer in run_distributed(2, _through_layouts, str(tmp_path)):
        assert answer["good"].all()
    # Three newest, and the best one; each as one process would have it after the same steps.
    steps = ["step-00000002", "step-00000003", "step-00000004", "step-00000005"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best", "latest", *steps]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000005\n"
    best = best_snapshot(tmp_path)
    assert best is not None
    assert best.name == "step-00000002"
    model, _ = started(steps=3)
    for step in steps:
        folder = consolidate(tmp_path / "checkpoints" / step, tmp_path / step)
        mine, my_optimizer = started(seed=1)
        state = restore_snapshot(folder, mine, my_optimizer)
        assert state["step"] == int(step[-1])
        assert _equal(mine.state_dict(), model.state_dict())
        assert _equal(load_model(folder).state_dict(), model.state_dict())
        assert one_step(mine, my_optimizer, 9) == one_step(*started(steps=3), 9)


def test_a_consolidated_snapshot_is_the_one_that_one_process_writes(tmp_path: Path) -> None:
    model, optimizer = started(steps=2)
    save(tmp_path / "a", 2, model, part_of(model, optimizer, "one", 0), everyone())
    folder = tmp_path / "a" / "checkpoints" / "step-00000002"
    theirs = save_snapshot(tmp_path / "b", 2, model, optimizer, {"step_of_caller": 2})
    consolidate(folder, folder)  # in its own place
    assert not is_sharded(folder)
    assert latest_snapshot(tmp_path / "a") == folder
    assert verify_folder(folder) == verify_folder(theirs)
    for file in ("model.safetensors", "training.safetensors", "config.json"):
        assert (folder / file).read_bytes() == (theirs / file).read_bytes()
    assert json.loads((folder / "training.json").read_text()) == json.loads((theirs / "training.json").read_text())


def _from_one_file(rank: int, folder: str) -> dict[str, Tensor]:
    torch.manual_seed(0)  # as in the test's own process: the random state is saved, too
    model, optimizer = started(steps=3)
    good = []
    for cut in CUTS:
        part = part_of(model, optimizer, cut, rank, blank=True)
        state = restore(folder, part, everyone())
        assert state == {"caller": 1, "step": 7}
        wanted = part_of(model, optimizer, cut, rank)
        good.append(_equal(part.values(), wanted.values()))
        good.append(part.optimizer.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"])
    return {"good": torch.tensor(good)}


def test_many_ranks_go_on_with_the_snapshot_of_one_process(tmp_path: Path) -> None:
    model, optimizer = started(steps=3)
    folder = save_snapshot(tmp_path, 7, model, optimizer, {"caller": 1})
    for answer in run_distributed(2, _from_one_file, str(folder)):
        assert answer["good"].all()
    path = folder / "training.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"training.safetensors is damaged"):
        restore(folder, part_of(model, optimizer, "one", 0), everyone())


def test_both_forms_are_one_series(tmp_path: Path) -> None:
    model, optimizer = started(steps=1)
    save_snapshot(tmp_path, 200, model, optimizer, {})
    save(tmp_path, 100, model, part_of(model, optimizer, "one", 0), everyone())  # gone back, so newer
    assert newest_checkpoint(tmp_path, everyone()) == latest_snapshot(tmp_path)
    found = latest_snapshot(tmp_path)
    assert found is not None
    assert found.name == "step-00000100"
    for call in (lambda: restore_snapshot(found, model, optimizer), lambda: resolve_model_folder(tmp_path)):
        with pytest.raises(
            CheckpointError,
            match=r"lies in parts of 1 process; make it one with `moesaic convert .*step-00000100 OUT`\.$",
        ):
            call()
    save_snapshot(tmp_path, 150, model, optimizer, {})
    save(tmp_path, 160, model, part_of(model, optimizer, "one", 0), everyone(), keep_last=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-00000150", "step-00000160"]


def _passes_over(rank: int, run: str) -> dict[str, Tensor]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = newest_checkpoint(run, everyone())
    said = [str(warning.message) for warning in caught if "damaged snapshot" in str(warning.message)]
    assert len(said) == (1 if rank == 0 else 0)
    assert rank == 1 or "step-00000002" in said[0]
    return {"step": torch.tensor(int(found.name[-1]) if found else -1)}


def test_a_damaged_newest_checkpoint_is_passed_over_by_all(tmp_path: Path) -> None:
    model, optimizer = started(steps=1)
    for step in (1, 2):
        save(tmp_path, step, model, part_of(model, optimizer, "one", 0), everyone())
    path = tmp_path / "checkpoints" / "step-00000002" / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert [int(answer["step"]) for answer in run_distributed(2, _passes_over, str(tmp_path))] == [1, 1]


def test_there_may_be_no_checkpoint_yet(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path, everyone()) is None


def test_another_optimizer_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    model, optimizer = started(steps=1)
    folder = save(tmp_path, 1, model, part_of(model, optimizer, "one", 0), everyone())
    part = part_of(*started(seed=1), "one", 0)
    before = part.values()
    other = torch.optim.SGD([p for _, p in part.trained.values()])
    part.optimizer, mine = other, part.optimizer  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match='holds the state of "AdamW", but this run uses SGD'):
        restore(folder, part, everyone())
    one_group = torch.optim.AdamW([{"name": "decay", "params": [p for _, p in part.trained.values()]}])
    part.optimizer = one_group
    with pytest.raises(CheckpointError, match=r'does not have .* in the optimizer group "decay"'):
        restore(folder, part, everyone())
    part.optimizer = mine
    path = folder / "training.json"
    for broken in ({"version": 7}, {"state": 3}, {"optimizer": {"kind": "AdamW"}}, {"optimizer": None}):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | broken))
        with pytest.raises(CheckpointError):
            restore(folder, part, everyone())
        path.write_text(json.dumps(record))
    assert _equal(part.values(), before)


def test_groups_of_ranks_make_one_optimizer() -> None:
    """Two stages; the second has no parameter of the first group."""

    def packed(*groups: tuple[str, list[str]], lr: float = 0.1) -> dict[str, object]:
        return {
            "kind": "AdamW",
            "groups": [{"names": names, "settings": {"name": name, "lr": lr}} for name, names in groups],
            "values": {},
        }

    merged = merge_optimizers([packed(("no_decay", ["c"])), packed(("decay", ["a", "b"]), ("no_decay", ["d", "c"]))])
    assert [(group["settings"]["name"], group["names"]) for group in merged["groups"]] == [
        ("decay", ["a", "b"]),
        ("no_decay", ["c", "d"]),
    ]
    with pytest.raises(CheckpointError, match='disagree on the settings of the optimizer group "decay"'):
        merge_optimizers([packed(("decay", ["a"])), packed(("decay", ["a"]), lr=0.2)])


def _train_until_killed(rank: int, run: str, seed: int, background: bool) -> dict[str, Tensor]:
    """Save a checkpoint per step until a SIGKILL takes one rank, from a thread, at a random moment."""
    torch.manual_seed(0)
    model, optimizer = started(steps=1)
    chance = random.Random(seed)
    victim, after = chance.randrange(2), chance.uniform(0.0, 0.6)
    group = saving_group(range(2), rank)
    saver = AsyncSaver(group)
    for step in range(2, 1000):
        if step == 4 and rank == victim:
            threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        one_step(model, optimizer, step)
        part = part_of(model, optimizer, "experts", rank)
        if not background:
            save(run, step, model, part, group)
            continue
        packed, moments = pack_optimizer(part.optimizer, part.trained)
        saver.save(
            lambda tensors, extra, group, step=step: save_sharded_snapshot(
                run, step, tensors, {}, optimizer=extra, group=group
            ),
            {**part.tensors, **moments},
            packed,
        )
    return {}


def _check_after_kill(run: Path, at_least: int) -> None:
    found = newest_checkpoint(run, everyone())
    assert found is not None
    step = int(found.name[5:])
    assert step >= at_least
    part = part_of(*started(), "one", 0, blank=True)
    restore(found, part, everyone())
    assert _equal(part.values(), part_of(*_trained(step), "one", 0).values())


def _trained(step: int) -> tuple[object, object]:
    model, optimizer = started(steps=1)
    for i in range(2, step + 1):
        one_step(model, optimizer, i)
    return model, optimizer


def _one_more(rank: int, run: str) -> dict[str, Tensor]:
    model, optimizer = started(steps=1)
    save(run, 999, model, part_of(model, optimizer, "rows", rank), everyone())
    return {}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_a_kill_at_any_moment_leaves_the_last_whole_checkpoint(tmp_path: Path, seed: int, background: bool) -> None:
    with pytest.raises(RuntimeError, match="ranks"):
        run_distributed(2, _train_until_killed, str(tmp_path), seed, background)
    _check_after_kill(tmp_path, at_least=2 if background else 3)  # in the background one more may be on its way
    time.sleep(0.1)
    run_distributed(2, _one_more, str(tmp_path))  # and the next save clears up
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left[:1] == ["latest"] or all(name.startswith(("step-", "latest")) for name in left), left
    assert "step-00000999" in left


def test_every_cut_of_the_tiny_run_differs() -> None:
    """Guards the tests above against layouts that are all the same."""
    model, optimizer = started()
    shapes = {
        cut: tuple(tuple(held.local) for held, _ in part_of(model, optimizer, cut, 0).tensors.values()) for cut in CUTS
    }
    assert len(set(shapes.values())) == len(CUTS)
