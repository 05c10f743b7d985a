"""Whole or absent: what is left on the disk after success, failure, a kill, a full disk."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moesaic.checkpoint import atomic
from moesaic.checkpoint.atomic import atomic_file, atomic_folder, settle, sweep, verify_folder
from moesaic.errors import CheckpointError, MoesaicError


def fill(final: Path, text: str = "one", name: str = "a.txt") -> None:
    with atomic_folder(final) as partial:
        (partial / name).write_text(text)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    atomic_file(tmp_path / "latest", "old")
    atomic_file(tmp_path / "latest", b"new")
    assert tree(tmp_path) == {"latest": b"new"}


def test_a_folder_appears_with_its_manifest(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "model"
    with atomic_folder(final) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "b.bin").write_bytes(b"\0" * 10)
        assert not final.exists()
        assert partial.name == f".model.incomplete-{os.getpid()}"
    assert verify_folder(final) == {"sub/b.bin"}
    assert sorted(p.name for p in final.parent.iterdir()) == ["model"]


def test_replacing_leaves_only_the_new_folder(tmp_path: Path) -> None:
    fill(tmp_path / "model", "one")
    fill(tmp_path / "model", "two", "b.txt")
    assert verify_folder(tmp_path / "model") == {"b.txt"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder_untouched(tmp_path: Path, error: type[BaseException]) -> None:
    fill(tmp_path / "model")
    before = tree(tmp_path)

    def failing() -> None:
        with atomic_folder(tmp_path / "model") as partial:
            (partial / "half").write_text("...")
            raise error

    with pytest.raises(error):
        failing()
    assert tree(tmp_path) == before


def test_a_folder_with_foreign_files_is_never_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("three years")
    with pytest.raises(MoesaicError, match=r"thesis\.tex"):
        fill(home)
    fill(tmp_path / "model")
    (tmp_path / "model" / "notes.md").write_text("mine")
    with pytest.raises(MoesaicError, match=r"notes\.md"):
        fill(tmp_path / "model")
    assert tree(home) == {"thesis.tex": b"three years"}
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty")
    verify_folder(tmp_path / "empty")


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    fill(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fill(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a.txt").read_text() == "two"


def test_what_dead_writers_left_is_swept_and_what_live_ones_write_is_not(tmp_path: Path) -> None:
    dead, alive = tmp_path / f".model.incomplete-{dead_pid()}", tmp_path / f".model.incomplete-{os.getppid()}"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "x").write_text("x")
    fill(tmp_path / "model")
    assert not dead.exists()
    assert alive.exists()


def test_a_kill_between_the_two_renames_is_repaired(tmp_path: Path) -> None:
    fill(tmp_path / "model", "old")
    aside = tmp_path / f".model.replaced-{dead_pid()}"
    os.rename(tmp_path / "model", aside)
    assert settle(tmp_path / "model") == tmp_path / "model"
    assert (tmp_path / "model" / "a.txt").read_text() == "old"
    os.rename(tmp_path / "model", aside)
    sweep(tmp_path)  # a writer repairs it before it deletes leftovers
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failing_second_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "model", "old")
    before, rename = tree(tmp_path), os.rename

    def failing(a: Path, b: Path) -> None:
        if ".incomplete-" in Path(a).name:
            raise OSError(5, "input/output error")
        rename(a, b)

    monkeypatch.setattr(atomic.os, "rename", failing)
    with pytest.raises(MoesaicError, match="Cannot write to"):
        fill(tmp_path / "model", "new")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("where", ["file/model", "file", "/proc/model"])
def test_an_impossible_place_is_a_sentence(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MoesaicError, match="Cannot write"):
        fill(tmp_path / where)
    with pytest.raises(MoesaicError, match="Cannot write"):
        atomic_file(tmp_path / where / "latest", "x")
    assert tree(tmp_path) == {"file": b"x"}


def test_a_full_disk_is_a_sentence_and_leaves_the_old_folder(tmp_path: Path) -> None:
    fill(tmp_path / "model", "old")
    atomic_file(tmp_path / "latest", "old")
    before = tree(tmp_path)
    with file_size_limit(4096):
        with pytest.raises(MoesaicError, match="larger than this system allows"):
            fill(tmp_path / "model", "x" * 10_000)
        with pytest.raises(MoesaicError, match="larger than this system allows"):
            atomic_file(tmp_path / "latest", "x" * 10_000)
    assert tree(tmp_path) == before


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    fill(tmp_path / "model", "some text")
    for path in sorted((tmp_path / "model").iterdir()):
        good = path.read_bytes()
        for i in range(len(good)):
            if path.name == atomic.MANIFEST and chr(good[i]).isspace():
                continue  # another layout of the same manifest is the same manifest
            path.write_bytes(good[:i] + bytes([good[i] ^ 0x04]) + good[i + 1 :])
            with pytest.raises(CheckpointError, match=path.name):
                verify_folder(tmp_path / "model")
        path.write_bytes(good)
    verify_folder(tmp_path / "model")


def test_truncated_deleted_and_stray_files_are_noticed_by_size_alone(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    fill(folder, "some text")
    (folder / "a.txt").write_text("some")
    with pytest.raises(CheckpointError, match="4 bytes and was saved with 9"):
        verify_folder(folder, quick=True)
    (folder / "a.txt").unlink()
    with pytest.raises(CheckpointError, match=r"a\.txt is missing"):
        verify_folder(folder, quick=True)
    (folder / "a.txt").write_text("some text")
    (folder / "model-00003-of-00004.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="does not belong"):
        verify_folder(folder, quick=True)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        verify_folder(folder)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "a\\..\\x", "C:x", "x\0y", "", ".", "a//b", "\ud800", 3, None, ["x"]]
)
def test_hostile_names_are_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(CheckpointError, match="refused"):
        atomic.safe_member(tmp_path, name)


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    folder = tmp_path / "model"
    fill(folder, "s")
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside the folder"):
        verify_folder(folder)
    (folder / "a.txt").unlink()
    os.mkfifo(folder / "a.txt")
    with pytest.raises(CheckpointError, match="not a plain file"):
        verify_folder(folder)
