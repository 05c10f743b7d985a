"""The shape of a model as frozen data: sizes and names only, JSON in and out, impossible combinations refused in words.

>>> cfg = ModelConfig(vocab_size=4096, dim=256, num_layers=6, moe=MoEConfig(num_experts=16, k=2, hidden=256))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from moesaic.errors import ConfigError
from moesaic.experts.neurons import ExpertKind
from moesaic.nn.mlp import Activation
from moesaic.nn.norm import NormKind
from moesaic.nn.rope import RopeScaling
from moesaic.ops.grouped import Backend
from moesaic.plan.capacity import CapacityRule
from moesaic.routing.balance import Scope
from moesaic.routing.rules import RuleSet

_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class RouterConfig:
    """Which router, and its options.

    Attributes:
        name: a key of ``routing.ROUTERS``.
        options: keyword arguments of that router.
        allow_leak: build it in a causal decoder although it looks at later tokens or other sequences.
    """

    name: str = "topk"
    options: dict[str, Any] = field(default_factory=dict)
    allow_leak: bool = False


@dataclass(frozen=True)
class MoEConfig:
    """Sparse layers. ``num_experts``, ``k`` and ``hidden`` are one number for all MoE layers, or a list with one each.

    Attributes:
        num_experts: feed-forward experts per layer.
        k: experts per token.
        hidden: width of one expert.
        dense_first: this many first layers stay dense (DeepSeek: 1 or 3).
        every: of the layers after those, every n-th is sparse (the n-th first; 1 = all).
        layers: the sparse layers by index, in order, where no such rule says it; overrides the two above.
        router: the router and its options.
        shared, shared_gate: shared experts of the same width; optionally scaled by a sigmoid per token.
        shared_hidden: width of the shared network where it is no multiple of ``hidden``; None is ``shared * hidden``.
        expert_bias: biases in both products of every expert (gpt-oss).
        zero, copy, constant: zero-computation experts.
        heads: sub-tokens each token is cut into, each routed by itself (multi-head MoE); 1 routes whole tokens.
        capacity: drop rule; None is dropless.
        losses: coefficients of balancing losses by name, see ``routing.LOSSES``.
        loss_options: loss -> its options, for example ``{"v2_device": {"devices": 8}}``.
        loss_scope: over what the Switch loss counts load.
        backend: of the grouped products.
        expert_kind: "ffn", or "neuron": single neurons for layers of very many experts; ``hidden`` must be 1, and ``gated``
            does not apply to them.
        rules: which tokens may use which experts, in every sparse layer (``routing/rules.py``).
        expert_dropout: dropout on the hidden units of experts, in training (Switch fine-tuning: 0.4).
        expert_masking: probability of an expert to be out for a whole batch, in training.
        gating_dropout, gating_groups: probability of a batch to keep to local experts, in training, and the number of groups.
    """

    num_experts: int | tuple[int, ...] = 16
    k: int | tuple[int, ...] = 2
    hidden: int | tuple[int, ...] = 512
    dense_first: int = 0
    every: int = 1
    layers: tuple[int, ...] | None = None
    router: RouterConfig = field(default_factory=RouterConfig)
    shared: int = 0
    shared_gate: bool = False
    shared_hidden: int | None = None
    expert_bias: bool = False
    zero: int = 0
    copy: int = 0
    constant: int = 0
    heads: int = 1
    capacity: CapacityRule | None = None
    losses: dict[str, float] = field(default_factory=lambda: {"switch": 1e-2, "z": 1e-3})
    loss_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    loss_scope: Scope = "micro_batch"
    backend: Backend = "auto"
    expert_kind: ExpertKind = "ffn"
    rules: RuleSet | None = None
    expert_dropout: float = 0.0
    expert_masking: float = 0.0
    gating_dropout: float = 0.0
    gating_groups: int = 1


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2): keys and values are made from one short vector per token, which is all the
    cache holds.

    Attributes:
        kv_rank: width of that vector.
        q_rank: width of the queries' own bottleneck; None projects them directly.
        nope_dim, rope_dim: parts of a head's query and key without and with rotary positions.
        value_dim: width of a head's value.
    """

    kv_rank: int
    q_rank: int | None = None
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128


