"""What the arguments of several commands share."""

from __future__ import annotations

from typing import Any

import torch
from tyro.conf import arg

from moesaic.errors import ConfigError


def whole_number(words: str, default: str) -> Any:
    """A whole number whose default is not known before other options are read; help says where it comes from."""
    return arg(metavar="INT", help=words, help_behavior_hint=f"(default: {default})")


def at_least(option: str, value: int, least: int) -> None:
    """Raise ``ConfigError`` naming the option unless its value is large enough."""
    if value < least:
        raise ConfigError(f"{option} must be at least {least}, not {value}.")


def device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
