"""Parameters counted from the built model (on the meta device nothing is allocated): total, active per token, by part."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from moesaic.experts.layer import MoE
from moesaic.models.decoder import Decoder


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    Attributes:
        total, active: all, and those one token's forward pass uses: k experts of each sparse layer and everything else.
        parts: part -> total.
        active_parts: part -> active.
    """

    total: int
    active: int
    parts: dict[str, int] = field(default_factory=dict)
    active_parts: dict[str, int] = field(default_factory=dict)

    @property
    def embedding(self) -> int:
        """Input embedding and head."""
        return self.parts.get("embedding", 0) + self.parts.get("head", 0)


def count_parameters(model: Decoder) -> ParameterCount:
    """Count ``model`` by part: embedding, head (0 if tied), attention, norm, feed-forward, router, experts, shared experts.

    A token counts as using its router's k experts; zero-computation experts may make the true number smaller. Multi-head layers
    use the same experts for every sub-token, and count them (under "experts") as often: active means FLOPs there.
    Tokens that skip a Mixture-of-Depths block use none of it but its depth router, yet are counted as if they took every block.
    """
    parts = {"embedding": model.embedding.weight.numel(), "head": 0}
    if model.head.weight is not model.embedding.weight:
        parts["head"] = model.head.weight.numel()
    parts["norm"] = _size(model.norm)
    active: dict[str, int] = {}

    def add(part: str, count: int, used: int | None = None) -> None:
        parts[part] = parts.get(part, 0) + count
        active[part] = active.get(part, 0) + (count if used is None else used)

    depth = model.depth_routers()
    for layer, block in enumerate(model.blocks):
        if layer in depth:
            add("depth router", _size(depth[layer]))
        add("norm", _size(block.norm1) + _size(block.norm2))  # type: ignore[arg-type]
        add("attention", _size(block.attention))  # type: ignore[arg-type]
        ffn = block.ffn
        if not isinstance(ffn, MoE):
            add("feed-forward", _size(ffn))  # type: ignore[arg-type]
            continue
        add("router", _size(ffn.router))
        shared = 0 if ffn.shared is None else _size(ffn.shared)
        rest = _size(ffn) - _size(ffn.router) - _size(ffn.experts) - shared
        add("experts", _size(ffn.experts), ffn.active_parameters() - _size(ffn.router) - shared - rest)
        if rest:
            add("head projections", rest)
        if shared:
            add("shared experts", shared)
    for part in ("embedding", "head"):
        active[part] = parts[part]
    active["norm"] += _size(model.norm)
    return ParameterCount(sum(parts.values()), sum(active.values()), parts, active)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
