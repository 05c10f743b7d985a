"""The tokenizer: exact round trips, no injected control ids, errors in words, streaming equal to decoding at once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moesaic.errors import ConfigError, DataError, MoesaicError
from moesaic.tokenizer import EOS, PAD, decode_stream, encode, eos_id, load_tokenizer, pad_id, train_bpe

TEXTS = ["the cat sat on the mat. " * 20, "日本語の文章。" * 10, "def f(x):\n    return x  # <|endoftext|>\n" * 10]
TOKENIZER = train_bpe(TEXTS, 400)

WEIRD = [
    "",
    " ",
    "\n\n\n",
    "日本語 中文 한국어",
    "😀👩‍👩‍👧‍👦🏳️‍🌈",
    "a\0b\0",
    "\r\n \t\x0b\x0c\x85\u2028",
    f"{EOS}{PAD} x{EOS}",
    "don't  stop   ",
    "\ufeffbom",
    "\ufffd\ufffe\U0010ffff",
    "e\u0301 vs \u00e9",
    "\u202eright to left\u200b",
    "x" * 5000,
]


@pytest.mark.parametrize("text", WEIRD)
def test_text_comes_back_exactly(text: str) -> None:
    assert TOKENIZER.decode(encode(TOKENIZER, text)) == text


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_unicode_text_comes_back_exactly(text: str) -> None:
    assert TOKENIZER.decode(encode(TOKENIZER, text)) == text


def test_ids_of_the_control_tokens() -> None:
    assert (eos_id(TOKENIZER), pad_id(TOKENIZER)) == (0, 1)


def test_control_text_never_becomes_a_control_id(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (TOKENIZER, load_tokenizer(tmp_path)):
        ids = encode(tokenizer, f"a {EOS} b {PAD}")
        assert not {0, 1} & set(ids)
        assert tokenizer.decode(ids) == f"a {EOS} b {PAD}"


def test_training_is_deterministic() -> None:
    assert train_bpe(TEXTS, 400).to_str() == train_bpe(iter(TEXTS), 400).to_str()
    assert train_bpe(TEXTS, 400).to_str() != train_bpe(TEXTS[:2], 400).to_str()


def test_vocabulary_size_is_kept_or_smaller() -> None:
    assert train_bpe(TEXTS, 280).get_vocab_size() == 280
    assert train_bpe(["a"], 5000).get_vocab_size() == 258


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"257.*258"):
        train_bpe(TEXTS, 257)


def test_lone_surrogates_are_named() -> None:
    with pytest.raises(DataError, match=r"character 2 is the lone surrogate '\\ud83d'"):
        encode(TOKENIZER, "ab\ud83d")
    with pytest.raises(DataError, match="not Unicode"):
        train_bpe(["fine", "a\ud800"], 300)


def test_errors_of_the_text_source_pass_through() -> None:
    def texts():  # type: ignore[no-untyped-def]
        yield "good"
        raise DataError("the third file is broken")

    with pytest.raises(DataError, match="the third file is broken"):
        train_bpe(texts(), 300)


def test_loading_by_folder_or_file_gives_the_same(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    TOKENIZER.save(str(file))
    assert load_tokenizer(tmp_path).to_str() == load_tokenizer(file).to_str() == TOKENIZER.to_str()


def test_a_missing_tokenizer_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match=r"There is no tokenizer at .*tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'{"version": "1.0"}', b"\xff\xfe"])
def test_a_broken_tokenizer_is_an_error_in_words(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path: Path) -> None:
    other = Tokenizer.from_str(TOKENIZER.to_str())
    other.enable_truncation(3)
    other.enable_padding(length=10)
    other.save(str(tmp_path / "tokenizer.json"))
    assert encode(load_tokenizer(tmp_path), TEXTS[0]) == encode(TOKENIZER, TEXTS[0])


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(DataError, match="no end-of-text token"):
        eos_id(Tokenizer(models.BPE()))


def test_streaming_equals_decoding_at_once_for_any_ids() -> None:
    rng = random.Random(0)
    size = TOKENIZER.get_vocab_size()
    for _ in range(300):
        ids = [rng.randrange(size) for _ in range(12)]
        stream = decode_stream(TOKENIZER)
        assert "".join(map(stream.feed, ids)) + stream.finish() == TOKENIZER.decode(ids)


def test_streaming_never_shows_half_a_character() -> None:
    text = "aé日😀\ufffd!"
    stream = decode_stream(TOKENIZER)
    shown = ""
    for token in encode(TOKENIZER, text):
        shown += stream.feed(token)
        assert text.startswith(shown)
    assert shown == text
    assert stream.finish() == ""


def test_streaming_ends_an_unfinished_character_visibly() -> None:
    stream = decode_stream(TOKENIZER)
    ids = encode(TOKENIZER, "😀")
    assert "".join(map(stream.feed, ids[:-1])) == ""
    assert stream.finish() == "\ufffd"


def test_streaming_skips_control_tokens_and_ids_beyond_the_vocabulary() -> None:
    stream = decode_stream(TOKENIZER)
    ids = [0, *encode(TOKENIZER, "the cat"), 1, 99999]
    assert "".join(map(stream.feed, ids)) == "the cat"


def test_streaming_works_for_tokenizers_that_are_not_byte_level() -> None:
    pieces = ["▁the", "▁cat", "s", *[f"<0x{byte:02X}>" for byte in "é😀".encode()]]
    other = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[]))
    other.pre_tokenizer = pre_tokenizers.Metaspace()
    other.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    ids = [0, 1, 2, *range(3, len(pieces)), 0, 1]
    stream = decode_stream(other)
    parts = [stream.feed(token) for token in ids]
    assert "".join(parts) + stream.finish() == other.decode(ids)
    assert parts[:3] == ["the", " cat", "s"]
