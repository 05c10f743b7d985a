"""A labelled corpus that every machine already has: the text files of its own Python installation.

    corpus = stdlib_corpus(max_bytes=8_000_000, seed=0)
    print(corpus.describe())                       # documents and bytes of each domain
    cache = cached_documents(corpus.fingerprint, lambda: corpus.documents, tokenizer, "cache/")

Domains, each as far as the installation has it (system Pythons often come without tests or headers):
code (modules without their docstrings and tables), tests, prose (docstrings, help topics, licences, package
descriptions), data tables (character maps, long literals, test vectors, settings), c headers.
One installation gives the same corpus every time; another version of Python gives another.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import random
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

from moesaic.data.readers import Document
from moesaic.errors import ConfigError, DataError

CODE, TESTS, PROSE, TABLES, HEADERS = "code", "tests", "prose", "data tables", "c headers"

_PART_BYTES = 32_768  # longer texts become several documents, so that a split by document stays fine-grained
_TEXT_MIN = 200  # shorter texts are stubs and "this file is empty" notes
_TABLE_LINES = 30  # a literal of this many lines at the top of a module is data, not code
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_SKIPPED_FOLDERS = ("__pycache__", "site-packages", "dist-packages", "config-", "_pyrepl", "__phello__")
_TABLE_SUFFIXES = (".dectest", ".csv", ".xml", ".cfg", ".def", ".toml", ".json", ".types", ".ini")


@dataclass(frozen=True)
class Places:
    """The folders to read: the standard library, the C headers, and where packages leave their descriptions."""

    stdlib: Path
    include: Path
    packages: Path

    @classmethod
    def of_this_python(cls) -> Places:
        """Where the running Python keeps them."""
        paths = sysconfig.get_paths()
        return cls(Path(paths["stdlib"]), Path(paths["include"]), Path(paths["purelib"]))


@dataclass(frozen=True)
class StdlibCorpus:
    """The documents, {domain: (documents, bytes)}, and a sha256 that names exactly this text."""

    documents: list[Document]
    sizes: dict[str, tuple[int, int]]
    fingerprint: str

    def describe(self) -> str:
        """A small table: domain, documents, bytes, share."""
        total = sum(size for _, size in self.sizes.values())
        rows = [
            f"{label:<12}{count:>10,}{size:>14,}{size / total:>8.0%}" for label, (count, size) in self.sizes.items()
        ]
        return "\n".join([f"{'domain':<12}{'documents':>10}{'bytes':>14}{'share':>8}", *rows])


def stdlib_corpus(max_bytes: int, seed: int, places: Places | None = None) -> StdlibCorpus:
    """At most ``max_bytes`` of UTF-8 text, shared evenly by the domains as far as each has text.

    No domain is more than half of the whole. ``seed`` chooses which files are taken and their order. Identical texts
    are taken once. Raises DataError if fewer than two domains are found, ConfigError for ``max_bytes`` below 10,000.
    """
    if max_bytes < 10_000:
        raise ConfigError(f"max_bytes is {max_bytes}, but a corpus of several domains needs at least 10,000 bytes.")
    places = places or Places.of_this_python()
    seen: set[bytes] = set()
    texts: dict[str, list[tuple[str, bytes]]] = {}
    for label, files in _files(places).items():
        random.Random(f"{seed}/{label}").shuffle(files)
        parts = _collect(label, files, places, seen, max_bytes // 2)
        if parts:
            texts[label] = parts
    if len(texts) < 2:
        raise DataError(
            f"This Python has too few text files of its own ({places.stdlib} gives {', '.join(texts) or 'none'}); "
            "give a text file or folder instead."
        )
    _divide_module.cache_clear()
    shares = _shares({label: sum(len(data) for _, data in parts) for label, parts in texts.items()}, max_bytes)
    documents: list[Document] = []
    sizes: dict[str, tuple[int, int]] = {}
    for label in sorted(texts):
        taken = _take(texts[label], shares[label])
        documents += [Document(data.decode("utf-8"), label, where) for where, data in taken]
        sizes[label] = (len(taken), sum(len(data) for _, data in taken))
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.label}\0{document.where}\0{document.text}\0".encode())
    return StdlibCorpus(documents, sizes, digest.hexdigest())


def _shares(available: dict[str, int], max_bytes: int) -> dict[str, int]:
    """How many bytes each domain gives: equal shares, what one cannot fill going to the others; none above the rest."""
    shares: dict[str, int] = {}
    left = max_bytes
    for place, label in enumerate(sorted(available, key=lambda label: (available[label], label))):
        shares[label] = min(available[label], left // (len(available) - place))
        left -= shares[label]
    largest = max(shares, key=lambda label: shares[label])
    shares[largest] = min(shares[largest], sum(shares.values()) - shares[largest])
    return shares


def _take(parts: list[tuple[str, bytes]], room: int) -> list[tuple[str, bytes]]:
    """The first parts that fill ``room`` bytes, the last one cut after a line."""
    taken = []
    for where, data in parts:
        if len(data) > room:
            data = data[: data.rfind(b"\n", 0, room) + 1]
            if data.strip():
                taken.append((where, data))
            break
        taken.append((where, data))
        room -= len(data)
    return taken


def _collect(
    label: str, files: list[tuple[str, Path]], places: Places, seen: set[bytes], enough: int
) -> list[tuple[str, bytes]]:
    parts: list[tuple[str, bytes]] = []
    size = 0
    for where, path in files:
        for text in _texts(label, where, path):
            data = text.strip().encode("utf-8") + b"\n"
            key = hashlib.sha256(data).digest()
            if len(data) < _TEXT_MIN or key in seen:
                continue
            seen.add(key)
            while data:
                cut = len(data) if len(data) <= _PART_BYTES else data.rfind(b"\n", 0, _PART_BYTES) + 1 or len(data)
                parts.append((where, data[:cut]))
                size += cut
                data = data[cut:]
        if size >= enough:
            break
    return parts


def _walk(root: Path) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Files below ``root`` with their relative parts, sorted; caches and installed packages left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(_SKIPPED_FOLDERS))
        for name in sorted(names):
            path = Path(folder, name)
            yield path.relative_to(root).parts, path


def _files(places: Places) -> dict[str, list[tuple[str, Path]]]:
    """The files that may hold text of each domain, named without the machine's own paths."""
    files: dict[str, list[tuple[str, Path]]] = {label: [] for label in (CODE, TESTS, PROSE, TABLES, HEADERS)}
    for parts, path in _walk(places.stdlib):
        entry = ("/".join(("stdlib", *parts)), path)
        suffix = path.suffix.lower()
        in_tests = not _TEST_FOLDERS.isdisjoint(parts[:-1])
        if suffix == ".py" and parts[0] == "encodings":
            files[TABLES].append(entry)
        elif suffix == ".py" and in_tests:
            files[TESTS].append(entry)
        elif suffix == ".py" and parts[0] == "pydoc_data":
            files[PROSE].append(entry)
        elif suffix == ".py" and not path.name.startswith("_sysconfigdata"):  # that one lists this machine's paths
            for label in (CODE, PROSE, TABLES):
                files[label].append(entry)
        elif suffix in _TABLE_SUFFIXES or path.name.endswith("Grammar.txt"):
            files[TABLES].append(entry)
        elif suffix in (".txt", ".rst", ".html") and not in_tests:
            files[PROSE].append(entry)
    if places.packages.is_dir():
        for info in sorted(places.packages.glob("*.dist-info")):
            for parts, path in _walk(info):
                if path.name == "METADATA" or path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE")):
                    files[PROSE].append(("/".join(("packages", info.name, *parts)), path))
    if places.include.is_dir():
        headers = ((parts, path) for parts, path in _walk(places.include) if path.suffix == ".h")
        files[HEADERS] += [("/".join(("include", *parts)), path) for parts, path in headers]
    return files


