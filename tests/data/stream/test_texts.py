"""Which documents of a stream are for what, and the corpus made of it: tokenizer, validation text, sample, domains."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.data.corpus import load_corpus
from moesaic.data.stream.lanes import Stripe
from moesaic.data.stream.patient import Patience
from moesaic.data.stream.texts import Skipped, is_held_out
from moesaic.data.stream.tokens import TokenStream
from moesaic.data.tokens import encode_documents
from moesaic.errors import ConfigError, DataError
from moesaic.models import RouterConfig, build_model
from moesaic.tokenizer import EOS, encode, eos_id
from moesaic.train.fit import fit_routers
from tests.data.stream.shards import config, documents, feed_of, held_out, texts_of, tokenizer, write_shards
from tests.train.tiny_run import tiny_config

SHARDS = documents(6, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains: four shards of one, two of the other."""
    root = tmp_path_factory.mktemp("shards")
    write_shards(root / "prose", SHARDS[:4])
    write_shards(root / "code", SHARDS[4:])
    return root


def test_held_out_documents_are_a_fixed_share() -> None:
    texts = [text for shard in documents(20, 200) for text in shard]
    assert [is_held_out(text, 0.1) for text in texts] == [held_out(text, 0.1) for text in texts]
    share = sum(is_held_out(text, 0.1) for text in texts) / len(texts)
    assert share == pytest.approx(0.1, abs=0.02)
    assert all(is_held_out(text, 0.2) for text in texts if is_held_out(text, 0.1))
    # `printf 'the cat' | b2sum -l 64` is d8cb1deb7a9c392a, read from its low byte up 0x2a399c7aeb1dcbd8 / 2**64 = 0.16494.
    assert not is_held_out("the cat", 0.1649)
    assert is_held_out("the cat", 0.1650)
    assert not any(is_held_out(text, 1e-12) for text in texts)


def test_training_and_validation_share_no_document_and_lose_none(folder: Path) -> None:
    texts = texts_of(folder)
    parts = [[text.text for text in texts.spread(held_out=out)] for out in (False, True)]
    assert len(parts[1]) > 5
    assert not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == sorted(text for shard in SHARDS for text in shard)


