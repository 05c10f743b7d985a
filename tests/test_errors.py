"""The error family: everything is a MoesaicError, the nearest name is offered, and the disk's errors are sentences."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moesaic.errors import CheckpointError, ConfigError, DataError, MoesaicError, NonFiniteError, disk_errors, nearest


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, NonFiniteError])
def test_one_except_catches_all(kind: type[MoesaicError]) -> None:
    with pytest.raises(MoesaicError, match="said"):
        raise kind("said")


def test_nearest_offers_a_close_word_and_nothing_far_fetched() -> None:
    assert nearest("swich", ["switch", "z"]) == ' Did you mean "switch"?'
    assert nearest("zebra", ["switch", "importance"]) == ""
    assert nearest("x", []) == ""


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full; free some space or choose another folder"),
        (errno.EFBIG, "larger than this system allows; choose another folder"),
        (errno.EACCES, "permission denied; choose a folder you may write to"),
        (errno.EROFS, "read-only; choose another folder"),
        (errno.ENOENT, "no folder can be made there; choose another path"),
        (errno.EHOSTDOWN, os.strerror(errno.EHOSTDOWN)),  # one we have no words for: the system's
    ],
)
def test_disk_errors_say_where_why_and_what_to_do(number: int, words: str) -> None:
    with pytest.raises(MoesaicError) as caught, disk_errors("runs/a"):
        raise OSError(number, os.strerror(number), "runs/a/file")
    assert str(caught.value).startswith("Cannot write to runs/a: ")
    assert str(caught.value).endswith(words + ".")
    assert isinstance(caught.value.__cause__, OSError)


def test_disk_errors_lets_everything_else_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), disk_errors(tmp_path):
        _ = 1 / 0
    with disk_errors(tmp_path):
        (tmp_path / "a").write_text("whole")
    assert (tmp_path / "a").read_text() == "whole"


def test_real_disk_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target, words in (
        (tmp_path / "file" / "below", "a part of the path is a file"),
        (tmp_path / ("x" * 300), "the name is too long"),
        (tmp_path, "a folder stands where a file is needed"),
    ):
        with pytest.raises(MoesaicError, match=words), disk_errors(target):
            target.write_text("x")
