"""Dense models: to be upcycled, and as twins."""

from __future__ import annotations

from dataclasses import replace

from moesaic.models.config import ModelConfig
from moesaic.nn.rope import RopeScaling


def qwen3(dim: int, num_layers: int, num_heads: int, num_kv_heads: int, **changes: object) -> ModelConfig:
    """The shape Qwen3 has in common, dense; ``changes`` are fields of ``ModelConfig``."""
    config = ModelConfig(
        vocab_size=151936,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        norm_eps=1e-6,
        rope_theta=1e6,
        max_seq_len=40960,
        qk_norm="head",
        tie_embeddings=False,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def llama_3_8b() -> ModelConfig:
    """Meta-Llama-3-8B, dense."""
    return ModelConfig(
        vocab_size=128256,
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        hidden=14336,
        norm_eps=1e-5,
        rope_theta=5e5,
        max_seq_len=8192,
        tie_embeddings=False,
    )


def llama_3_1_8b() -> ModelConfig:
    """Llama-3.1-8B, dense."""
    return replace(llama_3_8b(), max_seq_len=131072, rope_scaling=RopeScaling("llama3", 8.0, 8192))


def mistral_7b() -> ModelConfig:
    """Mistral-7B-v0.1, dense."""
    return replace(llama_3_8b(), vocab_size=32000, rope_theta=1e4, max_seq_len=32768, sliding_window=4096)


def qwen3_0_6b() -> ModelConfig:
    """Qwen3-0.6B, dense."""
    return qwen3(1024, 28, 16, 8, hidden=3072, tie_embeddings=True)


def qwen3_8b() -> ModelConfig:
    """Qwen3-8B, dense."""
    return qwen3(4096, 36, 32, 8, hidden=12288)
