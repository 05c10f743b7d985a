"""From a config to a model: the only place that turns names into modules, and all initialisation.

| part | initialisation |
|---|---|
| embedding | N(0, 0.02) |
| attention and feed-forward inputs | truncated normal, variance ``init_scale / fan_in`` |
| attention and feed-forward outputs | the same, divided by 2 * num_layers |
| experts | the same per expert, each from its own seed |
| routers | their own (usually N(0, 0.02)) |
| norms | gain 1, bias 0 |
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from moesaic.errors import ConfigError, LintWarning, nearest
from moesaic.experts.layer import MoE
from moesaic.experts.multi_head import MultiHeadMoE
from moesaic.models.block import Block
from moesaic.models.config import DepthConfig, ModelConfig, MoEConfig, RouterConfig, pick
from moesaic.models.decoder import Decoder
from moesaic.models.depth import DepthBlock
from moesaic.models.lint import by_severity, lint_layer
from moesaic.nn.attention import Attention
from moesaic.nn.latent import LatentAttention
from moesaic.nn.linear import Linear, init_fan_in_
from moesaic.nn.mlp import MLP
from moesaic.nn.norm import make_norm
from moesaic.routing import ROUTERS, check_losses, router_options
from moesaic.routing.balance import evidence_needed, prototype_memory
from moesaic.routing.depth import DEPTH_ROUTERS, DepthRouter
from moesaic.routing.options import check_options, options_of


def build_model(config: ModelConfig, seed: int | None = None, device: torch.device | str = "cpu") -> Decoder:
    """Build and initialise a decoder.

    Args:
        seed: seeds the initialisation without touching the caller's random state; None uses that state.
        device: "meta" builds shapes only.

    Raises ``ConfigError`` for what cannot be: unknown router or option, a gate that cannot learn, a loss without effect. Warns
    (``LintWarning``) of what will likely disappoint, see ``models/lint.py``.
    """
    if seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_model(config, None, device)
    with torch.device(device):
        blocks = [build_block(config, layer) for layer in range(config.num_layers)]
        norm = make_norm(config.norm, config.dim, config.norm_eps)
        head = Linear(config.dim, config.vocab_size, bias=False)
        model = Decoder(config, nn.Embedding(config.vocab_size, config.dim), blocks, norm, head)
        # One matrix drawn once: a tied head takes over the embedding's.
        ends = [model.embedding] if config.tie_embeddings else [model.embedding, model.head]
        for piece in (*ends, *blocks):
            initialise(piece, config)
    if model.embedding.weight.device.type != "meta":  # a model to be used, not a shape to be counted
        warn(model)
    return model


def warn(model: Decoder) -> None:
    """Pass on what runs and will likely disappoint (``LintWarning``)."""
    moe, sparse = model.config.moe, model.moe_layers()
    found = []
    for i, layer in enumerate(sparse.values()):
        assert moe is not None
        found += lint_layer(moe, layer, pick(moe.num_experts, i))
    for finding in by_severity(found):
        if finding.severity == "warning":
            warnings.warn(f"{finding.where}: {finding.what} {finding.instead}".strip(), LintWarning, stacklevel=3)


def build_block(config: ModelConfig, layer: int, slots: Sequence[int] | None = None) -> Block:
    """One block, not initialised. Arguments and errors as of ``build_ffn``."""
    attention = _attention(config, layer)
    norms = [make_norm(config.norm, config.dim, config.norm_eps) for _ in range(2)]
    rest = (build_ffn(config, layer, slots), norms[0], norms[1], config.norm_placement)
    if config.depth is None or layer not in config.depth_layers:
        return Block(attention, *rest)
    assert isinstance(attention, Attention)
    return DepthBlock(attention, *rest, build_depth_router(config.dim, config.depth))


def _attention(config: ModelConfig, layer: int) -> Attention | LatentAttention:
    if (latent := config.latent) is not None:
        scale = 1.0 if config.rope_scaling is None else config.rope_scaling.score_scale
        return LatentAttention(
            config.dim,
            config.num_heads,
            kv_rank=latent.kv_rank,
            q_rank=latent.q_rank,
            nope_dim=latent.nope_dim,
            rope_dim=latent.rope_dim,
            value_dim=latent.value_dim,
            layer=layer,
            bias=config.attention_bias == "all",
            score_scale=scale,
        )
    return Attention(
        config.dim,
        config.num_heads,
        config.kv_heads,
        config.heads_dim,
        layer=layer,
        window=config.window(layer),
        qk_norm=config.qk_norm,
        bias=config.attention_bias,
        clip=config.clip_qkv,
        sinks=config.attention_sinks,
        eps=config.norm_eps,
    )


def build_depth_router(dim: int, depth: DepthConfig) -> DepthRouter:
    """The router of Mixture-of-Depths blocks. Raises ``ConfigError`` for what cannot be, or leaks without leave."""
    if depth.router not in DEPTH_ROUTERS:
        raise ConfigError(
            f'There is no depth router "{depth.router}".{nearest(depth.router, DEPTH_ROUTERS)} '
            f"Known: {', '.join(DEPTH_ROUTERS)}."
        )
    cls = DEPTH_ROUTERS[depth.router]
    check_options(f'Depth router "{depth.router}"', depth.options, options_of(cls, hidden=("capacity",)))
    router = cls(dim, capacity=depth.capacity, **depth.options)
    if not router.facts.causal and not depth.allow_leak:
        raise ConfigError(
            f'Depth router "{depth.router}" looks at later tokens in training, so a decoder trained with it cheats and cannot '
            "generate the same way (a predictor stands in); leave model.depth null, or set model.depth.allow_leak=true if you "
            "want that."
        )
    return router


def build_ffn(config: ModelConfig, layer: int, slots: Sequence[int] | None = None) -> MLP | MoE:
    """The feed-forward layer of one block, not initialised.

    Args:
        slots: of a sparse layer, the experts whose weights are made (``MoE``); None makes all.

    Raises ``ConfigError`` for what a decoder must not hold.
    """
    moe = config.moe
    if moe is None or layer not in config.moe_layers:
        return MLP(config.dim, pick(config.hidden, layer), config.activation, config.gated, config.mlp_bias)
    i = config.moe_layers.index(layer)
    kind = MoE if moe.heads == 1 else partial(MultiHeadMoE, heads=moe.heads)
    sparse = kind(
        config.dim,
        pick(moe.hidden, i),
        pick(moe.num_experts, i),
        pick(moe.k, i),
        moe.router.name,
        _router_options(config, moe.router),
        shared=moe.shared,
        shared_gate=moe.shared_gate,
        shared_hidden=moe.shared_hidden,
        expert_bias=moe.expert_bias,
        zero=moe.zero,
        copy=moe.copy,
        constant=moe.constant,
        activation=config.activation,
        gated=config.gated,
        capacity=moe.capacity,
        backend=moe.backend,
        expert_kind=moe.expert_kind,
        rules=moe.rules,
        expert_dropout=moe.expert_dropout,
        expert_masking=moe.expert_masking,
        gating_dropout=moe.gating_dropout,
        gating_groups=moe.gating_groups,
        slots=slots,
    )
    check_losses(moe.losses, sparse.router, moe.loss_options, has_rules=moe.rules is not None and moe.rules.hard)
    sparse.evidence = evidence_needed(moe.losses, moe.loss_options)
    width = config.dim // moe.heads
    sparse.memory = prototype_memory(moe.losses, moe.loss_options, width, sparse.router.num_experts)
    if not moe.router.allow_leak:
        _refuse_leaks(moe, sparse)
    return sparse


def _router_options(config: ModelConfig, router: RouterConfig) -> dict[str, Any]:
    """The router's options, and the vocabulary size for those that have a table over it."""
    if router.name not in ROUTERS or "vocab_size" not in router_options(router.name):
        return router.options
    if router.options.get("vocab_size", config.vocab_size) != config.vocab_size:
        raise ConfigError(
            f"model.moe.router.options.vocab_size={router.options['vocab_size']} is not the model's vocab_size="
            f"{config.vocab_size}; leave it out."
        )
    return {**router.options, "vocab_size": config.vocab_size}


