"""Frozen dataclasses to JSON and back, strictly: unknown keys and wrong types are refused with the nearest valid name.

>>> cfg = from_dict(ModelConfig, {"dim": 64, ...})      # ConfigError: unknown key "dims" in model ... Did you mean "dim"?
>>> data = apply_overrides(to_dict(cfg), ["moe.k=4"])   # dotted overrides, values read as JSON where they parse as JSON
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from moesaic.errors import ConfigError, nearest

C = TypeVar("C")


def from_dict(cls: type[C], data: Any, where: str = "") -> C:
    """Build the dataclass ``cls`` from plain JSON ``data``.

    ``where`` is the dotted name of ``data`` shown in errors; nested settings are named below it.
    Raises ``ConfigError`` on an unknown or missing key or a wrong type.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where or 'The config'} must be a table of settings, not {_show(data)}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ConfigError(
                f'Unknown key "{key}" in {where or "the config"}.{nearest(str(key), fields)} '
                f"Valid keys: {', '.join(fields)}."
            )
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    values = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in data.items()}
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(
            f"{where or 'The config'} lacks the required key{'s' if len(missing) > 1 else ''} {', '.join(missing)}."
        )
    return cls(**values)


def to_dict(obj: Any) -> Any:
    """The plain JSON form of a config (dataclasses to dicts, tuples to lists)."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: to_dict(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, dict):
        return {key: to_dict(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [to_dict(value) for value in obj]
    return obj


def load_config_file(path: str | Path) -> dict[str, Any]:
    """Read a ``.json`` or ``.toml`` file of settings into a dict."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"There is no config file {path}; give the path of a .json or .toml file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the config file {path}: {error}.") from None
    try:
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:  # broken JSON or TOML, or a number of thousands of digits
        raise ConfigError(f"{path} is not valid {'TOML' if path.suffix == '.toml' else 'JSON'}: {error}.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a table of settings, not {_show(data)}.")
    return data


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return ``data`` with each ``a.b.c=value`` applied; values are JSON where they parse, else strings."""
    data = copy.deepcopy(data)
    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise ConfigError(f'"{item}" is not an override; write name=value, for example model.moe.k=4.')
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        *parents, last = name.split(".")
        table = data
        for i, key in enumerate(parents):
            if table.get(key) is None:
                table[key] = {}
            table = table[key]
            if not isinstance(table, dict):
                raise ConfigError(f'"{".".join(parents[: i + 1])}" is a single value, so "{name}" cannot be set.')
        table[last] = value
    return data


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return _plain(value, where)
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(hint), value, where)
    if origin is typing.Literal:
        choices = get_args(hint)
        if value not in choices or isinstance(value, bool) != any(isinstance(c, bool) for c in choices if c == value):
            names = ", ".join(map(repr, choices))
            raise ConfigError(
                f"{where} must be one of {names}, not {_show(value)}.{nearest(str(value), map(str, choices))}"
            )
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list such as {_show([value])}, not {_show(value)}.")
        inner = get_args(hint)[0]
        return tuple(_convert(inner, v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a table of settings, not {_show(value)}.")
        return {str(k): _convert(get_args(hint)[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{where} must be a number, not {_show(value)}, which is too large for one.") from None
    if hint is type(None):
        if value is not None:
            raise ConfigError(f"{where} must be null, not {_show(value)}.")
        return None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {_NAMES.get(hint, hint.__name__)}, not {_show(value)}.")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number, not {value}.")
    return value


def _plain(value: Any, where: str) -> Any:
    """``value`` if JSON can hold it: free-form options are saved and must come back."""
    if isinstance(value, dict):
        return {str(key): _plain(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number, not {value}.")
    if value is not None and not isinstance(value, str | int | float):
        raise ConfigError(f"{where} must be a text, a number, true or false, a list or a table, not {_show(value)}.")
    return value


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    problems: list[ConfigError] = []
    for option in options:
        try:
            return _convert(option, value, where)
        except ConfigError as error:
            problems.append(error)
    # A table can only have been meant for the dataclass among the options: its own error says most.
    if isinstance(value, dict) or len(problems) == 1:
        raise problems[-1]
    raise ConfigError(f"{where} must be {' or '.join(_hint_name(o) for o in options)}, not {_show(value)}.")


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _hint_name(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return "a list"
    if get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, get_args(hint)))
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
