"""Sparse models."""

from __future__ import annotations

from dataclasses import replace

from moesaic.models.config import LatentConfig, ModelConfig, MoEConfig, RouterConfig
from moesaic.models.presets.dense import qwen3
from moesaic.nn.rope import RopeScaling

_RENORMALISED = RouterConfig("topk", {"normalize": "chosen"})
_PLAIN = RouterConfig("topk", {"normalize": "none"})


def mixtral_8x7b() -> ModelConfig:
    """Mixtral-8x7B-v0.1."""
    return ModelConfig(
        vocab_size=32000,
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        norm_eps=1e-5,
        rope_theta=1e6,
        max_seq_len=32768,
        tie_embeddings=False,
        moe=MoEConfig(num_experts=8, k=2, hidden=14336, router=_RENORMALISED, losses={"switch": 0.02}),
    )


def mixtral_8x22b() -> ModelConfig:
    """Mixtral-8x22B-Instruct-v0.1; the base model of that version has 32000 tokens and is otherwise the same."""
    return replace(
        mixtral_8x7b(),
        vocab_size=32768,
        dim=6144,
        num_layers=56,
        num_heads=48,
        max_seq_len=65536,
        moe=MoEConfig(num_experts=8, k=2, hidden=16384, router=_RENORMALISED, losses={"switch": 0.001}),
    )


def dbrx() -> ModelConfig:
    """DBRX. Its LayerNorms have gains alone; ours also have biases, 1 parameter in 260,000, and zero at the start."""
    return ModelConfig(
        vocab_size=100352,
        dim=6144,
        num_layers=40,
        num_heads=48,
        num_kv_heads=8,
        norm="layernorm",
        norm_eps=1e-5,
        rope_theta=5e5,
        max_seq_len=32768,
        clip_qkv=8.0,
        tie_embeddings=False,
        moe=MoEConfig(num_experts=16, k=4, hidden=10752, router=_RENORMALISED, losses={"switch": 0.05}),
    )


def deepseek_moe_16b() -> ModelConfig:
    """deepseek-moe-16b-base. The loss was not found in a copy of its config.json: it is the default of the model's code."""
    return ModelConfig(
        vocab_size=102400,
        dim=2048,
        num_layers=28,
        num_heads=16,
        hidden=10944,
        norm_eps=1e-6,
        rope_theta=1e4,
        max_seq_len=4096,
        tie_embeddings=False,
        moe=MoEConfig(
            num_experts=64, k=6, hidden=1408, dense_first=1, shared=2, router=_PLAIN, losses={"sequence": 0.001}
        ),
    )


def _deepseek_rope(mscale: float) -> RopeScaling:
    return RopeScaling("yarn", 40.0, 4096, beta_fast=32.0, beta_slow=1.0, mscale=mscale, mscale_all_dim=mscale)


def deepseek_v2() -> ModelConfig:
    """DeepSeek-V2. Experts of a token lie on 3 of 8 devices; weights are not renormalised but multiplied by 16."""
    options = {"normalize": "none", "scale": 16.0, "groups": 8, "groups_kept": 3, "group_score": "max"}
    return ModelConfig(
        vocab_size=102400,
        dim=5120,
        num_layers=60,
        num_heads=128,
        hidden=12288,
        norm_eps=1e-6,
        rope_theta=1e4,
        rope_scaling=_deepseek_rope(0.707),
        max_seq_len=163840,
        latent=LatentConfig(kv_rank=512, q_rank=1536, nope_dim=128, rope_dim=64, value_dim=128),
        tie_embeddings=False,
        moe=MoEConfig(
            num_experts=160,
            k=6,
            hidden=1536,
            dense_first=1,
            shared=2,
            router=RouterConfig("topk", options),
            losses={"sequence": 0.001},
        ),
    )


def deepseek_v2_lite() -> ModelConfig:
    """DeepSeek-V2-Lite: queries straight from the model width, no groups, no scale."""
    return replace(
        deepseek_v2(),
        dim=2048,
        num_layers=27,
        num_heads=16,
        hidden=10944,
        latent=LatentConfig(kv_rank=512, q_rank=None, nope_dim=128, rope_dim=64, value_dim=128),
        moe=MoEConfig(
            num_experts=64, k=6, hidden=1408, dense_first=1, shared=2, router=_PLAIN, losses={"sequence": 0.001}
        ),
    )


