"""One file of text -> rows: plain text, JSON lines, parquet.

    for found in read_file("pages.jsonl.gz", lambda: open("pages.jsonl.gz", "rb"), Reading()):
        ...                                            # a ``Row``, or a ``DataError`` for a record that cannot be read

Errors are yielded, not raised, so that the caller decides whether to stop or to count and go on (see ``readers.py``): one
for every record, or for the rest of a file, that cannot be read. Files are opened by the caller and may lie anywhere
(``data.stream``). Every row says where the next record begins, and reading may start there.
Line endings come out as "\\n" and a byte-order mark is removed; every other character, NUL included, is kept.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from moesaic.errors import DataError, nearest
from moesaic.tokenizer import lone_surrogate

PARAGRAPH_CHARACTERS = 8192
JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".json")

_BLOCK = 1 << 16  # bytes of a text read at once


class Place(NamedTuple):
    """Where a record begins: its number in the file, its byte (after decompression; unused in parquet), its line."""

    record: int = 0
    offset: int = 0
    line: int = 0


START = Place()


class Row(NamedTuple):
    """A text, the value of its label field (None where none was asked for), "file:line" for messages, what comes next."""

    text: str
    label: str | None
    where: str
    after: Place = START


Found = Row | DataError
Opener = Callable[[], BinaryIO]


@dataclass(frozen=True)
class Reading:
    """How files are read; see ``data.readers.read_documents``.

    Of the records only those are read, and checked, whose number is ``part`` modulo ``parts``.
    """

    text_field: str = "text"
    label_field: str | None = None
    document: Literal["file", "paragraphs"] = "file"
    part: int = 0
    parts: int = 1

    def wants(self, record: int) -> bool:
        """Whether the record of this number is to be read."""
        return record % self.parts == self.part


def read_file(name: str, opened: Opener, how: Reading, start: Place = START) -> Iterator[Found]:
    """The rows of the file ``name`` (its suffix says its format; it is what messages call it) from ``start`` on.

    ``opened`` gives the raw file, which must be seekable where ``start`` is not the beginning or the file is parquet.
    What ``opened`` and its file raise is yielded as a ``DataError`` where it is an ``OSError``, else passed on.
    """
    if name.endswith(".parquet"):
        yield from _parquet(name, opened, how, start)
        return
    try:
        with opened() as raw, _unpacked(name, raw) as file:
            if start.offset:
                file.seek(start.offset)
            if name.endswith(JSON_LINES):
                yield from _json_lines(name, file, how, start)
            elif how.document == "paragraphs":
                yield from _paragraphs(name, file, how, start)
            elif start.record == 0 and how.wants(0):
                yield from _whole(name, file)
    except (OSError, EOFError, zlib.error) as error:
        yield _damage(name, error)


def _unpacked(name: str, raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb")) if name.endswith(".gz") else raw


def _damage(name: str, error: Exception) -> DataError:
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        return DataError(f"{name} is truncated or damaged ({error}); copy or download it again.")
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{name} cannot be read: {reason}.")


def _not_utf8(where: str, data: bytes, error: UnicodeDecodeError, offset: int) -> DataError:
    looks_like = "It looks like UTF-16; convert" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "Convert"
    return DataError(
        f"{where} is not UTF-8 (byte 0x{data[error.start]:02x} at offset {offset + error.start}). "
        f"{looks_like} it to UTF-8, for instance with iconv."
    )


def _row(text: str, label: str | None, where: str, after: Place) -> Found:
    at = lone_surrogate(text)
    if at is not None:
        return DataError(f"{where}: the text has half a surrogate pair ({text[at]!a} at character {at}); remove it.")
    return Row(text.replace("\r\n", "\n"), label, where, after)


def _whole(name: str, file: BinaryIO) -> Iterator[Found]:
    """One row."""
    data = file.read()
    try:
        text = data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        yield _not_utf8(name, data, error, 0)
        return
    yield Row(text, None, name, Place(1, len(data)))


def _paragraphs(name: str, file: BinaryIO, how: Reading, start: Place) -> Iterator[Found]:
    """Rows of about 8 kB that end at blank lines; no more of the file than such a row and a block is held."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    place, fed, ended = start, start.offset, False
    held = ""  # decoded text from ``place`` on, its line endings as in the file
    if start.offset == 0:
        mark = file.read(3)
        place = Place(0, 3) if mark == codecs.BOM_UTF8 else START
        held, fed = "" if place.offset else decoder.decode(mark), 3
    while True:
        end = _paragraph_end(held, ended)
        if end is None and not ended:
            # As much again as is held, so that a paragraph of any length is searched a few times only.
            data = file.read(max(_BLOCK, len(held)))
            kept = len(decoder.getstate()[0])
            try:
                held += decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                yield _not_utf8(name, error.object, error, fed - kept)
                return
            fed, ended = fed + len(data), not data
            continue
        if not held:
            return
        raw, held = held[:end], held[end:]
        after = Place(place.record + 1, place.offset + len(raw.encode()), place.line + raw.count("\n"))
        if how.wants(place.record):
            yield Row(raw.replace("\r\n", "\n"), None, f"{name}:{place.line + 1}", after)
        place = after