@dataclass(frozen=True)
class DepthConfig:
    """Mixture-of-Depths blocks, which compute only some tokens (``routing/depth.py``).

    Attributes:
        capacity: share of a sequence's tokens a block takes in training (the paper's is 0.125).
        every, first: of the blocks from ``first`` on, every n-th is one (the n-th first; 1 = all). The paper's is every other.
        router: a key of ``routing.depth.DEPTH_ROUTERS``.
        options: further keyword arguments of that router.
        allow_leak: build it in a causal decoder although training chooses tokens against later ones.
    """

    capacity: float = 0.125
    every: int = 2
    first: int = 0
    router: str = "mixture_of_depths"
    options: dict[str, Any] = field(default_factory=dict)
    allow_leak: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer, dense (``moe=None``) or sparse.

    Attributes:
        vocab_size, dim, num_layers: V, D, number of blocks.
        num_heads, num_kv_heads, head_dim: attention heads, key/value heads (None: as many), head width (None: dim / heads).
        hidden: width of dense feed-forward layers; a list gives one per block (entries of sparse blocks unused).
        activation, gated: of all feed-forward networks, experts included.
        norm, norm_eps, norm_placement: "pre" (default of every production MoE) or "post".
        rope_theta, max_seq_len: rotary base and longest context.
        rope_scaling: how positions beyond those of pre-training are turned, or None.
        qk_norm: RMSNorm on queries and keys, per "head" (Qwen3) or over the whole "projection" (OLMoE).
        attention_bias: biases in the "qkv" projections (Qwen2) or in "all" four.
        mlp_bias: biases in dense feed-forward layers.
        clip_qkv: queries, keys and values are clamped to plus and minus this; None leaves them.
        attention_sinks: one trained logit per head that takes part in the softmax and has no value (gpt-oss).
        latent: multi-head latent attention instead of grouped queries, or None; ``num_kv_heads`` and ``head_dim`` stay None.
        sliding_window: tokens a query may look back, itself included; None or 0 is full; a list gives one per block.
        tie_embeddings: one matrix for embedding and head.
        init_scale: variance scale of the fan-in initialisation (Switch Transformer: 0.1).
        moe: sparse layers, or None.
        depth: Mixture-of-Depths blocks, or None.
    """

    vocab_size: int
    dim: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | tuple[int, ...] = 1024
    activation: Activation = "silu"
    gated: bool = True
    norm: NormKind = "rmsnorm"
    norm_eps: float = 1e-6
    norm_placement: Literal["pre", "post"] = "pre"
    rope_theta: float = 10000.0
    max_seq_len: int = 1024
    rope_scaling: RopeScaling | None = None
    qk_norm: Literal["none", "head", "projection"] = "none"
    attention_bias: Literal["none", "qkv", "all"] = "none"
    mlp_bias: bool = False
    clip_qkv: float | None = None
    attention_sinks: bool = False
    latent: LatentConfig | None = None
    sliding_window: int | tuple[int, ...] | None = None
    tie_embeddings: bool = True
    init_scale: float = 1.0
    moe: MoEConfig | None = None
    depth: DepthConfig | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "max_seq_len"):
            _at_least(f"model.{name}", getattr(self, name), 1)
        if self.num_layers > _MOST_LAYERS:  # checked before anything enumerates layers: a hostile file may say 10**12
            raise ConfigError(f"model.num_layers={self.num_layers} is more than the {_MOST_LAYERS} this code allows.")
        if self.latent is not None:
            _check_latent(self, self.latent)
        elif self.head_dim is None and self.dim % self.num_heads:
            raise ConfigError(
                f"model.dim={self.dim} is not a multiple of model.num_heads={self.num_heads}; change one or set model.head_dim."
            )
        if self.rope_dim % 2:
            raise ConfigError(f"The head width must be even for rotary positions, not {self.rope_dim}.")
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ConfigError(f"model.num_kv_heads={self.kv_heads} must divide model.num_heads={self.num_heads}.")
        if not self.norm_eps > 0 or not self.init_scale > 0 or not self.rope_theta > 0:
            raise ConfigError("model.norm_eps, model.init_scale and model.rope_theta must be above 0.")
        if self.clip_qkv is not None and not self.clip_qkv > 0:
            raise ConfigError(f"model.clip_qkv must be above 0, not {self.clip_qkv}; null does not clip.")
        if self.activation == "clamped_swiglu" and not self.gated:
            raise ConfigError('model.activation="clamped_swiglu" is a gate; set model.gated=true.')
        _per_layer("model.hidden", self.hidden, self.num_layers, 1)
        if self.sliding_window is not None:
            _per_layer("model.sliding_window", self.sliding_window, self.num_layers, 0)
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.rope_dim, self.rope_theta)
        if self.moe is not None:
            _check_moe(self, self.moe)
        if self.depth is not None:
            _check_depth(self, self.depth)

    @property
    def heads_dim(self) -> int:
        """Width of one head; with latent attention, of its query and key."""
        if self.latent is not None:
            return self.latent.nope_dim + self.latent.rope_dim
        return self.head_dim or self.dim // self.num_heads

    @property
    def rope_dim(self) -> int:
        """Width of what rotary positions turn in a head."""
        return self.heads_dim if self.latent is None else self.latent.rope_dim

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the sparse blocks."""
        if self.moe is None:
            return ()
        if self.moe.layers is not None:
            return self.moe.layers
        first, every = self.moe.dense_first, self.moe.every
        return tuple(i for i in range(first, self.num_layers) if (i - first + 1) % every == 0)

    @property
    def depth_layers(self) -> tuple[int, ...]:
        """Indices of the Mixture-of-Depths blocks."""
        if self.depth is None:
            return ()
        first, every = self.depth.first, self.depth.every
        return tuple(i for i in range(first, self.num_layers) if (i - first + 1) % every == 0)

    def window(self, layer: int) -> int | None:
        """Sliding window of a block; None is full attention."""
        if self.sliding_window is None:
            return None
        return pick(self.sliding_window, layer) or None


