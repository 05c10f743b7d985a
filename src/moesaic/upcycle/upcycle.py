"""A dense decoder to a sparse one that starts out as the same function, or near it.

>>> sparse = upcycle(dense, UpcycleConfig(experts=8, k=2))
>>> print(difference(dense, sparse, ids))

| method | experts of a layer | step 0 |
|---|---|---|
| copy | E copies of the layer | the same function |
| noise | copies, each with its own noise | near |
| granular | E / G copies, each cut into G shards; output weights times G | the same function |
| drop | copies, a share of each one's units drawn anew | another |
| split | the units dealt out, H / E each | another |

Output weights are divided by what the router's weights add up to (``router.py``), output biases shared out so that they are
added once. No tensor of the result is shared with the dense model, which is left as it was.

Legend: B rows, S positions, T tokens, D model width, H hidden units, E experts, G shards.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder
from moesaic.nn.mlp import MLP
from moesaic.routing import Router
from moesaic.routing.options import options_of
from moesaic.upcycle.build import from_tensors, rest_of
from moesaic.upcycle.cluster import groups_of
from moesaic.upcycle.config import UpcycleConfig, check_dense, sparse_config
from moesaic.upcycle.neurons import Neurons, mlp_tensors, of_mlp, stack
from moesaic.upcycle.observe import activations, ffn_inputs
from moesaic.upcycle.router import make_router, point_at, rows_from_targets, settle_weights, tie_shards


@torch.no_grad()
def upcycle(dense: Decoder, config: UpcycleConfig, ids_BS: Tensor | None = None) -> Decoder:
    """The sparse decoder, in evaluation mode, on the device and in the dtype of ``dense``; routers in fp32 at least.

    Args:
        ids_BS: int64 token ids of some text, for methods that look at activations (``config.needs_text``).

    Raises ``ConfigError`` for what cannot be: a model that is sparse already, k above E, units that do not divide, a router
    that mixes tokens or cannot learn, missing text, "btx" (see ``assemble``).
    """
    E = config.num_experts
    if config.method == "btx" or E is None:
        raise ConfigError(
            'method="btx" makes experts of several models; use assemble, or name them all on the command line.'
        )
    check_dense(dense.config, config)
    if config.needs_text and ids_BS is None:
        raise ConfigError(
            'split_by="activations" and router_init="activations" look at what the model does on text; give some.'
        )
    config, total = with_scale(dense.config, config, E)
    dtype = dense.embedding.weight.dtype
    probe = make_router(dense.config, config.router, E, config.k, config.seed, dtype)
    shape = sparse_config(dense.config, config, probe, E)
    seen = ffn_inputs(dense, ids_BS, shape.moe_layers) if config.needs_text and ids_BS is not None else {}
    tensors = rest_of(dense, {f"blocks.{layer}.ffn." for layer in shape.moe_layers})
    for layer in shape.moe_layers:
        router = make_router(dense.config, config.router, E, config.k, seed_of(config.seed, layer, 0), dtype)
        settle_weights(router, dense.config, config.router_std)
        if config.method == "granular":
            tie_shards(router, config.shards)
        ffn = dense.blocks[layer].ffn
        assert isinstance(ffn, MLP)
        made = _layer(of_mlp(ffn), shape, config, layer, E, total, router, seen.get(layer))
        made |= {
            f"router.{name}": value for name, value in router.to(dense.embedding.weight.device).state_dict().items()
        }
        tensors |= {f"blocks.{layer}.ffn.{name}": value for name, value in made.items()}
    return from_tensors(shape, tensors, dense)


def with_scale(dense: ModelConfig, config: UpcycleConfig, E: int) -> tuple[UpcycleConfig, float]:
    """The config, its router scaled if so wished, and what that router's weights add up to at the start."""

    def total_of(config: UpcycleConfig) -> float:
        router = make_router(dense, config.router, E, config.k, config.seed, torch.float64)
        return settle_weights(router, dense, config.router_std)

    total = total_of(config)
    if config.scale_in == "experts":
        return config, total
    router = make_router(dense, config.router, E, config.k, config.seed, torch.float32)
    if "scale" not in options_of(type(router)):
        raise ConfigError(f'Router "{config.router.name}" has no option scale; set scale_in="experts".')
    scale = float(config.router.options.get("scale", 1.0)) * config.multiple / total
    scaled = replace(config, router=replace(config.router, options={**config.router.options, "scale": scale}))
    return scaled, total_of(scaled)


