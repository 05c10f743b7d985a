"""From a ``DataConfig`` to a tokenizer and two views of tokens, training and validation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from moesaic.data.config import STDLIB, DataConfig
from moesaic.data.feed import Feed, RowFeed
from moesaic.data.packing import PackedRows
from moesaic.data.readers import Document, read_documents
from moesaic.data.split import TokenView, split
from moesaic.data.stdlib_corpus import StdlibCorpus, stdlib_corpus
from moesaic.data.stream.patient import Patience
from moesaic.data.stream.shards import list_shards
from moesaic.data.stream.texts import Text, Texts
from moesaic.data.stream.tokens import TokenStream
from moesaic.data.tokens import TokenCache, cached_documents, cached_tokens
from moesaic.errors import ConfigError, DataError
from moesaic.tokenizer import load_tokenizer, train_bpe

Say = Callable[[str], None]
_BPE_BYTES = 64_000_000  # enough text to learn merges from; more only costs time


@dataclass(frozen=True)
class Corpus:
    """Text ready to train on.

    Attributes:
        tokenizer: given or trained.
        train: tokens in memory, or a stream of them.
        val: tokens of other documents (see ``data.split``, ``data.stream``).
        fingerprint: names exactly these tokens; a resumed run must find the same.
    """

    tokenizer: Tokenizer
    train: TokenView | TokenStream
    val: TokenView
    fingerprint: str

    @property
    def labels(self) -> tuple[str, ...]:
        """Domains of the documents."""
        return self.train.labels

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer, rounded up to a multiple of 64: what a model needs."""
        return -(-self.tokenizer.get_vocab_size() // 64) * 64

    def feed(self, seq_len: int, batch_size: int, accumulate: int, seed: int) -> Feed:
        """The training text in steps of ``accumulate`` micro-batches of ``batch_size`` rows."""
        if isinstance(self.train, TokenStream):
            return self.train.feed(seq_len, batch_size, accumulate, seed)
        return RowFeed(PackedRows(self.train, seq_len), batch_size, accumulate, seed)


def cache_root(config: DataConfig) -> Path:
    """The folder token caches live in."""
    if config.cache_dir:
        return Path(config.cache_dir)
    named = os.environ.get("MOESAIC_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesaic"


def load_corpus(
    config: DataConfig, seed: int = 0, say: Say = lambda _: None, tokenizer: Tokenizer | None = None
) -> Corpus:
    """Read, tokenise once into the cache, and split; or list the shards of a stream and read its held-out documents.

    ``tokenizer`` (of a resumed run) wins over the configured one. ``seed`` chooses the split of text in memory.
    Raises ``DataError`` and ``ConfigError`` in the words of ``readers``, ``tokens``, ``split`` and ``stream``.
    """
    if not config.sources:
        raise DataError("There is no text to train on; name files or folders with --data, or use --data stdlib.")
    if tokenizer is None and config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
    if config.stream:
        return _open_stream(config, say, tokenizer)
    if tokenizer is None:
        tokenizer = _learn_tokenizer(config, say)
    store = load_store(config, tokenizer, say)
    train, val = split(store, config.val_fraction, seed)
    say(
        f"{train.num_tokens:,} training and {val.num_tokens:,} validation tokens in "
        f"{store.view.num_documents:,} documents, domains: {', '.join(train.labels)}."
    )
    return Corpus(tokenizer, train, val, _fingerprint(store))


def _open_stream(config: DataConfig, say: Say, tokenizer: Tokenizer | None) -> Corpus:
    if STDLIB in config.sources:
        raise ConfigError(f'"{STDLIB}" is small and already here; leave data.stream out for it.')
    patience = Patience(config.retries, say)
    texts = Texts(config, list_shards(config, patience), patience)
    size = sum(shard.size for shard in texts.shards) / 1e6
    say(f"Streaming {len(texts.shards):,} shards ({size:,.1f} MB), domains: {', '.join(texts.labels)}.")
    if tokenizer is None:
        say(f"Training a byte-level BPE tokenizer of {config.vocab_size:,} tokens on the beginning of the stream ...")
        tokenizer = train_bpe(_first_bytes(texts.spread(held_out=False)), config.vocab_size)
    stream = TokenStream(texts, tokenizer)
    val = stream.held_out()
    say(f"{val.num_tokens:,} validation tokens in {val.num_documents:,} documents held out.")
    return Corpus(tokenizer, stream, val, stream.fingerprint)


def _fingerprint(store: TokenCache) -> str:
    """By what the tokens are, not by where the files lie: a project that was moved or copied resumes."""
    names = ("tokenizer_sha256", "tokens_sha256", "documents_sha256", "labels")
    return hashlib.sha256(json.dumps([store.meta[name] for name in names]).encode()).hexdigest()[:20]


def load_store(config: DataConfig, tokenizer: Tokenizer, say: Say = lambda _: None) -> TokenCache:
    """All tokens of the configured text, from the cache or tokenised into it."""
    if _is_stdlib(config):
        text = _stdlib(config.stdlib_bytes)
        say(f"Text of this Python installation ({text.fingerprint[:12]}):\n{text.describe()}")
        return cached_documents(text.fingerprint, lambda: text.documents, tokenizer, cache_root(config), _counter(say))
    return cached_tokens(
        config.sources,
        tokenizer,
        cache_root(config),
        text_field=config.text_field,
        label_field=config.label_field,
        label_by=config.label_by,
        on_error=config.on_error,
        document=config.document,
        progress=_counter(say),
    )


def _is_stdlib(config: DataConfig) -> bool:
    if STDLIB in config.sources and len(config.sources) > 1:
        raise DataError(f'"{STDLIB}" cannot be mixed with other sources; give it alone.')
    return STDLIB in config.sources


@lru_cache(maxsize=1)
def _stdlib(size: int) -> StdlibCorpus:
    return stdlib_corpus(size, seed=0)  # one text for all seeds, so that runs compare


def _learn_tokenizer(config: DataConfig, say: Say) -> Tokenizer:
    documents = _stdlib(config.stdlib_bytes).documents if _is_stdlib(config) else _read(config)
    say(f"Training a byte-level BPE tokenizer of {config.vocab_size:,} tokens ...")
    return train_bpe(_first_bytes(documents), config.vocab_size)


def _read(config: DataConfig) -> Iterable[Document]:
    return read_documents(
        config.sources,
        text_field=config.text_field,
        label_field=config.label_field,
        label_by=config.label_by,
        on_error=config.on_error,
        document=config.document,
    )


def _first_bytes(documents: Iterable[Document | Text]) -> Iterator[str]:
    left = _BPE_BYTES
    for document in documents:
        yield document.text[:left]
        left -= len(document.text)
        if left <= 0:
            return


def _counter(say: Say) -> Callable[[int, int], None]:
    shown = 0

    def count(documents: int, tokens: int) -> None:
        nonlocal shown
        if tokens >= shown + 5_000_000:
            shown = tokens
            say(f"  {tokens:,} tokens of {documents:,} documents ...")

    return count