def _refuse_leaks(moe: MoEConfig, sparse: MoE) -> None:
    """A decoder whose routing looks at later tokens or other sequences must ask for it by name."""
    instead = "or set model.moe.router.allow_leak=true if you want that."
    facts = sparse.router.facts
    if not facts.causal:
        raise ConfigError(
            f'Router "{moe.router.name}" looks at later tokens, so a decoder trained with it cheats and cannot generate the '
            f"same way; choose a causal router, {instead}"
        )
    if not facts.batch_invariant:
        raise ConfigError(
            f'Router "{moe.router.name}" looks at the other sequences of a batch, so a text is not read the same in other '
            f"company; choose a batch-invariant router, {instead}"
        )
    if moe.capacity is not None and moe.capacity.eval_factor is not None:
        raise ConfigError(
            f"model.moe.capacity.eval_factor={moe.capacity.eval_factor} drops tokens in evaluation because of later tokens and "
            f"other sequences, so losses flatter and texts depend on their company; leave it null (dropless), {instead}"
        )


def initialise(piece: nn.Module, config: ModelConfig) -> None:
    """Draw the weights of an embedding, a head that has its own, or a block. Those of a model are drawn in this order."""
    if isinstance(piece, nn.Embedding):
        nn.init.normal_(piece.weight, std=0.02)
    elif isinstance(piece, Linear):
        init_fan_in_(piece.weight, config.dim, config.init_scale)
    elif isinstance(piece, Block):
        for part in (piece.attention, piece.ffn):
            part.reset_parameters(config.init_scale, 1 / (2 * config.num_layers))  # type: ignore[operator]
    else:
        raise TypeError(f"{type(piece).__name__} is no piece of a model that is drawn")
