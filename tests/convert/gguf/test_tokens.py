"""Vocabularies: the same tokens of every text in llama.cpp, special ids, templates, and what has no equal there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from moesaic.convert.gguf import export_gguf
from moesaic.convert.gguf import pre_tokenizers as rules
from moesaic.convert.gguf.tokens import vocabulary_of
from moesaic.errors import DataError, MoesaicError
from moesaic.models.config import ModelConfig
from moesaic.tokenizer import load_tokenizer, train_bpe
from tests.convert.gguf.families import llama_cpp_of
from tests.models.tiny import lively

CORPUS = [
    "The quick brown fox jumps over the lazy dog. She's here, they'll come; I'M LOUD and we've 12345 reasons.\n",
    "def route(x, k=2):\n    return x.topk(k, dim=-1)  # best first\n\n\tindented",
    "Ein Käfer läuft über die Straße. Ça va très bien, mañana será otro día.",
    "Привет, мир! Γειά σου Κόσμε. こんにちは世界。你好，世界！안녕하세요 123,456.78",
    "  spaces   and\ttabs \n\n newlines  ",
] * 3

TEXTS = [
    *CORPUS[:5],
    "",
    " ",
    "a",
    "   leading",
    "trailing   ",
    "a  b   c",
    "\n\n\n",
    "x\r\ny\r\n",
    "don't DON'T we'll WE'LL it's 'quoted'",
    "1 12 123 1234 12345 3.14159 ½ Ⅷ ١٢٣",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 and ZWJ; e\u0301 combining; ﬁ ligature; \u00a0nbsp\u2009thin",
    "mixed日本語English한국어",
    "snake_case camelCase SCREAMING_CASE kebab-case",
    "<html><body class='x'>&amp;</body></html>",
    "\u200b\ufeff\x00\x7f control",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ẞ ß İ ı",
    "▁ the lower block itself ▁▁",
]

VOCAB = 700


def _ids_there(path: Path, texts: list[str]) -> list[list[int]]:
    with llama_cpp_of(path) as reader:
        return [reader.tokenize(text.encode(), add_bos=False, special=False) if text else [] for text in texts]


def _export(folder: Path, vocab_size: int = VOCAB) -> Path:
    config = ModelConfig(vocab_size=vocab_size, dim=32, num_layers=1, num_heads=1, hidden=32, max_seq_len=64)
    export_gguf(lively(config), folder / "m.gguf", kind="f32", tokenizer_folder=folder)
    return folder / "m.gguf"


def _save(tokenizer: Tokenizer, folder: Path, **options: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    if options:
        (folder / "tokenizer_config.json").write_text(json.dumps(options))


def _byte_level(*splits: Any, ignore_merges: bool = False) -> Tokenizer:
    """A byte-level BPE whose words are cut by regular expressions."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps = [pre_tokenizers.Split(Regex(s), "isolated") if isinstance(s, str) else s for s in splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _piece_level(prefix: bool = True, metaspace: bool = False) -> Tokenizer:
    """A BPE over characters with byte fallback, as ``transformers`` converts SentencePiece models of Llama and Mistral."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if metaspace:
        scheme = "always" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    else:
        steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False, limit_alphabet=150)
    words = [word for text in CORPUS for word in text.replace("\n", " ").split(" ")]
    tokenizer.train_from_iterator(words, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


# ---- the same tokens ----


def test_our_own_bpe_cuts_every_text_alike(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    tokenizer = train_bpe(CORPUS, 600)
    _save(tokenizer, tmp_path)
    path = _export(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert _ids_there(path, TEXTS) == [loaded.encode(text).ids for text in TEXTS]
    with llama_cpp_of(path) as reader:
        for text in TEXTS[:5]:
            assert reader.detokenize(loaded.encode(text).ids).decode() == text
        assert reader.token_eos() == loaded.token_to_id("<|endoftext|>") == 0
        assert reader.tokenize(b"a", add_bos=True) == loaded.encode("a").ids  # none is put before a text


RULES = {
    "llama-bpe": (rules._LLAMA3,),
    "smaug-bpe": (rules._LLAMA3,),
    "qwen2": (rules._QWEN2,),
    "gpt-4o": (rules._GPT4O,),
    "tekken": (rules._TEKKEN,),
    "deepseek-v3": rules._DEEPSEEK3,
}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_cuts_every_text_alike(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    tokenizer = _byte_level(*RULES[name], ignore_merges=name in ("llama-bpe", "tekken"))
    _save(tokenizer, tmp_path)
    path = _export(tmp_path)
    with llama_cpp_of(path) as reader:
        assert reader.metadata["tokenizer.ggml.pre"] == name
    assert _ids_there(path, TEXTS) == [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_pieces_with_byte_fallback_cut_every_text_alike(prefix: bool, metaspace: bool, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    tokenizer = _piece_level(prefix, metaspace)
    _save(tokenizer, tmp_path, bos_token="<s>", eos_token="</s>", unk_token={"content": "<unk>"})
    path = _export(tmp_path)
    texts = [text for text in TEXTS if not (prefix and metaspace and text.startswith((" ", "▁")))]
    there = _ids_there(path, texts)
    assert there == [tokenizer.encode(text, add_special_tokens=False).ids if text else [] for text in texts]
    notes: list[str] = []
    vocabulary_of(tmp_path, VOCAB, None, notes)
    assert any("begins with a space has two there" in note for note in notes) == (prefix and metaspace)
    with llama_cpp_of(path) as reader:
        assert (reader.token_bos(), reader.token_eos()) == (1, 2)
        assert reader.tokenize(b"fox", add_bos=True) == tokenizer.encode("fox").ids
        assert tokenizer.encode("fox").ids[0] == 1


# ---- what the keys say ----


def test_keys_of_a_byte_level_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_bpe(CORPUS, 600)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    _save(tokenizer, tmp_path)
    notes: list[str] = []
    keys = vocabulary_of(tmp_path, VOCAB, None, notes)
    size = tokenizer.get_vocab_size()
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert notes == []
    assert len(tokens) == len(types) == VOCAB == len(set(tokens))
    assert tokens[:size] == [tokenizer.id_to_token(i) for i in range(size)]
    assert types[:2] == [3, 3]  # control
    assert types[2 : size - 1] == [1] * (size - 3)
    assert types[size - 1] == 4  # user-defined
    assert tokens[size] == f"[PAD{size}]"
    assert types[size:] == [5] * (VOCAB - size)  # unused
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    first = json.loads(tokenizer.to_str())["model"]["merges"][0]
    assert keys["tokenizer.ggml.merges"][0] == (first if isinstance(first, str) else " ".join(first))
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.ggml.eos_token_id"] == 0


def test_scores_follow_the_first_merge_that_makes_a_token(tmp_path: Path) -> None:
    tokenizer = _piece_level()
    _save(tokenizer, tmp_path, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    keys = vocabulary_of(tmp_path, VOCAB, None, [])
    tokens, scores, types = (keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    merges = [
        tuple(m) if isinstance(m, list) else tuple(m.split(" "))
        for m in json.loads(tokenizer.to_str())["model"]["merges"]
    ]
    first = tokens.index("".join(merges[0]))
    assert scores[first] == 0.0
    assert scores[tokens.index("q")] == -len(merges)
    assert [types[tokens.index(t)] for t in ("<unk>", "<s>", "</s>", "<0x0A>", "q")] == [2, 3, 3, 6, 1]
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    assert keys["tokenizer.ggml.unknown_token_id"] == 0


@pytest.mark.parametrize("where", ["file", "text", "list"])
def test_chat_templates_are_kept(where: str, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    options: dict[str, Any] = {}
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
    elif where == "text":
        options["chat_template"] = template
    else:
        options["chat_template"] = [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]
    _save(train_bpe(CORPUS, 600), tmp_path, **options)
    assert vocabulary_of(tmp_path, VOCAB, None, [])["tokenizer.chat_template"] == template


def test_without_a_tokenizer_the_file_says_so() -> None:
    notes: list[str] = []
    assert vocabulary_of(None, VOCAB, None, notes) == {"tokenizer.ggml.model": "none"}
    assert notes == ["No tokenizer was given, so the file has no vocabulary: programs must feed it token ids."]


def test_what_llama_cpp_leaves_out_is_said(tmp_path: Path) -> None:
    tokenizer = train_bpe(CORPUS, 600)
    tokenizer.normalizer = normalizers.NFC()
    _save(tokenizer, tmp_path)
    notes: list[str] = []
    vocabulary_of(tmp_path, VOCAB, None, notes)
    assert len(notes) == 1
    assert "normalises text (NFC)" in notes[0]
    _save(_byte_level(rules._QWEN2, ignore_merges=True), tmp_path)
    notes.clear()
    assert vocabulary_of(tmp_path, VOCAB, None, notes)["tokenizer.ggml.pre"] == "qwen2"
    assert len(notes) == 1
    assert "always merges whole words" in notes[0]


# ---- refused ----


def test_a_rule_that_is_not_known_is_refused_and_may_be_named(tmp_path: Path) -> None:
    _save(_byte_level(r"\p{L}+"), tmp_path)
    with pytest.raises(MoesaicError, match=r"by a rule that is none of those known here"):
        vocabulary_of(tmp_path, VOCAB, None, [])
    assert vocabulary_of(tmp_path, VOCAB, "qwen2", [])["tokenizer.ggml.pre"] == "qwen2"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _byte_level(pre_tokenizers.Punctuation()), r"cuts text by .*Punctuation.*no equal of"),
        (lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "is a WordLevel tokenizer, and only BPE ones"),
        (lambda: Tokenizer(models.BPE({"a": 0, "b": 1}, [])), "neither a byte-level BPE nor one with byte fallback"),
        (lambda: train_bpe(CORPUS, 258), "has no merges"),
    ],
)  # fmt: skip
def test_tokenizers_without_an_equal_are_refused(make: Any, message: str, tmp_path: Path) -> None:
    _save(make(), tmp_path)
    with pytest.raises(MoesaicError, match=message):
        vocabulary_of(tmp_path, VOCAB, None, [])


def test_a_space_before_every_text_is_refused(tmp_path: Path) -> None:
    tokenizer = train_bpe(CORPUS, 600)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    _save(tokenizer, tmp_path)
    with pytest.raises(MoesaicError, match="puts a space before every text"):
        vocabulary_of(tmp_path, VOCAB, None, [])


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    _save(train_bpe(CORPUS, 600), tmp_path)
    with pytest.raises(MoesaicError, match=r"tokens up to id \d+, but the model's vocabulary is 300"):
        vocabulary_of(tmp_path, 300, None, [])


def test_a_missing_or_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no tokenizer at"):
        vocabulary_of(tmp_path, VOCAB, None, [])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        vocabulary_of(tmp_path, VOCAB, None, [])


def test_padding_never_equals_a_token(tmp_path: Path) -> None:
    """llama.cpp aborts the process on two equal tokens."""
    tokenizer = train_bpe(CORPUS, 600)
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"[PAD{size + 1}]"])
    _save(tokenizer, tmp_path)
    tokens = vocabulary_of(tmp_path, VOCAB, None, [])["tokenizer.ggml.tokens"]
    assert tokens[size : size + 2] == [f"[PAD{size + 1}]", f"[PAD{size + 1}]_"]
    assert len(set(tokens)) == VOCAB


def test_the_rule_of_deepseek_v2_is_recognised() -> None:
    """By all but its class of cased letters, some 300 ranges long."""
    letters = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ" + "".join(f"{chr(n)}-{chr(n + 2)}" for n in range(0x1E00, 0x1F00, 3)) + "]+"
    expressions = ["[\r\n]", letters, *rules._DEEPSEEK2[2:5]]
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": e}, "behavior": "Isolated"} for e in expressions
    ]
    steps += [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": False}]
    data = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    assert rules.name_of(data, False, Path("t"), []) == "deepseek-llm"
    steps.pop(-2)
    with pytest.raises(MoesaicError, match="none of those known"):
        rules.name_of(data, False, Path("t"), [])
