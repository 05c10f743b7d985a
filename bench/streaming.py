"""What reading text while training costs: tokens per second of a stream, memory, and the time to go on after a stop.

    python bench/streaming.py [--megabytes 64] [--lanes 16]

Writes shards of this Python installation's own text (repeated to size, every document numbered) into a temporary folder: JSON
lines, gzipped and parquet. Reads them as ``moesaic train`` would: byte-level BPE of 4096, rows of 1024, 16 rows a step. Per
format: tokens/s with nothing else to do, tokens/s of the tokenizer alone on such text in memory, peak memory above the start,
seconds to the first step, seconds from a saved state to the next step when half of the text is read. Last line: JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import tempfile
import time
from itertools import count, cycle
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moesaic.data.config import DataConfig
from moesaic.data.stdlib_corpus import stdlib_corpus
from moesaic.data.stream.feed import StreamFeed
from moesaic.data.stream.lanes import Stripe
from moesaic.data.stream.patient import Patience
from moesaic.data.stream.shards import list_shards
from moesaic.data.stream.texts import Texts
from moesaic.data.tokens import encode_documents
from moesaic.tokenizer import train_bpe

SHARDS, SEQ_LEN, ROWS = 32, 1024, 16


def main() -> None:
    """See the file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--lanes", type=int, default=16)
    wanted = parser.parse_args()
    documents = [document.text for document in stdlib_corpus(8_000_000, seed=0).documents]
    tokenizer = train_bpe(documents[:200], 4096)
    figures = {}
    print(f"{'format':10} {'tokens/s':>10} {'tokenizer':>10} {'MB above start':>14} {'first s':>8} {'resumed s':>9}")
    for suffix in (".jsonl", ".jsonl.gz", ".parquet"):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), documents, wanted.megabytes * 1_000_000, suffix)
            figures[suffix] = one = measure(folder, tokenizer, wanted.lanes)
        print(
            f"{suffix:10} {one['tokens_per_s']:10,.0f} {one['tokenizer_per_s']:10,.0f} {one['megabytes']:14,.0f} "
            f"{one['first_s']:8.2f} {one['resumed_s']:9.2f}"
        )
    print(json.dumps({"lanes": wanted.lanes, "megabytes": wanted.megabytes, "formats": figures}))


def write(folder: Path, documents: list[str], size: int, suffix: str) -> None:
    """``SHARDS`` files of about ``size`` bytes of text together."""
    texts = (f"{n} {text}" for n, text in zip(count(), cycle(documents), strict=False))
    for shard in range(SHARDS):
        rows, written = [], 0
        while written < size / SHARDS:
            rows.append(next(texts))
            written += len(rows[-1])
        file = folder / f"text-{shard:05d}{suffix}"
        if suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table({"text": rows}), file)
        else:
            data = "".join(json.dumps({"text": text}) + "\n" for text in rows).encode()
            file.write_bytes(gzip.compress(data, 6) if suffix.endswith(".gz") else data)


def measure(folder: str, tokenizer: Tokenizer, lanes: int) -> dict[str, Any]:
    """Half an epoch, then a resume."""
    config = DataConfig(sources=(folder,), stream=True, lanes=lanes, prefetch=0, val_fraction=0.01)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    texts = Texts(config, list_shards(config, Patience()), Patience())
    feed = StreamFeed(texts, tokenizer, SEQ_LEN, ROWS, 1, seed=0)
    feed.next_step()
    first = time.perf_counter() - started
    started, steps = time.perf_counter(), 0
    while min(lane[2] for lane in feed.state_dict()["lanes"]) < SHARDS // lanes // 2 and steps < 2000:
        feed.next_step()
        steps += 1
    seconds = time.perf_counter() - started
    tokens = steps * ROWS * SEQ_LEN
    again = StreamFeed(texts, tokenizer, SEQ_LEN, ROWS, 1, seed=0)
    again.load_state_dict(feed.state_dict())
    started = time.perf_counter()
    again.next_step()
    resumed = time.perf_counter() - started
    some = [text.text for text in texts.read(Stripe(0, 0, 1))][:400]
    started = time.perf_counter()
    counted = sum(len(ids) for _, ids, _ in encode_documents(tokenizer, some))
    alone = counted / (time.perf_counter() - started)
    for one in (feed, again):
        one.close()
    return {
        "tokens_per_s": tokens / seconds,
        "tokenizer_per_s": alone,
        "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "first_s": first,
        "resumed_s": resumed,
        "steps": steps,
    }


if __name__ == "__main__":
    main()
