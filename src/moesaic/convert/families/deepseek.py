"""DeepSeek-V2, V2-Lite and V3: latent attention, many narrow experts with shared ones beside them, dense first layers.

V2 takes the best of a softmax, or of the best groups of it; V3 a sigmoid with a bias that moves the choice alone, and groups by
the sum of their two best. V3 stores further layers that predict later tokens: they are no part of the model and are kept aside.
Sources: DeepSeek-V2 and -V3 (2024), their published code, and transformers.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from torch import Tensor

from moesaic.convert.family import (
    Family,
    Layout,
    by_layer,
    common_keys,
    common_values,
    frame,
    gated_experts,
    gated_mlp,
    linear,
    moe_of,
    of_sparse,
    one_value,
    router_gate,
    vector,
)
from moesaic.convert.keys import Keys
from moesaic.convert.pieces import SAME, Entry, Piece, rope_pairs
from moesaic.errors import ConfigError
from moesaic.models.config import LatentConfig, ModelConfig, MoEConfig, RouterConfig, pick

_LAYER = re.compile(r"model\.layers\.(\d{1,9})\..+")


# ---- config keys ----


def _common(keys: Keys) -> dict[str, Any]:
    """The fields both versions spell alike, ``moe`` aside."""
    fields = common_keys(keys, tie_default=False)
    rope, nope = keys.whole("qk_rope_head_dim", 64), keys.whole("qk_nope_head_dim", 128)
    keys.fixed("num_key_value_heads", fields["num_heads"])  # every head makes its own from the latent vector
    # transformers repeats these when it saves.
    keys.fixed("head_dim", rope)
    keys.fixed("qk_head_dim", nope + rope)
    keys.fixed("mlp_bias", False)
    keys.carry("ep_size")  # how the experts were spread over devices
    latent = LatentConfig(
        kv_rank=keys.whole("kv_lora_rank", 512),
        q_rank=keys.whole("q_lora_rank", None if "q_lora_rank" in keys.data else 1536),
        nope_dim=nope,
        rope_dim=rope,
        value_dim=keys.whole("v_head_dim", 128),
    )
    biases = "all" if keys.flag("attention_bias", False) else "none"
    return fields | {"latent": latent, "attention_bias": biases, "hidden": keys.whole("intermediate_size")}


def _moe(keys: Keys, router: RouterConfig, first: int, shared: int, coefficient: float) -> MoEConfig:
    keys.fixed("moe_layer_freq", 1)
    alpha = keys.number("aux_loss_alpha", coefficient)
    if "n_shared_experts" in keys.data and keys.data["n_shared_experts"] is None:
        keys.carry("n_shared_experts")  # no shared network at all, where 0 is one of no width
        shared = 0
    return MoEConfig(
        num_experts=keys.whole("n_routed_experts"),
        k=keys.whole("num_experts_per_tok"),
        hidden=keys.whole("moe_intermediate_size"),
        dense_first=keys.whole("first_k_dense_replace", first),
        shared=keys.whole("n_shared_experts", shared),
        router=router,
        losses={"sequence" if keys.flag("seq_aux", True) else "switch": alpha},
    )


def _groups(keys: Keys, score: str) -> dict[str, Any]:
    return {
        "groups": keys.whole("n_group", 1),
        "groups_kept": keys.whole("topk_group", None),
        "group_score": score,
    }


def _read_v2(keys: Keys) -> ModelConfig:
    fields = _common(keys)
    keys.fixed("scoring_func", "softmax")
    if keys.flag("norm_topk_prob", False):
        raise ConfigError(
            f"{keys.where}: norm_topk_prob=true means two things for deepseek_v2: DeepSeek's code normalises the weights of "
            "the chosen experts, transformers ignores it. Set it to false if the model was made with the latter."
        )
    options: dict[str, Any] = {"normalize": "none", "scale": keys.number("routed_scaling_factor", 1.0)}
    limited = keys.choice("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy")
    if limited:
        options |= _groups(keys, "max")
    else:
        keys.carry("n_group", "topk_group")  # then without effect
    moe = _moe(keys, RouterConfig("topk", options), first=0, shared=2, coefficient=0.001)
    return ModelConfig(**fields, moe=moe)


def _read_v3(keys: Keys) -> ModelConfig:
    fields = _common(keys)
    keys.fixed("scoring_func", "sigmoid")
    keys.fixed("topk_method", "noaux_tc")
    keys.fixed("rope_interleave", True, False)  # how rows are stored; the table asks
    if keys.whole("num_nextn_predict_layers", 0) < 0:
        raise ConfigError(f"{keys.where}: num_nextn_predict_layers must be at least 0.")
    keys.carry("num_nextn_predict_layers")
    options = {
        "score": "sigmoid",
        "normalize": "chosen" if keys.flag("norm_topk_prob", True) else "none",
        "scale": keys.number("routed_scaling_factor", 2.5),
        "balance_bias": True,
        **_groups(keys, "top2_sum"),
    }
    # The paper's coefficient; not every published config names it.
    moe = _moe(keys, RouterConfig("topk", options), first=3, shared=1, coefficient=1e-4)
    return ModelConfig(**fields, moe=moe)


def _write(config: ModelConfig) -> dict[str, Any]:
    moe, latent = moe_of(config), config.latent
    if latent is None:
        raise ConfigError("This model has no latent attention, which the family is built on.")
    options = moe.router.options
    return {
        **common_values(config),
        "num_key_value_heads": config.num_heads,
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.q_rank,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "attention_bias": config.attention_bias == "all",
        "intermediate_size": one_value(config.hidden),
        "moe_intermediate_size": one_value(moe.hidden),
        "first_k_dense_replace": config.moe_layers[0],
        "n_routed_experts": one_value(moe.num_experts),
        "num_experts_per_tok": one_value(moe.k),
        "n_shared_experts": moe.shared,
        "routed_scaling_factor": options.get("scale", 1.0),
        "seq_aux": "switch" not in moe.losses,
        "aux_loss_alpha": moe.losses.get("sequence", moe.losses.get("switch", 0.0)),
    }


def _write_groups(config: ModelConfig) -> dict[str, Any]:
    options = moe_of(config).router.options
    groups = options.get("groups", 1)
    return {"n_group": groups, "topk_group": options.get("groups_kept") or groups}


def _write_v2(config: ModelConfig) -> dict[str, Any]:
    limited = moe_of(config).router.options.get("groups", 1) > 1
    return {
        **_write(config),
        **(_write_groups(config) if limited else {}),
        "norm_topk_prob": False,
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "scoring_func": "softmax",
    }


def _write_v3(config: ModelConfig) -> dict[str, Any]:
    return {
        **_write(config),
        **_write_groups(config),
        "norm_topk_prob": moe_of(config).router.options.get("normalize", "chosen") == "chosen",
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    }


# ---- tables ----


def _attention(config: ModelConfig, i: int, pairs: bool) -> list[Entry]:
    latent = config.latent
    assert latent is not None
    ours, theirs = f"blocks.{i}.attention", f"model.layers.{i}.self_attn"
    D, H, C, P = config.dim, config.num_heads, latent.kv_rank, latent.rope_dim
    bias = config.attention_bias == "all"
    of_heads = rope_pairs(H, latent.nope_dim, P) if pairs else SAME
    of_key = rope_pairs(1, C, P) if pairs else SAME
    query = H * (latent.nope_dim + P)
    if latent.q_rank is None:
        entries = linear(f"{ours}.wq", f"{theirs}.q_proj", query, D, turn=of_heads)
    else:
        entries = [
            *linear(f"{ours}.wq_a", f"{theirs}.q_a_proj", latent.q_rank, D, bias=bias),
            vector(f"{ours}.q_norm.weight", f"{theirs}.q_a_layernorm.weight", latent.q_rank),
            *linear(f"{ours}.wq_b", f"{theirs}.q_b_proj", query, latent.q_rank, turn=of_heads),
        ]
    return [
        *entries,
        *linear(f"{ours}.wkv_a", f"{theirs}.kv_a_proj_with_mqa", C + P, D, bias=bias, turn=of_key),
        vector(f"{ours}.kv_norm.weight", f"{theirs}.kv_a_layernorm.weight", C),
        *linear(f"{ours}.wkv_b", f"{theirs}.kv_b_proj", H * (latent.nope_dim + latent.value_dim), C),
        *linear(f"{ours}.wo", f"{theirs}.o_proj", D, H * latent.value_dim, bias=bias),
    ]


def _feed_forward(config: ModelConfig, i: int, layout: Layout, carried: dict[str, Any]) -> list[Entry]:
    ours, theirs = f"blocks.{i}.ffn", f"model.layers.{i}.mlp"
    D = config.dim
    if i not in config.moe_layers:
        return gated_mlp(ours, theirs, D, pick(config.hidden, i))
    moe, experts, hidden = of_sparse(config, i)
    entries = [
        *router_gate(i, f"{theirs}.gate", experts, D),
        *gated_experts(f"{ours}.experts", f"{theirs}.experts", experts, D, hidden, layout),
    ]
    if moe.router.options.get("balance_bias"):
        entries.append(vector(f"{ours}.router.choice_bias_E", f"{theirs}.gate.e_score_correction_bias", experts))
    if moe.shared:
        width = moe.shared_hidden or moe.shared * hidden
        return entries + gated_mlp(f"{ours}.shared.mlp", f"{theirs}.shared_experts", D, width)
    if "n_shared_experts" in carried:
        return entries
    # With a count of 0 they build and store a network of no width: its tensors come from, and fill, no numbers of ours.
    outward = entries.index(next(entry for entry in entries if entry.ours.endswith("experts.w_out")))
    empty = [
        Piece(f"{theirs}.shared_experts.{name}.weight", shape, partial(_no_rows, shape=shape))
        for name, shape in (("gate_proj", (0, D)), ("up_proj", (0, D)), ("down_proj", (D, 0)))
    ]
    entries[outward] = Entry(entries[outward].ours, (*entries[outward].pieces, *empty))
    return entries


def _no_rows(w_EHD: Tensor, shape: tuple[int, int]) -> Tensor:
    empty_0D = w_EHD[0, :0]
    return empty_0D if shape[0] == 0 else empty_0D.transpose(0, 1)


def _table(config: ModelConfig, layout: Layout, carried: dict[str, Any]) -> list[Entry]:
    # V2 has no such key: neighbours always turn together.
    pairs = bool(carried.get("rope_interleave", True))
    return frame(config) + by_layer(
        config,
        lambda c, i: _attention(c, i, pairs),
        lambda c, i: _feed_forward(c, i, layout, carried),
    )


def _aside(name: str, config: ModelConfig, carried: dict[str, Any]) -> bool:
    """Layers past the last that predict tokens further ahead (whose embedding and head may repeat the model's)."""
    layer = _LAYER.fullmatch(name)
    further = carried.get("num_nextn_predict_layers") or 0
    return layer is not None and config.num_layers <= int(layer[1]) < config.num_layers + further


DEEPSEEK_V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", _read_v2, _write_v2, _table)
DEEPSEEK_V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", _read_v3, _write_v3, _table, aside=_aside)
