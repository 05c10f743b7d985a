"""Files of text read from any record on and in stripes: always the rows of one reading from the beginning."""

from __future__ import annotations

import gzip
import io
import json
import re
from typing import Any, BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data import formats
from moesaic.data.formats import START, Place, Reading, Row, read_file
from moesaic.errors import DataError


def rows(name: str, data: bytes, how: Reading, start: Place = START) -> list[Row]:
    found = list(read_file(name, lambda: io.BytesIO(data), how, start))
    assert all(isinstance(row, Row) for row in found), found
    return found  # type: ignore[return-value]


def parquet(texts: list[str]) -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pq.write_table(
        pa.table({"text": pa.array(texts, pa.string()), "n": list(range(len(texts)))}), file, row_group_size=3
    )
    return file.getvalue()


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" + "\n" * (n % 3 == 1) for n, text in enumerate(texts)).encode()


texts = st.lists(st.text(max_size=20), min_size=0, max_size=14)


@settings(max_examples=30, deadline=None)
@given(texts, st.integers(1, 4), st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.parquet"]))
def test_any_place_is_a_beginning_and_stripes_are_a_partition(texts: list[str], parts: int, name: str) -> None:
    data = parquet(texts) if name == "a.parquet" else lines(texts)
    data = gzip.compress(data) if name.endswith(".gz") else data
    whole = rows(name, data, Reading())
    assert [row.text for row in whole] == [text.replace("\r\n", "\n") for text in texts]
    for n, row in enumerate(whole):
        assert rows(name, data, Reading(), row.after) == whole[n + 1 :]
    stripes = [rows(name, data, Reading(part=part, parts=parts)) for part in range(parts)]
    assert sorted((row for stripe in stripes for row in stripe), key=lambda row: row.after.record) == whole
    for stripe, part in zip(stripes, range(parts), strict=True):
        assert all((row.after.record - 1) % parts == part for row in stripe)
        for n, row in enumerate(stripe):
            assert rows(name, data, Reading(part=part, parts=parts), row.after) == stripe[n + 1 :]


def slow_paragraphs(data: bytes, least: int) -> list[tuple[str, int]]:
    """(text, line) by one pass over the whole text."""
    text = data.decode().removeprefix("\ufeff").replace("\r\n", "\n")
    found, start = [], 0
    while start < len(text):
        blank = re.compile(r"\n\s*\n").search(text, start + least)
        end = blank.end() if blank else len(text)
        found.append((text[start:end], text.count("\n", 0, start) + 1))
        start = end
    return found


pieces = st.lists(
    st.sampled_from(
        ["a", "é", "word ", "\n", "\n\n", "\r\n", "\r", " ", "\n \t\n", "\r\n\r\n", "\U0001f600", "\u2028", "\n\n \n"]
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(pieces, st.booleans(), st.integers(1, 12), st.integers(1, 9))
def test_paragraphs_read_in_blocks_are_those_of_the_whole_text(
    pieces: list[str], mark: bool, least: int, block: int
) -> None:
    data = ("\ufeff" * mark + "".join(pieces)).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "PARAGRAPH_CHARACTERS", least)
        patch.setattr(formats, "_BLOCK", block)
        how = Reading(document="paragraphs")
        whole = rows("a.txt", data, how)
        assert [(row.text, int(row.where.split(":")[1])) for row in whole] == slow_paragraphs(data, least)
        for n, row in enumerate(whole):
            assert rows("a.txt", data, how, row.after) == whole[n + 1 :]
        stripes = [rows("a.txt", data, Reading(document="paragraphs", part=part, parts=2)) for part in range(2)]
        assert stripes == [whole[0::2], whole[1::2]]


def test_a_long_text_is_read_in_blocks() -> None:
    """Two paragraphs of a text of 2 MB need no more than a few blocks of it."""
    data = ("A line of a paragraph.\n" * 400 + "\n").encode() * 200

    class Counted(io.BytesIO):
        given = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            Counted.given += len(data)
            return data

    found = read_file("a.txt", lambda: Counted(data), Reading(document="paragraphs"))
    assert isinstance(next(found), Row)
    assert isinstance(next(found), Row)
    assert Counted.given < 200_000
    found.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("block", [3, 1 << 16])
def test_damaged_text_in_the_middle_of_a_file_is_named_with_its_offset(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_BLOCK", block)
    monkeypatch.setattr(formats, "PARAGRAPH_CHARACTERS", 4)
    data = "é one.\n\ntwo two.\n\nthr".encode() + b"\xe9" + b"e.\n\n"
    found = list(read_file("a.txt", lambda: io.BytesIO(data), Reading(document="paragraphs")))
    assert isinstance(found[-1], DataError)
    assert "a.txt is not UTF-8 (byte 0xe9 at offset 22)" in str(found[-1])
    cut = list(read_file("a.txt", lambda: io.BytesIO("one é".encode()[:-1]), Reading(document="paragraphs")))
    assert "at offset 4" in str(cut[0])


def test_a_whole_file_is_one_record() -> None:
    assert rows("a.txt", b"one\n\ntwo", Reading()) == [Row("one\n\ntwo", None, "a.txt", Place(1, 8))]
    assert rows("a.txt", b"one\n\ntwo", Reading(), Place(1, 8)) == []
    assert [len(rows("a.txt", b"one", Reading(part=part, parts=3))) for part in range(3)] == [1, 0, 0]


def test_broken_records_of_other_stripes_are_not_reported() -> None:
    data = b'{"text": "a"}\n{"text"\n{"text": "c"}\n'
    assert [row.text for row in rows("a.jsonl", data, Reading(part=0, parts=2))] == ["a", "c"]
    (error,) = read_file("a.jsonl", lambda: io.BytesIO(data), Reading(part=1, parts=2))
    assert "a.jsonl:2 is not valid JSON" in str(error)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_sentences_of_the_file_itself_pass_through(name: str) -> None:
    """A lost connection (``data.stream.patient``) must not be taken for a damaged file."""

    class Lost(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise DataError("the connection is gone")

        def readinto(self, buffer: Any) -> int:
            raise DataError("the connection is gone")

        readline = __next__ = read  # type: ignore[assignment]

    data = parquet(["x"]) if name == "a.parquet" else b"x"

    def opened() -> BinaryIO:
        return Lost(data)

    with pytest.raises(DataError, match="the connection is gone"):
        list(read_file(name, opened, Reading()))


def test_only_the_row_groups_that_are_needed_are_read() -> None:
    """The last group of a file whose first groups are damaged."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    table = pa.table({"text": [f"text number {n}" for n in range(9)]})
    pq.write_table(table, file, row_group_size=3, write_page_checksum=True, compression="none", use_dictionary=False)
    data = file.getvalue().replace(b"text number 1", b"test number 1", 1)
    assert [row.text[-1] for row in rows("a.parquet", data, Reading(), Place(4))] == list("45678")
    broken = list(read_file("a.parquet", lambda: io.BytesIO(data), Reading()))
    assert "is not a whole parquet file (after row 0" in str(broken[0])
