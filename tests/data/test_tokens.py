"""The token store: exact text, whole or absent, rebuilt when and only when something changed; honest splits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from moesaic.data import tokens as module
from moesaic.data.readers import Document
from moesaic.data.tokens import build_cache, cached_documents, cached_tokens, open_cache, split
from moesaic.errors import ConfigError, DataError, MoesaicError
from moesaic.tokenizer import encode, train_bpe

TOKENIZER = train_bpe(["the cat sat on the mat and looked at the other cat. " * 20, "日本語の文章。" * 10], 350)


def docs(*sizes: int, label: str = "a") -> list[Document]:
    return [Document(f"{n} " * size, label, f"doc {n}") for n, size in enumerate(sizes)]


def decoded(cache: Any, index: int) -> str:
    ids = cache.view.document(index).tolist()
    assert ids[-1] == 0
    assert 0 not in ids[:-1]
    return TOKENIZER.decode(ids[:-1])


def test_documents_come_back_exactly(tmp_path: Path) -> None:
    texts = ["one\n", "日本語 😀", "a\0b", "<|endoftext|> x <|pad|>", " \r\n lots   of space ", "x" * 3]
    documents = [Document(text, "ba"[n % 2], "here") for n, text in enumerate(texts)]
    cache = build_cache(documents, TOKENIZER, tmp_path / "c")
    assert [decoded(cache, n) for n in range(len(texts))] == texts
    assert cache.labels == ("a", "b")
    assert cache.view.label_D.tolist() == [1, 0, 1, 0, 1, 0]
    assert cache.view.num_documents == cache.meta["documents"] == 6
    assert cache.view.num_tokens == cache.meta["tokens"] == len(cache.view.tokens)
    assert cache.view.tokens.dtype == np.uint16


def test_long_documents_are_encoded_in_pieces_with_the_same_tokens(tmp_path: Path) -> None:
    text = "The cat sat;\n    on the_mat = 12 and looked...\n\n" * 3000
    cache = build_cache([Document(text, "a", "x"), Document("end", "a", "y")], TOKENIZER, tmp_path / "c")
    assert cache.view.document(0).tolist() == [*encode(TOKENIZER, text), 0]
    assert decoded(cache, 1) == "end"


@pytest.mark.parametrize("unit", ["日", "x", " ", "\n", "😀"])
def test_text_without_a_place_to_cut_still_comes_back(tmp_path: Path, unit: str) -> None:
    text = "!" + unit * 70_000
    cache = build_cache([Document(text, "a", "x")], TOKENIZER, tmp_path / "c")
    assert decoded(cache, 0) == text


def test_batches_join_seamlessly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = docs(5, 500, 1, 90, 300)
    whole = build_cache(documents, TOKENIZER, tmp_path / "whole")
    monkeypatch.setattr(module, "_BATCH", 64)
    monkeypatch.setattr(module, "_PIECE", 50)
    seen: list[tuple[int, int]] = []
    parts = build_cache(documents, TOKENIZER, tmp_path / "parts", progress=lambda n, tokens: seen.append((n, tokens)))
    assert [decoded(parts, n) for n in range(5)] == [document.text for document in documents]
    assert parts.view.start_D.tolist() == whole.view.start_D.tolist()
    assert np.array_equal(parts.view.tokens, whole.view.tokens)
    assert len(seen) > 10
    assert seen == sorted(seen)
    assert seen[-1] == (5, parts.view.num_tokens)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    vocab = {"<|endoftext|>": 0} | {f"w{n}": n for n in range(1, 70_000)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w1"))
    cache = build_cache([Document("w69999", "a", "x")], tokenizer, tmp_path / "c")
    assert cache.view.tokens.dtype == np.uint32
    assert cache.view.document(0).tolist() == [69999, 0]


def test_no_documents_and_half_characters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        build_cache([], TOKENIZER, tmp_path / "c")
    with pytest.raises(DataError, match="page 7: the text has half a surrogate"):
        build_cache([Document("a\ud800", "a", "page 7")], TOKENIZER, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, DataError])
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, kind: type[BaseException]) -> None:
    def interrupted() -> Iterator[Document]:
        yield Document("text " * 300_000, "a", "x")
        yield Document("text " * 300_000, "a", "y")
        assert any("incomplete" in path.name for path in tmp_path.iterdir())
        raise kind("stop")

    with pytest.raises(kind, match="stop"):
        build_cache(interrupted(), TOKENIZER, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_store_is_never_overwritten(tmp_path: Path) -> None:
    build_cache(docs(3), TOKENIZER, tmp_path / "c")
    with pytest.raises(DataError, match="exists already"):
        build_cache(docs(4), TOKENIZER, tmp_path / "c")


def test_another_process_finishing_first_is_no_error(tmp_path: Path) -> None:
    def racing() -> Iterator[Document]:
        yield from docs(3)
        (tmp_path / "other").rename(tmp_path / "c")

    build_cache(docs(3), TOKENIZER, tmp_path / "other")
    cache = build_cache(racing(), TOKENIZER, tmp_path / "c")
    assert decoded(cache, 0) == docs(3)[0].text
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_disk_that_refuses_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MoesaicError, match="Cannot write to .*file"):
        build_cache(docs(3), TOKENIZER, tmp_path / "file" / "c")


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["truncate", "delete", "flip", "empty"])
def test_damage_is_found_and_the_fix_is_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "c"
    build_cache(docs(30, 40), TOKENIZER, folder)
    open_cache(folder, verify=True)
    file = folder / name
    data = file.read_bytes()
    middle = len(data) // 2
    if damage == "delete":
        file.unlink()
    elif damage == "flip":
        at = data.index(b"tokens_sha256") if name == "meta.json" else middle
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    else:
        file.write_bytes(data[: middle if damage == "truncate" else 0])
    with pytest.raises(DataError, match=rf"{name}.*Delete the folder .*c to build it again"):
        open_cache(folder, verify=True)
    if not (name == "tokens.bin" and damage == "flip"):  # one wrong token is seen only by hashing them all
        with pytest.raises(DataError, match=name):
            open_cache(folder)


def test_opening_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no token store at .*nothing"):
        open_cache(tmp_path / "nothing")


def test_a_corpus_is_tokenised_once_until_something_changes(tmp_path: Path) -> None:
    corpus, root = tmp_path / "corpus", tmp_path / "cache"
    corpus.mkdir()
    (corpus / "a.txt").write_text("the cat")
    (corpus / "b.txt").write_text("the mat")
    built: list[int] = []

    def get(tokenizer: Tokenizer = TOKENIZER, **options: Any) -> Path:
        return cached_tokens(corpus, tokenizer, root, progress=lambda n, _: built.append(n), **options).folder

    first = get()
    assert (get(), built) == (first, [2])
    different = {first, get(label_by="none"), get(document="paragraphs"), get(train_bpe(["other text"], 300))}
    stat = (corpus / "a.txt").stat()
    (corpus / "a.txt").write_text("the dog")  # the same size
    os.utime(corpus / "a.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    different.add(get())
    (corpus / "c.txt").write_text("more")
    different.add(get())
    assert len(different) == len(built) == 6
    assert get() in different
    assert len(built) == 6


def test_what_a_killed_build_left_is_ignored_and_a_truncated_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat")
    folder = cached_tokens(tmp_path / "a.txt", TOKENIZER, tmp_path / "cache").folder
    folder.rename(folder.with_name(folder.name + ".incomplete-1"))  # as a kill before the final rename leaves it
    (folder.with_name(folder.name + ".incomplete-1") / "tokens.bin").write_bytes(b"")
    cache = cached_tokens(tmp_path / "a.txt", TOKENIZER, tmp_path / "cache")
    assert decoded(cache, 0) == "the cat sat on the mat"
    (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-2])
    with pytest.raises(DataError, match=r"tokens\.bin has .* truncated\. Delete the folder"):
        cached_tokens(tmp_path / "a.txt", TOKENIZER, tmp_path / "cache")


def test_what_was_skipped_is_remembered(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{broken\n{"text": "y"}\n')
    for _ in range(2):
        cache = cached_tokens(tmp_path / "a.jsonl", TOKENIZER, tmp_path / "cache", on_error="skip")
        assert cache.meta["skipped"] == 1
        assert "a.jsonl:2" in cache.meta["problems"][0]
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        cached_tokens(tmp_path / "a.jsonl", TOKENIZER, tmp_path / "cache")


def test_documents_in_memory_are_cached_by_their_fingerprint(tmp_path: Path) -> None:
    calls: list[int] = []

    def make() -> list[Document]:
        calls.append(1)
        return docs(3)

    folders = {cached_documents(name, make, TOKENIZER, tmp_path).folder for name in ("x", "x", "y")}
    assert (len(folders), len(calls)) == (2, 2)
    meta = json.loads((cached_documents("x", make, TOKENIZER, tmp_path).folder / "meta.json").read_text())
    assert meta["source"] == "x"


# The split


def ranges(view: Any) -> set[int]:
    return {n for start, end in zip(view.start_D, view.end_D, strict=True) for n in range(start, end)}


def test_split_shares_out_every_token_by_document(tmp_path: Path) -> None:
    sizes = np.random.default_rng(0).integers(5, 200, 120).tolist()
    documents = docs(*sizes[:100], label="a") + docs(*sizes[100:], label="b")
    cache = build_cache(documents, TOKENIZER, tmp_path / "c")
    train, held = split(cache, 0.1, seed=3)
    assert ranges(train) | ranges(held) == set(range(cache.view.num_tokens))
    assert not ranges(train) & ranges(held)
    assert set(train.start_D.tolist()) | set(held.start_D.tolist()) == set(cache.view.start_D.tolist())
    for label in (0, 1):
        part = [int((view.end_D - view.start_D)[view.label_D == label].sum()) for view in (train, held)]
        assert part[1] / sum(part) == pytest.approx(0.1, abs=0.03)


def test_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    cache = build_cache(docs(*range(5, 60)), TOKENIZER, tmp_path / "c")
    first, again, other = (split(open_cache(cache.folder), 0.2, seed)[1].start_D.tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_every_label_with_two_documents_is_in_both_parts(tmp_path: Path, fraction: float) -> None:
    documents = docs(5, 5, label="a") + docs(5, 5000, label="b") + docs(1, 1, 1, label="c")
    cache = build_cache(documents, TOKENIZER, tmp_path / "c")
    train, held = split(cache, fraction, 0)
    assert set(train.label_D.tolist()) == set(held.label_D.tolist()) == {0, 1, 2}


def test_a_domain_of_one_long_document_is_split_by_position(tmp_path: Path) -> None:
    cache = build_cache(docs(1000, label="long") + docs(2, label="short"), TOKENIZER, tmp_path / "c")
    size = len(cache.view.document(0))
    train, held = split(cache, 0.1, 0)
    assert train.end_D[0] == held.start_D[0] == size - round(size * 0.1)
    assert (held.num_documents, held.end_D.tolist(), train.num_documents) == (1, [size], 2)


def test_a_corpus_too_small_to_split_is_refused(tmp_path: Path) -> None:
    cache = build_cache(docs(2), TOKENIZER, tmp_path / "c")
    with pytest.raises(DataError, match="too small"):
        split(cache, 0.1, 0)
    for fraction in (0.0, 1.0, -1, float("nan")):
        with pytest.raises(ConfigError, match="val_fraction"):
            split(cache, fraction, 0)
