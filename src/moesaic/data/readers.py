"""Text sources -> documents, each with the domain it belongs to.

    for document in read_documents("corpus/"):             # also a file, "logs/*.txt", "pages.jsonl.gz", "x.parquet",
        print(document.label, len(document.text))          # a save_to_disk folder, "hf://owner/name:split", or a list

A mistake in the data stops the reading with one sentence that names file and line; with ``on_error="skip"`` it is
counted instead (``.skipped``, ``.problems`` on what ``read_documents`` returns). A corpus without text is an error.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moesaic.data.formats import JSON_LINES, Found, Reading, read_file
from moesaic.data.hub import is_saved_dataset, parse_dataset
from moesaic.errors import ConfigError, DataError, nearest

LabelBy = Literal["stem", "folder", "none", "auto"]

# What a folder is searched for. A file named outright is read whatever its suffix.
PLAIN_TEXT = (
    *(".txt", ".text", ".txt.gz", ".md", ".rst", ".tex", ".org", ".adoc", ".html", ".htm", ".log", ".srt"),
    *(".csv", ".tsv", ".xml", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".sql", ".sh", ".bat", ".css"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt", ".scala", ".swift"),
    *(".js", ".ts", ".jsx", ".tsx", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".clj", ".ex", ".erl"),
    *(".lisp", ".el", ".zig", ".f90", ".m", ".cs", ".vb", ".asm", ".s"),
)
# Beside data files these describe the data set; they are not part of it.
_DESCRIPTIONS = ("readme", "license", "licence", "notice", "citation", "dataset_infos")
_MAX_STEM_LABELS = 64
_SHARD = re.compile(r"[-_.]\d+(?:[-_]of[-_]\d+)?$")


@dataclass(frozen=True)
class Document:
    """A text, its domain, and where it came from ("file" or "file:line"), for messages."""

    text: str
    label: str
    where: str


class Documents(Iterator[Document]):
    """What ``read_documents`` returns: an iterator that also counts what it skipped.

    ``skipped``: broken records passed over so far (``on_error="skip"``). ``problems``: the first ten of their messages.
    """

    def __init__(self, documents: Iterator[Document | DataError], on_error: str, source: str) -> None:
        self.skipped = 0
        self.problems: list[str] = []
        self._documents = documents
        self._on_error = on_error
        self._source = source
        self._empty = True

    def __next__(self) -> Document:
        for found in self._documents:
            if isinstance(found, Document):
                self._empty = False
                return found
            if self._on_error == "raise":
                raise unwanted(found)
            self.skipped += 1
            if len(self.problems) < 10:
                self.problems.append(str(found))
        if self._empty:
            broken = (
                f" ({self.skipped} broken records were skipped, the first: {self.problems[0]})" if self.skipped else ""
            )
            raise DataError(
                f"{self._source} holds no text{broken}; give a source with at least one non-blank document."
            )
        raise StopIteration


def unwanted(found: DataError) -> DataError:
    """The error that stops the reading at a broken record, with the way to go on without it."""
    return DataError(f'{found} Such records are left out with on_error="skip" (--set data.on_error=skip).')


def read_documents(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    text_field: str = "text",
    label_field: str | None = None,
    label_by: LabelBy = "auto",
    on_error: Literal["raise", "skip"] = "raise",
    document: Literal["file", "paragraphs"] = "file",
) -> Documents:
    """The documents of one source or several, in a fixed order (folders sorted), blank ones left out.

    Arguments:
        source: a text file, a folder (searched recursively for text and data files, hidden ones left out), a glob
            pattern, .jsonl/.ndjson/.json (lines, also .gz), .parquet, a folder written by ``save_to_disk``, or a
            data set ``hf://OWNER/NAME[/CONFIG][:SPLIT]``; or a list of these.
        text_field, label_field: fields of JSON lines, parquet and data sets; ``label_field`` gives the label.
        label_by: the label where no field gives it. "stem": the file's name without suffix and shard number;
            "folder": the first folder in which the files' paths differ; "none": "all"; "auto": the stem for files of
            one folder (up to 64 of them) or files named one by one, else the folder.
        on_error: "skip" counts broken records, and files that break off, instead of stopping at the first.
        document: "file" makes a plain text file one document, "paragraphs" cuts it at blank lines about every 8 kB.

    Raises DataError (at once: missing files; while reading: everything in the data) and ConfigError for an option
    that does not exist.
    """
    _check_option("label_by", label_by, ("stem", "folder", "none", "auto"))
    _check_option("on_error", on_error, ("raise", "skip"))
    _check_option("document", document, ("file", "paragraphs"))
    sources = [os.fspath(one) for one in ([source] if isinstance(source, str | os.PathLike) else source)]
    places = resolve(sources)
    labels = labels_of(places, label_by, named_one_by_one=len(places) == len(sources))

    def found() -> Iterator[Document | DataError]:
        for place, label in zip(places, labels, strict=True):
            for row in _parse(place, Reading(text_field, label_field, document)):
                if isinstance(row, DataError):
                    yield row
                elif row.text.strip():
                    yield Document(row.text, label if row.label is None else row.label, row.where)

    return Documents(found(), on_error, ", ".join(sources))


def _check_option(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f'{name} is "{value}", but it must be one of {", ".join(choices)}.{nearest(value, choices)}')


def _parse(place: str, how: Reading) -> Iterator[Found]:
    if place.startswith("hf://") or os.path.isdir(place):
        return parse_dataset(place.removeprefix("hf://"), how.text_field, how.label_field)
    return read_file(place, lambda: open(place, "rb"), how)


def resolve(sources: Sequence[str]) -> list[str]:
    """The files, saved data sets and hub ids that ``sources`` mean, in reading order. DataError for those not there."""
    if not sources:
        raise DataError("No text source is given; name a file, a folder, a pattern or hf://OWNER/NAME.")
    places: list[str] = []
    for source in sources:
        path = Path(source)
        if source.startswith("hf://") or path.is_file():
            places.append(source)
        elif path.is_dir():
            places.extend([source] if is_saved_dataset(path) else _files_in(path))
        elif glob.has_magic(source):
            matches = sorted(match for match in glob.glob(source, recursive=True) if os.path.isfile(match))
            if not matches:
                raise DataError(f'The pattern "{source}" matches no file; check the folder and the suffix.')
            places.extend(matches)
        elif "://" in source:
            raise DataError(f"{source} can only be streamed; add --set data.stream=true, or give a local copy.")
        else:
            here = os.listdir(path.parent) if path.parent.is_dir() else []
            raise DataError(f"There is no file or folder {source}.{nearest(path.name, here)}")
    return list(dict.fromkeys(places))


def _files_in(folder: Path) -> list[str]:
    names: list[str] = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names.extend(os.path.join(root, name) for name in sorted(files) if not name.startswith("."))
    return choose_files(f"The folder {folder}", names)


def choose_files(what: str, names: Sequence[str]) -> list[str]:
    """Those of the files ``names`` found in ``what`` that hold text or data, in the same order. DataError if none does."""
    # .json is left out: beside data it is nearly always a description, not lines.
    data = [name for name in names if name.endswith((*JSON_LINES[:-1], ".parquet"))]
    text = [name for name in names if name.lower().endswith(PLAIN_TEXT)]
    if data:
        text = [name for name in text if not os.path.basename(name).lower().startswith(_DESCRIPTIONS)]
    if not data and not text:
        suffixes = sorted({Path(name).suffix or "no suffix" for name in names})[:8]
        has = f"it has only {', '.join(suffixes)} files" if names else "it is empty"
        raise DataError(f"{what} holds no text files ({has}); name the files outright to read them anyway.")
    chosen = set(data) | set(text)
    return [name for name in names if name in chosen]


def _stem(place: str) -> str:
    if place.startswith("hf://"):
        return place.removeprefix("hf://").split(":")[0].rstrip("/").split("/")[-1]
    name = Path(place).name
    if not os.path.isdir(place):
        name = Path(name.removesuffix(".gz")).stem
    return _SHARD.sub("", name) or name


def labels_of(places: Sequence[str], label_by: str, named_one_by_one: bool) -> list[str]:
    """The label of each file, saved data set or hub id; see ``read_documents``."""
    if label_by == "none":
        return ["all"] * len(places)
    stems = [_stem(place) for place in places]
    if label_by == "stem":
        return stems
    files = [place for place in places if not place.startswith("hf://")]
    parents = {place: os.path.dirname(os.path.abspath(place)) for place in files}
    different = len(set(stems))
    if label_by == "auto" and (
        different == len(places) <= _MAX_STEM_LABELS
        if named_one_by_one
        else len(set(parents.values())) <= 1 and different <= _MAX_STEM_LABELS
    ):
        return stems
    try:
        root = os.path.commonpath(parents.values()) if parents else ""
    except ValueError:  # files on different Windows drives share no path
        return stems
    labels = []
    for place, stem in zip(places, stems, strict=True):
        below = os.path.relpath(parents[place], root) if place in parents else ""
        labels.append(stem if not below else Path(below).parts[0] if below != "." else os.path.basename(root) or stem)
    return labels
