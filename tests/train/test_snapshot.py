"""Training checkpoints: resuming is bitwise, a kill at any moment loses at most the save under way, damage is passed over."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint import native
from moesaic.checkpoint.atomic import verify_folder
from moesaic.checkpoint.native import load_model
from moesaic.errors import CheckpointError, MoesaicError
from moesaic.train import snapshot
from moesaic.train.snapshot import best_snapshot, latest_snapshot, resolve_model_folder, restore_snapshot, save_snapshot
from tests.checkpoint.standin import Tiny, TinyConfig, TinyMoE, adamw, build_tiny, same, train_steps, values
from tests.checkpoint.test_atomic import file_size_limit, tree

Run = tuple[Tiny, torch.optim.AdamW]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ModelConfig", TinyConfig)
    monkeypatch.setattr(native, "build_model", build_tiny)


def started(seed: int = 1, steps: int = 1, dtype: torch.dtype = torch.float32, tied: bool = False) -> Run:
    model = build_tiny(TinyConfig(tied=tied), seed=seed).to(dtype)
    optimizer = adamw(model)
    train_steps(model, optimizer, steps)
    return model, optimizer


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) - 5] ^= 0x40
    path.write_bytes(data)


@pytest.fixture
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_equals_never_having_stopped(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    model, optimizer = started(steps=3, dtype=dtype, tied=tied)
    state = {
        "best_loss": 0.1 + 0.2,
        "position": [2**60, 3],
        "worst": float("inf"),
        "nested": {"none": None, "on": True},
    }
    folder = save_snapshot(tmp_path, 3, model, optimizer, state)
    at_save = values(model, optimizer)
    train_steps(model, optimizer, 3)
    expected, drawn = values(model, optimizer), torch.rand(3)

    model, optimizer = started(seed=9, steps=2, dtype=dtype, tied=tied)
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = 7.0, (0.5, 0.5)
    weights = list(model.parameters())
    assert restore_snapshot(folder, model, optimizer) == state | {"step": 3}
    assert same(values(model, optimizer), at_save)
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))
    train_steps(model, optimizer, 3)
    assert same(values(model, optimizer), expected)
    assert torch.equal(torch.rand(3), drawn)


def test_a_fresh_process_resumes_bitwise(tmp_path: Path) -> None:
    model, optimizer = started(steps=3)
    save_snapshot(tmp_path, 3, model, optimizer, {})
    train_steps(model, optimizer, 3)
    script = """
        import sys, torch
        from moesaic.train.snapshot import latest_snapshot, restore_snapshot
        from tests.checkpoint.standin import TinyConfig, adamw, build_tiny, train_steps, values
        torch.set_num_threads(1)
        model = build_tiny(TinyConfig(), seed=5)
        optimizer = adamw(model)
        restore_snapshot(latest_snapshot(sys.argv[1]), model, optimizer)
        train_steps(model, optimizer, 3)
        torch.save({k: v for k, v in values(model, optimizer).items() if isinstance(v, torch.Tensor)}, sys.argv[2])
    """
    run_script(script, str(tmp_path), str(tmp_path / "out"))
    found = torch.load(tmp_path / "out", weights_only=True)
    assert same(found, {k: v for k, v in values(model, optimizer).items() if isinstance(v, torch.Tensor)})


def run_script(script: str, *arguments: str) -> str:
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_moments_keep_their_own_dtype(tmp_path: Path) -> None:
    """torch's own load_state_dict casts fp32 moments of bf16 weights down to bf16."""
    model, optimizer = started(dtype=torch.bfloat16)
    moments = torch.full_like(model.up_EDH, 1 / 3, dtype=torch.float32)
    optimizer.state[model.up_EDH]["exp_avg"] = moments
    folder = save_snapshot(tmp_path, 1, model, optimizer, {})
    model, optimizer = started(seed=2, dtype=torch.bfloat16)
    restore_snapshot(folder, model, optimizer)
    assert same({"m": optimizer.state[model.up_EDH]["exp_avg"]}, {"m": moments})


