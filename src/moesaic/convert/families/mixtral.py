"""Mixtral (Jiang et al. 2024): eight full-size experts, two per token, softmax over the chosen."""

from __future__ import annotations

from typing import Any

from moesaic.convert.family import (
    Family,
    Layout,
    by_layer,
    common_keys,
    common_values,
    frame,
    gated_experts,
    grouped_attention,
    grouped_heads,
    grouped_values,
    moe_of,
    of_sparse,
    one_value,
    router_gate,
)
from moesaic.convert.keys import Keys
from moesaic.convert.pieces import Entry
from moesaic.convert.windows import same_everywhere
from moesaic.models.config import ModelConfig, MoEConfig, RouterConfig


def _read(keys: Keys) -> ModelConfig:
    fields = common_keys(keys, tie_default=False, theta_default=1e6, eps_default=1e-5)
    fields |= grouped_heads(keys, fields, kv_default=8)
    keys.carry("router_jitter_noise")  # in training alone
    coefficient = keys.number("router_aux_loss_coef", 0.001)
    moe = MoEConfig(
        num_experts=keys.whole("num_local_experts", 8),
        k=keys.whole("num_experts_per_tok", 2),
        hidden=keys.whole("intermediate_size"),
        router=RouterConfig("topk", {"normalize": "chosen"}),
        losses={"switch": coefficient},
    )
    return ModelConfig(**fields, sliding_window=same_everywhere(keys, fields["num_layers"]), moe=moe)


def _write(config: ModelConfig) -> dict[str, Any]:
    moe = moe_of(config)
    return {
        **common_values(config),
        **grouped_values(config),
        "intermediate_size": one_value(moe.hidden),
        "num_local_experts": one_value(moe.num_experts),
        "num_experts_per_tok": one_value(moe.k),
        "sliding_window": config.window(0),
        "router_aux_loss_coef": moe.losses.get("switch", 0.0),
    }


def _experts(config: ModelConfig, i: int, layout: Layout) -> list[Entry]:
    _, experts, hidden = of_sparse(config, i)
    # transformers renamed the module when it stacked the experts.
    theirs = f"model.layers.{i}." + ("block_sparse_moe" if layout == "per_expert" else "mlp")
    return [
        *router_gate(i, f"{theirs}.gate", experts, config.dim),
        *gated_experts(
            f"blocks.{i}.ffn.experts", f"{theirs}.experts", experts, config.dim, hidden, layout, ("w1", "w3", "w2")
        ),
    ]


def _table(config: ModelConfig, layout: Layout, carried: dict[str, Any]) -> list[Entry]:
    return frame(config) + by_layer(config, grouped_attention, lambda c, i: _experts(c, i, layout))


MIXTRAL = Family("mixtral", "MixtralForCausalLM", _read, _write, _table)
