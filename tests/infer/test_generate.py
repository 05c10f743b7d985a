"""Text in, text out: tokenisation, stop strings across tokens and bytes, streaming, defaults and error sentences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from moesaic.errors import ConfigError, DataError
from moesaic.infer import SamplingConfig, generate, generate_texts
from moesaic.tokenizer import EOS, encode, train_bpe
from tests.infer.fakes import FakeConfig, Rolling, Script

BYTES = train_bpe([], 258)  # one token per byte
MERGED = train_bpe(["the end of the end " * 20], 290)


# Every byte that occurs in UTF-8, to its token: each lead and continuation byte is in one of these characters.
_SAMPLE = map(
    chr, [*range(0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x10000, 64), *range(1 << 16, 0x110000, 4096)]
)
BYTE_ID = {byte: token for char in _SAMPLE for byte, token in zip(char.encode(), encode(BYTES, char), strict=True)}


def say(text: str | bytes, tokenizer: Tokenizer = BYTES, end: bool = True) -> list[int]:
    """The ids a scripted model must produce to write ``text``; bytes may be any, also half a character."""
    ids = [BYTE_ID[byte] for byte in text] if isinstance(text, bytes) else encode(tokenizer, text)
    return ids + [0] * end


def run(scripts: list[list[int]], *, tokenizer: Tokenizer = BYTES, **settings) -> tuple[list[str], list[list[str]]]:
    pieces: list[list[str]] = [[] for _ in scripts]
    texts = generate(
        Script(scripts, FakeConfig(max_seq_len=200)),
        ["go"] * len(scripts),
        tokenizer,
        temperature=0,
        on_text=lambda row, piece: pieces[row].append(piece),
        **settings,
    )
    assert ["".join(row) for row in pieces] == texts
    return texts, pieces


def test_a_string_gives_a_string_and_a_list_a_list():
    model = Script([say("hi")])
    model.tokenizer = BYTES
    assert generate(model, "go", temperature=0) == "hi"
    assert generate(model, ["go"], temperature=0) == ["hi"]
    assert generate(model, [], temperature=0) == []


def test_the_end_token_gives_no_text_and_ends_the_row():
    assert run([say("one"), say("three")])[0] == ["one", "three"]
    assert run([say("one")], eos_ids=[])[0] == ["one"]  # 50 end tokens, none of them text


@pytest.mark.parametrize("tokenizer", [BYTES, MERGED])
def test_a_stop_string_is_cut_wherever_the_tokens_fall(tokenizer: Tokenizer):
    texts, pieces = run([say("to the end of it", tokenizer)], tokenizer=tokenizer, stop=["nd of"])
    assert texts == ["to the e"]
    assert all("n" not in piece for piece in pieces[0])


def test_a_false_start_is_given_back():
    assert run([say("a STO b ST")], stop=["STOP"])[0] == ["a STO b ST"]
    assert run([say("a STO b STOP c")], stop="STOP")[0] == ["a STO b "]  # a bare string is one stop string


def test_a_multi_byte_stop_string_and_its_shared_first_byte():
    # ü and é both begin with byte C3: the decision falls on the second byte.
    texts, pieces = run([say("grün, café!")], stop=["é"])
    assert texts == ["grün, caf"]
    assert "ü" in pieces[0]


def test_characters_arrive_whole_and_a_cut_one_as_replacement():
    text = "naïve 漢字 🦉"
    texts, pieces = run([say(text)])
    assert texts == [text]
    assert pieces[0] == list(text)
    assert run([say("🦉".encode()[:3])])[0] == ["�"]
    assert run([say("🦉".encode()[:3], end=False)], max_new_tokens=3)[0] == ["�"]
    assert run([say(b"a\x80b\xc3(")])[0] == ["a�b�("]


@given(st.text("ab é漢\n", max_size=20), st.lists(st.text("ab é漢\n", min_size=1, max_size=3), max_size=2))
def test_text_is_the_script_up_to_the_first_stop_string(text: str, stops: list[str]):
    texts, _ = run([say(text)], stop=stops, max_new_tokens=100)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert texts == [text[: min(ends)[1]] if ends else text]


@given(st.lists(st.sampled_from(sorted(BYTE_ID)), max_size=12).map(bytes))
def test_any_bytes_stream_to_what_the_tokenizer_decodes(raw: bytes):
    assert run([say(raw)])[0] == [BYTES.decode(say(raw))]


def test_rows_stop_for_their_own_reasons():
    texts, result = generate_texts(
        Script([say("one STOP"), say("two"), say("three, four", end=False)]), ["a", "bcd", "ef"], BYTES,
        max_new_tokens=10, stop=["ST"],
    )  # fmt: skip
    assert texts == ["one ", "two", "three, fou"]
    assert result.finish == ("stop", "eos", "length")
    assert BYTES.decode(list(result.ids[0])) == "one ST"


def test_the_text_of_a_prompt_does_not_depend_on_its_batch():
    model = Rolling(FakeConfig(vocab_size=BYTES.get_vocab_size()))
    prompts = ["a longer prompt", "b", "", "füßchen"]
    together = generate(model, prompts, BYTES, max_new_tokens=20, temperature=1.5, top_p=0.9)
    assert together == [generate(model, p, BYTES, max_new_tokens=20, temperature=1.5, top_p=0.9) for p in prompts]
    assert len(set(together)) == 4


def test_keywords_replace_fields_of_the_sampling_config():
    model = Rolling(FakeConfig(vocab_size=BYTES.get_vocab_size()), sharpness=0.3)
    greedy = generate(model, "x", BYTES, temperature=0)
    assert generate(model, "x", BYTES, sampling=SamplingConfig(temperature=5.0, top_k=1)) == greedy
    assert generate(model, "x", BYTES, sampling=SamplingConfig(temperature=5.0), top_k=1) == greedy
    assert generate(model, "x", BYTES, sampling=SamplingConfig(temperature=5.0)) != greedy
    with pytest.raises(ConfigError, match="top_p must be above 0"):
        generate(model, "x", BYTES, top_p=0)


def test_an_empty_prompt_starts_from_the_end_token():
    model = Script([say("hi")])
    generate(model, "", BYTES)
    assert model.caches[0].fed[0][0].tolist() == [[BYTES.token_to_id(EOS)]]


def word_tokenizer(*specials: str) -> Tokenizer:
    words = {word: i for i, word in enumerate([*specials, "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def test_the_opening_token_of_a_foreign_template_is_kept_and_its_closing_token_is_not():
    tokenizer = word_tokenizer("<s>", "</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    model = Script([[2, 1]], FakeConfig(vocab_size=4))
    assert generate(model, "b", tokenizer) == "a"
    assert model.caches[0].fed[0][0].tolist() == [[0, 3]]


def test_a_tokenizer_without_an_end_token_runs_to_the_length():
    model = Script([[0]], FakeConfig(vocab_size=2))
    tokenizer = word_tokenizer()
    assert generate(model, "b", tokenizer, max_new_tokens=3) == "aaa"
    with pytest.raises(ConfigError, match="prompt is empty and the tokenizer has no end-of-text token"):
        generate(model, "", tokenizer)


def test_ids_without_a_name_are_not_generated():
    padded = FakeConfig(vocab_size=BYTES.get_vocab_size() + 6)
    _, result = generate_texts(Script([[BYTES.get_vocab_size() + 2]], padded), ["x"], BYTES, max_new_tokens=20)
    assert max(result.ids[0]) < BYTES.get_vocab_size()


def test_errors_are_sentences():
    model = Script([say("hi")])
    with pytest.raises(ConfigError, match="generate needs a tokenizer: pass tokenizer="):
        generate(model, "go")
    with pytest.raises(ConfigError, match="stop string must be text"):
        generate(model, "go", BYTES, stop=[""])
    with pytest.raises(DataError, match="lone surrogate"):
        generate(model, "bad \ud800", BYTES)
    with pytest.raises(ConfigError, match="belongs to another model"):
        generate(Script([[2]], FakeConfig(vocab_size=20)), "z", BYTES)
    with pytest.raises(ConfigError, match="context of 64"):
        generate(model, "z" * 64, BYTES)


def test_an_exception_in_the_callback_ends_the_call():
    def hang_up(row: int, piece: str) -> None:
        raise ConnectionError("client left")

    with pytest.raises(ConnectionError, match="client left"):
        generate(Script([say("hi")]).train(), "go", BYTES, on_text=hang_up)
    assert not torch.is_inference_mode_enabled()
