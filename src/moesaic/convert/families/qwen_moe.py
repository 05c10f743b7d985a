"""Qwen2-MoE (Yang et al. 2024; biased queries, a sigmoid-gated shared expert) and Qwen3-MoE (2025; normed heads, none shared).

Of both, layers may stay dense: those in ``mlp_only_layers``, and all but every ``decoder_sparse_step``-th.
"""

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
    gated_mlp,
    grouped_attention,
    grouped_heads,
    grouped_values,
    linear,
    moe_of,
    of_sparse,
    one_value,
    router_gate,
)
from moesaic.convert.keys import Keys
from moesaic.convert.pieces import Entry
from moesaic.convert.windows import (
    FULL,
    SLIDING,
    check_window,
    kinds_and_window,
    layer_kinds,
    window_key,
    windows_of,
)
from moesaic.errors import ConfigError
from moesaic.models.config import ModelConfig, MoEConfig, RouterConfig, pick

# ---- config keys ----


def normalising(moe: MoEConfig) -> bool:
    """``norm_topk_prob``: whether the weights of the chosen add up to 1."""
    return moe.router.name == "topk" and moe.router.options.get("normalize", "chosen") == "chosen"


def _read_moe(keys: Keys, layers: int, **fields: Any) -> MoEConfig:
    every = keys.whole("decoder_sparse_step", 1)
    if every < 1:
        raise ConfigError(f"{keys.where}: decoder_sparse_step must be at least 1, not {every}.")
    dense = keys.wholes(
        "mlp_only_layers", ()
    )  # may name layers beyond the last (models cut short); transformers skips them
    sparse = tuple(i for i in range(layers) if i not in dense and (i + 1) % every == 0)
    if not sparse:
        raise ConfigError(
            f"{keys.where}: by decoder_sparse_step={every} and mlp_only_layers={list(dense)} none of the {layers} layers is "
            "sparse, and moesaic reads sparse models of this type alone."
        )
    experts = keys.whole("num_experts", None)
    other = keys.whole("num_local_experts", None)  # what transformers 5 calls it when it saves Qwen3-MoE
    if experts is not None and other is not None and experts != other:
        raise ConfigError(f"{keys.where} gives num_experts={experts} and num_local_experts={other}; keep one.")
    if experts is None and other is None:
        keys.get("num_experts")  # raises
    return MoEConfig(
        num_experts=other if experts is None else experts,
        k=keys.whole("num_experts_per_tok"),
        hidden=keys.whole("moe_intermediate_size"),
        every=1 if dense else every,
        layers=sparse if dense else None,
        router=RouterConfig("topk", {"normalize": "chosen" if keys.flag("norm_topk_prob", False) else "none"}),
        losses={"switch": keys.number("router_aux_loss_coef", 0.001)},
        **fields,
    )


def _write_moe(config: ModelConfig) -> dict[str, Any]:
    moe, sparse, layers = moe_of(config), config.moe_layers, range(config.num_layers)
    dense = [i for i in layers if i not in sparse]
    # A step where one says it, else the list.
    step = next((n + 1 for n in layers if [i for i in layers if (i + 1) % (n + 1) == 0] == list(sparse)), None)
    return {
        "decoder_sparse_step": step or 1,
        "mlp_only_layers": [] if step else dense,
        "intermediate_size": pick(config.hidden, dense[0]) if dense else one_value(config.hidden),
        "moe_intermediate_size": one_value(moe.hidden),
        "num_experts": one_value(moe.num_experts),
        "num_experts_per_tok": one_value(moe.k),
        "norm_topk_prob": normalising(moe),
        "router_aux_loss_coef": moe.losses.get("switch", 0.0),
    }


def _read_qwen2(keys: Keys) -> ModelConfig:
    fields = common_keys(keys, tie_default=False)
    fields |= grouped_heads(keys, fields, kv_default=16)
    layers = fields["num_layers"]
    used = keys.flag("use_sliding_window", False)
    window = window_key(keys, 4096)
    # Every other of the first max_window_layers; the list, where there is one, decides.
    below = keys.whole("max_window_layers", 28)
    kinds = layer_kinds(keys, layers, [SLIDING if used and i % 2 == 0 and i < below else FULL for i in range(layers)])
    shared = keys.whole("shared_expert_intermediate_size")
    return ModelConfig(
        **fields,
        hidden=keys.whole("intermediate_size"),
        attention_bias="qkv" if keys.flag("qkv_bias", True) else "none",
        sliding_window=windows_of(keys, kinds, window if used else None),
        moe=_read_moe(keys, layers, shared=1, shared_gate=True, shared_hidden=shared),
    )


