"""The token store: a corpus tokenised once, then memory-mapped by every run that uses it.

    cache = cached_tokens("corpus/", tokenizer, "cache/")         # reads and tokenises only what it has not seen
    train, validation = split(cache, 0.05, seed=0)                # by document, every domain in both where possible

A store is a folder: ``tokens.bin`` (raw uint16, or uint32 for vocabularies over 65536; every document ends with the
end-of-text token), ``documents.npy`` (int64, one row (first token, label index) a document) and ``meta.json`` (sizes,
labels, sha256 of contents and tokenizer). It is filled under another name and renamed, so it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from moesaic.data.readers import Document, Documents, LabelBy, read_documents, resolve
from moesaic.data.split import TokenView, split
from moesaic.errors import DataError, MoesaicError, disk_errors
from moesaic.tokenizer import eos_id, is_byte_level, lone_surrogate

__all__ = [
    "Progress",
    "TokenCache",
    "TokenView",
    "build_cache",
    "cached_documents",
    "cached_tokens",
    "open_cache",
    "split",
    "tokenizer_sha256",
]

Progress = Callable[[int, int], None]  # documents and tokens so far

_PIECE = 1 << 15  # characters encoded in one call: pieces run in parallel, and one call never holds a whole 1 GB file
_BATCH = 1 << 20  # characters of one encode_batch; an Encoding takes about 100 bytes a character


@dataclass(frozen=True)
class TokenCache:
    """An opened store. ``meta`` is its meta.json; ``view`` holds all documents, in the order they were read."""

    folder: Path
    view: TokenView
    meta: dict[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """The domains, sorted."""
        return self.view.labels


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """A name for exactly this tokenizer."""
    return hashlib.sha256(tokenizer.to_str().encode("utf-8")).hexdigest()


def pieces_of(text: str, byte_level: bool) -> Iterator[str]:
    """``text`` cut where a cut changes no token, so that a document of any length is encoded in calls of bounded size."""
    # A space between two word characters starts a pre-token in every byte-level tokenizer, so cutting there changes
    # no token. Text without such a place (one long CJK line) is cut anywhere: a token may differ, the bytes do not.
    # Other tokenizers put a mark before the first word of each call, so their documents are encoded whole.
    start = 0
    while byte_level and len(text) - start > _PIECE:
        place = re.compile(r"(?<=\w) (?=\w)").search(text, start + _PIECE // 2, start + _PIECE + 1)
        cut = place.start() if place else start + _PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]


Encoded = tuple[int, npt.NDArray[np.int64], bool]


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[Encoded]:
    """(number of the document, some of its ids, whether they are its last) of each document, as a store holds them.

    The end-of-text token is the last id of each. About 30 kB of text are taken and encoded at a time.
    """
    end = eos_id(tokenizer)
    held: list[tuple[int, bool, str]] = []
    size = 0
    for number, text in enumerate(texts):
        pieces = list(pieces_of(text, is_byte_level(tokenizer)))
        for n, piece in enumerate(pieces, start=1):
            held.append((number, n == len(pieces), piece))
            size += len(piece)
            if size >= _PIECE:
                yield from _encoded(tokenizer, held, end)
                held, size = [], 0
    yield from _encoded(tokenizer, held, end)


def _encoded(tokenizer: Tokenizer, held: list[tuple[int, bool, str]], end: int) -> Iterator[Encoded]:
    # Unlike encode, encode_batch lets other threads run meanwhile.
    encodings = tokenizer.encode_batch([piece for _, _, piece in held], add_special_tokens=False)
    for (number, last, _), encoding in zip(held, encodings, strict=True):
        yield number, np.array([*encoding.ids, end] if last else encoding.ids, dtype=np.int64), last


def _batches(documents: Iterable[Document], byte_level: bool) -> Iterator[tuple[list[str], list[Document | None]]]:
    """Pieces of text; beside each the document it ends, or None where more pieces of it follow."""
    pieces: list[str] = []
    ends: list[Document | None] = []
    size = 0
    for document in documents:
        if lone_surrogate(document.text) is not None:
            raise DataError(
                f"{document.where}: the text has half a surrogate pair, which no encoding can carry; remove it."
            )
        for piece in pieces_of(document.text, byte_level):
            pieces.append(piece)
            ends.append(None)
            size += len(piece)
            if size >= _BATCH and len(pieces) > 1:
                yield pieces[:-1], ends[:-1]
                pieces, ends, size = pieces[-1:], ends[-1:], len(piece)
        ends[-1] = document
    if pieces:
        yield pieces, ends


def build_cache(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    progress: Progress | None = None,
    source: str = "",
) -> TokenCache:
    """Tokenise ``documents`` into the new store ``folder`` and open it; ``source`` goes into meta.json as given.

    Raises DataError if there are no documents or the store exists, MoesaicError if the disk refuses. When it is
    interrupted nothing is left under ``folder``. If another process finishes the same store first, that one is opened.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists already; delete it or choose another folder for the tokens.")
    incomplete = folder.with_name(f"{folder.name}.incomplete-{os.getpid()}")
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(incomplete, ignore_errors=True)
        incomplete.mkdir()
    try:
        _fill(incomplete, documents, tokenizer, progress, source)
        with disk_errors(folder):
            try:
                incomplete.rename(folder)
            except OSError:
                if not (folder / "meta.json").is_file():
                    raise
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)
    return open_cache(folder)


