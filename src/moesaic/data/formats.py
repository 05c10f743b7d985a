"""One file of text -> rows: plain text, JSON lines, parquet, and data sets of the ``datasets`` library.

Each parser yields ``Row`` for every record and a ``DataError`` (yielded, not raised) for every record or rest of a
file that cannot be read, so that the caller decides whether to stop or to count and go on (see ``readers.py``).
Line endings come out as "\\n" and a byte-order mark is removed; every other character, NUL included, is kept.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moesaic.errors import DataError, nearest
from moesaic.tokenizer import lone_surrogate

PARAGRAPH_CHARACTERS = 8192


class Row(NamedTuple):
    """A text, the value of its label field (None where none was asked for), and "file:line" for messages."""

    text: str
    label: str | None
    where: str


Found = Row | DataError


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _damage(path: Path, error: Exception) -> DataError:
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        return DataError(f"{path} is truncated or damaged ({error}); copy or download it again.")
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{path} cannot be read: {reason}.")


def _not_utf8(where: str, data: bytes, error: UnicodeDecodeError, offset: int) -> DataError:
    looks_like = "It looks like UTF-16; convert" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "Convert"
    return DataError(
        f"{where} is not UTF-8 (byte 0x{data[error.start]:02x} at offset {offset + error.start}). "
        f"{looks_like} it to UTF-8, for instance with iconv."
    )


def _row(text: str, label: str | None, where: str) -> Found:
    at = lone_surrogate(text)
    if at is not None:
        return DataError(f"{where}: the text has half a surrogate pair ({text[at]!a} at character {at}); remove it.")
    return Row(text.replace("\r\n", "\n"), label, where)


def parse_text(path: Path, document: Literal["file", "paragraphs"]) -> Iterator[Found]:
    """A plain text file, gzipped or not: one row, or rows of about 8 kB that end at blank lines."""
    try:
        with _open(path) as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        yield _damage(path, error)
        return
    try:
        text = data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        yield _not_utf8(str(path), data, error, 0)
        return
    if document == "file":
        yield Row(text, None, str(path))
        return
    start, line = 0, 1
    while start < len(text):
        blank = re.compile(r"\n\s*\n").search(text, start + PARAGRAPH_CHARACTERS)
        end = blank.end() if blank else len(text)
        yield Row(text[start:end], None, f"{path}:{line}")
        line += text.count("\n", start, end)
        start = end


def parse_json_lines(path: Path, text_field: str, label_field: str | None) -> Iterator[Found]:
    """A file with one JSON object a line, gzipped or not. Blank lines are passed over."""
    offset = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                start = offset
                offset += len(line)
                try:
                    content = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    yield _not_utf8(where, line, error, start)
                    continue
                if number == 1:
                    content = content.removeprefix("\ufeff")
                if not content.strip():
                    continue
                try:
                    record = json.loads(content.rstrip("\r\n"))
                except RecursionError:
                    yield DataError(f"{where} is not valid JSON: it is nested too deeply.")
                    continue
                except ValueError as error:
                    hint = " The file must hold one object a line, not one array." if content.startswith("[") else ""
                    # The line is known; "line 1" of it would only mislead.
                    what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                    yield DataError(f"{where} is not valid JSON: {what}.{hint}")
                    continue
                if not isinstance(record, dict):
                    yield DataError(
                        f"{where} holds a JSON {type(record).__name__}; each line must be an object such as "
                        f'{{"{text_field}": "..."}}.'
                    )
                    continue
                yield _record(record, text_field, label_field, where)
    except (OSError, EOFError, zlib.error) as error:
        yield _damage(path, error)


def _record(record: Mapping[str, Any], text_field: str, label_field: str | None, where: str) -> Found:
    """The row in a record's fields, each checked for presence and type."""
    for field in (text_field, label_field):
        if field is not None and field not in record:
            return DataError(f"{where} {_missing(field, record)}")
    text = record[text_field]
    if not isinstance(text, str):
        return DataError(f'{where}: the field "{text_field}" is {_kind(text)}, but it must be a string.')
    if label_field is None:
        return _row(text, None, where)
    label = record[label_field]
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        return DataError(
            f'{where}: the label field "{label_field}" is {_kind(label)}, but it must be a name or a number.'
        )
    return _row(text, str(label), where)


def _missing(field: str, present: Iterable[str]) -> str:
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


def parse_parquet(path: Path, text_field: str, label_field: str | None) -> Iterator[Found]:
    """A parquet file. Page checksums, where the writer stored them, are verified."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"Reading {path} needs pyarrow; install it with: pip install 'moesaic[data]'.") from error
    wanted = [field for field in (text_field, label_field) if field is not None]
    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            present = file.schema_arrow.names
            for field in wanted:
                if field not in present:
                    yield DataError(f"{path} {_missing(field, present)}")
                    return
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for record in batch.to_pylist():
                    number += 1
                    yield _record(record, text_field, label_field, f"{path}:row {number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        first_line = next(iter(str(error).splitlines()), "unknown damage")
        yield DataError(
            f"{path} is not a whole parquet file (after row {number}: {first_line}); copy or download it again."
        )


def parse_dataset(name: str, text_field: str, label_field: str | None) -> Iterator[Found]:
    """A data set of the ``datasets`` library: ``OWNER/NAME[/CONFIG][:SPLIT]`` on the hub, or ``FOLDER[:SPLIT]``.

    A folder is one written by ``save_to_disk`` or one of data files. The split is "train" unless named.
    """
    try:
        import datasets
        import pyarrow as pa
    except ImportError as error:
        raise DataError(f"Reading {name} needs datasets; install it with: pip install 'moesaic[data]'.") from error
    match = re.fullmatch(r"((?:[A-Za-z]:)?[^:]+)(?::(\w+(?:\[[^\]]*\])?))?", name)
    if match is None:
        raise DataError(f"hf://{name} is not a data set; write hf://OWNER/NAME, with :SPLIT after it if need be.")
    place, split = Path(match[1]), match[2]
    try:
        if is_saved_dataset(place):
            saved = datasets.load_from_disk(str(place))
            if isinstance(saved, datasets.DatasetDict):
                chosen = split or ("train" if len(saved) != 1 else next(iter(saved)))
                if chosen not in saved:
                    raise DataError(f'The data set {name} has no split "{chosen}" (it has: {", ".join(saved)}).')
                table = saved[chosen]
            else:
                table = saved
        elif place.is_dir():
            table = datasets.load_dataset(str(place), split=split or "train")
        else:
            owner_and_name = "/".join(match[1].split("/")[:2])
            config = match[1].split("/")[2] if match[1].count("/") == 2 else None
            table = datasets.load_dataset(owner_and_name, config, split=split or "train")
        for field in (text_field, label_field):
            if field is not None and field not in table.column_names:
                yield DataError(f"The data set {name} {_missing(field, table.column_names)}")
                return
        table = table.select_columns([field for field in (text_field, label_field) if field is not None])
        for number, record in enumerate(table):
            yield _record(record, text_field, label_field, f"{name}:row {number + 1}")
    except ConnectionError as error:
        raise DataError(
            f"The data set {name} cannot be fetched: the hub is out of reach. Connect to the network, "
            "or give a local folder or file instead."
        ) from error
    except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError) as error:
        cause = error.__cause__ or error
        first_line = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise DataError(f"The data set {name} cannot be loaded: {first_line.rstrip('.')}.") from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``folder`` was written by ``datasets``' ``save_to_disk``."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )
