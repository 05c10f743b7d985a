"""Branch-Train-MiX (Sukhbaatar et al. 2024): several fine-tunes of one dense model become the experts of one sparse model.

>>> sparse = assemble([seed, code, law], UpcycleConfig(method="btx", k=2))

In the chosen layers expert e is model e's feed-forward layer; every other tensor is the mean over the models. The router is
new: random, to be learned, or pointing along the mean inputs of each model's own text. Models that are all the same give their
own function back; not so with prompts and a router whose weights do not add up to a constant (order A), as its gate then starts
too large for them to be equal.

Legend: E experts and models, B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moesaic.checkpoint.native import config_differences
from moesaic.config import to_dict
from moesaic.errors import ConfigError
from moesaic.models.decoder import Decoder
from moesaic.nn.mlp import MLP
from moesaic.upcycle.build import from_tensors
from moesaic.upcycle.config import UpcycleConfig, check_dense, sparse_config
from moesaic.upcycle.neurons import of_mlp, stack
from moesaic.upcycle.observe import ffn_inputs
from moesaic.upcycle.router import make_router, point_at, rows_from_means, settle_weights
from moesaic.upcycle.upcycle import seed_of, with_noise, with_scale


@torch.no_grad()
def assemble(models: Sequence[Decoder], config: UpcycleConfig, prompts: Sequence[Tensor] = ()) -> Decoder:
    """The sparse decoder made of these dense ones, in evaluation mode; what is no tensor comes from the first.

    Args:
        prompts: for ``router_init="prompts"``, int64 (B, S) token ids of each model's own text, in the order of the models.

    Raises ``ConfigError`` for fewer than two models, different architectures or dtypes, other numbers of experts or texts.
    """
    E = len(models)
    if config.method != "btx":
        raise ConfigError(
            f'method="{config.method}" upcycles one model, and {E} were given; use method="btx" for several.'
        )
    if E < 2:
        raise ConfigError(f'method="btx" needs at least two models, not {E}; to upcycle one, use method="copy".')
    if config.experts not in (None, E):
        raise ConfigError(f"{E} models make {E} experts, not experts={config.experts}; leave experts out.")
    config = replace(config, experts=E)  # which checks k
    _check_alike(models, config)
    if config.needs_text and len(prompts) != E:
        raise ConfigError(
            f'router_init="prompts" needs one text per model: {E} models and {len(prompts)} texts were given.'
        )
    first = models[0]
    dtype = first.embedding.weight.dtype
    config, total = with_scale(first.config, config, E)
    shape = sparse_config(
        first.config, config, make_router(first.config, config.router, E, config.k, config.seed, dtype), E
    )
    states = [model.state_dict() for model in models]
    mean = {name: _mean([state[name] for state in states]) for name in states[0]}
    seen: list[dict[int, Tensor]] = []
    if config.needs_text:
        dense = from_tensors(first.config, mean, first)
        seen = [ffn_inputs(dense, ids_BS, shape.moe_layers) for ids_BS in prompts]
    prefixes = tuple(f"blocks.{layer}.ffn." for layer in shape.moe_layers)
    tensors = {name: tensor for name, tensor in mean.items() if not name.startswith(prefixes)}
    for layer, prefix in zip(shape.moe_layers, prefixes, strict=True):
        router = make_router(first.config, config.router, E, config.k, seed_of(config.seed, layer, 0), dtype)
        settle_weights(router, first.config, config.router_std)
        if seen:
            inputs = [of_one[layer].cpu() for of_one in seen]
            point_at(router, rows_from_means(inputs), torch.cat(inputs))
        generator = torch.Generator(first.embedding.weight.device).manual_seed(seed_of(config.seed, layer, 1))
        layers = [model.blocks[layer].ffn for model in models]
        experts = (
            with_noise(of_mlp(ffn).scaled(1 / total, 1 / total), config.noise_std, generator)
            for ffn in layers
            if isinstance(ffn, MLP)
        )
        tensors |= {f"{prefix}experts.{name}": value for name, value in stack(experts, E).items()}
        device = first.embedding.weight.device
        tensors |= {f"{prefix}router.{name}": value for name, value in router.to(device).state_dict().items()}
    return from_tensors(shape, tensors, first)


def _check_alike(models: Sequence[Decoder], config: UpcycleConfig) -> None:
    first = models[0]
    check_dense(first.config, config)
    for number, model in enumerate(models[1:], start=2):
        differences = config_differences(to_dict(model.config), to_dict(first.config))
        if differences:
            raise ConfigError(
                f"Model {number} is of another architecture than the first: "
                + "; ".join(differences[:3]).replace(" there", "").replace(" here", " in the first")
                + ". Fine-tunes of one model are needed."
            )
        if model.embedding.weight.dtype != first.embedding.weight.dtype:
            raise ConfigError(
                f"Model {number} holds {model.embedding.weight.dtype} and the first {first.embedding.weight.dtype}; load both "
                "in one dtype."
            )
        ours, theirs = (getattr(m.tokenizer, "to_str", lambda: None)() for m in (first, model))
        if ours is not None and theirs is not None and ours != theirs:
            raise ConfigError(
                f"Model {number} has another tokenizer than the first, so their embeddings cannot be averaged."
            )


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean, summed in fp64, in the tensors' dtype; what is equal in all comes back bit for bit."""
    first = tensors[0].detach().double()
    apart = torch.zeros_like(first)  # the sum of distances from the first: exactly 0 where all are equal
    for other in tensors[1:]:
        apart += other.detach() - first
    return (first + apart / len(tensors)).to(tensors[0].dtype, copy=True)
