"""What text a run reads and how it becomes tokens, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesaic.errors import ConfigError

STDLIB = "stdlib"


@dataclass(frozen=True)
class DataConfig:
    """What to read and how to cut it into tokens.

    Attributes:
        sources: files, folders, globs, ``hf://owner/name``; or "stdlib", the text every Python installation carries. With
            ``stream`` also any fsspec URL, such as ``s3://bucket/folder`` or ``https://host/file.jsonl.gz``.
        text_field, label_field, label_by, document, on_error: see ``data.readers.read_documents``.
        tokenizer: a tokenizer.json or a folder holding one; None trains byte-level BPE of ``vocab_size`` on the text.
        val_fraction: share of each domain's tokens kept for validation, by document (with ``stream``: of documents).
        stdlib_bytes: size of the "stdlib" corpus.
        cache_dir: where token caches live; None is the user's cache folder (or ``MOESAIC_CACHE``).
        stream: read and tokenise the text while training, not beforehand (see ``data.stream``); the rest is for this alone.
        labels: every value ``label_field`` may have, as a stream cannot look ahead; needed where that is set.
        lanes: independent readers the rows come from, at most as many as a micro-batch has rows.
        shuffle: documents of a lane that are put in random order at a time (1: the order of the files).
        val_tokens: validation tokens read from the held-out documents at the start.
        prefetch: steps read ahead of training in a thread (0: none).
        retries: how often a failed read over the network is tried again, after 1, 2, 4, ... seconds.
    """

    sources: tuple[str, ...] = ()
    text_field: str = "text"
    label_field: str | None = None
    label_by: Literal["stem", "folder", "none", "auto"] = "auto"
    document: Literal["file", "paragraphs"] = "file"
    on_error: Literal["raise", "skip"] = "raise"
    tokenizer: str | None = None
    vocab_size: int = 4096
    val_fraction: float = 0.05
    stdlib_bytes: int = 8_000_000
    cache_dir: str | None = None
    stream: bool = False
    labels: tuple[str, ...] = ()
    lanes: int = 64
    shuffle: int = 64
    val_tokens: int = 100_000
    prefetch: int = 2
    retries: int = 5

    def __post_init__(self) -> None:
        if self.vocab_size < 260:
            raise ConfigError(
                f"data.vocab_size must be at least 260 (256 bytes and the special tokens), not {self.vocab_size}."
            )
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"data.val_fraction must lie between 0 and 1, such as 0.05, not {self.val_fraction}.")
        for name, least in (("lanes", 1), ("shuffle", 1), ("val_tokens", 2), ("prefetch", 0), ("retries", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"data.{name} must be at least {least}, not {getattr(self, name)}.")
        if self.stream and self.label_field is not None and not self.labels:
            raise ConfigError(
                f'A stream cannot look ahead for the values of data.label_field="{self.label_field}"; list all of them in '
                "data.labels."
            )
        if self.labels and not (self.stream and self.label_field is not None):
            raise ConfigError("data.labels is read only with data.stream and data.label_field; leave it out.")
