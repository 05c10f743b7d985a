"""A sparse decoder to a dense one: the inverse of upcycling, and a start for distillation (OneS, Xue et al. 2022).

>>> dense = densify(sparse)                                             # the mean of the experts
>>> dense = densify(sparse, DensifyConfig(method="most_used"), ids)     # the expert that most tokens of the text go to

What was upcycled and not trained on comes back: copies as they were; with ``shards`` also granular and split layers, whose
experts are then put side by side, each made of all copies of its shard.

Legend: B rows, S positions, T tokens, E experts, K of them per token, G shards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.experts.layer import MoE
from moesaic.experts.stacked import StackedExperts
from moesaic.models.config import pick
from moesaic.models.decoder import Decoder
from moesaic.plan.plan import RoutingPlan
from moesaic.upcycle.build import from_tensors, rest_of
from moesaic.upcycle.neurons import Neurons, join, mean, mlp_tensors, of_expert, of_mlp
from moesaic.upcycle.router import sums_of, weight_sums


@dataclass(frozen=True)
class DensifyConfig:
    """What a dense layer is made of.

    Attributes:
        method: "average" of the experts, or the "most_used" one.
        by_load: weigh experts by how many tokens of the text they serve, where the method is "average".
        shards: of which the experts are parts: expert ``c * shards + g`` is part g of copy c, and the parts lie side by side in
            the dense layer. 1: whole networks. As many as experts: none is like another (``split``), all go in.
    """

    method: Literal["average", "most_used"] = "average"
    by_load: bool = False
    shards: int = 1

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise ConfigError(f"shards must be at least 1, not {self.shards}.")

    @property
    def needs_text(self) -> bool:
        """Whether loads on some text are asked for."""
        return self.by_load or self.method == "most_used"


@dataclass(frozen=True, eq=False)
class Usage:
    """What one layer's router did: fp64 (E,) rows each expert served, and the mean sum of a token's weights."""

    load_E: Tensor
    total: float


@torch.no_grad()
def densify(model: Decoder, config: DensifyConfig | None = None, ids_BS: Tensor | None = None) -> Decoder:
    """The dense decoder, in evaluation mode; shared experts lie beside the others in its layers.

    Outputs are multiplied by what the router's weights add up to, on the text if there is one, else on random vectors.

    Args:
        ids_BS: int64 token ids of some text (``config.needs_text``).

    Raises ``ConfigError`` for a dense model, missing text, and layers no dense layer can stand for (zero-computation experts,
    single neurons, sub-tokens, gated shared experts).
    """
    config = DensifyConfig() if config is None else config
    layers = model.moe_layers()
    if not layers:
        raise ConfigError("This model is dense already; there are no experts to put together.")
    if config.needs_text and ids_BS is None:
        raise ConfigError("Which experts are used is seen on text; give some.")
    for layer, sparse in layers.items():
        _check(sparse, layer, config)
    usage = {} if ids_BS is None else usage_on(model, ids_BS)
    tensors = rest_of(model, {f"blocks.{layer}.ffn." for layer in layers})
    hidden = [pick(model.config.hidden, i) for i in range(model.config.num_layers)]
    made: dict[int, Neurons] = {}
    for layer, sparse in layers.items():
        seen = usage.get(layer) or _unseen(sparse, model.config.vocab_size)
        made[layer] = _dense_layer(sparse, config, seen)
        hidden[layer] = made[layer].count
    biases = model.config.mlp_bias or any(neurons.b_in_PH is not None for neurons in made.values())
    for layer, neurons in made.items():
        tensors |= {f"blocks.{layer}.ffn.{name}": t for name, t in mlp_tensors(_with_biases(neurons, biases)).items()}
    if biases and not model.config.mlp_bias:  # dense layers between them get biases of zero
        for i in range(model.config.num_layers):
            if i not in layers:
                ffn = model.blocks[i].ffn
                for part in ("w_in", "w_out"):
                    weight = getattr(ffn, part).weight
                    tensors[f"blocks.{i}.ffn.{part}.bias"] = weight.new_zeros(weight.shape[0])
    widths: int | tuple[int, ...] = hidden[0] if len(set(hidden)) == 1 else tuple(hidden)
    return from_tensors(replace(model.config, moe=None, hidden=widths, mlp_bias=biases), tensors, model)


@torch.no_grad()
def usage_on(model: Decoder, ids_BS: Tensor) -> dict[int, Usage]:
    """Layer -> what its router does on this text, in evaluation; the model's mode is restored.

    Models routed by task get task 0. Of blocks that run on some of the tokens only, these count; a layer that no
    token gets to is left out.
    """
    loads: dict[int, Tensor] = {}
    sums: dict[int, float] = {}
    tokens: dict[int, int] = {}
    was_training = model.training
    try:
        model.eval()
        for row in range(ids_BS.shape[0]):
            ids_1S = ids_BS[row : row + 1].to(model.embedding.weight.device)
            plans = model(ids_1S, task_BS=torch.zeros_like(ids_1S), last_only=True).plans
            for layer, plan in plans.items():
                if not isinstance(plan, RoutingPlan):
                    raise ConfigError(
                        f"Layer {layer} mixes tokens before its experts, so no dense layer can stand for it."
                    )
                loads[layer] = loads.get(layer, 0) + plan.counts_E.double().cpu()
                sums[layer] = sums.get(layer, 0.0) + float(sums_of(plan).sum())
                tokens[layer] = tokens.get(layer, 0) + (
                    plan.num_tokens if plan.valid_T is None else int(plan.valid_T.sum())
                )
    finally:
        model.train(was_training)
    return {layer: Usage(loads[layer], sums[layer] / tokens[layer]) for layer in loads if tokens[layer]}


def _unseen(sparse: MoE, vocab_size: int) -> Usage:
    return Usage(
        torch.ones(sparse.router.num_experts), float(weight_sums(sparse.router, sparse.dim, vocab_size).mean())
    )


def _dense_layer(sparse: MoE, config: DensifyConfig, seen: Usage) -> Neurons:
    """The units of the dense layer that stands for this one."""
    experts, G = sparse.experts, config.shards
    assert isinstance(experts, StackedExperts)
    E, K = experts.num_experts, sparse.router.k
    parts = []
    for g in range(G):
        copies = range(g, E, G)
        load = [float(seen.load_E[e]) for e in copies]
        if config.method == "most_used":
            parts.append(of_expert(experts, copies[load.index(max(load))]))
            continue
        weights = load if config.by_load and sum(load) > 0 else [1.0] * len(copies)
        parts.append(mean((of_expert(experts, e), weight) for e, weight in zip(copies, weights, strict=True)))
    # A token's weights add up to ``total`` over K rows. With whole copies every shard gets its G-th part; with fewer experts
    # than shards each chosen one gets its K-th part, and the others, now always on, as much as if they had been chosen.
    out = _round_one(seen.total / min(K, G))
    neurons = join([part.scaled(out, out * min(K, G) / G) for part in parts])
    if sparse.shared is None:
        return neurons
    return join([neurons, _with_biases(of_mlp(sparse.shared.mlp), neurons.b_in_PH is not None)])


def _round_one(factor: float) -> float:
    """1 where it is 1 up to rounding, so that copies come back bit for bit."""
    return 1.0 if abs(factor - 1) < 1e-6 else factor


def _with_biases(neurons: Neurons, wanted: bool) -> Neurons:
    """The same with biases of zero, where some are wanted and there are none."""
    if not wanted or neurons.b_in_PH is not None:
        return neurons
    P, H, D = neurons.w_in_PHD.shape
    new = neurons.w_out_HD.new_zeros
    return Neurons(neurons.w_in_PHD, neurons.w_out_HD, new(P, H), new(D))


def _check(sparse: MoE, layer: int, config: DensifyConfig) -> None:
    obstacles = {
        "experts shown as layers of their own (merge adapters, or stack_experts, first)": isinstance(
            sparse.experts, nn.ModuleList
        ),
        "zero-computation experts": sparse.num_special > 0,
        "single neurons as experts": not isinstance(sparse.experts, StackedExperts | nn.ModuleList)
        and sparse.num_special == 0,
        "sub-tokens (multi-head)": getattr(sparse, "heads", 1) > 1,
        "a gated shared expert": sparse.shared is not None and sparse.shared.output_gate is not None,
    }
    for what, there in obstacles.items():
        if there:
            raise ConfigError(f"Layer {layer} has {what}, which no dense layer can stand for.")
    if sparse.router.num_experts % config.shards:
        raise ConfigError(
            f"shards={config.shards} does not divide the {sparse.router.num_experts} experts of layer {layer}; choose another."
        )
