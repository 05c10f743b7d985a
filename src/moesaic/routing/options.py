"""Options by name, read off a signature: the keyword-only arguments of a router's constructor or of a loss are its options."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from moesaic.errors import ConfigError, nearest

_LARGEST = 2**62  # int64 with room for sums


def options_of(function: Callable[..., Any], hidden: Collection[str] = ()) -> dict[str, Any]:
    """Option name -> type hint: the keyword-only arguments of a function (of a class: its constructor), but the hidden ones."""
    hints = typing.get_type_hints(function.__init__ if isinstance(function, type) else function)  # type: ignore[misc]
    parameters = inspect.signature(function).parameters.values()
    return {p.name: hints.get(p.name, Any) for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in hidden}


def check_options(owner: str, options: Mapping[str, Any], valid: Mapping[str, Any]) -> None:
    """Raises ``ConfigError`` for an option that ``valid`` (name -> hint) does not know or a value of the wrong type.

    ``owner`` stands in the sentence: ``Router "topk"``.
    """
    for key, value in options.items():
        if key not in valid:
            known = ", ".join(valid) or "none"
            raise ConfigError(f'{owner} has no option "{key}".{nearest(key, valid)} Options: {known}.')
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int) and abs(number) > _LARGEST:
                raise ConfigError(
                    f"Option {key} of {owner[0].lower() + owner[1:]} is {number}, which no tensor can hold."
                )
        _check_value(owner[0].lower() + owner[1:], key, value, valid[key])


def _check_value(owner: str, key: str, value: Any, hint: Any) -> None:
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else None
    if choices is not None:
        if value not in choices:
            raise ConfigError(
                f"Option {key} of {owner} must be one of {', '.join(map(repr, choices))}, not {value!r}."
                f"{nearest(str(value), map(str, choices))}"
            )
        return
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if kind is Any or not isinstance(kind, type):
            return
        if isinstance(value, bool) != (kind is bool):
            continue
        if isinstance(value, kind) or (kind is float and isinstance(value, int)):
            return
    names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ConfigError(f"Option {key} of {owner} must be {names}, not {value!r}.")