def _texts(label: str, where: str, path: Path) -> list[str]:
    """What a file gives to a domain; nothing if it is not UTF-8 or cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return []
    if where.startswith("stdlib/pydoc_data/"):
        return _help_topics(text)
    if path.suffix == ".html":
        return [_text_of_html(text)]
    if path.name == "METADATA":
        return [text.partition("\n\n")[2]]  # the description below the header fields
    if where.startswith("stdlib/encodings/"):
        # The rest of that folder is a hundred times the same ten lines around a C codec.
        return [text] if "decoding_table" in text or "decoding_map" in text or path.name == "aliases.py" else []
    if path.suffix != ".py" or label == TESTS:
        return [text]
    code, docstrings, tables = _divide_module(text)
    return {CODE: [code], PROSE: [docstrings], TABLES: [tables]}[label]


def _parse(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in old modules
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return None


@lru_cache(maxsize=1024)  # asked for by three domains
def _divide_module(source: str) -> tuple[str, str, str]:
    """A module as (code, docstrings, tables): the three share no line."""
    tree = _parse(source)
    if tree is None:
        return "", "", ""
    lines: list[str | None] = list(source.split("\n"))
    docstrings: list[tuple[int, str]] = []
    tables: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            if is_text and isinstance(first.value.value, str) and _whole_lines(first, lines):  # type: ignore[attr-defined]
                docstrings.append((first.lineno, inspect.cleandoc(first.value.value)))  # type: ignore[attr-defined]
                _blank(first, lines, " " * first.col_offset + "pass" if len(node.body) == 1 else None)
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict | ast.List | ast.Tuple | ast.Set):
            last = statement.end_lineno or statement.lineno
            if last - statement.lineno + 1 >= _TABLE_LINES and _whole_lines(statement, lines):
                tables.append("\n".join(line for line in lines[statement.lineno - 1 : last] if line is not None))
                _blank(statement, lines, None)
    code = "\n".join(line for line in lines if line is not None)
    return code, "\n\n".join(text for _, text in sorted(docstrings)), "\n\n".join(tables)


def _whole_lines(node: ast.stmt, lines: list[str | None]) -> bool:
    first, last = lines[node.lineno - 1], lines[(node.end_lineno or node.lineno) - 1]
    if first is None or last is None:
        return False
    return not first[: node.col_offset].strip() and not last.encode("utf-8")[node.end_col_offset :].strip()


def _blank(node: ast.stmt, lines: list[str | None], instead: str | None) -> None:
    for at in range(node.lineno - 1, node.end_lineno or node.lineno):
        lines[at] = None
    lines[node.lineno - 1] = instead


def _help_topics(source: str) -> list[str]:
    """The texts of pydoc_data/topics.py, which is one assignment of a dict from topic to text."""
    tree = _parse(source)
    topics = [node.value for node in tree.body if isinstance(node, ast.Assign)] if tree else []
    return [
        value.value
        for topic in topics
        if isinstance(topic, ast.Dict)
        for value in topic.values
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    ]


class _Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style", "head")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style", "head")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.words.append(data)


def _text_of_html(text: str) -> str:
    parser = _Words()
    parser.feed(text)
    parser.close()
    lines = [line.strip() for line in "".join(parser.words).split("\n")]
    return "\n".join(line for line, before in zip(lines, ["", *lines], strict=False) if line or before)
