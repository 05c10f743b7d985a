"""Tiny models of every family llama.cpp computes, their variants, and llama.cpp as a second reader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesaic.models.config import LatentConfig, ModelConfig, MoEConfig, RouterConfig
from moesaic.models.decoder import Decoder
from moesaic.nn.rope import RopeScaling

VOCAB = 96
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden": 96,
    "max_seq_len": 128,
    "tie_embeddings": False,
}


def _moe(options: dict[str, Any], **changes: Any) -> MoEConfig:
    values = {"num_experts": 8, "k": 2, "hidden": 32, "losses": {}, "router": RouterConfig("topk", options)}
    return MoEConfig(**(values | changes))


def _config(moe: MoEConfig | None = None, **changes: Any) -> ModelConfig:
    return ModelConfig(**(_SIZES | changes), moe=moe)


def llama(**changes: Any) -> ModelConfig:
    return _config(**changes)


def mixtral(**changes: Any) -> ModelConfig:
    return _config(_moe({"normalize": "chosen"}), **changes)


def qwen3(**changes: Any) -> ModelConfig:
    return _config(**({"qk_norm": "head", "head_dim": 32, "tie_embeddings": True} | changes))


def qwen3_moe(**changes: Any) -> ModelConfig:
    return _config(_moe({"normalize": "chosen"}, k=4), **({"qk_norm": "head", "head_dim": 32} | changes))


def qwen2_moe(**changes: Any) -> ModelConfig:
    moe = _moe({"normalize": "none"}, shared=1, shared_gate=True, shared_hidden=96)
    return _config(moe, **({"attention_bias": "qkv"} | changes))


def olmoe(**changes: Any) -> ModelConfig:
    changes = {"qk_norm": "projection", "num_kv_heads": 4, "norm_eps": 1e-5} | changes
    return _config(_moe({"normalize": "none"}, k=4), **changes)


_LATENT = LatentConfig(kv_rank=32, q_rank=None, nope_dim=32, rope_dim=16, value_dim=32)
_LATENT_Q = LatentConfig(kv_rank=32, q_rank=64, nope_dim=32, rope_dim=16, value_dim=32)


def deepseek_v2(options: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    moe = _moe(options or {"normalize": "none", "scale": 2.0}, shared=2, dense_first=1)
    return _config(moe, **({"latent": _LATENT, "num_kv_heads": None, "num_layers": 3} | changes))


def deepseek_v3(**changes: Any) -> ModelConfig:
    options = {
        "score": "sigmoid", "normalize": "chosen", "scale": 2.5, "balance_bias": True, "groups": 4, "groups_kept": 2,
        "group_score": "top2_sum",
    }  # fmt: skip
    return deepseek_v2(options, **({"latent": _LATENT_Q} | changes))


def gpt_oss(**changes: Any) -> ModelConfig:
    moe = _moe({"normalize": "softmax_chosen", "gate_bias": True}, expert_bias=True)
    values: dict[str, Any] = {
        "attention_bias": "all", "attention_sinks": True, "activation": "clamped_swiglu", "head_dim": 32,
        "sliding_window": (6, 0), "norm_eps": 1e-5,
    }  # fmt: skip
    return _config(moe, **(values | changes))


FAMILIES = {
    "mixtral": mixtral, "qwen3_moe": qwen3_moe, "olmoe": olmoe, "deepseek_v2": deepseek_v2, "deepseek_v3": deepseek_v3,
    "qwen2_moe": qwen2_moe, "gpt_oss": gpt_oss, "llama": llama, "qwen3": qwen3,
}  # fmt: skip

YARN = RopeScaling("yarn", 4.0, 32)
DEEPSEEK_YARN = RopeScaling("yarn", 40.0, 32, mscale=0.707, mscale_all_dim=0.707)

VARIANTS: dict[str, ModelConfig] = {
    "mixtral tied, every head its own key": mixtral(tie_embeddings=True, num_kv_heads=4),
    "mixtral one key head, wide heads": mixtral(num_kv_heads=1, head_dim=32, rope_theta=1e6),
    "mixtral biases": mixtral(attention_bias="all"),
    "mixtral linear rope": mixtral(rope_scaling=RopeScaling("linear", 4.0)),
    "mixtral yarn": mixtral(rope_scaling=YARN),
    "mixtral odd yarn": mixtral(rope_scaling=RopeScaling("yarn", 4.0, 32, beta_fast=8.0, beta_slow=2.0, truncate=False)),
    "llama 3 rope": llama(rope_scaling=RopeScaling("llama3", 8.0, 32), rope_theta=5e5),
    "llama all biases, tied": llama(attention_bias="all", mlp_bias=True, tie_embeddings=True),
    "qwen3 yarn": qwen3(rope_scaling=YARN),
    "qwen3 moe tied, yarn": qwen3_moe(tie_embeddings=True, rope_scaling=YARN),
    "qwen3 moe attention factor": qwen3_moe(rope_scaling=RopeScaling("yarn", 4.0, 32, attention_factor=1.5)),
    "olmoe tied": olmoe(tie_embeddings=True),
    "qwen2 moe tied, no biases": qwen2_moe(tie_embeddings=True, attention_bias="none"),
    "deepseek v2 yarn": deepseek_v2(rope_scaling=DEEPSEEK_YARN),
    "deepseek v2 two mscales": deepseek_v2(rope_scaling=RopeScaling("yarn", 8.0, 32, mscale=1.0, mscale_all_dim=0.5)),
    "deepseek v2 plain yarn": deepseek_v2(rope_scaling=YARN),
    "deepseek v2 linear": deepseek_v2(rope_scaling=RopeScaling("linear", 4.0)),
    "deepseek v2 tied, normalised": deepseek_v2({"normalize": "softmax_chosen"}, tie_embeddings=True),
    "deepseek v3 yarn": deepseek_v3(rope_scaling=RopeScaling("yarn", 40.0, 32, mscale=1.0, mscale_all_dim=1.0)),
    "deepseek dense": _config(latent=_LATENT, num_kv_heads=None),
    "gpt-oss yarn": gpt_oss(rope_scaling=YARN),
    "gpt-oss windows in other places": gpt_oss(num_layers=3, sliding_window=(0, 0, 6)),
    "gpt-oss without windows": gpt_oss(sliding_window=None),
}  # fmt: skip


def loud(model: Decoder, seed: int = 5) -> Decoder:
    """``lively`` leaves norms, biases, sinks and the choice bias plain; here nothing is, so that none can be lost unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() == 1 or ".b_" in name:
                noise = torch.randn(tensor.shape, generator=generator) * 0.3
                tensor.copy_(1 + noise if "norm" in name else noise)
    return model


@contextmanager
def llama_cpp_of(path: Path, context: int = 128) -> Iterator[Any]:
    """llama.cpp with the file loaded, keys and values in fp32."""
    import llama_cpp

    reader = llama_cpp.Llama(
        str(path), n_ctx=context, logits_all=True, type_k=0, type_v=0, n_threads=1, n_threads_batch=1, verbose=False
    )
    try:
        yield reader
    finally:
        reader.close()


def logits_there(reader: Any, ids: list[int]) -> np.ndarray:
    """fp32 (S, V) of one text."""
    reader.reset()
    reader.eval(ids)
    return np.array(reader.scores[: len(ids)])


def greedy_there(reader: Any, ids: list[int], steps: int) -> list[int]:
    """The ``steps`` likeliest tokens after ``ids``, one by one, with its own cache."""
    logits_there(reader, ids)
    found = []
    for _ in range(steps):
        found.append(int(np.argmax(reader.scores[reader.n_tokens - 1])))
        reader.eval(found[-1:])
    return found


def greedy_here(model: Decoder, ids: list[int], steps: int) -> list[int]:
    found = list(ids)
    with torch.no_grad():
        for _ in range(steps):
            found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]
