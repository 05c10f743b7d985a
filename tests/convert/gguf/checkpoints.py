"""Tiny random Hugging Face checkpoints of every family llama.cpp computes: keys, names and shapes as published, none of ours.

Sizes are told apart by their shapes, and turned heads are wide enough that turning them twice does not undo it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
V, D, A, KV, R, F, E, H = 40, 20, 4, 2, 8, 28, 6, 12  # as in tensors.py; F is the width of dense feed-forward layers


@dataclass(frozen=True)
class Case:
    """``config.json`` and the shapes of the tensors; ``aside``: of those that are no part of the model."""

    config: dict[str, Any]
    shapes: Shapes
    aside: Shapes = field(default_factory=dict)


def write(case: Case, folder: Path, seed: int = 0) -> dict[str, Tensor]:
    """Save the checkpoint. Matrices hold numbers that BF16 has, all that stays F32 in every GGUF file holds others."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in (case.shapes | case.aside).items()}
    for name in tensors:
        if not stays_fp32(name):
            tensors[name] = tensors[name].bfloat16().float()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case.config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return {name: tensors[name] for name in case.shapes}


def stays_fp32(name: str) -> bool:
    """Norms, biases, sinks, gates of experts and of the shared one."""
    gates = ("mlp.gate.weight", "moe.gate.weight", "router.weight", "shared_expert_gate.weight", "sinks")
    return "norm" in name or name.endswith(("bias", *gates))


# ---- parts ----


def _frame(width: int, layers: int, tied: bool = False) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (V, width), "model.norm.weight": (width,)}
    if not tied:
        shapes["lm_head.weight"] = (V, width)
    for i in range(layers):
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (width,)
        shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (width,)
    return shapes


def _attention(layers: int, width: int, heads: int, kv: int, head: int, biases: str = "", norms: str = "") -> Shapes:
    shapes: Shapes = {}
    for i in range(layers):
        at = f"model.layers.{i}.self_attn."
        for name, out in (("q", heads * head), ("k", kv * head), ("v", kv * head)):
            shapes[f"{at}{name}_proj.weight"] = (out, width)
            if name in biases:
                shapes[f"{at}{name}_proj.bias"] = (out,)
        shapes[f"{at}o_proj.weight"] = (width, heads * head)
        if "o" in biases:
            shapes[f"{at}o_proj.bias"] = (width,)
        if norms:
            shapes[f"{at}q_norm.weight"] = (head if norms == "head" else heads * head,)
            shapes[f"{at}k_norm.weight"] = (head if norms == "head" else kv * head,)
    return shapes


def _mlp(at: str, width: int, hidden: int, bias: bool = False) -> Shapes:
    shapes: Shapes = {}
    for name, out, into in (("gate", hidden, width), ("up", hidden, width), ("down", width, hidden)):
        shapes[f"{at}.{name}_proj.weight"] = (out, into)
        if bias:
            shapes[f"{at}.{name}_proj.bias"] = (out,)
    return shapes


def _experts(at: str, width: int) -> Shapes:
    """A gate and experts, one tensor for each matrix of each."""
    shapes: Shapes = {f"{at}.gate.weight": (E, width)}
    for e in range(E):
        shapes |= _mlp(f"{at}.experts.{e}", width, H)
    return shapes


def _stacked(at: str, width: int) -> Shapes:
    gate: Shapes = {f"{at}.gate.weight": (E, width)}
    return gate | {f"{at}.experts.gate_up_proj": (E, 2 * H, width), f"{at}.experts.down_proj": (E, width, H)}


def _config(type_: str, architecture: str, width: int = D, layers: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "model_type": type_, "architectures": [architecture], "vocab_size": V, "hidden_size": width,
        "num_hidden_layers": layers, "num_attention_heads": A, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    } | more  # fmt: skip


# ---- families ----


def _llama(biased: bool = False, tied: bool = False, **more: Any) -> Case:
    shapes = _frame(D, 2, tied) | _attention(2, D, A, KV, R, "qkvo" if biased else "")
    for i in range(2):
        shapes |= _mlp(f"model.layers.{i}.mlp", D, F, biased)
    keys = {"num_key_value_heads": KV, "head_dim": R, "intermediate_size": F, "tie_word_embeddings": tied}
    biases = {"attention_bias": biased, "mlp_bias": biased}
    return Case(_config("llama", "LlamaForCausalLM", **keys, **biases, **more), shapes)