def deepseek_v3() -> ModelConfig:
    """DeepSeek-V3, without its multi-token prediction layer. The loss is the paper's, 1e-4 (config.json says nothing)."""
    options = {
        "score": "sigmoid",
        "normalize": "chosen",
        "scale": 2.5,
        "balance_bias": True,
        "groups": 8,
        "groups_kept": 4,
        "group_score": "top2_sum",
    }
    return replace(
        deepseek_v2(),
        vocab_size=129280,
        dim=7168,
        num_layers=61,
        hidden=18432,
        rope_scaling=_deepseek_rope(1.0),
        moe=MoEConfig(
            num_experts=256,
            k=8,
            hidden=2048,
            dense_first=3,
            shared=1,
            router=RouterConfig("topk", options),
            losses={"sequence": 1e-4},
        ),
    )


def qwen1_5_moe_a2_7b() -> ModelConfig:
    """Qwen1.5-MoE-A2.7B. Its context, 8192, is that of the base model; the chat model's is 32768."""
    return ModelConfig(
        vocab_size=151936,
        dim=2048,
        num_layers=24,
        num_heads=16,
        norm_eps=1e-6,
        rope_theta=1e6,
        max_seq_len=8192,
        attention_bias="qkv",
        tie_embeddings=False,
        moe=MoEConfig(
            num_experts=60,
            k=4,
            hidden=1408,
            shared=1,
            shared_gate=True,
            shared_hidden=5632,
            router=_PLAIN,
            losses={"switch": 0.001},
        ),
    )


def qwen2_57b_a14b() -> ModelConfig:
    """Qwen2-57B-A14B."""
    return replace(
        qwen1_5_moe_a2_7b(),
        dim=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        max_seq_len=131072,
        moe=MoEConfig(
            num_experts=64,
            k=8,
            hidden=2560,
            shared=1,
            shared_gate=True,
            shared_hidden=20480,
            router=_PLAIN,
            losses={"switch": 0.001},
        ),
    )


def _qwen3_moe(hidden: int) -> MoEConfig:
    return MoEConfig(
        num_experts=128,
        k=8,
        hidden=hidden,
        router=_RENORMALISED,
        losses={"switch": 0.001},
        loss_scope="global_batch",  # of the report
    )


def qwen3_30b_a3b() -> ModelConfig:
    """Qwen3-30B-A3B; its base model's context is 32768."""
    return qwen3(2048, 48, 32, 4, moe=_qwen3_moe(768))


def qwen3_235b_a22b() -> ModelConfig:
    """Qwen3-235B-A22B."""
    return qwen3(4096, 94, 64, 4, moe=_qwen3_moe(1536))


def olmoe_1b_7b() -> ModelConfig:
    """OLMoE-1B-7B-0924. Losses are the paper's, 0.01 and 1e-3; queries and keys are normalised over the whole projection."""
    return ModelConfig(
        vocab_size=50304,
        dim=2048,
        num_layers=16,
        num_heads=16,
        norm_eps=1e-5,
        rope_theta=1e4,
        max_seq_len=4096,
        qk_norm="projection",
        tie_embeddings=False,
        moe=MoEConfig(num_experts=64, k=8, hidden=1024, router=_PLAIN, losses={"switch": 0.01, "z": 0.001}),
    )


def _gpt_oss(num_layers: int, num_experts: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=201088,
        dim=2880,
        num_layers=num_layers,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        activation="clamped_swiglu",
        norm_eps=1e-5,
        rope_theta=1.5e5,
        rope_scaling=RopeScaling("yarn", 32.0, 4096, beta_fast=32.0, beta_slow=1.0, truncate=False),
        max_seq_len=131072,
        attention_bias="all",
        attention_sinks=True,
        sliding_window=(128, 0) * (num_layers // 2),
        tie_embeddings=False,
        moe=MoEConfig(
            num_experts=num_experts,
            k=4,
            hidden=2880,
            expert_bias=True,
            router=RouterConfig("topk", {"normalize": "softmax_chosen", "gate_bias": True}),
            losses={"switch": 0.9},
        ),
    )


def gpt_oss_120b() -> ModelConfig:
    """gpt-oss-120b."""
    return _gpt_oss(36, 128)


def gpt_oss_20b() -> ModelConfig:
    """gpt-oss-20b."""
    return _gpt_oss(24, 32)
