"""Qwen3, dense (Yang et al. 2025): RMSNorm on the queries and keys of every head; if windows, then in the upper layers."""

from __future__ import annotations

from typing import Any

from moesaic.convert.families.llama import dense_table
from moesaic.convert.family import Family, common_keys, common_values, grouped_heads, grouped_values, one_value
from moesaic.convert.keys import Keys
from moesaic.convert.windows import FULL, SLIDING, kinds_and_window, layer_kinds, window_key, windows_of
from moesaic.models.config import ModelConfig


def _read(keys: Keys) -> ModelConfig:
    fields = common_keys(keys, tie_default=False)
    fields |= grouped_heads(keys, fields, kv_default=32, width_default=128)
    layers = fields["num_layers"]
    window = window_key(keys, 4096)
    if not keys.flag("use_sliding_window", False):
        window = None
    first = keys.whole("max_window_layers", 28)
    implied = [SLIDING if window is not None and i >= first else FULL for i in range(layers)]
    kinds = layer_kinds(keys, layers, implied)  # the list decides, max_window_layers only makes it
    return ModelConfig(
        **fields,
        hidden=keys.whole("intermediate_size"),
        qk_norm="head",
        attention_bias="all" if keys.flag("attention_bias", False) else "none",
        sliding_window=windows_of(keys, kinds, window),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    kinds, window = kinds_and_window(config)
    return {
        **common_values(config),
        **grouped_values(config),
        "intermediate_size": one_value(config.hidden),
        "attention_bias": config.attention_bias == "all",
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": kinds.index(SLIDING) if window else config.num_layers,  # for readers without layer_types
        "layer_types": kinds,
    }


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read, _write, dense_table)
