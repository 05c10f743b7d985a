"""What a conversion is to write, as far as its target and the type of its numbers say so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from moesaic.convert.gguf.number_types import KINDS
from moesaic.errors import ConfigError, one_of

Target = Literal["moesaic", "hf", "gguf"]


def kind_of_target(target: Path, to: Target | None, gguf_type: str | None) -> Target | None:
    """``to``; where that is None, "gguf" if ``target`` ends in .gguf or ``gguf_type`` is given. None: it depends on the source.

    Raises ``ConfigError`` for what is unknown or does not go together, and for a GGUF file whose place is taken.
    """
    if to is not None:
        one_of("to", to, ("moesaic", "hf", "gguf"))
    if gguf_type is not None:
        one_of("type", gguf_type, KINDS)
    named = target.suffix.lower() == ".gguf"
    if to is None and (named or gguf_type is not None):
        to = "gguf"
    if to in ("moesaic", "hf"):
        if gguf_type is not None:
            raise ConfigError(
                f"type={gguf_type} is for GGUF files, and to={to} writes a folder; leave one of them out."
            )
        if named:
            raise ConfigError(
                f"{target} is named like a GGUF file, and to={to} writes a folder; leave that out, or choose another name."
            )
    if to == "gguf" and os.path.lexists(target):
        raise ConfigError(f"{target} exists already; choose another target, or remove it.")
    return to
