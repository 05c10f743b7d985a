"""Ready-made training configurations, each a function that returns one."""

from __future__ import annotations

from typing import Literal

from moesaic.cost.machine import bf16_is_fast
from moesaic.data.config import STDLIB, DataConfig
from moesaic.models.config import ModelConfig, MoEConfig
from moesaic.train.config import TrainConfig
from moesaic.train.optim import OptimConfig


def quickstart(steps: int = 360) -> TrainConfig:
    """E=16, k=2 on the text of this Python installation: a few minutes on two cores.

    Small and narrow on purpose: a wider model sees too few tokens in that time for sparsity to matter (docs/log.md).
    """
    return TrainConfig(
        model=ModelConfig(
            vocab_size=2048,
            dim=128,
            num_layers=4,
            num_heads=4,
            max_seq_len=256,
            qk_norm="head",
            hidden=384,
            moe=MoEConfig(num_experts=16, k=2, hidden=192),
        ),
        data=DataConfig(sources=(STDLIB,), vocab_size=2048, stdlib_bytes=8_000_000),
        optim=OptimConfig(lr=3e-3, schedule="wsd", decay_fraction=0.3),
        steps=steps,
        batch_size=8,
        seq_len=256,
        eval_every=25,
        eval_rows=64,
        checkpoint_every=100,
        dtype=_dtype(),
    )


def small(steps: int = 1000) -> TrainConfig:
    """The default of ``moesaic train``: 26M parameters, 8M active, contexts of 256 tokens."""
    return TrainConfig(
        model=ModelConfig(
            vocab_size=8192,
            dim=256,
            num_layers=6,
            num_heads=4,
            max_seq_len=512,
            qk_norm="head",
            hidden=768,
            moe=MoEConfig(num_experts=16, k=2, hidden=320),
        ),
        data=DataConfig(vocab_size=8192),
        optim=OptimConfig(lr=2e-3),
        steps=steps,
        dtype=_dtype(),
    )


def compare(steps: int = 300) -> TrainConfig:
    """The base of ``moesaic compare``: E=16, k=2, about a minute per run and core.

    fp32, because a comparison should not measure how routers bear rounding, and kernels are not compiled for each new load.
    """
    return TrainConfig(
        model=ModelConfig(
            vocab_size=1024,
            dim=96,
            num_layers=4,
            num_heads=4,
            max_seq_len=128,
            qk_norm="head",
            hidden=256,
            moe=MoEConfig(num_experts=16, k=2, hidden=128),
        ),
        data=DataConfig(sources=(STDLIB,), vocab_size=1024, stdlib_bytes=8_000_000),
        optim=OptimConfig(lr=3e-3, schedule="wsd", decay_fraction=0.3),
        steps=steps,
        batch_size=16,
        seq_len=128,
        # Short runs too get curves, two checkpoints to compare, and a window in which experts may turn out dead.
        eval_every=max(1, min(25, steps // 8)),
        eval_rows=64,
        checkpoint_every=max(1, min(100, steps // 2)),
        keep_last=2,
        dead_window=max(1, min(50, steps // 4)),
        sample_tokens=0,
        tensorboard=False,
        dtype="fp32",
    )


def _dtype() -> Literal["fp32", "bf16"]:
    """bf16 activations where the machine multiplies them natively. The run's config.json records which it was."""
    return "bf16" if bf16_is_fast() else "fp32"


RECIPES = {"quickstart": quickstart, "small": small, "compare": compare}