def test_the_beginning_is_of_many_shards_and_domains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight documents of a shard at a time; with two shards at once, one of each domain comes first."""
    monkeypatch.setattr("moesaic.data.stream.texts._AT_ONCE", 2)
    texts = texts_of(folder)
    assert texts.labels == ("code", "prose")
    labels = [text.label for text in texts.spread(held_out=False)]
    assert sorted(labels[:16]) == [0] * 8 + [1] * 8
    assert set(labels[8:16]) != set(labels[:8])
    every = [text.text for text in texts.spread(held_out=False)]
    assert sorted(every) == sorted(text for shard in SHARDS for text in shard if not held_out(text))
    left_early = texts.spread(held_out=False)
    next(left_early)
    left_early.close()  # type: ignore[attr-defined]


def test_broken_records_are_said_at_one_ten_and_a_hundred(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {n}"}) if n % 2 else "{" for n in range(250)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    said: list[str] = []
    texts = texts_of(tmp_path, on_error="skip", val_fraction=1e-9)
    skipped = Skipped(Patience(0, said.append))
    assert len(list(texts.read(Stripe(0, 0, 1), skipped=skipped))) == 125
    assert skipped.count == 125
    assert [line.split(". The")[0] for line in said] == [f"Broken records left out so far: {n}" for n in (1, 10, 100)]
    with pytest.raises(DataError, match=r"a.jsonl:1 is not valid JSON.* left out with on_error=\"skip\""):
        list(texts_of(tmp_path).read(Stripe(0, 0, 1)))


def test_labels_from_a_field_are_named_beforehand(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {n}", "lang": ("en", "de", "fr")[n % 3]}) for n in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    more: dict[str, Any] = {"label_field": "lang", "val_fraction": 1e-9}
    texts = texts_of(tmp_path, labels=("fr", "en", "de"), **more)
    assert texts.labels == ("de", "en", "fr")
    assert [text.label for text in texts.read(Stripe(0, 0, 1))] == [1, 0, 2] * 3
    with pytest.raises(DataError, match=r'a.jsonl:3: the label "fr" is not in data.labels \(de, en\)\..*on_error'):
        list(texts_of(tmp_path, labels=("en", "de"), **more).read(Stripe(0, 0, 1)))
    assert len(list(texts_of(tmp_path, labels=("en", "de"), on_error="skip", **more).read(Stripe(0, 0, 1)))) == 6
    with pytest.raises(ConfigError, match='look ahead for the values of data.label_field="lang"; list all of them'):
        texts_of(tmp_path, **more)


# ---- the corpus -------------------------------------------------------------------------------------------------


def test_a_corpus_of_a_stream(folder: Path) -> None:
    said: list[str] = []
    wanted = config(folder, vocab_size=300, val_tokens=150)
    corpus = load_corpus(wanted, seed=0, say=said.append)
    assert "Streaming 6 shards" in said[0]
    assert corpus.labels == corpus.val.labels == ("code", "prose")
    assert set(corpus.val.label_D.tolist()) == {0, 1}
    assert 150 <= corpus.val.num_tokens < 200
    for d in range(corpus.val.num_documents):
        text = corpus.tokenizer.decode(corpus.val.document(d).tolist(), skip_special_tokens=False)
        assert text.endswith(EOS)
        assert held_out(text.removesuffix(EOS))
    again = load_corpus(wanted, seed=7)
    assert again.tokenizer.to_str() == corpus.tokenizer.to_str()  # the same for every seed: runs compare
    assert again.fingerprint == corpus.fingerprint
    assert (again.val.tokens == corpus.val.tokens).all()
    assert load_corpus(wanted, tokenizer=tokenizer()).fingerprint != corpus.fingerprint
    batch = corpus.feed(16, 4, 1, 0).next_step()[0]
    assert batch.ids_BS.shape == (4, 16)


def test_the_text_of_the_installation_is_no_stream() -> None:
    with pytest.raises(ConfigError, match='"stdlib" is small and already here; leave data.stream out for it'):
        load_corpus(config("stdlib"))


def test_the_tokenizer_never_sees_held_out_text(tmp_path: Path) -> None:
    """A word that only held-out documents have is not a token."""
    plain = [f"plain words {n}" for n in range(200)]
    odd = [f"zygomorphic zygomorphic {n}" for n in range(300)]
    kept = [text for text in odd if held_out(text)]
    assert len(kept) > 15
    write_shards(tmp_path, [[*plain, *kept], plain[:50]])
    corpus = load_corpus(config(tmp_path, vocab_size=300))
    assert "words" in str(corpus.tokenizer.get_vocab())
    assert "zygo" not in str(corpus.tokenizer.get_vocab())


def test_a_sample_for_routers_that_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.data.stream.tokens._SAMPLE_TOKENS", 200)
    stream = TokenStream(texts_of(folder), tokenizer())
    view = stream.sample()
    assert view is stream.sample()  # read once
    assert 200 <= view.num_tokens < 250
    assert view.labels == stream.labels
    texts = [tokenizer().decode(view.document(d).tolist()) for d in range(view.num_documents)]
    assert texts == [text.text for text in islice(stream.texts.spread(held_out=False), len(texts))]


def test_a_stream_with_nothing_to_hold_out_says_so(tmp_path: Path) -> None:
    write_shards(tmp_path, [[text for text in SHARDS[0] if not held_out(text)]])
    with pytest.raises(
        DataError, match=r"too few documents to hold some out for validation.* data.document=paragraphs"
    ):
        load_corpus(config(tmp_path), tokenizer=tokenizer())


def test_whole_texts_and_paragraphs_stream_too(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("A paragraph of a book that says little.\n\n" * 4000)
    wanted = config(tmp_path, document="paragraphs", lanes=2, val_fraction=0.3)
    feed = feed_of(tmp_path, 2, 1, document="paragraphs", lanes=2, shuffle=1)
    batch = feed.next_step()[0]
    assert tokenizer().decode(batch.ids_BS[0].tolist()).startswith("A para")
    with pytest.raises(DataError, match="hold some out"):  # all paragraphs are alike, so all are on one side
        load_corpus(replace(wanted, val_fraction=1e-9), tokenizer=tokenizer())


def test_routers_that_count_are_fitted_on_the_sample(folder: Path) -> None:
    moe = {"router": RouterConfig("hash", {"kind": "balanced"}), "losses": {}, "k": 2}
    models = [build_model(tiny_config(moe=moe).model, seed=0) for _ in range(2)]
    stream = TokenStream(texts_of(folder), tokenizer())
    fit_routers(models[0], stream, lambda _: None)
    fit_routers(models[1], stream.sample(), lambda _: None)
    tables = [[layer.router.table_KV for layer in model.moe_layers().values()] for model in models]
    assert all(torch.equal(a, b) for a, b in zip(*tables, strict=True))
    fresh = build_model(tiny_config(moe=moe).model, seed=0).moe_layers()
    assert not torch.equal(tables[0][0], fresh[0].router.table_KV)


def test_documents_are_encoded_as_in_a_store() -> None:
    """Whatever their sizes and however they are grouped: the ids of one call for each, and the end-of-text token."""
    texts = ["a", "", "words " * 20_000, "document " * 3, "é" * 40_000, "x"]
    found: list[list[int]] = [[] for _ in texts]
    ended = []
    for number, ids, last in encode_documents(tokenizer(), texts):
        assert len(ids)
        found[number] += ids.tolist()
        ended += [number] if last else []
    assert ended == list(range(6))
    assert found == [[*encode(tokenizer(), text), eos_id(tokenizer())] for text in texts]
