"""Byte-level BPE through the ``tokenizers`` library: train, load, encode, decode, and decode while generating.

    tokenizer = train_bpe(texts, vocab_size=4096)
    tokenizer.save("run/tokenizer.json")
    ids = encode(load_tokenizer("run"), "any text")       # tokenizer.decode(ids) gives the text back exactly

The control tokens can be written only by id: text that happens to contain "<|endoftext|>" is encoded as ordinary
bytes. The library does not store that switch (``encode_special_tokens``) in the file, so it is set on every load.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import TracebackType

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moesaic.errors import ConfigError, DataError

EOS = "<|endoftext|>"
PAD = "<|pad|>"

# 256 bytes plus the two control tokens: below this, some text could not be written at all.
MIN_VOCAB = 258

# Names the control tokens have in other people's tokenizer.json, tried after ours.
_FOREIGN_EOS = ("<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "<｜end▁of▁sentence｜>", "[SEP]")
_FOREIGN_PAD = ("<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE learned from ``texts``; the same texts in the same order give the same tokenizer.

    The vocabulary may come out smaller than ``vocab_size`` when the texts hold too few different pairs to merge.
    Ids 0 and 1 are ``EOS`` and ``PAD``. Raises ConfigError below 258 entries, DataError for text that is not Unicode.
    """
    if vocab_size < MIN_VOCAB:
        raise ConfigError(f"vocab_size is {vocab_size}, but a byte-level tokenizer needs at least {MIN_VOCAB} entries.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except UnicodeEncodeError as error:
        raise DataError(f"The tokenizer cannot learn from text that is not Unicode ({error}).") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


class _LibraryErrors:
    """Turns what ``tokenizers`` raises for a broken file, which is a bare ``Exception`` and nothing more special."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is Exception:
            raise DataError(f"{self._file} is not a tokenizer the `tokenizers` library can read ({error}).") from error


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in ``path``, a ``tokenizer.json`` or a folder that holds one. DataError if missing or broken."""
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"There is no tokenizer at {file}; give a tokenizer.json or a folder that holds one.")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not a tokenizer: it is not UTF-8 (byte {error.start}).") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error
    with _LibraryErrors(file):
        tokenizer = Tokenizer.from_str(content)
    # A file may carry truncation or padding from someone's fine-tuning; either would silently change our text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def eos_id(tokenizer: Tokenizer) -> int:
    """Id of the token that ends a document. Raises DataError if the tokenizer has none."""
    for name in (EOS, *_FOREIGN_EOS):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    raise DataError(f'The tokenizer has no end-of-text token (looked for "{EOS}" and {len(_FOREIGN_EOS)} other names).')


def pad_id(tokenizer: Tokenizer) -> int:
    """Id written at padding positions, the end-of-text id where the tokenizer has no padding token (it is masked)."""
    for name in (PAD, *_FOREIGN_PAD):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    return eos_id(tokenizer)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of ``text``, no control token added. Raises DataError if ``text`` holds a lone surrogate."""
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    except TypeError as error:
        at = lone_surrogate(text)
        if at is None:
            raise
        raise DataError(f"The text is not Unicode: character {at} is the lone surrogate {text[at]!a}.") from error


def lone_surrogate(text: str) -> int | None:
    """Position of the first character that no encoding can carry (half of a UTF-16 pair), or None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether tokens are pieces of bytes, so that any cut of the text decodes to the same text."""
    return isinstance(tokenizer.decoder, decoders.ByteLevel)


@cache
def _byte_of() -> dict[str, int]:
    # GPT-2's table: printable Latin-1 bytes stand for themselves, the other 68 for U+0100 onwards.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}


class StreamDecoder:
    """Text from ids, one at a time: ``feed`` returns what has become certain, ``finish`` what is left.

    All pieces joined equal ``tokenizer.decode(ids)``: a character is emitted only when all its UTF-8 bytes are there.
    Control tokens give no text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if is_byte_level(tokenizer) else None
        # For tokenizers that are not byte-level: the last ids whose text is out, then those still unfinished.
        self._pending: list[int] = []
        self._certain = 0
        self._emitted = ""

    def feed(self, token: int) -> str:
        """The text that ``token`` completes, often the empty string."""
        added = self._added.get(token)
        if added is not None and added.special:
            return ""
        if self._utf8 is None:
            return self._feed_by_text(token)
        name = self._tokenizer.id_to_token(token)
        if name is None:  # an id beyond the vocabulary (padded embedding rows) has no text
            return ""
        table = _byte_of()
        known = added is None and all(letter in table for letter in name)
        return self._utf8.decode(bytes(table[letter] for letter in name) if known else name.encode("utf-8"))

    def _feed_by_text(self, token: int) -> str:
        # A piece's text may depend on the pieces before it (leading space, byte fallback), so decode from the last
        # certain point and emit the difference; an unfinished character shows as a trailing U+FFFD.
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._emitted) :]
        self._pending = self._pending[self._certain :]
        self._certain = len(self._pending)
        self._emitted = self._tokenizer.decode(self._pending)
        return new

    def finish(self) -> str:
        """The rest: nothing, or U+FFFD for a character whose bytes never came."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)
        return self._tokenizer.decode(self._pending)[len(self._emitted) :] if self._pending else ""


def decode_stream(tokenizer: Tokenizer) -> StreamDecoder:
    """A fresh incremental decoder for one generated text."""
    return StreamDecoder(tokenizer)
