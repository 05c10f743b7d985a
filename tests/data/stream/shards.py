"""Shards made by hand for the tests of streams, and a slow reading of them that specifies the fast one."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from moesaic.data.config import DataConfig
from moesaic.data.packing import IGNORE, Batch
from moesaic.data.stream import patient
from moesaic.data.stream.feed import StreamFeed
from moesaic.data.stream.lanes import Lanes, hash_order
from moesaic.data.stream.patient import Patience
from moesaic.data.stream.shards import list_shards
from moesaic.data.stream.texts import Texts
from moesaic.tokenizer import encode, eos_id, train_bpe

SEQ_LEN = 11
Shards = Sequence[Sequence[str]]


@lru_cache
def tokenizer() -> Tokenizer:
    return train_bpe(["a document of some shard with words and numbers 0 1 2 3 4 5 6 7 8 9"] * 3, 300)


def documents(shards: int, each: int) -> list[list[str]]:
    """``shards`` lists of ``each`` texts, no two alike, from one word to about thirty."""
    return [
        [f"document {i} of shard {s}" + " words" * (7 * i * (s + 1) % 31) for i in range(each)] for s in range(shards)
    ]


def write_shards(folder: Path, shards: Shards, suffix: str = ".jsonl") -> Path:
    """One file per list, ``name-00000.jsonl`` and so on; ``suffix`` is .jsonl, .jsonl.gz or .parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, texts in enumerate(shards):
        file = folder / f"name-{number:05d}{suffix}"
        if suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), file, row_group_size=7)
            continue
        data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        file.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    return folder


def config(source: Path | str | Sequence[str], **more: Any) -> DataConfig:
    sources = (str(source),) if isinstance(source, Path | str) else tuple(source)
    plain = DataConfig(sources=sources, stream=True, lanes=3, shuffle=4, val_fraction=0.1, prefetch=0, retries=2)
    return replace(plain, **more)


def texts_of(source: Path | str | Sequence[str], patience: Patience | None = None, **more: Any) -> Texts:
    wanted = config(source, **more)
    patience = patience or Patience(wanted.retries)
    return Texts(wanted, list_shards(wanted, patience), patience)


def feed_of(
    source: Path | str | Sequence[str], batch_size: int = 4, accumulate: int = 2, seed: int = 0, **more: Any
) -> StreamFeed:
    return StreamFeed(texts_of(source, **more), tokenizer(), SEQ_LEN, batch_size, accumulate, seed)


def rows_of(batches: Sequence[Batch]) -> list[tuple[list[int], list[int], list[int], list[int], list[bool]]]:
    """Every field of every row, micro-batch after micro-batch."""
    return [
        tuple(
            getattr(batch, name)[b].tolist() for name in ("ids_BS", "targets_BS", "document_BS", "label_BS", "valid_BS")
        )
        for batch in batches
        for b in range(len(batch.ids_BS))
    ]  # type: ignore[misc]


def together(parts: Sequence[Sequence[Batch]]) -> list[Any]:
    """The rows of a step from the shares of all parts: of each micro-batch part 0's, then part 1's, and so on."""
    return [row for micro in zip(*parts, strict=True) for row in rows_of(micro)]


def held_out(text: str, fraction: float = 0.1) -> bool:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64 < fraction


def slow_lane(shards: Shards, lane: int, lanes: int, seed: int = 0, shuffle: int = 4) -> Iterator[tuple[int, int]]:
    """(token, running number of the document) of lane ``lane``, for ever: the loop that specifies a lane."""
    number = 0
    for epoch in range(10**9):
        for shard, part, parts in Lanes(len(shards), lanes, seed).stripes(lane, epoch):
            mine = [(j, text) for j, text in enumerate(shards[shard]) if j % parts == part and text.strip()]
            mine = [(j, text) for j, text in mine if not held_out(text)]
            begin = 0
            for first in range(0, len(mine), shuffle):
                window = mine[first : first + shuffle]
                key = ("window", seed, epoch, shard, part, begin)
                order = hash_order(len(window), *key) if shuffle > 1 else (0,)
                begin = window[-1][0] + 1
                for place in order:
                    for token in [*encode(tokenizer(), window[place][1]), eos_id(tokenizer())]:
                        yield token, number
                    number += 1


def slow_steps(
    shards: Shards,
    steps: int,
    batch_size: int = 4,
    accumulate: int = 2,
    lanes: int = 3,
    seed: int = 0,
    shuffle: int = 4,
) -> list[list[Any]]:
    """The rows of the first ``steps`` steps, by the slow lanes."""
    lanes = min(lanes, batch_size)
    sources = [slow_lane(shards, lane, lanes, seed, shuffle) for lane in range(lanes)]
    last = [next(source) for source in sources]
    result = []
    for _ in range(steps):
        rows = []
        for _ in range(accumulate):
            for row in range(batch_size):
                lane = row * lanes // batch_size
                tokens = [last[lane], *(next(sources[lane]) for _ in range(SEQ_LEN))]
                last[lane] = tokens[-1]
                targets = [b if m == n else IGNORE for (_, m), (b, n) in pairwise(tokens)]
                ids, owners = [t for t, _ in tokens[:-1]], [n - tokens[0][1] for _, n in tokens[:-1]]
                rows.append((ids, targets, owners, [0] * SEQ_LEN, [True] * SEQ_LEN))
        result.append(rows)
    return result


def no_pauses(monkeypatch: Any) -> list[float]:
    """Pauses of ``Patience`` are noted instead of slept."""
    slept: list[float] = []
    monkeypatch.setattr(patient.time, "sleep", slept.append)
    return slept


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)