def _fill(
    folder: Path, documents: Iterable[Document], tokenizer: Tokenizer, progress: Progress | None, source: str
) -> None:
    end = eos_id(tokenizer)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    digest = hashlib.sha256()
    names: dict[str, int] = {}
    table: list[tuple[int, int]] = []
    total = characters = start = 0
    with disk_errors(folder):
        file = open(folder / "tokens.bin", "wb")  # noqa: SIM115  closed below; reading errors must not look like disk errors
    with _closing(file, folder):
        for pieces, ends in _batches(documents, is_byte_level(tokenizer)):
            ids: list[int] = []
            for encoding, document in zip(tokenizer.encode_batch(pieces, add_special_tokens=False), ends, strict=True):
                ids += encoding.ids
                if document is not None:
                    ids.append(end)
                    table.append((start, names.setdefault(document.label, len(names))))
                    start = total + len(ids)
                    characters += len(document.text)
            data = np.asarray(ids, dtype=np.int64).astype(dtype).tobytes()
            with disk_errors(folder):
                file.write(data)
            digest.update(data)
            total += len(ids)
            if progress is not None:
                progress(len(table), total)
        if not table:
            raise DataError("There is no text to tokenise; give a source with at least one non-blank document.")
        with disk_errors(folder):
            file.flush()
            os.fsync(file.fileno())
    labels = sorted(names)
    place_of = np.array([labels.index(name) for name in names], dtype=np.int64)
    document_D2 = np.array(table, dtype=np.int64)
    document_D2[:, 1] = place_of[document_D2[:, 1]]
    with disk_errors(folder):
        np.save(folder / "documents.npy", document_D2, allow_pickle=False)
        meta = {
            "format": "moesaic-tokens",
            "version": 1,
            "dtype": dtype.name,
            "tokens": total,
            "documents": len(table),
            "characters": characters,
            "labels": labels,
            "vocab_size": vocab_size,
            "eos_id": end,
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "tokens_sha256": digest.hexdigest(),
            "documents_sha256": _sha256(folder / "documents.npy"),
            "source": source,
            "skipped": documents.skipped if isinstance(documents, Documents) else 0,
            "problems": documents.problems if isinstance(documents, Documents) else [],
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


@contextmanager
def _closing(file: BinaryIO, folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with disk_errors(folder):  # what a full disk did not take is written again here, and refused again
            file.close()


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def open_cache(folder: str | os.PathLike[str], verify: bool = False) -> TokenCache:
    """Memory-map a store. Sizes and the document table are always checked; ``verify`` also hashes all tokens.

    Raises DataError, naming the file and the fix, if the store is missing, truncated or changed.
    """
    folder = Path(folder)
    fix = f"Delete the folder {folder} to build it again."
    if not folder.is_dir():
        raise DataError(f"There is no token store at {folder}.")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        known = meta["format"] == "moesaic-tokens" and meta["version"] == 1
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
        total, count, labels = int(meta["tokens"]), int(meta["documents"]), tuple(map(str, meta["labels"]))
        expected = {"tokens.bin": str(meta["tokens_sha256"]), "documents.npy": str(meta["documents_sha256"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'meta.json'} is missing or damaged. {fix}") from error
    if not known:
        raise DataError(f"{folder / 'meta.json'} is of an unknown version. {fix}")
    for name, size in (("tokens.bin", total * dtype.itemsize), ("documents.npy", None)):
        file = folder / name
        if not file.is_file():
            raise DataError(f"{file} is missing. {fix}")
        if size is not None and file.stat().st_size != size:
            raise DataError(f"{file} has {file.stat().st_size} bytes where {size} were written: it is truncated. {fix}")
        if (verify or size is None) and _sha256(file) != expected[name]:
            raise DataError(f"{file} is not what was written: it was changed or damaged. {fix}")
    document_D2 = np.load(folder / "documents.npy", allow_pickle=False)
    if document_D2.shape != (count, 2):
        raise DataError(f"{folder / 'documents.npy'} does not belong to this meta.json. {fix}")
    tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r", shape=(total,))
    start_D = np.ascontiguousarray(document_D2[:, 0])
    end_D = np.append(start_D[1:], total)
    return TokenCache(folder, TokenView(tokens, start_D, end_D, np.ascontiguousarray(document_D2[:, 1]), labels), meta)


def cached_documents(
    fingerprint: str,
    documents: Callable[[], Iterable[Document]],
    tokenizer: Tokenizer,
    cache_root: str | os.PathLike[str],
    progress: Progress | None = None,
) -> TokenCache:
    """The store for the text that ``fingerprint`` names: opened if it exists, else built from ``documents()``."""
    key = hashlib.sha256(f"{fingerprint}\n{tokenizer_sha256(tokenizer)}".encode()).hexdigest()[:20]
    folder = Path(cache_root) / f"tokens-{key}"
    if folder.exists():
        return open_cache(folder)
    return build_cache(documents(), tokenizer, folder, progress, source=fingerprint)


def cached_tokens(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    cache_root: str | os.PathLike[str],
    *,
    text_field: str = "text",
    label_field: str | None = None,
    label_by: LabelBy = "auto",
    on_error: Literal["raise", "skip"] = "raise",
    document: Literal["file", "paragraphs"] = "file",
    progress: Progress | None = None,
) -> TokenCache:
    """The store of ``sources`` read with these options (see ``read_documents``), tokenised at most once.

    It is found again by the sources' paths, sizes and modification times, the options and the tokenizer. A data set
    on the hub has neither size nor time here: it is found by its name alone.
    """
    many = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    names = [os.fspath(one) for one in many]
    options = {"text_field": text_field, "label_field": label_field, "label_by": label_by, "document": document}
    what = {"files": _stamps(resolve(names)), "named": len(names), "on_error": on_error, **options}
    fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def read() -> Documents:
        return read_documents(
            names,
            text_field=text_field,
            label_field=label_field,
            label_by=label_by,
            on_error=on_error,
            document=document,
        )

    return cached_documents(fingerprint, read, tokenizer, cache_root, progress)


def _stamps(places: Iterable[str]) -> list[tuple[str, int, int]]:
    stamps: list[tuple[str, int, int]] = []
    for place in places:
        path = Path(re.sub(r"^hf://|:\w+(\[[^\]]*\])?$", "", place) if place.startswith("hf://") else place)
        stamps.append((place if place.startswith("hf://") else str(path.absolute()), 0, 0))
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            try:
                stat = file.stat()
            except FileNotFoundError as error:
                if place.startswith("hf://"):
                    continue
                raise MoesaicError(f"{file} disappeared while it was looked at.") from error
            stamps.append((str(file), stat.st_size, stat.st_mtime_ns))
    return stamps