def pick(value: int | tuple[int, ...], index: int) -> int:
    """The entry of a per-layer setting."""
    return value if isinstance(value, int) else value[index]


def _check_latent(config: ModelConfig, latent: LatentConfig) -> None:
    for name in ("kv_rank", "nope_dim", "rope_dim", "value_dim"):
        _at_least(f"model.latent.{name}", getattr(latent, name), 1)
    _at_least("model.latent.q_rank", 1 if latent.q_rank is None else latent.q_rank, 1)
    if config.num_kv_heads is not None or config.head_dim is not None:
        raise ConfigError(
            "model.latent has head widths of its own and no key/value heads; leave num_kv_heads and head_dim null."
        )
    for name, off in (("qk_norm", "none"), ("attention_sinks", False), ("sliding_window", None), ("clip_qkv", None)):
        if getattr(config, name) != off:
            raise ConfigError(f"model.{name}={getattr(config, name)!r} does not go with model.latent; leave it out.")
    if config.depth is not None:
        raise ConfigError("model.depth does not go with model.latent; leave one of them null.")
    if config.attention_bias == "qkv":
        raise ConfigError('model.attention_bias must be "none" or "all" with model.latent.')


def _check_moe(config: ModelConfig, moe: MoEConfig) -> None:
    _at_least("model.moe.every", moe.every, 1)
    if moe.layers is not None and (
        sorted(set(moe.layers)) != list(moe.layers) or not all(0 <= i < config.num_layers for i in moe.layers)
    ):
        raise ConfigError(
            f"model.moe.layers must list blocks 0 to {config.num_layers - 1} in order, each once, not {list(moe.layers)}."
        )
    for name in ("dense_first", "shared", "zero", "copy", "constant"):
        _at_least(f"model.moe.{name}", getattr(moe, name), 0)
    _at_least("model.moe.heads", moe.heads, 1)
    if config.dim % moe.heads:
        raise ConfigError(
            f"model.moe.heads={moe.heads} must divide model.dim={config.dim}, so that every sub-token is equally wide."
        )
    sparse = len(config.moe_layers)
    if not sparse:
        raise ConfigError(
            f"No layer is sparse: {config.num_layers} layers with moe.dense_first={moe.dense_first} and moe.every={moe.every}; "
            "lower one of them, or leave moe out for a dense model."
        )
    for name in ("num_experts", "k", "hidden"):
        _per_layer(f"model.moe.{name}", getattr(moe, name), sparse, 1, "sparse layer")
    special = moe.zero + moe.copy + moe.constant
    for i in range(sparse):
        k, experts = pick(moe.k, i), pick(moe.num_experts, i) + special
        if k > experts:
            raise ConfigError(
                f"model.moe.k={k} is more than the {experts} experts of a layer; choose k between 1 and {experts}."
            )
        if moe.expert_kind == "neuron" and pick(moe.hidden, i) != 1:
            raise ConfigError(
                f'model.moe.expert_kind="neuron" has experts of one hidden unit, so model.moe.hidden must be 1, not '
                f"{pick(moe.hidden, i)}."
            )
    if moe.shared_hidden is not None:
        _at_least("model.moe.shared_hidden", moe.shared_hidden, 1)
        if not moe.shared:
            raise ConfigError("model.moe.shared_hidden needs a shared expert; set model.moe.shared=1.")
    if moe.expert_bias and moe.expert_kind == "neuron":
        raise ConfigError('model.moe.expert_bias does not go with expert_kind="neuron".')
    if moe.shared_gate and not moe.shared:
        raise ConfigError("model.moe.shared_gate needs at least one shared expert; set model.moe.shared=1.")
    for name, coefficient in moe.losses.items():
        if not coefficient >= 0:
            raise ConfigError(f"model.moe.losses.{name} must be at least 0, not {coefficient}.")


def _check_depth(config: ModelConfig, depth: DepthConfig) -> None:
    _at_least("model.depth.every", depth.every, 1)
    _at_least("model.depth.first", depth.first, 0)
    if not 0 < depth.capacity <= 1:
        raise ConfigError(
            f"model.depth.capacity must be above 0 and at most 1, not {depth.capacity}; the paper's is 0.125."
        )
    if not config.depth_layers:
        raise ConfigError(
            f"No block is a Mixture-of-Depths one: {config.num_layers} layers with depth.first={depth.first} and "
            f"depth.every={depth.every}; lower one of them, or leave depth out."
        )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}.")


def _per_layer(name: str, value: int | tuple[int, ...], layers: int, least: int, what: str = "layer") -> None:
    if isinstance(value, int):
        _at_least(name, value, least)
        return
    if len(value) != layers:
        raise ConfigError(f"{name} lists {len(value)} values for {layers} {what}s; give one number or one per {what}.")
    for entry in value:
        _at_least(name, entry, least)
