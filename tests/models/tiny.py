"""Tiny configurations and readers shared by the tests of models and training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig, MoEConfig, RouterConfig
from moesaic.models.decoder import Decoder
from moesaic.plan.plan import RoutingPlan

VOCAB = 64


def tiny(moe: MoEConfig | None = None, **changes: Any) -> ModelConfig:
    """A two-layer model of width 16."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden": 24,
        "max_seq_len": 64,
    }
    return ModelConfig(**(values | changes), moe=moe)


def sparse(router: str | RouterConfig = "topk", options: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """The same with four experts in both layers; keyword arguments of ``MoEConfig`` may follow."""
    k = 1 if router == "switch" else 2
    choice = router if isinstance(router, RouterConfig) else RouterConfig(router, options or {})
    moe = {"num_experts": 4, "k": k, "hidden": 12, "losses": {}, "router": choice}
    return tiny(MoEConfig(**(moe | changes)))


def lively(config: ModelConfig, seed: int = 1) -> Decoder:
    """A model with loud weights in evaluation mode: every token of the context counts, and routing is far from uniform."""
    model = build_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.normal_(std=0.3, generator=generator)
            elif name.startswith("embedding"):
                parameter.mul_(10)
            elif name.startswith("blocks"):
                parameter.mul_(1.5)
    return model.eval()


def some_ids(rows: int, length: int, seed: int = 3) -> Tensor:
    """int64 (rows, length) ids of the tiny vocabulary."""
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def experts_of(plan: Any, rows: int, length: int) -> Tensor:
    """int64 (rows, length, K): where each position was sent."""
    assert isinstance(plan, RoutingPlan)
    return plan.expert_TK.view(rows, length, -1)
