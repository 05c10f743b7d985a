"""How a dense model becomes a sparse one, as frozen data, and the shape that comes out of it.

>>> UpcycleConfig(method="granular", experts=16, k=2, shards=2)      # 8 copies of 2 halves, one whole copy per token
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from moesaic.errors import ConfigError
from moesaic.models.config import ModelConfig, MoEConfig, RouterConfig, pick
from moesaic.routing import Router

Method = Literal["copy", "noise", "granular", "drop", "split", "btx"]
PRESERVING: tuple[Method, ...] = ("copy", "granular")
"""Methods whose model computes at first what the dense one does, wherever the router's weights add up to a constant."""

_DEFAULT_NOISE = 0.05


@dataclass(frozen=True)
class UpcycleConfig:
    """A way to make experts of dense feed-forward layers.

    Attributes:
        method: "copy" (Komatsuzaki et al. 2022); "noise": copies with noise; "granular": each copy cut into ``shards`` (He et
            al. 2024); "drop": copies with a part of the hidden units drawn anew (Nakamura et al. 2025); "split": the units
            dealt out to the experts (Zhang et al. 2021; LLaMA-MoE 2024); "btx": one expert from each of several models
            (Sukhbaatar et al. 2024).
        experts, k: experts per sparse layer (None: 8; of "btx" as many as models) and how many of them a token uses.
        every, dense_first, layers: which layers become sparse, as in ``MoEConfig``.
        router: of the sparse layers; the default renormalises the weights of the chosen experts (order B).
        router_std: of the gate's weights at the start. None keeps the router's own (0.02) where its weights add up to a
            constant; where they do not (order A: Switch, OLMoE) it is ``2e-7 / sqrt(dim)``, so that every weight starts at
            1/E up to rounding and yet tokens differ in what they choose.
        router_init: "random"; "activations": rows that predict from the input how much each expert's units are excited
            ("split", needs text); "prompts": rows along the mean input of each model's text ("btx", needs text).
        scale_in: where the factor goes that makes up for weights not adding up to 1: into the output matrices of the
            "experts", or into the option ``scale`` of the "router".
        noise: standard deviation of noise on every matrix of every expert, in units of that matrix's own; None is 0.05 for
            "noise" and 0 for the others.
        shards: parts that "granular" cuts a feed-forward layer into; ``k / shards`` whole copies serve a token.
        drop: share of an expert's hidden units that "drop" draws anew.
        split_by: how "split" deals out units: in "order", at "random", by balanced k-means over their "weights" or over the
            tokens that excite them ("activations": co-activation, needs text).
        shared: hidden units of "split" that go to a shared expert, always on: those excited most often, or without text the
            first.
        split_scale: what the weights of the chosen experts of a "split" layer add up to. None is k, as if the chosen units
            were still in the dense layer and the others were off; LLaMA-MoE takes ``experts / k``.
        losses: of the sparse model; None takes what its router advises.
        seed: of routers, noise and choices.
    """

    method: Method = "copy"
    experts: int | None = None
    k: int = 2
    every: int = 1
    dense_first: int = 0
    layers: tuple[int, ...] | None = None
    router: RouterConfig = field(default_factory=RouterConfig)
    router_std: float | None = None
    router_init: Literal["random", "activations", "prompts"] = "random"
    scale_in: Literal["experts", "router"] = "experts"
    noise: float | None = None
    shards: int = 2
    drop: float = 0.5
    split_by: Literal["order", "random", "weights", "activations"] = "random"
    shared: int = 0
    split_scale: float | None = None
    losses: dict[str, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        E = self.num_experts
        if E is not None and E < 1:
            raise ConfigError(f"experts must be at least 1, not {E}.")
        if self.k < 1 or (E is not None and self.k > E):
            raise ConfigError(f"k={self.k} experts per token are impossible with {E} experts; choose 1 to {E}.")
        if self.shards < 1:
            raise ConfigError(f"shards must be at least 1, not {self.shards}.")
        if self.shared < 0:
            raise ConfigError(f"shared must be at least 0, not {self.shared}.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be from 0 to 2**63 - 1, not {self.seed}.")
        if self.method == "granular":
            self._check_shards(E or 0)
        if not 0 <= self.drop <= 1:
            raise ConfigError(f"drop is a share of the hidden units, from 0 to 1, not {self.drop}.")
        if self.noise is not None and not 0 <= self.noise < math.inf:
            raise ConfigError(f"noise must be a number of at least 0, not {self.noise}.")
        if self.noise and self.method == "copy":
            raise ConfigError(f'method="copy" adds no noise; with noise={self.noise} the method is "noise".')
        if self.router_std is not None and not 0 <= self.router_std < math.inf:
            raise ConfigError(f"router_std must be a number of at least 0, not {self.router_std}.")
        if self.split_scale is not None and not 0 < self.split_scale < math.inf:
            raise ConfigError(f"split_scale must be a number above 0, not {self.split_scale}.")
        only = {"activations": "split", "prompts": "btx"}.get(self.router_init)
        if only not in (None, self.method):
            raise ConfigError(f'router_init="{self.router_init}" belongs to method="{only}", not to "{self.method}".')
        if self.shared and self.method != "split":
            raise ConfigError(f'shared={self.shared} hidden units need method="split", not "{self.method}".')

    def _check_shards(self, E: int) -> None:
        for name, value in (("experts", E), ("k", self.k)):
            if value % self.shards:
                raise ConfigError(
                    f"{name}={value} is not a multiple of shards={self.shards}: a token must get whole copies of the layer, "
                    "and every copy is as many experts as shards."
                )

    @property
    def num_experts(self) -> int | None:
        """E; None where the number of models will say."""
        return 8 if self.experts is None and self.method != "btx" else self.experts

    @property
    def noise_std(self) -> float:
        """Relative standard deviation of the noise in effect."""
        return self.noise if self.noise is not None else _DEFAULT_NOISE if self.method == "noise" else 0.0

    @property
    def needs_text(self) -> bool:
        """Whether the method has to see what the model reads."""
        return self.router_init != "random" or (self.method == "split" and self.split_by == "activations")

    @property
    def multiple(self) -> float:
        """What experts' outputs are multiplied with, once the router's weights are taken to add up to 1."""
        if self.method == "granular":
            return float(self.shards)
        if self.method == "split":
            return float(self.k if self.split_scale is None else self.split_scale)
        return 1.0

    def expert_hidden(self, hidden: int, layer: int) -> int:
        """Width of an expert made from a layer of ``hidden`` units. Raises ``ConfigError`` where that does not divide."""
        if self.method == "granular":
            if hidden % self.shards:
                raise ConfigError(
                    f"Layer {layer} has {hidden} hidden units, which shards={self.shards} does not divide; choose another."
                )
            return hidden // self.shards
        if self.method == "split":
            E = self.num_experts or 1
            if hidden <= self.shared or (hidden - self.shared) % E:
                raise ConfigError(
                    f"Layer {layer} has {hidden} hidden units; {hidden} - {self.shared} shared ones cannot be dealt out to {E} "
                    "experts equally; choose another number of experts or of shared units."
                )
            return (hidden - self.shared) // E
        return hidden


def sparse_config(dense: ModelConfig, config: UpcycleConfig, router: Router, E: int) -> ModelConfig:
    """The shape of the sparse model: ``dense`` with experts in the chosen layers, dropless.

    ``router`` is one as its layers will have it, which knows its losses. Raises ``ConfigError`` for what cannot be.
    """
    moe = MoEConfig(
        num_experts=E,
        k=config.k,
        dense_first=config.dense_first,
        every=config.every,
        layers=config.layers,
        router=config.router,
        shared=1 if config.shared else 0,
        shared_hidden=config.shared or None,
        expert_bias=dense.mlp_bias,
        losses=dict(router.facts.losses) if config.losses is None else config.losses,
    )
    layers = replace(dense, moe=moe).moe_layers  # checks the choice of layers
    widths = tuple(config.expert_hidden(pick(dense.hidden, layer), layer) for layer in layers)
    return replace(dense, moe=replace(moe, hidden=widths[0] if len(set(widths)) == 1 else widths))


def check_dense(dense: ModelConfig, config: UpcycleConfig) -> None:
    """Raises ``ConfigError`` for a model that cannot be upcycled this way."""
    if dense.moe is not None:
        raise ConfigError(
            f"This model is sparse already (layers {', '.join(map(str, dense.moe_layers))}); upcycle a dense one, or make it "
            "dense first with moesaic densify."
        )
    if config.shared and dense.mlp_bias:
        raise ConfigError("Shared experts have no biases, and this model's feed-forward layers do; set shared=0.")