def _mistral() -> Case:
    config = _llama().config | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
    }
    return Case({key: value for key, value in config.items() if not key.endswith("_bias")}, _llama().shapes)


def _mixtral(stacked: bool = False, **more: Any) -> Case:
    shapes = _frame(D, 2) | _attention(2, D, A, KV, R)
    for i in range(2):
        if stacked:
            shapes |= _stacked(f"model.layers.{i}.mlp", D)
        else:
            at = f"model.layers.{i}.block_sparse_moe"
            shapes[f"{at}.gate.weight"] = (E, D)
            for e in range(E):
                shapes |= {f"{at}.experts.{e}.w{n}.weight": (D, H) if n == 2 else (H, D) for n in (1, 2, 3)}
    keys = {"num_key_value_heads": KV, "head_dim": R, "intermediate_size": H, "num_local_experts": E}
    return Case(
        _config("mixtral", "MixtralForCausalLM", **keys, num_experts_per_tok=2, sliding_window=None, **more), shapes
    )


def _qwen3() -> Case:
    shapes = _frame(D, 2, tied=True) | _attention(2, D, A, KV, R, norms="head")
    for i in range(2):
        shapes |= _mlp(f"model.layers.{i}.mlp", D, F)
    keys = {"num_key_value_heads": KV, "head_dim": R, "intermediate_size": F, "tie_word_embeddings": True}
    return Case(_config("qwen3", "Qwen3ForCausalLM", **keys, attention_bias=False), shapes)


_QWEN_MOE = {"num_experts": E, "num_experts_per_tok": 3, "moe_intermediate_size": H, "intermediate_size": F}


def _qwen3_moe(stacked: bool = False) -> Case:
    shapes = _frame(D, 2) | _attention(2, D, A, KV, R, norms="head")
    for i in range(2):
        shapes |= (_stacked if stacked else _experts)(f"model.layers.{i}.mlp", D)
    keys = _QWEN_MOE | {"num_key_value_heads": KV, "head_dim": R, "norm_topk_prob": True}
    return Case(_config("qwen3_moe", "Qwen3MoeForCausalLM", **keys, attention_bias=False), shapes)


def _qwen2_moe(tied: bool = False) -> Case:
    shapes = _frame(A * R, 2, tied) | _attention(2, A * R, A, KV, R, "qkv")
    for i in range(2):
        at = f"model.layers.{i}.mlp"
        shapes |= _experts(at, A * R) | _mlp(f"{at}.shared_expert", A * R, F)
        shapes[f"{at}.shared_expert_gate.weight"] = (1, A * R)
    keys = _QWEN_MOE | {"num_key_value_heads": KV, "shared_expert_intermediate_size": F, "tie_word_embeddings": tied}
    return Case(_config("qwen2_moe", "Qwen2MoeForCausalLM", A * R, **keys, norm_topk_prob=False), shapes)


def _olmoe(**more: Any) -> Case:
    shapes = _frame(A * R, 2) | _attention(2, A * R, A, A, R, norms="projection")
    for i in range(2):
        shapes |= _experts(f"model.layers.{i}.mlp", A * R)
    keys = {"num_key_value_heads": A, "intermediate_size": H, "num_experts": E, "num_experts_per_tok": 3}
    return Case(_config("olmoe", "OlmoeForCausalLM", A * R, **keys, norm_topk_prob=False, **more), shapes)


NOPE, ROPE, VALUE, RANK, Q_RANK = 10, 8, 14, 16, 18


