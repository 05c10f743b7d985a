"""Shards with a tokenizer: what stands in a ``Corpus`` where text in memory has its training view."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer

from moesaic.data.split import TokenView
from moesaic.data.stream.feed import StreamFeed
from moesaic.data.stream.texts import Text, Texts
from moesaic.data.tokens import encode_documents, tokenizer_sha256
from moesaic.errors import DataError

_SAMPLE_TOKENS = 2_000_000


@dataclass(frozen=True)
class TokenStream:
    """Training text that is read and tokenised when a feed asks for it."""

    texts: Texts
    tokenizer: Tokenizer

    @property
    def labels(self) -> tuple[str, ...]:
        """The domains, sorted."""
        return self.texts.labels

    @property
    def fingerprint(self) -> str:
        """Names tokenizer and domains. Whether the shards are the same is the feed's to check, which can say which is not."""
        what = [tokenizer_sha256(self.tokenizer), "stream", self.labels]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:20]

    def feed(self, seq_len: int, batch_size: int, accumulate: int, seed: int) -> StreamFeed:
        """The text in steps of ``accumulate`` micro-batches of ``batch_size`` rows."""
        return StreamFeed(self.texts, self.tokenizer, seq_len, batch_size, accumulate, seed)

    def sample(self) -> TokenView:
        """The first two million training tokens of many shards, read once; raises ``DataError`` if there are none."""
        return self._sample

    @cached_property
    def _sample(self) -> TokenView:
        return self._view(self.texts.spread(held_out=False), _SAMPLE_TOKENS)

    def held_out(self) -> TokenView:
        """The first ``data.val_tokens`` tokens of held-out documents of many shards. Raises ``DataError`` if there are none."""
        return self._view(self.texts.spread(held_out=True), self.texts.config.val_tokens)

    def _view(self, texts: Iterable[Text], most: int) -> TokenView:
        parts, labels, ends = [np.zeros(0, dtype=np.int64)], [], [0]
        for text in texts:  # one at a time: finding the next one that is held out may take a while
            ids = [ids for _, ids, _ in encode_documents(self.tokenizer, [text.text])]
            parts += ids
            labels.append(text.label)
            ends.append(ends[-1] + sum(map(len, ids)))
            if ends[-1] >= most:
                break
        if not labels:
            raise DataError(
                "The stream has too few documents to hold some out for validation and keep some for training "
                "(data.val_fraction says how many, and the text of each which): add text, change data.val_fraction, or let "
                "every file be many documents with data.document=paragraphs."
            )
        end_D = np.array(ends, dtype=np.int64)
        label_D = np.array(labels, dtype=np.int64)
        return TokenView(np.concatenate(parts).astype(np.uint32), end_D[:-1], end_D[1:], label_D, self.labels)
