"""What a rank holds, as the entries of a checkpoint: one per tensor, and one per expert of a stacked tensor.

>>> entries = entries_of({"blocks.0.ffn.experts.w_in": (held, w_EDF)})    # slots of experts 4 and 5
>>> list(entries)                                                           # ["blocks.0.ffn.experts.4.w_in", "...5.w_in"]

Experts are stored under logical names, never by rank or slot (fieldguide 4.10), so that any layout finds them. A name may have
a path before it ("optimizer/exp_avg/blocks.0.ffn.experts.w_in"): everything with a "/" belongs to training, not to the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moesaic.checkpoint.untrusted import show
from moesaic.errors import CheckpointError
from moesaic.parallel.held import Held, Ranges
from moesaic.train.sharded.regions import all_of, common, shift, slices, volume, within

Tensors = Mapping[str, tuple[Held, Tensor]]


@dataclass
class Entry:
    """What this rank holds of one tensor of the checkpoint.

    Attributes:
        shape: of the whole tensor.
        parts: (region of the whole tensor, the memory that holds it); replicas come several times.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[tuple[Ranges, Tensor]] = field(default_factory=list)

    def view(self, region: Ranges) -> Tensor:
        """The memory of a region that lies in one of the parts."""
        for held, x in self.parts:
            if within(region, held):
                return x[slices(shift(region, [start for start, _ in held]))]
        raise ValueError(f"{self.name}: {region} is not held here")

    def fill(self, region: Ranges, x: Tensor) -> None:
        """Copy the elements ``x`` of a region into every part that has some of them."""
        for held, mine in self.parts:
            both = common(held, region) if volume(region) else None
            if both is not None:
                to, out = ([start for start, _ in ends] for ends in (held, region))
                mine[slices(shift(both, to))].copy_(x[slices(shift(both, out))])


@dataclass(frozen=True)
class Whole:
    """A logical tensor, all its experts together."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    experts: bool

    def entries(self, name: str) -> list[str]:
        """The entries it is stored as, in the order of its experts."""
        return [expert_name(name, expert) for expert in range(self.shape[0])] if self.experts else [name]

    @property
    def entry_shape(self) -> tuple[int, ...]:
        """Of each entry."""
        return self.shape[1:] if self.experts else self.shape


def expert_name(name: str, expert: int) -> str:
    """The name of one expert's part of a stacked tensor: its number before the last word."""
    cut = max(name.rfind("."), name.rfind("/")) + 1
    return f"{name[:cut]}{expert}.{name[cut:]}"


def whole_of(held: Held, x: Tensor) -> Whole:
    """The logical tensor of which ``x`` is a part."""
    return Whole(held.shape, x.dtype, held.kind == "experts" and bool(held.shape))


def local_of(x: Tensor) -> Tensor:
    """The plain local tensor, sharing memory; of a ``DTensor`` this rank's shard."""
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x


def entries_of(tensors: Tensors) -> dict[str, Entry]:
    """By name. Raises ``ValueError`` for a tensor whose shape is not the one its ``Held`` gives, ``CheckpointError`` for names
    that cannot be told apart in a checkpoint.
    """
    entries: dict[str, Entry] = {}
    owner: dict[str, str] = {}
    for name, (held, x) in tensors.items():
        local = local_of(x)
        if tuple(local.shape) != held.local:
            raise ValueError(f"{name} is {list(local.shape)} here and {list(held.local)} by its Held")
        if not name or not name.isprintable() or "[" in name:
            raise CheckpointError(f"A tensor cannot be called {show(name)} in a sharded checkpoint; rename it.")
        whole = whole_of(held, x)
        for entry, region, part in _parts(name, held, local, whole):
            if owner.setdefault(entry, name) != name:
                raise CheckpointError(f"{name} and {owner[entry]} would both be stored as {entry}; rename one of them.")
            entries.setdefault(entry, Entry(entry, whole.entry_shape, x.dtype)).parts.append((region, part))
    return entries


def _parts(name: str, held: Held, x: Tensor, whole: Whole) -> Iterator[tuple[str, Ranges, Tensor]]:
    everything = all_of(whole.entry_shape)
    if not volume(everything):  # a tensor without elements: every rank holds it, whatever the cuts left of its boxes
        yield from ((entry, everything, x.new_empty(whole.entry_shape)) for entry in whole.entries(name))
        return
    for box in held.boxes:
        if not whole.experts:
            yield name, box.logical, x[box.local_slices]
            continue
        (first, last), slot = box.logical[0], box.local[0][0]
        for expert in range(first, last):
            part = x[slot + expert - first][box.local_slices[1:]]
            yield expert_name(name, expert), box.logical[1:], part
