"""Sliding windows: one key says how wide, others say which layers; ``layer_types`` of transformers 5 may repeat it."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.checkpoint.untrusted import show
from moesaic.convert.keys import Keys
from moesaic.errors import ConfigError
from moesaic.models.config import ModelConfig

FULL, SLIDING = "full_attention", "sliding_attention"
Windows = int | tuple[int, ...] | None


def layer_kinds(keys: Keys, num_layers: int, implied: Sequence[str], *, binding: bool = False) -> tuple[str, ...]:
    """The kind of attention of each layer.

    Args:
        implied: what the other keys say, by layer.
        binding: ``implied`` is what the family computes whatever ``layer_types`` says, so that another list is refused.
            Otherwise the list is what it computes.
    """
    kinds = keys.get("layer_types", None)
    if kinds is None:
        return tuple(implied)
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(k in (FULL, SLIDING) for k in kinds):
        raise ConfigError(
            f'{keys.where}: layer_types must name "{FULL}" or "{SLIDING}" for each of {num_layers} layers, not {show(kinds)}.'
        )
    if binding and kinds != list(implied):
        raise ConfigError(
            f"{keys.where}: layer_types says {show(kinds)}, but by sliding_window and the model type the layers are "
            f"{show(list(implied))}; one of them is wrong. Remove layer_types or correct it."
        )
    return tuple(kinds)


def windows_of(keys: Keys, kinds: Sequence[str], window: int | None) -> Windows:
    """``ModelConfig.sliding_window`` for layers of these kinds, one number where all agree."""
    if SLIDING not in kinds:
        return None
    if window is None:
        raise ConfigError(
            f"{keys.where}: layer_types has sliding layers, but there is no sliding_window in use to say how wide they are."
        )
    check_window(keys, window)
    if FULL not in kinds:
        return window
    return tuple(window if kind == SLIDING else 0 for kind in kinds)


def check_window(keys: Keys, window: int) -> None:
    """Raise ``ConfigError`` for a window in which a token would not even see itself."""
    if window < 1:
        raise ConfigError(f"{keys.where}: sliding_window must be at least 1, not {window}; null is full attention.")


def window_key(keys: Keys, absent: int | None) -> int | None:
    """``sliding_window``: null is none, and an absent key is what Hugging Face takes it for."""
    return keys.whole("sliding_window", None if "sliding_window" in keys.data else absent)


def same_everywhere(keys: Keys, num_layers: int, absent: int | None = None) -> Windows:
    """``sliding_window`` of families that use it in all layers or, where it is null, in none (Mistral, Mixtral)."""
    window = window_key(keys, absent)
    kinds = layer_kinds(keys, num_layers, [FULL if window is None else SLIDING] * num_layers, binding=True)
    return windows_of(keys, kinds, window)


def kinds_and_window(config: ModelConfig) -> tuple[list[str], int | None]:
    """``layer_types`` and the window of the sliding ones: the first, as families know one."""
    widths = [config.window(i) for i in range(config.num_layers)]
    return [SLIDING if width else FULL for width in widths], next((width for width in widths if width), None)
