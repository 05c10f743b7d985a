"""llama.cpp's names of the rules that cut text into words before BPE, recognised by what ``tokenizer.json`` says of its own.

llama.cpp has each rule built in under a name (``llama-vocab.cpp``); a file that names the wrong one tokenises text in another
way without a word. Hence nothing is guessed: what is not in the table is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesaic.checkpoint.untrusted import show
from moesaic.errors import MoesaicError

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _LETTERS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _LETTERS + r"|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_HEAD, _TAIL = r"[^\r\n\p{L}\p{N}]?", r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = f"{_HEAD}{_UPPER}*{_LOWER}+{_SHORT}|{_HEAD}{_UPPER}+{_LOWER}*{_SHORT}" + r"|\p{N}{1,3}" + _TAIL
_TEKKEN = f"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _TAIL
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK2 = (
    r"[\r\n]",
    r"\s?[A-Za-zµÀ...",  # some 300 ranges of cased letters
    "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    "[一-龥\u0800-一가-\ud7ff]+",
    r"\p{N}",
)
_LONG = 200
_GPT2 = ("gpt-2",)  # the rule of ByteLevel itself

# regular expressions, in order -> (name where whole words skip merging, name where they do not; None: llama.cpp has none)
_NAMES: dict[tuple[str, ...], tuple[str | None, str | None]] = {
    _GPT2: (None, "gpt-2"),
    (_LLAMA3,): ("llama-bpe", "smaug-bpe"),
    (_QWEN2,): (None, "qwen2"),
    (_GPT4O,): (None, "gpt-4o"),
    (_TEKKEN,): ("tekken", None),
    _DEEPSEEK2: (None, "deepseek-llm"),
    _DEEPSEEK3: (None, "deepseek-v3"),
}


def name_of(data: dict[str, Any], ignore_merges: bool, file: Path, notes: list[str]) -> str:
    """The name of the rule in ``data``, a parsed ``tokenizer.json``.

    ``notes`` gets what llama.cpp does not do. Raises ``MoesaicError`` for a rule it does not have.
    """
    normalizer = data.get("normalizer")
    if normalizer:
        notes.append(
            f"The tokenizer normalises text ({_types(normalizer)}) before it is cut; llama.cpp does not, so text in another "
            "form gives other tokens there."
        )
    names = _NAMES.get(_rules(data.get("pre_tokenizer") or {}, file))
    if names is None:
        raise MoesaicError(
            f"{file} cuts text into words by a rule that is none of those known here; give llama.cpp's name of it as "
            "pre_tokenizer (see llama-vocab.cpp), or export without a tokenizer."
        )
    skipping, merging = names
    if (skipping if ignore_merges else merging) is None:
        notes.append(
            f"llama.cpp {'always' if ignore_merges else 'never'} merges whole words that are tokens under this rule, and this "
            "tokenizer does the opposite; a word that its merges do not lead to is cut differently."
        )
    name = (skipping if ignore_merges else merging) or skipping or merging
    assert name is not None
    return name


def _rules(pre: dict[str, Any], file: Path) -> tuple[str, ...]:
    """The regular expressions of a pre-tokenizer that only splits, then turns bytes into letters."""
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    rules: list[str] = []
    for step in steps:
        kind = step.get("type")
        pattern = step.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(regex, str):  # files write line ends as such or as escapes
            regex = regex.replace("\r", "\\r").replace("\n", "\\n")
        if kind == "ByteLevel":
            if step.get("add_prefix_space"):
                raise MoesaicError(
                    f"{file} puts a space before every text (add_prefix_space), which llama.cpp does not."
                )
            rules += _GPT2 if step.get("use_regex", True) else []
        elif kind == "Digits" and step.get("individual_digits"):
            rules.append(r"\p{N}")
        elif kind == "Split" and regex and step.get("behavior") == "Isolated" and not step.get("invert"):
            rules.append(f"{regex[:12]}..." if regex.startswith(r"\s?[A-Za-zµÀ") and len(regex) > _LONG else regex)
        elif kind == "Split" and regex and step.get("behavior") == "Removed" and step.get("invert"):
            rules.append(regex)  # what matches is kept: the same where the expression covers every text
        else:
            raise MoesaicError(f"{file} cuts text by {show(step)}, which llama.cpp has no equal of.")
    return tuple(rules)


def _types(part: dict[str, Any]) -> str:
    inner = part.get("normalizers")
    return ", ".join(_types(p) for p in inner) if isinstance(inner, list) else str(part.get("type"))
