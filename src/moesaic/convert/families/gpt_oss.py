"""gpt-oss (OpenAI 2025): biases everywhere, attention sinks, windows in every other layer, clamped SwiGLU.

Released in MXFP4, which ``storage`` dequantises before the table sees it. Gate and up take turns in the last dimension of their
stack.
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
    grouped_attention,
    grouped_heads,
    grouped_values,
    moe_of,
    of_sparse,
    one_value,
    router_gate,
)
from moesaic.convert.keys import Keys
from moesaic.convert.pieces import ALTERNATING, Entry, Piece, whole
from moesaic.convert.windows import FULL, SLIDING, kinds_and_window, layer_kinds, window_key, windows_of
from moesaic.models.config import ModelConfig, MoEConfig, RouterConfig
from moesaic.nn.rope import RopeScaling

# What transformers takes an absent or null scaling for.
_SCALING = RopeScaling("yarn", 32.0, 4096, beta_fast=32.0, beta_slow=1.0, truncate=False)


def _read(keys: Keys) -> ModelConfig:
    fields = common_keys(keys, tie_default=False, theta_default=150000.0, eps_default=1e-5)
    if keys.data.get("rope_scaling") is None and keys.data.get("rope_parameters") is None:
        fields["rope_scaling"] = _SCALING
    # The key names a function that is not used: the gate is the clamped one whatever it says, of which one form is known.
    keys.fixed("hidden_act", "silu")
    keys.fixed("swiglu_alpha", 1.702)
    keys.fixed("swiglu_limit", 7.0)
    fields["activation"] = "clamped_swiglu"
    fields |= grouped_heads(keys, fields, kv_default=8, width_default=None if "head_dim" in keys.data else 64)
    layers = fields["num_layers"]
    kinds = layer_kinds(keys, layers, [FULL if i % 2 else SLIDING for i in range(layers)])
    if SLIDING not in kinds:
        keys.carry("sliding_window")  # without effect, but transformers wants a number all the same
    k = keys.whole("num_experts_per_tok", 4)
    keys.fixed("experts_per_token", k)  # published beside it
    keys.carry("initial_context_length")  # repeats what the rope scaling says, and is not read
    moe = MoEConfig(
        num_experts=keys.whole("num_local_experts", 128),
        k=k,
        hidden=keys.whole("intermediate_size", 2880),
        expert_bias=True,
        router=RouterConfig("topk", {"normalize": "softmax_chosen", "gate_bias": True}),
        losses={"switch": keys.number("router_aux_loss_coef", 0.001)},
    )
    return ModelConfig(
        **fields,
        attention_bias="all" if keys.flag("attention_bias", True) else "none",
        attention_sinks=True,
        sliding_window=windows_of(keys, kinds, window_key(keys, 128)),
        moe=moe,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    moe = moe_of(config)
    kinds, window = kinds_and_window(config)
    values = common_values(config)
    if config.rope_scaling is None:  # null would mean the released one
        values["rope_scaling"] = {"rope_type": "default"}
    return {
        **values,
        **grouped_values(config),
        # Read back, it stands for the clamped gate: of any other activation that shows as a difference.
        "hidden_act": "silu",
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "attention_bias": config.attention_bias == "all",
        "layer_types": kinds,
        **({"sliding_window": window} if window else {}),
        "intermediate_size": one_value(moe.hidden),
        "num_local_experts": one_value(moe.num_experts),
        "num_experts_per_tok": one_value(moe.k),
        "router_aux_loss_coef": moe.losses.get("switch", 0.0),
    }


def _experts(config: ModelConfig, i: int) -> list[Entry]:
    ours, theirs = f"blocks.{i}.ffn.experts", f"model.layers.{i}.mlp.experts"
    _, E, H = of_sparse(config, i)
    D = config.dim
    return [
        *router_gate(i, f"model.layers.{i}.mlp.router", E, D, bias=True),
        Entry(f"{ours}.w_in", (Piece(f"{theirs}.gate_up_proj", (E, D, 2 * H), whole, ALTERNATING),)),
        Entry(f"{ours}.b_in", (Piece(f"{theirs}.gate_up_proj_bias", (E, 2 * H), whole, ALTERNATING),)),
        Entry(f"{ours}.w_out", (Piece(f"{theirs}.down_proj", (E, H, D)),)),
        Entry(f"{ours}.b_out", (Piece(f"{theirs}.down_proj_bias", (E, D)),)),
    ]


def _table(config: ModelConfig, layout: Layout, carried: dict[str, Any]) -> list[Entry]:
    return frame(config) + by_layer(config, grouped_attention, _experts)


GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", _read, _write, _table, layouts=("stacked",))