def shared_width(config: ModelConfig, i: int) -> int:
    """Width of the shared network of block ``i``; 0 without one."""
    moe, _, hidden = of_sparse(config, i)
    return (moe.shared_hidden or moe.shared * hidden) if moe.shared else 0


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    kinds, window = kinds_and_window(config)
    widths = {} if config.heads_dim == config.dim // config.num_heads else {"head_dim": config.heads_dim}
    return {
        **common_values(config),
        "num_key_value_heads": config.kv_heads,
        **widths,  # no key of this family, but transformers 5 follows it
        **_write_moe(config),
        "shared_expert_intermediate_size": shared_width(config, config.moe_layers[0]),
        "qkv_bias": config.attention_bias == "qkv",
        "use_sliding_window": window is not None,
        "sliding_window": window or 0,
        "layer_types": kinds,
        "max_window_layers": config.num_layers - kinds[::-1].index(SLIDING) if window else config.num_layers,
    }


def _read_qwen3(keys: Keys) -> ModelConfig:
    fields = common_keys(keys, tie_default=False)
    fields |= grouped_heads(keys, fields, kv_default=4)
    layers = fields["num_layers"]
    window = window_key(keys, 4096)
    if not keys.flag("use_sliding_window", False):
        window = None
    if window is not None:
        check_window(keys, window)
    keys.carry("max_window_layers")  # published with Qwen3-MoE, and read by nothing: all layers slide or none
    kinds = layer_kinds(keys, layers, [FULL if window is None else SLIDING] * layers, binding=True)
    # Left over in published configs from Qwen2-MoE; of other values it is not known what was meant.
    keys.fixed("qkv_bias", False)
    keys.fixed("shared_expert_intermediate_size", 0)
    keys.fixed("use_qk_norm", True)
    return ModelConfig(
        **fields,
        hidden=keys.whole("intermediate_size"),
        qk_norm="head",
        attention_bias="all" if keys.flag("attention_bias", False) else "none",
        sliding_window=windows_of(keys, kinds, window),
        moe=_read_moe(keys, layers),
    )


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    _, window = kinds_and_window(config)
    return {
        **common_values(config),
        **grouped_values(config),
        **_write_moe(config),
        "attention_bias": config.attention_bias == "all",
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


# ---- tables ----


def gated_block(config: ModelConfig, i: int, layout: Layout) -> list[Entry]:
    """The feed-forward layer of block ``i`` under ``mlp``: dense, or a gate and experts (Qwen-MoE, OLMoE)."""
    ours, theirs = f"blocks.{i}.ffn", f"model.layers.{i}.mlp"
    if i not in config.moe_layers:
        return gated_mlp(ours, theirs, config.dim, pick(config.hidden, i), bias=config.mlp_bias)
    _, experts, hidden = of_sparse(config, i)
    return [
        *router_gate(i, f"{theirs}.gate", experts, config.dim),
        *gated_experts(f"{ours}.experts", f"{theirs}.experts", experts, config.dim, hidden, layout),
    ]


def _shared(config: ModelConfig, i: int) -> list[Entry]:
    if i not in config.moe_layers:
        return []
    ours, theirs = f"blocks.{i}.ffn.shared", f"model.layers.{i}.mlp.shared_expert"
    return [
        *gated_mlp(f"{ours}.mlp", theirs, config.dim, shared_width(config, i)),
        *linear(f"{ours}.output_gate", f"{theirs}_gate", 1, config.dim),
    ]


def _table(config: ModelConfig, layout: Layout, carried: dict[str, Any]) -> list[Entry]:
    return frame(config) + by_layer(config, grouped_attention, lambda c, i: gated_block(c, i, layout))


def _qwen2_table(config: ModelConfig, layout: Layout, carried: dict[str, Any]) -> list[Entry]:
    return _table(config, layout, carried) + by_layer(config, _shared)


QWEN2_MOE = Family("qwen2_moe", "Qwen2MoeForCausalLM", _read_qwen2, _write_qwen2, _qwen2_table)
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", _read_qwen3, _write_qwen3, _table)
