"""Ready-made training configurations, each a function that returns one."""

from __future__ import annotations

from moesaic.models.config import ModelConfig, MoEConfig, RouterConfig
from moesaic.train.config import STDLIB, DataConfig, TrainConfig
from moesaic.train.optim import OptimConfig


def quickstart(steps: int = 300) -> TrainConfig:
    """E=16, k=2 on the text of this Python installation: a few minutes on two cores."""
    return TrainConfig(
        model=ModelConfig(
            vocab_size=4096,
            dim=192,
            num_layers=4,
            num_heads=4,
            max_seq_len=256,
            qk_norm=True,
            hidden=512,
            moe=MoEConfig(
                num_experts=16,
                k=2,
                hidden=256,
                router=RouterConfig("topk"),
                losses={"switch": 1e-2, "z": 1e-3},
            ),
        ),
        data=DataConfig(sources=(STDLIB,), vocab_size=4096, stdlib_bytes=8_000_000),
        optim=OptimConfig(lr=3e-3, schedule="wsd", decay_fraction=0.3),
        steps=steps,
        batch_size=16,
        seq_len=128,
        eval_every=25,
        eval_rows=64,
        checkpoint_every=100,
        dtype="bf16",
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
            qk_norm=True,
            hidden=768,
            moe=MoEConfig(num_experts=16, k=2, hidden=320),
        ),
        data=DataConfig(vocab_size=8192),
        optim=OptimConfig(lr=2e-3),
        steps=steps,
    )


RECIPES = {"quickstart": quickstart, "small": small}
