"""The blocks of a model as shapes: every parameter, and along which dimension a layout cuts it. Built without memory.

Rules of cutting (``parallel/tensor.py``, ``parallel/experts.py``): attention heads, feed-forward and shared widths over tp;
experts over ep and their widths over etp; embeddings, head, norms, routers and the down-projections of latent attention are
whole on every rank of a stage.

>>> blocks_of(preset("deepseek-v3"))[3].experts            # 256

Legend: E experts, D model width, H expert width, V vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from moesaic.cost.count import kind_of, only
from moesaic.experts.layer import MoE
from moesaic.experts.special import WithSpecialExperts
from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder
from moesaic.nn.mlp import MLP
from moesaic.nn.norm import make_norm

Kind = Literal["dense", "experts"]

# (parameter of a block, dimension, axis); what matches none is whole on every rank.
_CUTS: tuple[tuple[str, int, Literal["tp", "etp"]], ...] = (
    (r"attention\.w[qkv]\.(weight|bias)", 0, "tp"),
    (r"attention\.(wq_b|wkv_b)\.weight", 0, "tp"),
    (r"attention\.wo\.weight", 1, "tp"),
    (r"attention\.sinks", 0, "tp"),
    (r"ffn\.(shared\.mlp\.)?w_in\.(weight|bias)", 0, "tp"),
    (r"ffn\.(shared\.mlp\.)?w_out\.weight", 1, "tp"),
    (r"ffn\.experts\.(stacked\.)?w_in", 2, "etp"),
    (r"ffn\.experts\.(stacked\.)?(b_in|w_out)", 1, "etp"),
)
_STACK = re.compile(r"ffn\.experts\.(stacked\.)?[wb]_(in|out)")


@dataclass(frozen=True)
class Part:
    """One parameter.

    Attributes:
        name: within its block.
        shape: of the whole.
        kind: "experts" are stacked along dimension 0 and lie on the grid of experts.
        dim, axis: the dimension that is sliced, and over what; None for none.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind = "dense"
    dim: int | None = None
    axis: Literal["tp", "etp"] | None = None


@dataclass(frozen=True)
class BlockShape:
    """One block.

    Attributes:
        parts: its parameters.
        experts, special: feed-forward and zero-computation experts; 0 in a dense block.
        rows: rows per token that the router aims at, sub-tokens included.
        heads: sub-tokens of a token.
        hidden: width of the dense network or of one expert.
        shared: width of shared experts.
        taken: share of the tokens that the block takes in training.
    """

    parts: tuple[Part, ...]
    experts: int = 0
    special: int = 0
    rows: float = 0.0
    heads: int = 1
    hidden: int = 0
    shared: int = 0
    taken: float = 1.0


def blocks_of(config: ModelConfig) -> tuple[BlockShape, ...]:
    """The blocks in order; equal ones are the same object. Raises ``ConfigError`` for a model that cannot be built."""
    if config.depth is not None:
        model = build_model(config, seed=0, device="meta")
        return tuple(_shape(model, layer, config, layer) for layer in range(config.num_layers))
    first: dict[tuple[int, ...], int] = {}
    for layer in range(config.num_layers):
        first.setdefault(kind_of(config, layer), layer)
    model = build_model(only(config, list(first.values())), seed=0, device="meta")
    shapes = {kind: _shape(model, place, config, layer) for place, (kind, layer) in enumerate(first.items())}
    return tuple(shapes[kind_of(config, layer)] for layer in range(config.num_layers))


def ends_of(config: ModelConfig) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Parameters before the first block and after the last. A tied head is in both: it is one where they are on one rank."""
    made = make_norm(config.norm, config.dim, config.norm_eps)
    norm = tuple(Part(f"norm.{name}", tuple(p.shape)) for name, p in made.named_parameters())
    matrix = (config.vocab_size, config.dim)
    return (Part("embedding.weight", matrix),), (*norm, Part("head.weight", matrix))


def _shape(model: Decoder, place: int, config: ModelConfig, layer: int) -> BlockShape:
    block = model.blocks[place]
    parts = tuple(_part(name, tuple(p.shape), config) for name, p in block.named_parameters())
    taken = config.depth.capacity if config.depth is not None and layer in config.depth_layers else 1.0
    ffn = block.ffn
    if isinstance(ffn, MLP):
        return BlockShape(parts, hidden=ffn.w_out.in_features, taken=taken)
    assert isinstance(ffn, MoE)
    heads: int = getattr(ffn, "heads", 1)
    stack = ffn.experts.stacked if isinstance(ffn.experts, WithSpecialExperts) else ffn.experts
    return BlockShape(
        parts,
        experts=stack.num_experts,
        special=ffn.num_special,
        rows=ffn.router.rows_per_token * heads,
        heads=heads,
        hidden=stack.hidden,
        shared=0 if ffn.shared is None else ffn.shared.mlp.w_out.in_features,
        taken=taken,
    )


def _part(name: str, shape: tuple[int, ...], config: ModelConfig) -> Part:
    kind: Kind = "experts" if _STACK.fullmatch(name) else "dense"
    if config.qk_norm == "projection" and re.fullmatch(r"attention\.[qk]_norm\.weight", name):
        return Part(name, shape, kind, 0, "tp")
    for pattern, dim, axis in _CUTS:
        if re.fullmatch(pattern, name) and dim < len(shape):
            return Part(name, shape, kind, dim, axis)
    return Part(name, shape, kind)
