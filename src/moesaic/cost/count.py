"""Parameters counted from the built model (on the meta device nothing is allocated): total, active per token, by part."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from moesaic.experts.layer import MoE
from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig, pick
from moesaic.models.decoder import Decoder

# Which of the two embedding matrices a published number counts: both, the output's alone (the head), or neither.
Embeddings = Literal["both", "out", "none"]


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

    def counting(self, embeddings: Embeddings) -> ParameterCount:
        """The same, without what a convention leaves out.

        "both" is everything; "out" leaves out the input embedding, unless it is the head as well (tied); "none" both.
        """
        if embeddings == "both":
            return self
        tied = not self.parts.get("head", 0)
        left_out = {"embedding", "head"} if embeddings == "none" else set() if tied else {"embedding"}
        parts = {part: 0 if part in left_out else number for part, number in self.parts.items()}
        active = {part: 0 if part in left_out else number for part, number in self.active_parts.items()}
        return ParameterCount(sum(parts.values()), sum(active.values()), parts, active)


def count_parameters(model: Decoder) -> ParameterCount:
    """Count ``model`` by part: embedding, head (0 if tied), attention, norm, feed-forward, router, experts, shared experts.

    A token counts as using its router's k experts; zero-computation experts may make the true number smaller. Multi-head layers
    use the same experts for every sub-token, and count them (under "experts") as often: active means FLOPs there.
    Tokens that skip a Mixture-of-Depths block use none of it but its depth router, yet are counted as if they took every block.
    """
    return _count(model, Counter(range(len(model.blocks))))


def count_config(config: ModelConfig) -> ParameterCount:
    """``count_parameters`` of the model of ``config``, of whose blocks only one of each kind is built."""
    if config.depth is not None:
        return count_parameters(build_model(config, seed=0, device="meta"))
    kinds = Counter(kind_of(config, layer) for layer in range(config.num_layers))
    first = {kind: next(i for i in range(config.num_layers) if kind_of(config, i) == kind) for kind in kinds}
    model = build_model(only(config, list(first.values())), seed=0, device="meta")
    return _count(model, Counter({place: kinds[kind] for place, kind in enumerate(first)}))


def kind_of(config: ModelConfig, layer: int) -> tuple[int, ...]:
    """Equal for two blocks with as many parameters in every part."""
    moe = config.moe
    if moe is None or layer not in config.moe_layers:
        return (pick(config.hidden, layer),)
    i = config.moe_layers.index(layer)
    return pick(moe.num_experts, i), pick(moe.k, i), pick(moe.hidden, i)


def only(config: ModelConfig, layers: list[int]) -> ModelConfig:
    """A model of these blocks alone, without Mixture-of-Depths."""
    moe, sparse = config.moe, config.moe_layers
    if moe is not None:
        rows = [sparse.index(layer) for layer in layers if layer in sparse]
        alone = replace(
            moe,
            layers=tuple(place for place, layer in enumerate(layers) if layer in sparse),
            num_experts=tuple(pick(moe.num_experts, i) for i in rows),
            k=tuple(pick(moe.k, i) for i in rows),
            hidden=tuple(pick(moe.hidden, i) for i in rows),
        )
        moe = alone if rows else None
    hidden = tuple(pick(config.hidden, layer) for layer in layers)
    return replace(config, num_layers=len(layers), hidden=hidden, sliding_window=None, moe=moe, depth=None)


def stored_elements(model: Decoder) -> int:
    """Numbers a checkpoint of ``model`` holds: every parameter once, tied ones too, and buffers that are saved."""
    return sum(tensor.numel() for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values())


def _count(model: Decoder, times: Counter[int]) -> ParameterCount:
    """Block ``layer`` counts ``times[layer]`` times."""
    parts = {"embedding": model.embedding.weight.numel(), "head": 0}
    if model.head.weight is not model.embedding.weight:
        parts["head"] = model.head.weight.numel()
    parts["norm"] = _size(model.norm)
    active = dict(parts)
    depth = model.depth_routers()
    for layer, block in enumerate(model.blocks):

        def add(part: str, count: int, used: int | None = None, often: int = times[layer]) -> None:
            parts[part] = parts.get(part, 0) + often * count
            active[part] = active.get(part, 0) + often * (count if used is None else used)

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
    return ParameterCount(sum(parts.values()), sum(active.values()), parts, active)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