def test_a_learning_rate_that_is_one_shared_tensor_stays_shared(tmp_path: Path) -> None:
    def make() -> Run:
        model = build_tiny(TinyConfig(), seed=1)
        lr = torch.tensor(0.25)
        return model, torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=lr, foreach=False)

    model, optimizer = make()
    folder = save_snapshot(tmp_path, 1, model, optimizer, {})
    model, optimizer = make()
    optimizer.param_groups[0]["lr"].fill_(9.0)
    restore_snapshot(folder, model, optimizer)
    first, *others = (group["lr"] for group in optimizer.param_groups)
    assert first.item() == 0.25
    assert all(lr is first for lr in others)


def test_moments_are_kept_by_name_not_by_position(tmp_path: Path) -> None:
    model, optimizer = started()
    folder = save_snapshot(tmp_path, 1, model, optimizer, {})
    for params, message in (
        ([{"params": [p]} for p in model.parameters()], "1 optimizer groups, but this run has 4"),
        (list(model.parameters())[::-1], "another order"),
        ([p for p in model.parameters() if p.ndim == 2], 'differ in "up_EDH"'),
    ):
        before = values(model)
        with pytest.raises(CheckpointError, match=message):
            restore_snapshot(folder, model, torch.optim.AdamW(params))
        assert same(values(model), before)
    with pytest.raises(CheckpointError, match='"AdamW", but this run uses SGD'):
        restore_snapshot(folder, model, torch.optim.SGD(model.parameters()))


def test_another_architecture_is_refused_not_passed_over(tmp_path: Path) -> None:
    folder = save_snapshot(tmp_path, 1, *started(), {})
    model = build_tiny(replace(TinyConfig(), moe=TinyMoE(k=2)), seed=1)
    with pytest.raises(CheckpointError, match="moe.k is 1 there and 2 here"):
        restore_snapshot(folder, model, adamw(model))


def test_a_snapshot_is_a_model_directory(tmp_path: Path) -> None:
    model, optimizer = started()
    folder = save_snapshot(tmp_path, 100, model, optimizer, {})
    assert folder == tmp_path / "checkpoints" / "step-00000100"
    assert same(values(load_model(folder)), values(model))
    expected = {"config.json", "model.safetensors", "training.json", "training.safetensors", "manifest.json"}
    assert set(tree(folder)) == expected
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000100\n"


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    model, optimizer = started()
    for step in range(1, 8):
        save_snapshot(tmp_path, step, model, optimizer, {}, keep_last=2, is_best=step in (1, 3))
    assert names(tmp_path) == ["best", "latest", "step-00000003", "step-00000006", "step-00000007"]
    assert best_snapshot(tmp_path) == tmp_path / "checkpoints" / "step-00000003"
    assert latest_snapshot(tmp_path) == tmp_path / "checkpoints" / "step-00000007"
    assert [(tmp_path / "checkpoints" / p).read_text() for p in ("latest", "best")] == [
        "step-00000007\n",
        "step-00000003\n",
    ]
    with pytest.raises(MoesaicError, match="keep_last is 0"):
        save_snapshot(tmp_path, 8, model, optimizer, {}, keep_last=0)


