"""From tensors by name to a decoder, without initialising what is replaced anyway."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder


def from_tensors(config: ModelConfig, tensors: Mapping[str, Tensor], like: Decoder) -> Decoder:
    """The decoder of this config with these parameters and buffers, in evaluation mode; it takes them over, uncopied.

    Tokenizer, the files that came with the model and compute dtype are those of ``like``. What a converter noted of its source
    is not: the result is no longer of that family.
    Raises ``ConfigError`` for a setting that adds parameters nobody gave a value.
    """
    model = build_model(config, seed=0, device="meta")
    wanted = model.state_dict(keep_vars=True)
    tied: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        tied.setdefault(id(tensor), []).append(name)
    state: dict[str, Tensor] = {}
    for names in tied.values():
        given = next((tensors[name] for name in names if name in tensors), None)
        if given is None:
            raise ConfigError(
                f"The sparse model has {names[0]}, which no dense model has; leave out the setting that adds it."
            )
        if given.shape != wanted[names[0]].shape:
            raise RuntimeError(f"{names[0]} is {list(given.shape)}, and {list(wanted[names[0]].shape)} in the model")
        # One object under every tied name: separate Parameters over one memory would get separate gradients.
        made = nn.Parameter(given) if isinstance(wanted[names[0]], nn.Parameter) else given
        state.update(dict.fromkeys(names, made))
    surplus = tensors.keys() - wanted.keys()
    if surplus:
        raise RuntimeError(f"{sorted(surplus)} have no place in the model")
    model.load_state_dict(state, strict=True, assign=True)
    model.compute_dtype, model.tokenizer, model.companions = like.compute_dtype, like.tokenizer, dict(like.companions)
    return model.eval()


def rest_of(model: Decoder, replaced: set[str]) -> dict[str, Tensor]:
    """Copies of all tensors whose names begin with none of ``replaced``."""
    return {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(prefix) for prefix in replaced)
    }


def device_of(model: Decoder) -> torch.device:
    """Where the model lies."""
    return model.embedding.weight.device
