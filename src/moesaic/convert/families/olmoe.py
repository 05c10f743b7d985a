"""OLMoE (Muennighoff et al. 2024): every layer sparse, RMSNorm over whole query and key projections, weights not normalised."""

from __future__ import annotations

from typing import Any

from moesaic.convert.families.qwen_moe import gated_block, normalising
from moesaic.convert.family import (
    Family,
    Layout,
    by_layer,
    common_keys,
    common_values,
    frame,
    grouped_attention,
    moe_of,
    one_value,
)
from moesaic.convert.keys import Keys
from moesaic.convert.pieces import Entry
from moesaic.convert.windows import FULL, layer_kinds
from moesaic.models.config import ModelConfig, MoEConfig, RouterConfig


def _read(keys: Keys) -> ModelConfig:
    fields = common_keys(keys, tie_default=False, eps_default=1e-5)
    heads, dim = fields["num_heads"], fields["dim"]
    keys.fixed("head_dim", dim // max(1, heads))  # its norms are as wide as the model whatever this says
    keys.fixed("sliding_window", None)
    layer_kinds(keys, fields["num_layers"], [FULL] * fields["num_layers"], binding=True)
    moe = MoEConfig(
        num_experts=keys.whole("num_experts", 64),
        k=keys.whole("num_experts_per_tok", 8),
        hidden=keys.whole("intermediate_size"),
        router=RouterConfig("topk", {"normalize": "chosen" if keys.flag("norm_topk_prob", False) else "none"}),
        losses={"switch": keys.number("router_aux_loss_coef", 0.01)},
    )
    return ModelConfig(
        **fields,
        num_kv_heads=keys.whole("num_key_value_heads", heads),
        qk_norm="projection",
        attention_bias="all" if keys.flag("attention_bias", False) else "none",
        clip_qkv=keys.number("clip_qkv", None),
        moe=moe,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    moe = moe_of(config)
    return {
        **common_values(config),
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": one_value(moe.hidden),
        "num_experts": one_value(moe.num_experts),
        "num_experts_per_tok": one_value(moe.k),
        "norm_topk_prob": normalising(moe),
        "router_aux_loss_coef": moe.losses.get("switch", 0.0),
        "attention_bias": config.attention_bias == "all",
        "clip_qkv": config.clip_qkv,
    }


def _table(config: ModelConfig, layout: Layout, carried: dict[str, Any]) -> list[Entry]:
    return frame(config) + by_layer(config, grouped_attention, lambda c, i: gated_block(c, i, layout))


OLMOE = Family("olmoe", "OlmoeForCausalLM", _read, _write, _table)
