"""Reading somebody's ``config.json`` key by key: at the end every key is known to have been used, or is refused by name.

>>> keys = Keys(read_json(folder / "config.json"), "config.json")
>>> dim = keys.whole("hidden_size")                 # required; a whole number
>>> keys.fixed("attention_dropout", 0.0)             # anything else would compute something we do not
>>> keys.carry("bos_token_id")                       # does not change what is computed; written back on export
>>> keys.finish()                                    # ConfigError naming a key nobody asked for
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moesaic.checkpoint.untrusted import show
from moesaic.errors import ConfigError, nearest

_REQUIRED: Any = object()
WHOLE_LIMIT = 2**53  # what any reader of JSON holds exactly, and beyond every size there is
_DEEPEST = 50  # tables and lists in one another, of a key that is only kept

# Known to every family and without effect on what a model computes.
CARRIED = (
    "_name_or_path", "architectures", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "label2id", "length_penalty", "max_length", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states", "output_router_logits",
    "output_scores", "pad_token_id", "prefix", "pretraining_tp", "problem_type", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tokenizer_class", "top_k", "top_p", "torch_dtype", "transformers_version",
    "typical_p", "use_cache",
)  # fmt: skip
# Neither followed nor written: code that came with the checkpoint, published beside model types that are known without it;
# and a note of transformers 4.4x to itself that it has chosen how attention is computed.
DROPPED = {
    "auto_map": "names code that came with the checkpoint",
    "_attn_implementation_autoset": "says which implementation of attention somebody else chose",
}
# These would have somebody's code run, or name an implementation.
REFUSED = ("trust_remote_code", "custom_pipelines", "_attn_implementation_internal")


class Keys:
    """The keys of one configuration, and what became of each.

    Attributes:
        mapped: keys that went into our config, in the order they were asked for.
        carried: keys without effect on the function, with their values.
        dropped: keys that are neither followed nor written back.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = dict(data), where
        self.mapped: list[str] = []
        self.carried: dict[str, Any] = {}
        self.dropped: list[str] = []

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value as it stands; null counts as absent where there is a default."""
        value = self.data.get(name)
        if name in self.data:
            self.mapped.append(name)
        if value is None:
            if default is _REQUIRED:
                raise ConfigError(f"{self.where} lacks the key {name}, which its model type needs.")
            return default
        return value

    def whole(self, name: str, default: Any = _REQUIRED) -> Any:
        """A whole number."""
        value = self.get(name, default)
        if value is not default and (not isinstance(value, int) or isinstance(value, bool)):
            raise ConfigError(f"{self.where}: {name} must be a whole number, not {show(value)}.")
        if value is not default and abs(value) >= WHOLE_LIMIT:
            raise ConfigError(f"{self.where}: {name}={show(value)} is impossible.")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A finite number."""
        value = self.get(name, default)
        if value is default:
            return value
        if not isinstance(value, int | float) or isinstance(value, bool) or not _is_finite(value):
            raise ConfigError(f"{self.where}: {name} must be a number, not {show(value)}.")
        return float(value)

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """True or false."""
        value = self.get(name, default)
        if value is not default and not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {name} must be true or false, not {show(value)}.")
        return value

    def wholes(self, name: str, default: Any = _REQUIRED) -> Any:
        """A list of whole numbers, as a tuple."""
        value = self.get(name, default)
        if value is default:
            return value
        if not isinstance(value, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise ConfigError(f"{self.where}: {name} must be a list of whole numbers, not {show(value)}.")
        if any(abs(v) >= WHOLE_LIMIT for v in value):
            raise ConfigError(f"{self.where}: {name}={show(value)} is impossible.")
        return tuple(value)

    def choice(self, name: str, choices: Mapping[str, Any], default: Any = _REQUIRED) -> Any:
        """What a word stands for."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in choices:
            hint = nearest(str(value), choices)
            raise ConfigError(f"{self.where}: {name} must be one of {', '.join(choices)}, not {show(value)}.{hint}")
        return choices[value]

    def fixed(self, name: str, *values: Any) -> None:
        """Absent, null or one of ``values``: of the others we do not compute what they mean."""
        value = self.data.get(name)
        if value is not None and not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
            known = " or ".join(show(v) for v in values)
            raise ConfigError(
                f"{self.where}: {name}={show(value)} is not supported, only {known}; moesaic would compute something else."
            )
        if name in self.data:
            self.carried[name] = self.data[name]

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """A word."""
        value = self.get(name, default)
        if value is not default and not isinstance(value, str):
            raise ConfigError(f"{self.where}: {name} must be a text, not {show(value)}.")
        return value

    def carry(self, *names: str) -> None:
        """Note keys that change nothing of what is computed."""
        self.carried.update({name: self.data[name] for name in names if name in self.data})

    def finish(self) -> None:
        """Raise ``ConfigError`` unless every key was asked for."""
        self.carry(*CARRIED)
        self.dropped = [name for name in DROPPED if name in self.data]
        for name, value in self.carried.items():  # they are written again
            if not _is_plain(value):
                raise ConfigError(f"{self.where}: {name}={show(value)} is no value of JSON that others could read.")
        known = {*self.mapped, *self.carried, *self.dropped}
        for name in REFUSED:
            if name in self.data:
                raise ConfigError(f"{self.where}: the key {name} would have other code run; refused. Remove it.")
        unknown = sorted(set(self.data) - known)
        if unknown:
            raise ConfigError(
                f"{self.where}: the key {show(unknown[0])} ({show(self.data[unknown[0]])}) is unknown for this model type, so "
                f"what it computes is not sure; refused.{nearest(unknown[0], known)} If it changes nothing, remove it."
                + (f" So are {', '.join(map(show, unknown[1:4]))}." if len(unknown) > 1 else "")
            )


def _is_finite(value: float) -> bool:
    """Whether a float holds it; a whole number may be too large for one."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether strict JSON holds it: no NaN or infinity, which Python's reader lets through."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return depth < _DEEPEST and all(_is_plain(v, depth + 1) for v in inner)
    return not isinstance(value, float) or math.isfinite(value)
