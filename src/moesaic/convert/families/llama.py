"""Dense families, for upcycling and as twins: Llama (1 to 3), Mistral, Qwen3."""

from __future__ import annotations

from typing import Any

from moesaic.convert.family import (
    Family,
    Layout,
    by_layer,
    common_keys,
    common_values,
    frame,
    gated_mlp,
    grouped_attention,
    grouped_heads,
    grouped_values,
    one_value,
)
from moesaic.convert.keys import Keys
from moesaic.convert.pieces import Entry
from moesaic.convert.windows import FULL, layer_kinds, same_everywhere
from moesaic.models.config import ModelConfig, pick


def _mlp(config: ModelConfig, i: int) -> list[Entry]:
    hidden = pick(config.hidden, i)
    return gated_mlp(f"blocks.{i}.ffn", f"model.layers.{i}.mlp", config.dim, hidden, bias=config.mlp_bias)


def dense_table(config: ModelConfig, layout: Layout, carried: dict[str, Any]) -> list[Entry]:
    """Tensors named as in Llama."""
    return frame(config) + by_layer(config, grouped_attention, _mlp)


def _read_llama(keys: Keys) -> ModelConfig:
    fields = common_keys(keys, tie_default=False)
    fields |= grouped_heads(keys, fields)
    layer_kinds(keys, fields["num_layers"], [FULL] * fields["num_layers"], binding=True)
    keys.fixed("sliding_window", None)
    return ModelConfig(
        **fields,
        hidden=keys.whole("intermediate_size"),
        attention_bias="all" if keys.flag("attention_bias", False) else "none",
        mlp_bias=keys.flag("mlp_bias", False),
    )


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {
        **common_values(config),
        **grouped_values(config),
        "intermediate_size": one_value(config.hidden),
        "attention_bias": config.attention_bias == "all",
        "mlp_bias": config.mlp_bias,
    }


def _read_mistral(keys: Keys) -> ModelConfig:
    fields = common_keys(keys, tie_default=False)
    fields |= grouped_heads(keys, fields, kv_default=8)
    window = same_everywhere(keys, fields["num_layers"], absent=4096)
    return ModelConfig(**fields, hidden=keys.whole("intermediate_size"), sliding_window=window)


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {
        **common_values(config),
        **grouped_values(config),
        "intermediate_size": one_value(config.hidden),
        "sliding_window": config.window(0),
    }


LLAMA = Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, dense_table)
MISTRAL = Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral, dense_table)