def _deepseek(type_: str, architecture: str, q_rank: int | None, bias: bool = False, **more: Any) -> Case:
    """Three layers, the first of them dense, two shared experts."""
    shapes = _frame(D, 3)
    for i in range(3):
        at = f"model.layers.{i}.self_attn."
        if q_rank is None:
            shapes[f"{at}q_proj.weight"] = (A * (NOPE + ROPE), D)
        else:
            shapes[f"{at}q_a_proj.weight"] = (q_rank, D)
            shapes[f"{at}q_a_layernorm.weight"] = (q_rank,)
            shapes[f"{at}q_b_proj.weight"] = (A * (NOPE + ROPE), q_rank)
        shapes[f"{at}kv_a_proj_with_mqa.weight"] = (RANK + ROPE, D)
        shapes[f"{at}kv_a_layernorm.weight"] = (RANK,)
        shapes[f"{at}kv_b_proj.weight"] = (A * (NOPE + VALUE), RANK)
        shapes[f"{at}o_proj.weight"] = (D, A * VALUE)
        at = f"model.layers.{i}.mlp"
        if i == 0:
            shapes |= _mlp(at, D, F)
            continue
        shapes |= _experts(at, D) | _mlp(f"{at}.shared_experts", D, 2 * H)
        if bias:
            shapes[f"{at}.gate.e_score_correction_bias"] = (E,)
    keys: dict[str, Any] = {
        "num_key_value_heads": A, "kv_lora_rank": RANK, "q_lora_rank": q_rank, "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE, "v_head_dim": VALUE, "intermediate_size": F, "moe_intermediate_size": H,
        "n_routed_experts": E, "n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
        "rms_norm_eps": 1e-6,
    }  # fmt: skip
    return Case(_config(type_, architecture, layers=3) | keys | more, shapes)


def _deepseek_v2(q_rank: int | None = None, **more: Any) -> Case:
    keys = {"topk_method": "greedy", "routed_scaling_factor": 1.5, "norm_topk_prob": False, "scoring_func": "softmax"}
    return _deepseek("deepseek_v2", "DeepseekV2ForCausalLM", q_rank, **keys, **more)


def _deepseek_v3(**more: Any) -> Case:
    keys = {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
    words = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 1}
    case = _deepseek("deepseek_v3", "DeepseekV3ForCausalLM", Q_RANK, True, **keys, **words, **more)
    further: Shapes = {"model.layers.3.eh_proj.weight": (D, 2 * D), "model.layers.3.enorm.weight": (D,)}
    return Case(case.config, case.shapes, further)


def _gpt_oss(**more: Any) -> Case:
    shapes = _frame(D, 2) | _attention(2, D, A, KV, R, "qkvo")
    for i in range(2):
        at = f"model.layers.{i}."
        shapes[f"{at}self_attn.sinks"] = (A,)
        shapes |= {f"{at}mlp.router.weight": (E, D), f"{at}mlp.router.bias": (E,)}
        shapes |= {f"{at}mlp.experts.gate_up_proj": (E, D, 2 * H), f"{at}mlp.experts.gate_up_proj_bias": (E, 2 * H)}
        shapes |= {f"{at}mlp.experts.down_proj": (E, H, D), f"{at}mlp.experts.down_proj_bias": (E, D)}
    keys: dict[str, Any] = {
        "num_key_value_heads": KV, "head_dim": R, "intermediate_size": H, "num_local_experts": E,
        "num_experts_per_tok": 3, "attention_bias": True, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    return Case(_config("gpt_oss", "GptOssForCausalLM", **keys, **more), shapes)


def _yarn(factor: float, **more: Any) -> dict[str, Any]:
    scaling = {"type": "yarn", "factor": factor, "original_max_position_embeddings": 16}
    return {"rope_scaling": scaling | {"beta_fast": 32, "beta_slow": 1} | more}


_OLD = {"original_max_position_embeddings": 48}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | _OLD

CASES: dict[str, Case] = {
    "llama": _llama(),
    "llama, biases": _llama(biased=True),
    "llama 3, tied": _llama(tied=True, rope_theta=100.0, rope_scaling=_LLAMA3),
    "mistral": _mistral(),
    "mixtral": _mixtral(rope_scaling={"type": "linear", "factor": 4.0}),
    "mixtral, stacked": _mixtral(stacked=True),
    "qwen3": _qwen3(),
    "qwen3_moe": _qwen3_moe(),
    "qwen3_moe, stacked": _qwen3_moe(stacked=True),
    "qwen2_moe": _qwen2_moe(),
    "qwen2_moe, tied": _qwen2_moe(tied=True),
    "olmoe": _olmoe(),
    "deepseek_v2, lite": _deepseek_v2(),
    "deepseek_v2": _deepseek_v2(Q_RANK, **_yarn(40.0, mscale=0.707, mscale_all_dim=0.707)),
    "deepseek_v3": _deepseek_v3(**_yarn(40.0, mscale=1.0, mscale_all_dim=1.0)),
    "deepseek_v3, halves": _deepseek_v3(rope_interleave=False),
    "gpt_oss": _gpt_oss(**_yarn(4.0, truncate=True)),
}
OLMOE_CLIPPED = _olmoe(clip_qkv=8.0)
