"""Every key of a GGUF file against the ``config.json`` it comes from, by llama.cpp's names; and the rotary factors of Llama 3.

The rules are those of ``set_gguf_parameters`` in llama.cpp's convert_hf_to_gguf.py. Beyond it, this export always writes sizes
that llama.cpp would otherwise infer (widths of heads, what is rotated, the vocabulary, how experts are weighed).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.convert.gguf import KINDS, Kind
from tests.convert.gguf.checkpoints import CASES
from tests.convert.gguf.test_by_hand import exported

gguf = pytest.importorskip("gguf")

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe", "olmoe": "olmoe", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "gpt_oss": "gpt-oss",
}  # fmt: skip
# config.json -> the key, where the value is the same
SAME = {
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "num_local_experts": "expert_count",
    "num_experts": "expert_count",
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "kv_lora_rank": "attention.kv_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
    "v_head_dim": "attention.value_length_mla",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "sliding_window": "attention.sliding_window",
}


def _attention(c: dict[str, Any]) -> dict[str, Any]:
    if "kv_lora_rank" in c:  # one key/value head over the latent vectors, made into heads afterwards
        return {
            "attention.head_count_kv": 1,
            "attention.key_length": c["kv_lora_rank"] + c["qk_rope_head_dim"],
            "attention.value_length": c["kv_lora_rank"],
            "attention.key_length_mla": c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
            "attention.q_lora_rank": c["q_lora_rank"] or 0,
        }
    width = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    lengths = dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), width)
    return {"attention.head_count_kv": c["num_key_value_heads"], **lengths}


def _experts(c: dict[str, Any]) -> dict[str, Any]:
    if not {"num_local_experts", "num_experts", "n_routed_experts"} & c.keys():
        return {"feed_forward_length": c["intermediate_size"]}
    if "n_routed_experts" in c:
        return {
            "feed_forward_length": c["intermediate_size"],  # of the dense layers
            "expert_shared_feed_forward_length": c["n_shared_experts"] * c["moe_intermediate_size"],
            "expert_gating_func": {"softmax": 1, "sigmoid": 2}[c["scoring_func"]],
            "expert_weights_norm": c["norm_topk_prob"],
        }
    # Without dense layers it is the width of experts, or not read beside the key that says so.
    width = c.get("moe_intermediate_size", c["intermediate_size"])
    return {"feed_forward_length": width, "expert_feed_forward_length": width}


def _rope(c: dict[str, Any]) -> dict[str, Any]:
    scaling = c.get("rope_scaling")
    if scaling is None or scaling.get("rope_type") == "llama3":  # Llama 3's is a tensor
        return {}
    keys = {"rope.scaling.type": scaling["type"], "rope.scaling.factor": scaling["factor"]}
    if scaling["type"] == "yarn":
        keys["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    if "mscale_all_dim" in scaling:
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * scaling["mscale_all_dim"]
    return keys


def expected(c: dict[str, Any]) -> dict[str, Any]:
    """The keys of the architecture, without its name."""
    same = {ours: c[theirs] for theirs, ours in SAME.items() if c.get(theirs) is not None}
    kinds = {"attention.sliding_window_pattern": [kind == "sliding_attention" for kind in c.get("layer_types", ())]}
    return same | _attention(c) | _experts(c) | _rope(c) | (kinds if "layer_types" in c else {})


@pytest.mark.parametrize("name", CASES)
def test_every_key_follows_from_the_config(name: str, tmp_path: Path) -> None:
    config = CASES[name].config
    file, _ = exported(CASES[name], tmp_path)
    assert file.arch == ARCHITECTURES[config["model_type"]]
    wanted = {f"{file.arch}.{key}": value for key, value in expected(config).items()}
    wanted |= {"general.architecture": file.arch, "general.type": "model", "general.name": "m", "general.file_type": 0}
    wanted |= {"tokenizer.ggml.model": "none"}
    keys = {key: value for key, value in file.keys.items() if not key.startswith("GGUF.")}
    assert keys.keys() == wanted.keys()
    for key, value in wanted.items():
        assert keys[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


def test_keys_are_known_to_the_package() -> None:
    groups = [group for group in vars(gguf.constants.Keys).values() if isinstance(group, type)]
    known = {text for group in groups for text in vars(group).values() if isinstance(text, str)}
    assert {"{arch}." + key for case in CASES.values() for key in expected(case.config)} <= known


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_says_its_type(kind: Kind, tmp_path: Path) -> None:
    file, _ = exported(CASES["gpt_oss"], tmp_path, kind)
    number = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32, "mxfp4": 38}[kind]  # enum llama_ftype
    assert file.keys["general.file_type"] == number
    assert file.keys.get("general.quantization_version") == (2 if kind in ("q8_0", "q4_0", "mxfp4") else None)


def test_rotary_factors_of_llama_3(tmp_path: Path) -> None:
    """By wavelength: short ones stay, long ones are divided by the factor, those between in proportion."""
    case = CASES["llama 3, tied"]
    file, _ = exported(case, tmp_path)
    scaling, factors = case.config["rope_scaling"], []
    for i in range(0, case.config["head_dim"], 2):
        length = 2 * math.pi * case.config["rope_theta"] ** (i / case.config["head_dim"])
        old = scaling["original_max_position_embeddings"]
        if length < old / scaling["high_freq_factor"]:
            factors.append(1.0)
        elif length > old / scaling["low_freq_factor"]:
            factors.append(scaling["factor"])
        else:
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            smooth = (old / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    assert {1.0, 8.0} < set(factors)
    assert np.allclose(file.tensors["rope_freqs.weight"], factors, rtol=1e-6)
