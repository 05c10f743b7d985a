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
        sources: files, folders, globs, ``hf://owner/name``; or "stdlib", the text every Python installation carries.
        text_field, label_field, label_by, document, on_error: see ``data.readers.read_documents``.
        tokenizer: a tokenizer.json or a folder holding one; None trains byte-level BPE of ``vocab_size`` on the text.
        val_fraction: share of each domain's tokens kept for validation, by document.
        stdlib_bytes: size of the "stdlib" corpus.
        cache_dir: where token caches live; None is the user's cache folder (or ``MOESAIC_CACHE``).
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

    def __post_init__(self) -> None:
        if self.vocab_size < 260:
            raise ConfigError(
                f"data.vocab_size must be at least 260 (256 bytes and the special tokens), not {self.vocab_size}."
            )
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"data.val_fraction must lie between 0 and 1, such as 0.05, not {self.val_fraction}.")