def _paragraph_end(held: str, ended: bool) -> int | None:
    """Where the first paragraph of ``held`` ends, or None where that shows only with more text."""
    # 8192 characters of the text with "\n" for line endings: every "\r\n" among them is one more here.
    least, before = PARAGRAPH_CHARACTERS, -1
    while least != before:
        least, before = PARAGRAPH_CHARACTERS + held.count("\r\n", 0, least + 1), least
    blank = re.compile(r"\n\s*\n").search(held, least)
    # White space at the end of what is held may go on, and with it the blank lines.
    if blank and (ended or re.compile(r"\S").search(held, blank.end())):
        return blank.end()
    return len(held) if ended else None


def _json_lines(name: str, file: BinaryIO, how: Reading, start: Place) -> Iterator[Found]:
    """One JSON object a line. Blank lines are passed over."""
    offset = start.offset
    for record, line in enumerate(file, start=start.record):
        begin, offset = offset, offset + len(line)
        if how.wants(record):
            found = _json_line(name, line, how, record, begin)
            if found is not None:
                yield found if isinstance(found, DataError) else found._replace(after=Place(record + 1, offset))


def _json_line(name: str, line: bytes, how: Reading, record: int, offset: int) -> Found | None:
    where = f"{name}:{record + 1}"
    try:
        content = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return _not_utf8(where, line, error, offset)
    if record == 0:
        content = content.removeprefix("\ufeff")
    if not content.strip():
        return None
    try:
        fields = json.loads(content.rstrip("\r\n"))
    except RecursionError:
        return DataError(f"{where} is not valid JSON: it is nested too deeply.")
    except ValueError as error:
        hint = " The file must hold one object a line, not one array." if content.startswith("[") else ""
        # The line is known; "line 1" of it would only mislead.
        what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        return DataError(f"{where} is not valid JSON: {what}.{hint}")
    if not isinstance(fields, dict):
        return DataError(
            f"{where} holds a JSON {type(fields).__name__}; each line must be an object such as "
            f'{{"{how.text_field}": "..."}}.'
        )
    return row_of(fields, how.text_field, how.label_field, where)


def row_of(
    record: Mapping[str, Any], text_field: str, label_field: str | None, where: str, after: Place = START
) -> Found:
    """The row in a record's fields, each checked for presence and type."""
    for field in (text_field, label_field):
        if field is not None and field not in record:
            return DataError(f"{where} {missing_field(field, record)}")
    text = record[text_field]
    if not isinstance(text, str):
        return DataError(f'{where}: the field "{text_field}" is {_kind(text)}, but it must be a string.')
    if label_field is None:
        return _row(text, None, where, after)
    label = record[label_field]
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        return DataError(
            f'{where}: the label field "{label_field}" is {_kind(label)}, but it must be a name or a number.'
        )
    return _row(text, str(label), where, after)


def missing_field(field: str, present: Iterable[str]) -> str:
    """The end of a sentence about a record without ``field``."""
    names = list(present)
    shown = ", ".join(f'"{name}"' for name in names[:12]) + (", ..." if len(names) > 12 else "")
    return f'has no field "{field}" (it has: {shown or "none"}).{nearest(field, names)}'


def _kind(value: object) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return "empty" if value == "" else names.get(type(value), type(value).__name__)


def _parquet(name: str, opened: Opener, how: Reading, start: Place) -> Iterator[Found]:
    """Page checksums, where the writer stored them, are verified. Row groups before ``start`` are not read."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"Reading {name} needs pyarrow; install it with: pip install 'moesaic[data]'.") from error
    wanted = [field for field in (how.text_field, how.label_field) if field is not None]
    number = start.record
    try:
        # Pages are read as they are needed: many files may be open at once, and a row group may take gigabytes.
        with (
            opened() as raw,
            pq.ParquetFile(raw, page_checksum_verification=True, buffer_size=1 << 20, pre_buffer=False) as file,
        ):
            present = file.schema_arrow.names
            for field in wanted:
                if field not in present:
                    yield DataError(f"{name} {missing_field(field, present)}")
                    return
            number, groups = 0, list(range(file.num_row_groups))
            while groups and number + file.metadata.row_group(groups[0]).num_rows <= start.record:
                number += file.metadata.row_group(groups.pop(0)).num_rows
            for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=wanted, use_threads=False):
                chosen = [n for n in range(number, number + len(batch)) if n >= start.record and how.wants(n)]
                first, number = number, number + len(batch)
                records = batch.take(pa.array([n - first for n in chosen], pa.int64())).to_pylist()
                for n, record in zip(chosen, records, strict=True):
                    yield row_of(record, how.text_field, how.label_field, f"{name}:row {n + 1}", Place(n + 1))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        first_line = next(iter(str(error).splitlines()), "unknown damage")
        yield DataError(
            f"{name} is not a whole parquet file (after row {number}: {first_line}); copy or download it again."
        )
