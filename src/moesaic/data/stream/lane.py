"""One lane: its documents in order, tokenised and packed end to end into rows, from any position on."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from moesaic.data.formats import START
from moesaic.data.split import Ints
from moesaic.data.stream.lanes import Cursor, Lanes, Stripe, hash_order
from moesaic.data.stream.texts import Skipped, Text, Texts
from moesaic.data.tokens import encode_documents
from moesaic.errors import DataError

_BARREN = 100  # epochs in which a lane finds nothing, after which it is not bad luck


class LaneRow(NamedTuple):
    """S + 1 consecutive tokens (the last is only a target), the document of each counted along the row, the label of each."""

    id_S1: Ints
    document_S1: Ints
    label_S1: Ints


class _Span(NamedTuple):
    """Consecutive tokens of one document; ``at.token`` is the number of the first of them."""

    at: Cursor
    ids: Ints
    label: int


class Lane:
    """Lane ``number`` of ``dealt``, which goes on from ``cursor``."""

    def __init__(
        self,
        number: int,
        dealt: Lanes,
        texts: Texts,
        tokenizer: Tokenizer,
        seq_len: int,
        cursor: Cursor,
        skipped: Skipped | None = None,
    ) -> None:
        self.cursor = cursor
        self._number, self._dealt, self._texts = number, dealt, texts
        self._tokenizer, self._seq_len, self._skipped = tokenizer, seq_len, skipped
        self._held: deque[_Span] = deque()  # from the first token of the next row on
        self._spans = self._read(cursor)

    def row(self, number: int) -> LaneRow:
        """Row ``number``, which must not lie behind; rows between are passed over."""
        while self.cursor.row < number:
            self._next()
        return self._next()

    def close(self) -> None:
        """Close the open shard."""
        self._spans.close()

    def _next(self) -> LaneRow:
        wanted = self._seq_len + 1
        while sum(len(span.ids) for span in self._held) < wanted:
            self._held.append(next(self._spans))
        ids, documents, labels = [], [], []
        document, before = -1, None
        for span in self._held:
            taken = span.ids[:wanted]
            wanted -= len(taken)
            document += before is None or span.at._replace(token=0) != before
            before = span.at._replace(token=0)
            ids.append(taken)
            documents.append(np.full(len(taken), document, dtype=np.int64))
            labels.append(np.full(len(taken), span.label, dtype=np.int64))
            if not wanted:
                break
        self._drop(self._seq_len)
        self.cursor = self._held[0].at._replace(row=self.cursor.row + 1)
        return LaneRow(np.concatenate(ids), np.concatenate(documents), np.concatenate(labels))

    def _drop(self, count: int) -> None:
        while count:
            span = self._held.popleft()
            if len(span.ids) > count:
                self._held.appendleft(
                    span._replace(at=span.at._replace(token=span.at.token + count), ids=span.ids[count:])
                )
                return
            count -= len(span.ids)

    def _read(self, cursor: Cursor) -> Generator[_Span]:
        skip = cursor.token
        for at, texts in self._windows(cursor):
            token = 0
            for number, ids, last in encode_documents(self._tokenizer, (text.text for text in texts)):
                used = min(max(skip - token, 0), len(ids))
                if used < len(ids):
                    place = at._replace(document=at.document + number, token=token + used)
                    yield _Span(place, ids[used:], texts[number].label)
                token += len(ids)
                if last:
                    token = skip = 0

    def _windows(self, cursor: Cursor) -> Iterator[tuple[Cursor, list[Text]]]:
        """The documents of each window in drawn order, the first ones from that of ``cursor`` on; and where they begin."""
        epoch, first, start, begin, barren = cursor.epoch, cursor.stripe, cursor.place, cursor.document, 0
        while True:
            found = False
            for number, stripe in islice(enumerate(self._dealt.stripes(self._number, epoch)), first, None):
                texts = self._texts.read(stripe, start, skipped=self._skipped)
                while window := list(islice(texts, self._texts.config.shuffle)):
                    found = True
                    order = self._order(len(window), epoch, stripe, start.record)
                    yield Cursor(0, epoch, number, *start, begin), [window[n] for n in order[begin:]]
                    start, begin = window[-1].after, 0
                start = START
            epoch, first, barren = epoch + 1, 0, 0 if found else barren + 1
            if barren == _BARREN:
                raise DataError(
                    f"The stream has too few documents for {self._dealt.lanes} lanes: one of them found none in {barren} "
                    "epochs. Set data.lanes lower, cut long files with data.document=paragraphs, or leave data.stream out."
                )

    def _order(self, size: int, epoch: int, stripe: Stripe, record: int) -> tuple[int, ...]:
        if self._texts.config.shuffle == 1:
            return (0,)
        return hash_order(size, "window", self._dealt.seed, epoch, stripe.shard, stripe.part, record)
