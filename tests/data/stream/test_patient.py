"""Failed reads are tried again, at the byte where they failed, and given up in a sentence."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data.stream.patient import Patience, PatientFile
from moesaic.errors import CheckpointError, DataError
from tests.data.stream.shards import no_pauses

DATA = bytes(range(256)) * 8


class Flaky(io.BytesIO):
    """Fails, gives less than asked for, or nothing, as the plan says; shared by all openings."""

    def __init__(self, plan: list[str]) -> None:
        super().__init__(DATA)
        self.plan = plan

    def read(self, size: int | None = -1, /) -> bytes:
        what = self.plan.pop(0) if self.plan else "whole"
        if what == "fail":
            raise TimeoutError("timed out")
        if what == "nothing":
            return b""
        return super().read(3 if what == "short" and size and size > 3 else size)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["fail", "nothing", "short", "whole"]), max_size=12),
    st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 300)), min_size=1, max_size=6),
)
def test_what_is_read_is_what_the_file_holds(plan: list[str], reads: list[tuple[int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        no_pauses(patch)
        left = list(plan)
        file = io.BufferedReader(PatientFile("x", lambda: Flaky(left), len(DATA), Patience(retries=12)), 16)
        for start, size in reads:
            file.seek(start)
            assert file.read(size) == DATA[start : start + size]
        file.seek(-5, io.SEEK_END)
        assert file.read() == DATA[-5:]
        file.close()


def test_pauses_grow_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    slept, said = no_pauses(monkeypatch), []

    def fail() -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(
        DataError, match=r"^s3://b/x could not be read in 9 tries \(Connection reset by peer\)\. Check the"
    ):
        Patience(8, said.append).attempt("s3://b/x", fail)
    assert slept == [1, 2, 4, 8, 16, 32, 60, 60]
    assert said[0] == "s3://b/x could not be read (Connection reset by peer); trying again in 1 s (1/8)."
    assert len(said) == 8


def test_a_success_is_the_end_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = no_pauses(monkeypatch)
    answers: list[Any] = [OSError(), ValueError("odd reply"), 7]

    def answer() -> int:
        one = answers.pop(0)
        if isinstance(one, Exception):
            raise one
        return int(one)

    assert Patience(2).attempt("x", answer) == 7
    assert slept == [1, 2]


class HttpError(Exception):
    """What web clients raise: the status is on it or on its response."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} answer\nmore of it")
        self.status = status


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (FileNotFoundError("x"), "x is not there; restore it"),
        (HttpError(404), "x is not there"),
        (PermissionError(13, "Permission denied"), r"x may not be read \(Permission denied\); check the permissions"),
        (HttpError(403), r"x may not be read \(403 answer\)"),
        (IsADirectoryError(21, "Is a directory"), "x cannot be read: Is a directory"),
        (CheckpointError("said already."), "said already."),
    ],
)
def test_some_failures_are_final(error: Exception, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slept = no_pauses(monkeypatch)

    def fail() -> None:
        raise error

    with pytest.raises((DataError, CheckpointError), match=match):
        Patience(5).attempt("x", fail)
    assert slept == []
    with pytest.raises(DataError, match="in 6 tries"):
        Patience(5).attempt("x", lambda: (_ for _ in ()).throw(HttpError(503)))


def test_a_file_that_ends_early_is_not_silently_short(monkeypatch: pytest.MonkeyPatch) -> None:
    no_pauses(monkeypatch)

    def opened() -> BinaryIO:
        return io.BytesIO(DATA[:100])

    with pytest.raises(DataError, match=r"could not be read in 2 tries \(it ended at byte 100 of 2,048\)"):
        io.BufferedReader(PatientFile("x", opened, len(DATA), Patience(1))).read()


def test_a_file_is_opened_once_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[io.BytesIO] = []

    def opened() -> BinaryIO:
        made.append(io.BytesIO(DATA))
        return made[-1]

    with io.BufferedReader(PatientFile("x", opened, len(DATA), Patience(1)), 64) as file:
        assert not made  # not before something is read
        assert file.read() == DATA
        file.seek(0)
        assert file.read() == DATA
    assert [inner.closed for inner in made] == [True]


def test_keys_in_an_address_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    no_pauses(monkeypatch)

    def fail() -> None:
        raise ValueError("503, message='Busy', url='https://host/a.jsonl?key=secret&x=1' (why?)")

    with pytest.raises(DataError, match=r"\(503, message='Busy', url='https://host/a.jsonl' \(why\?\)\)"):
        Patience(0).attempt("x", fail)
