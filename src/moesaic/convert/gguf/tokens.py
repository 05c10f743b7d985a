"""The vocabulary of a GGUF file, from ``tokenizer.json``: tokens, types, scores or merges, special ids, chat template.

Two kinds are known, as llama.cpp calls them: "gpt2", a byte-level BPE with one of the word rules of ``pre_tokenizers.py``, and
"llama", a BPE over characters with byte fallback and "▁" for spaces, as made from SentencePiece models.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moesaic.checkpoint.untrusted import read_json, safe_member, show
from moesaic.convert.gguf.pre_tokenizers import name_of
from moesaic.errors import DataError, MoesaicError
from moesaic.tokenizer import eos_id, load_tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_SPACE = "▁"


def vocabulary_of(
    folder: str | os.PathLike[str] | None, vocab_size: int, pre_tokenizer: str | None, notes: list[str]
) -> dict[str, Any]:
    """GGUF keys of the tokenizer in ``folder``, filled up to ``vocab_size`` tokens.

    Raises ``MoesaicError`` (a sentence) for a tokenizer llama.cpp has no equal of, or one of more than ``vocab_size`` tokens.
    """
    if folder is None:
        notes.append("No tokenizer was given, so the file has no vocabulary: programs must feed it token ids.")
        return {"tokenizer.ggml.model": "none"}
    folder = Path(folder)
    tokenizer = load_tokenizer(folder)
    file = folder if folder.is_file() else safe_member(folder, "tokenizer.json")
    data = read_json(file)
    options = _read_options(file.parent)
    tokens, types = _tokens(tokenizer, data, file, vocab_size)
    model = data.get("model")
    assert isinstance(model, dict)  # the tokenizers library has read it
    if model.get("type") != "BPE":
        raise MoesaicError(
            f"{file} is a {model.get('type')} tokenizer, and only BPE ones are exported to GGUF; export without a tokenizer."
        )
    for option in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise MoesaicError(f"{file} sets {option}={show(model[option])}, which llama.cpp's BPE does not know.")
    merges = _merges(model)
    if _is_byte_level(data):
        rule = pre_tokenizer or name_of(data, bool(model.get("ignore_merges")), file, notes)
        values: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": rule}
        if not merges:
            raise MoesaicError(
                f"{file} has no merges, and llama.cpp reads no BPE without; train it with a larger vocabulary."
            )
        values["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
    elif model.get("byte_fallback"):
        values = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": _scores(tokens, merges)}
        values["tokenizer.ggml.add_space_prefix"] = _adds_space(tokenizer, notes)
    else:
        raise MoesaicError(
            f"{file} is neither a byte-level BPE nor one with byte fallback, so llama.cpp has no equal of it; export without a "
            "tokenizer."
        )
    return values | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **_special_ids(tokenizer, options),
        **_template(file.parent, options),
    }


def _tokens(tokenizer: Tokenizer, data: dict[str, Any], file: Path, vocab_size: int) -> tuple[list[str], list[int]]:
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    highest = max(vocab.values(), default=-1)
    if highest >= vocab_size:
        raise MoesaicError(
            f"{file} has tokens up to id {highest}, but the model's vocabulary is {vocab_size}; it belongs to another model."
        )
    by_id = {number: token for token, number in vocab.items()}
    added = tokenizer.get_added_tokens_decoder()
    unknown = data["model"].get("unk_token")
    tokens, types = [], []
    for number in range(vocab_size):
        token = by_id.get(number)
        if token is None:
            token, type_ = f"[PAD{number}]", _UNUSED
            while token in vocab:  # llama.cpp aborts on two equal tokens
                token += "_"
        elif number in added:
            type_ = _CONTROL if added[number].special else _USER_DEFINED
        elif data["model"].get("byte_fallback") and _is_byte_token(token):
            type_ = _BYTE
        else:
            type_ = _NORMAL
        if token == unknown and type_ in (_NORMAL, _CONTROL):
            type_ = _UNKNOWN
        tokens.append(token)
        types.append(type_)
    return tokens, types


def _is_byte_token(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs in order of rank; files hold them as pairs or as words joined by a space."""
    pairs = []
    for merge in model.get("merges", ()):
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        pairs.append((left, right))
    return pairs


def _is_byte_level(data: dict[str, Any]) -> bool:
    pre = data.get("pre_tokenizer") or {}
    return any(step.get("type") == "ByteLevel" for step in pre.get("pretokenizers", [pre]))


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """llama.cpp joins the pair whose token scores highest: minus the rank of the first merge that makes it."""
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _adds_space(tokenizer: Tokenizer, notes: list[str]) -> bool:
    """Whether a text gets a space before it."""
    ids, spaced = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("a", " a"))
    adds = bool(ids) and str(tokenizer.id_to_token(ids[0])).startswith(_SPACE)
    if adds and ids == spaced:
        notes.append(
            "The tokenizer puts a space before a text that has none, llama.cpp before every text: one that begins with a space "
            "has two there."
        )
    return adds


def _read_options(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json``, where there is one."""
    path = folder / "tokenizer_config.json"
    return read_json(safe_member(folder, path.name)) if os.path.lexists(path) else {}


def _special_ids(tokenizer: Tokenizer, options: dict[str, Any]) -> dict[str, Any]:
    """Ids of the begin, end, unknown and padding tokens, and whether a text gets the first two."""
    ids: dict[str, int] = {}
    for option, name in _SPECIAL.items():
        token = options.get(option)
        token = token.get("content") if isinstance(token, dict) else token
        number = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if number is not None:
            ids[name] = int(number)
    if "eos" not in ids:
        with suppress(DataError):  # there are tokenizers without control tokens
            ids["eos"] = eos_id(tokenizer)
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a", add_special_tokens=True).ids
    before, after = [], []
    if len(framed) > len(plain) and plain:
        at = framed.index(plain[0])
        before, after = framed[:at], framed[at + len(plain) :]
    if before:
        ids.setdefault("bos", before[0])
    if "eos" in ids:
        ids.setdefault("bos", ids["eos"])  # left out, llama.cpp takes token 11 or 1 for it
    named = {f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items()}
    return named | {
        "tokenizer.ggml.add_bos_token": before == [ids.get("bos")],
        "tokenizer.ggml.add_eos_token": after == [ids.get("eos")],
    }


def _template(folder: Path, options: dict[str, Any]) -> dict[str, str]:
    """The chat template, from its own file or from the options."""
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        try:
            text = safe_member(folder, path.name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read ({error}).") from error
        return {"tokenizer.chat_template": text}
    template = options.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    return {"tokenizer.chat_template": template} if isinstance(template, str) and template else {}
