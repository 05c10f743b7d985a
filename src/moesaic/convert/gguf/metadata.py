"""What a GGUF file says of a model besides its tensors: sizes, rotary positions, routing; by llama.cpp's names."""

from __future__ import annotations

import math
from typing import Any

import torch

from moesaic.convert.gguf.architectures import Architecture
from moesaic.convert.meaning import meaning
from moesaic.models.config import ModelConfig, pick
from moesaic.nn.rope import RopeScaling, rope_frequencies

Values = dict[str, Any]  # int -> uint32, float -> float32, bool, str, lists of them

_SOFTMAX, _SIGMOID = 1, 2


def metadata_of(config: ModelConfig, arch: Architecture, notes: list[str]) -> Values:
    """Every key of the architecture, without its prefix; what is only nearly so is said in ``notes``."""
    values: Values = {
        "context_length": context_of(config, arch, notes),
        "vocab_size": config.vocab_size,
        "embedding_length": config.dim,
        "block_count": config.num_layers,
        "attention.head_count": config.num_heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.rope_dim,
        "rope.freq_base": float(config.rope_theta),
        "feed_forward_length": _width(config),
    }
    if (latent := config.latent) is None:
        values |= {
            "attention.head_count_kv": config.kv_heads,
            "attention.key_length": config.heads_dim,
            "attention.value_length": config.heads_dim,
        }
    else:  # computed as one key/value head over the latent vectors
        values |= {
            "attention.head_count_kv": 1,
            "attention.key_length": latent.kv_rank + latent.rope_dim,
            "attention.value_length": latent.kv_rank,
            "attention.key_length_mla": latent.nope_dim + latent.rope_dim,
            "attention.value_length_mla": latent.value_dim,
            "attention.kv_lora_rank": latent.kv_rank,
            "attention.q_lora_rank": latent.q_rank or 0,
        }
    if arch.windows:
        windows = [config.window(i) for i in range(config.num_layers)]
        # One width for all windows, and a mark on the layers that have one. llama.cpp aborts where none has: then all get the
        # whole context, which is no window.
        width = next((w for w in windows if w), config.max_seq_len)
        values |= {
            "attention.sliding_window": width,
            "attention.sliding_window_pattern": [w is not None for w in windows]
            if any(windows)
            else [True] * len(windows),
        }
    return values | _experts(config) | _rope(config, arch, notes)


def context_of(config: ModelConfig, arch: Architecture, notes: list[str]) -> int:
    """The longest context in which ``arch`` computes the same."""
    windows = {w for i in range(config.num_layers) if (w := config.window(i)) is not None and w < config.max_seq_len}
    if windows and not arch.windows:
        notes.append(
            f'The architecture "{arch.name}" knows no sliding windows, so the context is {min(windows)} instead of '
            f"{config.max_seq_len} tokens: up to there the two compute the same."
        )
        return min(windows)
    return config.max_seq_len


def rope_factors(config: ModelConfig, arch: Architecture) -> torch.Tensor | None:
    """fp32 (R / 2,): what each rotary frequency is divided by, for scalings that have no keys of their own; else None."""
    scaling = config.rope_scaling
    if scaling is None or not arch.factors or not (scaling.kind == "llama3" or _odd_yarn(scaling)):
        return None
    nowhere = torch.zeros(1, 1)
    plain = rope_frequencies(config.rope_dim, config.rope_theta, None, nowhere)
    return plain / rope_frequencies(config.rope_dim, config.rope_theta, scaling, nowhere)


def _odd_yarn(scaling: RopeScaling) -> bool:
    """Whether this is a YaRN other than the one llama.cpp computes by itself."""
    return scaling.kind == "yarn" and (scaling.beta_fast, scaling.beta_slow, scaling.truncate) != (32.0, 1.0, True)


def _rope(config: ModelConfig, arch: Architecture, notes: list[str]) -> Values:
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    if rope_factors(config, arch) is not None:
        return {} if scaling.table_scale == 1 else {"rope.scaling.attn_factor": float(scaling.table_scale)}
    values: Values = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    log = 0.1 * math.log(scaling.factor)
    table = scaling.table_scale  # the factor on cos and sin
    if scaling.kind == "yarn":
        values["rope.scaling.original_context_length"] = scaling.original_max_seq_len
        if _odd_yarn(scaling):
            notes.append(
                "llama.cpp computes YaRN with beta_fast=32, beta_slow=1 and bounds rounded to whole dimensions; this "
                f"model has {scaling.beta_fast:g}, {scaling.beta_slow:g} and truncate={str(scaling.truncate).lower()}, so a "
                "few rotary frequencies and with them logits differ a little."
            )
    # llama.cpp multiplies cos and sin by 1 + log by itself; in "deepseek2" by ratio(log_mul) instead where a log_mul is given,
    # and there the scores by (org * (1 + log_mul * log))^2, org being the factor on cos and sin, or 1 + log without YaRN.
    own = 1 + log if scaling.kind == "yarn" else 1.0
    if config.latent is not None and log:
        org = table if scaling.kind == "yarn" else 1 + log
        log_mul = (math.sqrt(scaling.score_scale) / org - 1) / log
        if abs(log_mul) > 1e-9:
            values["rope.scaling.yarn_log_multiplier"] = 0.1 * log_mul
            own = 1.0
    if not math.isclose(table, own, rel_tol=1e-9):
        values["rope.scaling.attn_factor"] = table / own
    return values


def _width(config: ModelConfig) -> int:
    """The architectures without dense layers read the width of experts here, or do not read it."""
    dense = [i for i in range(config.num_layers) if i not in config.moe_layers]
    if dense or config.moe is None:
        return pick(config.hidden, dense[0])
    return pick(config.moe.hidden, 0)


def _experts(config: ModelConfig) -> Values:
    if config.moe is None:
        # A latent model without experts still has to say how many shared ones there are, and how wide experts would be.
        none = {"leading_dense_block_count": config.num_layers, "expert_shared_count": 0}
        return {} if config.latent is None else none | {"expert_feed_forward_length": _width(config)}
    sizes = meaning(config)["moe"]
    options, width, shared = sizes["router"]["options"], sizes["hidden"][0], sizes["shared"][0]
    score = options.get("score", "softmax")
    values: Values = {
        "expert_count": sizes["num_experts"][0],
        "expert_used_count": sizes["k"][0],
        "expert_feed_forward_length": width,
    }
    if shared:
        values["expert_shared_feed_forward_length"] = shared
    if config.latent is not None:  # the other graphs have one way to weigh experts
        values |= {
            "expert_gating_func": _SIGMOID if score == "sigmoid" else _SOFTMAX,
            "expert_weights_norm": options.get("normalize", "chosen") != "none",
            "expert_weights_scale": float(options.get("scale", 1)),
            "expert_shared_count": shared // width,
            "leading_dense_block_count": config.num_layers - len(config.moe_layers),
        }
    if options.get("groups_kept"):
        values |= {"expert_group_count": options["groups"], "expert_group_used_count": options["groups_kept"]}
    return values
