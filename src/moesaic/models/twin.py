"""The dense twin: the model a sparse one must beat, with the same active parameters per token.

>>> twin = dense_twin(cfg)
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moesaic.experts.layer import MoE
from moesaic.models.build import build_ffn
from moesaic.models.config import ModelConfig, pick


def dense_twin(config: ModelConfig) -> ModelConfig:
    """The config in which every sparse layer is a dense one of equal active parameters, to within half a hidden unit.

    What a token uses of a sparse layer (the router whatever its kind, k feed-forward experts at most, shared experts) is
    counted on the built layer, so that no router's extra matrices are forgotten.
    """
    if config.moe is None:
        return config
    per_unit = config.dim * (3 if config.gated else 2)
    hidden = []
    for layer in range(config.num_layers):
        if layer not in config.moe_layers:
            hidden.append(pick(config.hidden, layer))
            continue
        with torch.device("meta"):
            sparse = build_ffn(config, layer)
        assert isinstance(sparse, MoE)
        hidden.append(max(1, round(sparse.active_parameters() / per_unit)))
    return replace(config, moe=None, hidden=tuple(hidden))