def test_nothing_is_purged_when_the_new_snapshot_does_not_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = started()
    save_snapshot(tmp_path, 1, model, optimizer, {}, keep_last=1, is_best=True)

    def damaged(folder: Path, quick: bool = False) -> frozenset[str]:
        flip(folder / "model.safetensors")  # as a failing disk would between writing and reading back
        return verify_folder(folder, quick)

    monkeypatch.setattr(snapshot, "verify_folder", damaged)
    with pytest.raises(CheckpointError, match=r"step-00000002/model\.safetensors is damaged"):
        save_snapshot(tmp_path, 2, model, optimizer, {}, keep_last=1)
    assert names(tmp_path) == ["best", "latest", "step-00000001", "step-00000002"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000001\n"


def test_any_damaged_file_makes_resuming_fall_back_with_a_warning(
    tmp_path: Path, quiet: list[warnings.WarningMessage]
) -> None:
    model, optimizer = started()
    older = save_snapshot(tmp_path, 1, model, optimizer, {})
    newest = save_snapshot(tmp_path, 2, model, optimizer, {}, is_best=True)
    assert latest_snapshot(tmp_path) == newest
    for path in sorted(newest.iterdir()):
        good = path.read_bytes()
        for damage in (flip, lambda p: p.write_bytes(p.read_bytes()[:-9]), Path.unlink):
            damage(path)
            quiet.clear()
            assert latest_snapshot(tmp_path) == older
            assert "step-00000002" in str(quiet[0].message)
            assert path.name in str(quiet[0].message)
            assert len(quiet) == 1
            with pytest.raises(CheckpointError, match=path.name):
                restore_snapshot(newest, model, optimizer)
            path.write_bytes(good)
    flip(newest / "model.safetensors")
    assert best_snapshot(tmp_path) is None
    assert resolve_model_folder(tmp_path) == older
    assert save_snapshot(tmp_path, 2, model, optimizer, {}) == newest  # the damaged one makes way
    verify_folder(newest)
    quiet.clear()
    assert latest_snapshot(tmp_path) == newest
    assert quiet == []


def test_broken_pointers_mislead_nobody(tmp_path: Path) -> None:
    model, optimizer = started()
    newest = save_snapshot(tmp_path, 2, model, optimizer, {}, is_best=True)
    for text in ("../../etc", "step-00000009", "", "\0"):
        for pointer in ("latest", "best"):
            (tmp_path / "checkpoints" / pointer).write_text(text)
        assert latest_snapshot(tmp_path) == best_snapshot(tmp_path) == resolve_model_folder(tmp_path) == newest


def test_after_going_back_the_new_attempt_is_the_newest(tmp_path: Path) -> None:
    model, optimizer = started()
    for step in (100, 200):
        save_snapshot(tmp_path, step, model, optimizer, {})
    restore_snapshot(tmp_path / "checkpoints" / "step-00000100", model, optimizer)
    newest = save_snapshot(tmp_path, 150, model, optimizer, {}, keep_last=2)
    assert latest_snapshot(tmp_path) == newest
    assert names(tmp_path) == ["latest", "step-00000150", "step-00000200"]


def test_files_of_two_snapshots_are_never_mixed(tmp_path: Path) -> None:
    model, optimizer = started()
    older = save_snapshot(tmp_path, 1, model, optimizer, {})
    train_steps(model, optimizer, 1)
    newest = save_snapshot(tmp_path, 2, model, optimizer, {})
    shutil.copy(older / "training.safetensors", newest / "training.safetensors")
    with pytest.raises(CheckpointError, match=r"training\.safetensors is damaged"):
        restore_snapshot(newest, model, optimizer)


def test_resolving_what_the_user_points_at(tmp_path: Path) -> None:
    model, optimizer = started()
    sparse = tmp_path / "compare" / "sparse"
    first = save_snapshot(sparse, 1, model, optimizer, {}, is_best=True)
    save_snapshot(sparse, 2, model, optimizer, {})
    (sparse / "config.json").write_text("{}")
    for path in (first, sparse, sparse / "checkpoints", tmp_path / "compare"):
        assert resolve_model_folder(path) == first
    native.save_model(model, tmp_path / "model")
    assert resolve_model_folder(tmp_path / "model") == tmp_path / "model"
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    (tmp_path / "younger").mkdir()
    (tmp_path / "younger" / "metrics.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("none", "nothing at"),
        ("model/config.json", "is a file"),
        ("young", "no complete checkpoint yet"),
        ("younger", "no checkpoint yet"),
        ("empty", "no model directory"),
    ):
        with pytest.raises(CheckpointError, match=message):
            resolve_model_folder(tmp_path / name)
    assert latest_snapshot(tmp_path / "none") is None


@pytest.mark.parametrize("state", [{"a": {3: 1}}, {"a": torch.ones(1)}, {"a": {1, 2}}])
def test_a_state_that_would_not_come_back_is_a_programming_error(tmp_path: Path, state: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        save_snapshot(tmp_path, 1, *started(), state)
    assert not list(tmp_path.rglob("step-*"))


def test_a_newer_or_foreign_training_file_is_refused(tmp_path: Path) -> None:
    model, optimizer = started()
    folder = tmp_path / "hand-made"
    native.save_model(model, folder, extra_files={"training.json": {"version": 2}})
    with pytest.raises(CheckpointError, match="version 2"):
        restore_snapshot(folder, model, optimizer)
    native.save_model(model, folder)
    with pytest.raises(CheckpointError, match=r"training\.json is missing"):
        restore_snapshot(folder, model, optimizer)


def test_a_full_disk_leaves_the_older_snapshots(tmp_path: Path) -> None:
    model, optimizer = started()
    save_snapshot(tmp_path, 1, model, optimizer, {})
    before = tree(tmp_path)
    for limit in (10, 600, 3000, 6000):  # in config.json, in the model, in the optimizer's tensors
        with file_size_limit(limit), pytest.raises(MoesaicError, match="Cannot write"):
            save_snapshot(tmp_path, 2, model, optimizer, {}, keep_last=1)
    assert tree(tmp_path) == before


def save_until_full(disk: Path, model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    for step in range(1, 20):
        save_snapshot(disk, step, model, optimizer, {}, keep_last=20)


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounting needs root; the limit above covers it"
)
def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False).returncode:
        pytest.skip("this container may not mount")
    try:
        model, optimizer = started()
        with pytest.raises(MoesaicError, match="the disk is full"):
            save_until_full(disk, model, optimizer)
        newest = latest_snapshot(disk)
        assert newest is not None
        assert len(names(disk)) > 2
        assert newest.name == names(disk)[-1]
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(MoesaicError, match="read-only"):
            save_snapshot(disk, 30, model, optimizer, {})
        assert restore_snapshot(newest, model, optimizer) == {"step": int(newest.name[5:])}
    finally:
        subprocess.run(["umount", disk], check=True)


KILLED = """
    import os, sys, time, random, signal, torch
    from moesaic.train.snapshot import save_snapshot
    from tests.checkpoint.standin import TinyConfig, adamw, build_tiny

    torch.set_num_threads(1)
    run, acknowledged = sys.argv[1:]
    model = build_tiny(TinyConfig(), seed=0)
    optimizer = adamw(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()

    def save(value):
        # Every number of the snapshot is `value`; steps come round again, so that folders are also replaced.
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(value)
                for t in optimizer.state[p].values():
                    t.fill_(value)
        save_snapshot(run, value % 5, model, optimizer, {"value": value}, keep_last=2, is_best=value % 3 == 0)
        os.pwrite(note, b"%08d" % value, 0)  # one system call: a kill cannot leave half a number

    note = os.open(acknowledged, os.O_CREAT | os.O_WRONLY)
    draw = random.Random(0)
    for kill in range(30):
        start = int(open(acknowledged).read() or 0) + 1
        child = os.fork()
        if child == 0:
            for value in range(start, start + 1000):
                save(value)
            os._exit(1)
        time.sleep(draw.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print("killed", flush=True)
        sys.stdin.readline()
"""


def test_a_kill_at_any_moment_loses_at_most_the_save_under_way(tmp_path: Path) -> None:
    run, acknowledged, bystander = tmp_path / "run", tmp_path / "acknowledged", tmp_path / "bystander"
    bystander.write_text("untouched")
    path = os.pathsep.join(p for p in sys.path if p)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(run), str(acknowledged)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    model, optimizer = started()
    kills = inside = 0
    try:
        while process.stdout.readline():
            kills += 1
            leftovers = [p for p in run.rglob(".*") if ".incomplete-" in p.name or ".replaced-" in p.name]
            inside += bool(leftovers)
            text = acknowledged.read_text()
            newest = latest_snapshot(run)  # warnings are errors here: nothing may look damaged
            if newest is not None:
                state = restore_snapshot(newest, model, optimizer)
                numbers = {t.item() for p in model.parameters() for t in p.unique()}
                numbers |= {t.item() for entry in optimizer.state.values() for m in entry.values() for t in m.unique()}
                assert numbers == {float(state["value"])}
                assert state["step"] == state["value"] % 5 == int(newest.name[5:])
            if text:
                assert newest is not None
                assert state["value"] in (int(text), int(text) + 1)
            process.stdin.write("\n")
            process.stdin.flush()
    finally:
        process.kill() if process.poll() is None else None
        process.wait()
        process.stdin.close()
        process.stdout.close()
    assert kills == 30
    assert inside >= 5  # usually about 15: half the kills fall between the first file and the last rename
    save_snapshot(run, 9, model, optimizer, {}, keep_last=1)
    assert [n for n in names(run) if n.startswith(".")] == []
    assert bystander.read_text() == "untouched"
