"""What papers and model cards say of the size of models, as they print it, and how our counts compare (fieldguide 3.1, 9.21).

>>> found = compare("deepseek-v3", counts)                     # [Comparison("total", "671B", 671.03e9, ...), ...]

Published numbers are rounded, some cut off. A count agrees if it is within 1%, or gives the printed digits when rounded or cut.
What does neither is listed with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal

from moesaic.cost.count import Embeddings, ParameterCount

_UNITS = {"M": 10**6, "B": 10**9, "T": 10**12}
NEAR = 0.01


@dataclass(frozen=True)
class Published:
    """Published sizes of one model.

    Attributes:
        total, active: as printed ("46.7B"); None if nothing is.
        embeddings: which embedding matrices the active number counts.
        why: where a count of ours differs by more than 1%, the reason, by "total" and "active".
    """

    total: str
    active: str | None = None
    embeddings: Embeddings = "both"
    why: tuple[tuple[str, str], ...] = ()


_CUT = "the published number is cut off, not rounded"
PUBLISHED: dict[str, Published] = {
    "switch-base-128": Published("7B", "0.2B", why=(("total", "published with one digit"),)),
    "switch-base-64": Published("3.8B"),
    "switch-large": Published("26B", why=(("total", "published is rounded low: 4% under any count"),)),
    "switch-xxl": Published("395B"),
    "switch-c": Published("1571B"),
    "gshard-600b": Published("600B", why=(("total", "the experts alone are 3% over the published, rounded number"),)),
    "glam-64b-64e": Published("1.2T", "96.6B", why=(("total", "3% under the published number of two digits"),)),
    "st-moe-32b": Published("269B"),
    "st-moe-l": Published("4.1B"),
    "mixtral-8x7b": Published("46.7B", "12.9B"),
    "mixtral-8x22b": Published("141B", "39B"),
    "dbrx": Published("132B", "36B"),
    "deepseek-moe-16b": Published("16.4B", "2.8B"),
    "deepseek-v2": Published("236B", "21B", "out"),
    "deepseek-v2-lite": Published("15.7B", "2.4B", "out", (("active", _CUT),)),
    "deepseek-v3": Published("671B", "37B", "out"),
    "qwen1.5-moe-a2.7b": Published("14.3B", "2.7B"),
    "qwen2-57b-a14b": Published("57.4B", "14B"),
    "qwen3-30b-a3b": Published("30.5B", "3.3B", why=(("active", _CUT),)),
    "qwen3-235b-a22b": Published("235B", "22B"),
    "olmoe-1b-7b": Published("6.9B", "1.3B"),
    "gpt-oss-120b": Published("116.83B", "5.13B", "out"),
    "gpt-oss-20b": Published("20.91B", "3.61B", "out"),
    "jamba-v0.1": Published("52B", "12B"),
    "v-moe-b-16": Published("979M"),
    "v-moe-l-16": Published("3.4B"),
    "v-moe-15b": Published("14.7B"),
    "limoe-h-14": Published("5.6B", "675M"),
    "llama-3-8b": Published("8B"),
    "llama-3.1-8b": Published("8B"),
    "mistral-7b": Published("7.3B"),
    "qwen3-0.6b": Published("0.6B"),
    "qwen3-8b": Published("8.2B"),
}


@dataclass(frozen=True)
class Comparison:
    """A published number and ours.

    Attributes:
        what: "total" or "active".
        published: as printed.
        value: the number that is.
        counted: ours, under the convention of the published one.
        embeddings: that convention.
        difference: ours over theirs, minus 1.
        agrees: within 1%, or the printed digits.
        why: the reason of a difference above 1%, if one is known.
    """

    what: str
    published: str
    value: float
    counted: int
    embeddings: Embeddings
    difference: float
    agrees: bool
    why: str


def compare(name: str, counts: ParameterCount) -> list[Comparison]:
    """Published sizes of ``name`` beside ``counts``; empty where nothing is published."""
    if name not in PUBLISHED:
        return []
    said = PUBLISHED[name]
    rows: list[tuple[str, str, int, Embeddings]] = [("total", said.total, counts.total, "both")]
    if said.active is not None:
        rows.append(("active", said.active, counts.counting(said.embeddings).active, said.embeddings))
    why = dict(said.why)
    found = []
    for what, printed, ours, convention in rows:
        value = float(figure(printed))
        near = abs(ours / value - 1) <= NEAR
        found.append(
            Comparison(
                what,
                printed,
                value,
                ours,
                convention,
                ours / value - 1,
                near or gives(ours, printed),
                "" if near else why.get(what, "rounded to the digits printed" if gives(ours, printed) else ""),
            )
        )
    return found


def figure(printed: str) -> Decimal:
    """The number of a text such as "46.7B"."""
    return Decimal(printed[:-1]) * _UNITS[printed[-1]]


def gives(number: int, printed: str) -> bool:
    """Whether ``number`` rounded, or cut, to as many digits prints the same."""
    scaled, wanted = Decimal(number) / _UNITS[printed[-1]], Decimal(printed[:-1])
    return wanted in (scaled.quantize(wanted, ROUND_HALF_UP), scaled.quantize(wanted, ROUND_DOWN))
