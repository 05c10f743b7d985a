"""Published architectures that are no decoder of ours yet, counted by their formulas (fieldguide 3.0): nothing is built.

>>> counted("switch-c").counts.total                          # 1571 billion

Parts are named as in ``count_parameters``, so that every convention and size works on them too. Sizes: the papers, by the
fieldguide's table 3.1. Legend: D model width, A heads times their width, F width of feed-forward networks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moesaic.cost.count import ParameterCount
from moesaic.errors import ConfigError, nearest


@dataclass(frozen=True)
class Counted:
    """An architecture that is counted and not built.

    Attributes:
        counts: by part.
        layers, sparse_layers, experts, k, dim: what its table says.
        missing: what a decoder of ours lacks for it.
        left_out: what the count leaves out, or "".
    """

    counts: ParameterCount
    layers: int
    sparse_layers: int
    experts: int
    k: int
    dim: int
    missing: str
    left_out: str = ""


def _totals(parts: dict[str, int], experts: int, k: int) -> ParameterCount:
    active = {part: number // experts * k if part == "experts" else number for part, number in parts.items()}
    return ParameterCount(sum(parts.values()), sum(active.values()), parts, active)


def _t5(
    each: int,
    sparse: int,
    dim: int,
    heads_dim: int,
    hidden: int,
    experts: int,
    k: int,
    *,
    matrices: int = 3,
    head: bool = False,
    vocab: int = 32128,
) -> Counted:
    """``each`` encoder and as many decoder layers, ``sparse`` of all; decoder layers attend twice; ``matrices`` 3 if gated."""
    network = matrices * dim * hidden
    parts = {
        "embedding": vocab * dim,
        "head": vocab * dim if head else 0,
        "norm": (2 + 3) * each * dim + 2 * dim,
        "attention": (1 + 2) * each * 4 * dim * heads_dim,
        "feed-forward": (2 * each - sparse) * network,
        "router": sparse * dim * experts,
        "experts": sparse * experts * network,
    }
    return Counted(_totals(parts, experts, k), 2 * each, sparse, experts, k, dim, "an encoder and cross attention")


def _vision(
    layers: int, sparse: int, dim: int, hidden: int, k: int, classes: int, patch: int, text: int = 0
) -> Counted:
    """A vision Transformer of 224 x 224 pixels, 32 ungated experts, biases; ``text``: a vocabulary beside the patches."""
    network = 2 * dim * hidden + hidden + dim
    parts = {
        "embedding": text * dim,
        "head": classes * dim,
        "norm": layers * 4 * dim + 2 * dim,
        "attention": layers * (4 * dim * dim + 4 * dim),
        "feed-forward": (layers - sparse) * network,
        "router": sparse * dim * 32,
        "experts": sparse * 32 * network,
        "patches": 3 * patch * patch * dim + dim + ((224 // patch) ** 2 + 1) * dim,
    }
    return Counted(_totals(parts, 32, k), layers, sparse, 32, k, dim, "images as input")


def _gshard() -> Counted:
    experts = 18 * 2048 * 2 * 1024 * 8192
    return Counted(
        _totals({"experts": experts}, 2048, 2),
        36,
        18,
        2048,
        2,
        1024,
        "an encoder and cross attention",
        "everything but the experts",
    )


def _glam() -> Counted:
    dim, heads_dim, hidden, experts = 8192, 128 * 128, 32768, 64
    parts = {
        "embedding": 256_000 * dim,
        "head": 0,  # tied
        "norm": 64 * 2 * dim + dim,
        "attention": 64 * 4 * dim * heads_dim,
        "feed-forward": 32 * 3 * dim * hidden,
        "router": 32 * dim * experts,
        "experts": 32 * experts * 2 * dim * hidden,
    }
    return Counted(_totals(parts, experts, 2), 64, 32, experts, 2, dim, "ungated experts beside gated dense layers")


def _jamba() -> Counted:
    dim, inner, rank, state, hidden = 4096, 8192, 256, 16, 14336
    mamba = 2 * dim * inner + 4 * inner + inner * (rank + 2 * state) + rank * inner + inner * state + 2 * inner
    mamba += inner * dim
    network = 3 * dim * hidden
    parts = {
        "embedding": 65536 * dim,
        "head": 65536 * dim,
        "norm": 32 * 2 * dim + dim,
        "attention": 4 * (2 * dim * 32 * 128 + 2 * dim * 8 * 128),
        "mamba": 28 * mamba,
        "feed-forward": 16 * network,
        "router": 16 * dim * 16,
        "experts": 16 * 16 * network,
    }
    return Counted(_totals(parts, 16, 2), 32, 16, 16, 2, dim, "Mamba layers")


COUNTED: dict[str, Callable[[], Counted]] = {
    "switch-base-128": lambda: _t5(12, 12, 768, 12 * 64, 2048, 128, 1),
    "switch-base-64": lambda: _t5(12, 12, 768, 12 * 64, 2048, 64, 1),
    "switch-large": lambda: _t5(24, 24, 1024, 16 * 64, 2816, 128, 1),
    "switch-xxl": lambda: _t5(24, 24, 4096, 64 * 64, 10240, 128, 1),
    "switch-c": lambda: _t5(15, 30, 2080, 32 * 64, 6144, 2048, 1, matrices=2),
    "gshard-600b": _gshard,
    "glam-64b-64e": _glam,
    "st-moe-32b": lambda: _t5(27, 12, 5120, 64 * 128, 20480, 64, 2, head=True),
    "st-moe-l": lambda: _t5(27, 12, 1024, 16 * 64, 2816, 32, 2, head=True),
    "jamba-v0.1": _jamba,
    "v-moe-b-16": lambda: _vision(12, 6, 768, 3072, 2, 18291, 16),
    "v-moe-l-16": lambda: _vision(24, 12, 1024, 4096, 2, 18291, 16),
    "v-moe-15b": lambda: _vision(48, 24, 1408, 6400, 2, 18291, 14),
    "limoe-h-14": lambda: _vision(32, 12, 1280, 5120, 1, 0, 14, text=32000),
}


def counted(name: str) -> Counted:
    """An architecture that is only counted. Raises ``ConfigError`` naming the nearest."""
    if name not in COUNTED:
        raise ConfigError(f'Nothing is counted as "{name}".{nearest(name, COUNTED)} Known: {", ".join(COUNTED)}.')
    return COUNTED[name]()
