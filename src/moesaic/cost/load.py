"""How unevenly experts are used, as shares of the rows: a law, or what a run measured.

>>> parse_load("zipf:1.0")(0, 8, 2)                # of layer 0 with 8 experts and 2 rows a token: shares that add up to 1
>>> parse_load("run/trace")                        # every layer's own, from stored plans

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

from moesaic.errors import ConfigError, DataError
from moesaic.plan.read import load as rows_of
from moesaic.plan.store import load_trace

# (layer, E, rows per token) -> share of the rows of every expert.
Load = Callable[[int, int, float], tuple[float, ...]]


def uniform(_layer: int, experts: int, _rows: float) -> tuple[float, ...]:
    """All alike."""
    return (1 / experts,) * experts


def zipf(exponent: float) -> Load:
    """Expert e is wanted in proportion to ``1 / (e + 1)^exponent``; the most wanted ones lie together on the first ranks.

    No token takes an expert twice, so an expert gets one row of every token at most; what is over goes to the others.
    """

    def shares(_layer: int, experts: int, rows: float) -> tuple[float, ...]:
        return capped([(e + 1) ** -exponent for e in range(experts)], rows)

    return shares


def capped(weights: Sequence[float], rows: float) -> tuple[float, ...]:
    """Shares in proportion to ``weights``, none above ``1 / rows``: a token has ``rows`` rows for different experts."""
    limit = max(1 / rows, 1 / len(weights)) if rows > 0 else 1.0
    order = sorted(range(len(weights)), key=lambda e: -weights[e])
    # Of each expert and those after it: exact where differences would leave a rest of rounding.
    rest = list(accumulate(weights[e] for e in reversed(order)))[::-1]
    found, left = [0.0] * len(weights), 1.0
    for place, e in enumerate(order):
        share = weights[e] / rest[place] if rest[place] > 0 else 1 / (len(weights) - place)
        found[e] = min(limit, left * share)
        left -= found[e]
    return tuple(found)


def measured(path: Path) -> Load:
    """What the plans of a stored trace chose, layer by layer: one file, or all of a folder added up.

    Raises ``DataError`` for a folder without plans; asking for a layer or a number of experts it lacks raises ``ConfigError``.
    """
    parts = sorted(path.glob("rank-*")) if path.is_dir() else []
    if parts:
        raise DataError(
            f"{path} holds the traces of {len(parts)} processes, each of its own share of the rows and its own layers; name "
            f"one, for example {parts[0]}."
        )
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"There are no routing plans in {path}; train with trace_every to store some.")
    total: dict[int, list[int]] = {}
    for file in files:
        for layer, plan in load_trace(file)[0].items():
            counts = rows_of(plan).tolist()
            before = total.setdefault(layer, [0] * len(counts))
            if len(before) != len(counts):
                raise DataError(f"{file} has {len(counts)} experts in layer {layer}, files before it {len(before)}.")
            total[layer] = [a + b for a, b in zip(before, counts, strict=True)]

    def shares(layer: int, experts: int, _rows: float) -> tuple[float, ...]:
        if layer not in total or len(total[layer]) < experts:
            raise ConfigError(
                f"The trace {path} has "
                + (f"{len(total[layer])} experts in layer {layer}" if layer in total else f"no layer {layer}")
                + f", and this model {experts}; give a trace of this model."
            )
        counts = total[layer][:experts]  # zero-computation experts come last, and no row travels to them
        return tuple(count / max(1, sum(counts)) for count in counts)

    return shares


def parse_load(text: str) -> Load:
    """A load by its name: "uniform", "zipf:EXPONENT", or the path of a trace. Raises ``ConfigError`` in words."""
    if text == "uniform":
        return uniform
    if text.startswith("zipf"):
        try:
            exponent = float(text.removeprefix("zipf").removeprefix(":") or 1)
        except ValueError:
            exponent = -1.0
        if not 0 <= exponent <= 100:
            raise ConfigError(f'"{text}" is no load: write zipf:EXPONENT, for example zipf:1.0.')
        return zipf(exponent)
    if not Path(text).exists():
        raise ConfigError(f'"{text}" is no load: write uniform, zipf:EXPONENT, or the path of a stored routing trace.')
    return measured(Path(text))
