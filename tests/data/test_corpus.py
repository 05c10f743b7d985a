"""From settings to tokens: own files, the Python installation's text, a given tokenizer; errors in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moesaic.data.config import DataConfig
from moesaic.data.corpus import Corpus, cache_root, load_corpus
from moesaic.errors import DataError, MoesaicError
from moesaic.tokenizer import train_bpe
from tests.train.tiny_run import texts


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Two files, one a domain."""
    for label in ("code", "prose"):
        (tmp_path / f"{label}.txt").write_text("\n\n".join(t for t, of in texts() if of == label))
    files = (str(tmp_path / "code.txt"), str(tmp_path / "prose.txt"))
    return DataConfig(files, vocab_size=300, val_fraction=0.2, cache_dir=str(tmp_path / "cache"))


def decoded(corpus: Corpus) -> dict[str, str]:
    """All text of each domain, validation behind training."""
    whole = dict.fromkeys(corpus.labels, "")
    for view in (corpus.train, corpus.val):
        for d in range(view.num_documents):
            whole[view.labels[view.label_D[d]]] += corpus.tokenizer.decode(view.document(d).tolist())
    return whole


def test_files_become_a_tokenizer_and_two_views(config: DataConfig) -> None:
    said: list[str] = []
    corpus = load_corpus(config, say=said.append)
    assert corpus.labels == ("code", "prose")
    assert corpus.tokenizer.get_vocab_size() == 300
    assert corpus.vocab_size == 320
    assert decoded(corpus) == {Path(f).stem: Path(f).read_text() for f in config.sources}
    share = corpus.val.num_tokens / (corpus.val.num_tokens + corpus.train.num_tokens)
    assert share == pytest.approx(0.2, abs=0.02)
    assert said[0] == "Training a byte-level BPE tokenizer of 300 tokens ..."
    assert corpus.train.num_documents + corpus.val.num_documents == 4  # each file is cut in two, and still one document
    assert said[-1].endswith("validation tokens in 2 documents, domains: code, prose.")


def test_the_second_time_comes_from_the_cache_and_is_the_same(config: DataConfig, tmp_path: Path) -> None:
    first = load_corpus(config)
    stored = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")}
    assert len(stored) == 1
    again = load_corpus(config)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")} == stored
    assert again.fingerprint == first.fingerprint
    assert (again.train.start_D.tolist(), again.val.end_D.tolist()) == (
        first.train.start_D.tolist(),
        first.val.end_D.tolist(),
    )


def test_other_text_or_another_tokenizer_has_another_fingerprint(config: DataConfig) -> None:
    first = load_corpus(config)
    assert load_corpus(replace(config, vocab_size=290)).fingerprint != first.fingerprint
    with Path(config.sources[0]).open("a") as file:
        file.write("\nprint('one line more')\n")
    assert load_corpus(config, tokenizer=first.tokenizer).fingerprint != first.fingerprint


def test_the_seed_moves_the_split_and_not_the_text(config: DataConfig) -> None:
    paragraphs = replace(config, document="paragraphs", val_fraction=0.3)
    folder = Path(config.sources[0]).parent
    for i, (text, _) in enumerate(texts()):
        (folder / f"more{i}.txt").write_text(text)
    many = replace(paragraphs, sources=(str(folder / "more*.txt"),), label_by="none")
    one, two = load_corpus(many, seed=0), load_corpus(many, seed=1)
    assert one.fingerprint == two.fingerprint
    assert one.val.start_D.tolist() != two.val.start_D.tolist()
    assert load_corpus(many, seed=0).val.start_D.tolist() == one.val.start_D.tolist()


def test_a_given_tokenizer_is_used(config: DataConfig, tmp_path: Path) -> None:
    mine = train_bpe(["some other text, some other merges"], 270)
    mine.save(str(tmp_path / "tokenizer.json"))
    for where in (tmp_path / "tokenizer.json", tmp_path):
        corpus = load_corpus(replace(config, tokenizer=str(where)))
        assert corpus.tokenizer.get_vocab() == mine.get_vocab()
    passed = load_corpus(replace(config, tokenizer="/nowhere"), tokenizer=mine)  # that of a resumed run wins
    assert passed.tokenizer is mine


def test_the_text_of_this_python(tmp_path: Path) -> None:
    config = DataConfig(("stdlib",), vocab_size=280, stdlib_bytes=120_000, cache_dir=str(tmp_path))
    corpus = load_corpus(config)
    assert {"code", "prose"} <= set(corpus.labels)
    assert 20_000 < corpus.train.num_tokens + corpus.val.num_tokens < 120_000
    other_seed = load_corpus(config, seed=5, tokenizer=corpus.tokenizer)
    assert other_seed.fingerprint == corpus.fingerprint  # one text for all seeds, so that runs compare


def test_where_the_cache_lives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MOESAIC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root(DataConfig()) == tmp_path / "xdg" / "moesaic"
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "named"))
    assert cache_root(DataConfig()) == tmp_path / "named"
    assert cache_root(DataConfig(cache_dir="here")) == Path("here")
    monkeypatch.delenv("MOESAIC_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(DataConfig()) == tmp_path / ".cache" / "moesaic"


def test_bad_sources_are_refused_in_words(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": "not\n')
    for sources, words in [
        ((), "There is no text to train on; name files or folders with --data, or use --data stdlib."),
        (("stdlib", config.sources[0]), '"stdlib" cannot be mixed with other sources; give it alone.'),
        ((str(tmp_path / "cod.txt"),), f"There is no file or folder {tmp_path / 'cod.txt'}."),
        ((str(tmp_path / "empty.txt"),), "empty.txt"),
        ((str(tmp_path / "latin.txt"),), "latin.txt"),
        ((str(tmp_path / "bad.jsonl"),), "bad.jsonl:2"),
    ]:
        with pytest.raises(DataError) as caught:
            load_corpus(replace(config, sources=sources))
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(MoesaicError, match="There is no tokenizer at .*nowhere"):
        load_corpus(replace(config, tokenizer=str(tmp_path / "nowhere")))
    assert not list((tmp_path / "cache").rglob("*.bin"))  # nothing half-written
