"""Dense models to upcycle: the tiny one of ``tests.models.tiny`` in many shapes, with biases that count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.models.config import DepthConfig, LatentConfig, ModelConfig, RouterConfig
from moesaic.models.decoder import Decoder
from tests.models.tiny import lively, some_ids, tiny

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"mlp_bias": True},
    "ungated": {"gated": False, "activation": "gelu", "mlp_bias": True},
    "clamped": {"activation": "clamped_swiglu", "mlp_bias": True, "tie_embeddings": False},
    "widths": {"hidden": (24, 48)},
    "latent": {"num_kv_heads": None, "latent": LatentConfig(kv_rank=8, nope_dim=4, rope_dim=4, value_dim=4)},
    "post": {"norm_placement": "post", "norm": "layernorm", "sliding_window": (3, 0)},
    "depth": {"depth": DepthConfig(capacity=0.5, every=2, allow_leak=True)},
}
ORDER_A = RouterConfig("topk", {"normalize": "none"})


def dense(shape: str = "plain", dtype: torch.dtype = torch.float32, seed: int = 1, **changes: Any) -> Decoder:
    """A lively dense model of one of the shapes."""
    config: ModelConfig = tiny(None, **(SHAPES[shape] | changes))
    model = lively(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_(std=0.3, generator=generator)
    return model.to(dtype)


def ids() -> Tensor:
    """int64 (3, 40) random tokens."""
    return some_ids(3, 40)
