"""How much of a checkpoint was accounted for, in numbers: tensors, parameters, bytes, experts, config keys.

The same report guards import, export and conversion: it is made from what was used, not from what should have been.
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    used: int
    total: int

    @property
    def complete(self) -> bool:
        """Whether it is all."""
        return self.used == self.total

    def __str__(self) -> str:
        percent = 100.0 if self.complete else min(99.99, 100 * self.used / max(1, self.total))
        return f"{self.used:,} of {self.total:,} ({percent:.2f}%)" if not self.complete else f"{self.total:,} (100%)"


@dataclass(frozen=True)
class Coverage:
    """What was used of a checkpoint.

    Attributes:
        tensors, parameters, bytes: of the model, out of all that is stored (without what is kept aside or repeated).
        experts: experts whose tensors are all there.
        config_keys: keys that were understood.
        mapped, carried: which of them went into the config, and which change nothing and were kept.
        aside: tensors that are no part of the model and were kept (parameters in ``aside_parameters``).
        repeated: tensors stored twice (a tied head), found equal.
    """

    tensors: Share
    parameters: Share
    bytes: Share
    experts: Share
    config_keys: Share
    mapped: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    aside_parameters: int = 0
    repeated: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def complete(self) -> bool:
        """Whether every share is 100%."""
        return all(s.complete for s in (self.tensors, self.parameters, self.bytes, self.experts, self.config_keys))

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"complete": self.complete}

    def lines(self, names: bool = False) -> list[str]:
        """For people; ``names``: every key, and every tensor kept aside, by its name."""
        text = [
            f"tensors      {self.tensors}",
            f"parameters   {self.parameters}",
            f"bytes        {self.bytes}",
            f"experts      {self.experts}",
            f"config keys  {self.config_keys}: {len(self.mapped)} used, {len(self.carried)} kept that change nothing",
        ]
        if self.aside:
            text.append(f"kept aside   {len(self.aside):,} tensors, {self.aside_parameters:,} parameters")
            text += [f"  {name}" for name in self.aside if names]
        if self.repeated:
            text.append(f"repeated     {', '.join(self.repeated)}, equal to what it is tied to")
        if names:
            text += _wrapped("keys used", self.mapped) + _wrapped("keys kept", self.carried)
        return [*text, *self.notes]


def _wrapped(title: str, names: tuple[str, ...]) -> list[str]:
    text = ", ".join(names) or "none"
    return textwrap.wrap(text, 110, initial_indent=f"{title:<13}", subsequent_indent=" " * 13, break_on_hyphens=False)


def size_in_words(nbytes: int) -> str:
    """``1.53 GB``: decimal units, as disks are sold."""
    size, unit = float(nbytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