def _layer(
    ffn: Neurons,
    shape: ModelConfig,
    config: UpcycleConfig,
    layer: int,
    E: int,
    total: float,
    router: Router,
    x_TD: Tensor | None,
) -> dict[str, Tensor]:
    """The parameters of one sparse layer, by their names in it, the router's aside (whose gate may be set)."""
    generator = torch.Generator(ffn.w_out_HD.device).manual_seed(seed_of(config.seed, layer, 1))
    made: dict[str, Tensor] = {}
    if config.method == "split":
        hidden_TH = None if x_TD is None else activations(ffn, x_TD, shape.activation).cpu()
        shared_S, unit_EH = groups_of(ffn, config.split_by, E, config.shared, hidden_TH, seed_of(config.seed, layer, 1))
        device = ffn.w_out_HD.device
        experts = (ffn.pick(unit_H.to(device)) for unit_H in unit_EH)
        if config.shared:
            made = {f"shared.mlp.{name}": t for name, t in mlp_tensors(ffn.pick(shared_S.to(device))).items()}
        if config.router_init == "activations":
            assert x_TD is not None and hidden_TH is not None
            # How much of the output comes from each expert's units, in size.
            size_TH = hidden_TH.abs() * ffn.w_out_HD.float().norm(dim=1).cpu()
            target_TE = torch.stack([size_TH[:, unit_H].sum(dim=1) for unit_H in unit_EH], dim=1)
            x_TD = x_TD.cpu()
            point_at(router, rows_from_targets(x_TD, target_TE).to(x_TD.dtype), x_TD)
    elif config.method == "granular":
        each = ffn.count // config.shards
        parts = [
            ffn.pick(torch.arange(s * each, (s + 1) * each, device=ffn.w_out_HD.device)) for s in range(config.shards)
        ]
        experts = (parts[e % config.shards] for e in range(E))
    elif config.method == "drop":
        experts = (drawn_anew(ffn, config.drop, generator) for _ in range(E))
    else:
        experts = (ffn for _ in range(E))
    # Factors of 1 change no bit, so copies are the very numbers of the dense layer.
    scaled = (neurons.scaled(config.multiple / total, 1 / total) for neurons in experts)
    noisy = (with_noise(neurons, config.noise_std, generator) for neurons in scaled)
    return made | {f"experts.{name}": value for name, value in stack(noisy, E).items()}


def with_noise(neurons: Neurons, relative: float, generator: torch.Generator) -> Neurons:
    """Every weight matrix plus normal noise of ``relative`` times the matrix's own standard deviation; biases stay."""
    if not relative:
        return neurons
    *w_in_P, w_out_HD = (_noisy(w, relative, generator) for w in (*neurons.w_in_PHD, neurons.w_out_HD))
    return replace(neurons, w_in_PHD=torch.stack(w_in_P), w_out_HD=w_out_HD)


def _noisy(weight: Tensor, relative: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=_wide(weight))
    return (weight.to(noise.dtype) + noise * (relative * weight.to(noise.dtype).std())).to(weight.dtype)


def drawn_anew(neurons: Neurons, share: float, generator: torch.Generator) -> Neurons:
    """The same with ``floor(share * H)`` units, chosen at random, drawn from normal distributions: of each matrix the mean and
    standard deviation of its weights at those very units (Nakamura et al. 2025). Input biases likewise; the output bias stays.
    """
    H, device = neurons.count, neurons.w_out_HD.device
    unit_S = torch.randperm(H, generator=generator, device=device)[: int(share * H)]
    if not len(unit_S):
        return neurons

    def draw(values: Tensor) -> Tensor:
        wide = values.to(_wide(values))
        normal = torch.randn(values.shape, generator=generator, device=device, dtype=wide.dtype)
        return (wide.mean() + normal * wide.std(correction=0)).to(values.dtype)

    w_in_PHD, w_out_HD = neurons.w_in_PHD.clone(), neurons.w_out_HD.clone()
    b_in_PH = None if neurons.b_in_PH is None else neurons.b_in_PH.clone()
    for p in range(w_in_PHD.shape[0]):
        w_in_PHD[p, unit_S] = draw(w_in_PHD[p, unit_S])
        if b_in_PH is not None:
            b_in_PH[p, unit_S] = draw(b_in_PH[p, unit_S])
    w_out_HD[unit_S] = draw(w_out_HD[unit_S])
    return Neurons(w_in_PHD, w_out_HD, b_in_PH, neurons.b_out_D)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def seed_of(seed: int, layer: int, what: int) -> int:
    """A seed of its own for each layer and purpose."""
    return (seed * 1_000_003 + layer * 101 + what) % 2**63
