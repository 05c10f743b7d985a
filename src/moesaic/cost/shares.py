"""How many parameters every rank holds, part by part: stages, slices, experts of its slots, shards.

>>> shares = Shares(config, parallel, layout)
>>> shares.of(layout.coordinates(5), stage)       # Share(dense=..., experts=...)

FSDP cuts as it does in ``parallel/apply.py``: dense parameters along dimension 0, those of experts along dimension 1 where it
divides, in equal parts rounded up, so that the last ranks may hold less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from moesaic.cost.blocks import BlockShape, Part, blocks_of, ends_of
from moesaic.cost.schedule import Stage
from moesaic.layout import Axis, Layout, ParallelConfig
from moesaic.models.config import ModelConfig


@dataclass(frozen=True)
class Share:
    """Parameters of one rank.

    Attributes:
        dense, experts: numbers it holds, shards included.
        gathered: numbers of the largest piece that FSDP makes whole at once; 0 without.
    """

    dense: int
    experts: int
    gathered: int = 0

    @property
    def total(self) -> int:
        """Both kinds."""
        return self.dense + self.experts

    def __add__(self, other: Share) -> Share:
        return Share(self.dense + other.dense, self.experts + other.experts, max(self.gathered, other.gathered))


class Shares:
    """Parameters by rank of one layout.

    Attributes:
        blocks: the model's.
    """

    def __init__(
        self, model: ModelConfig, parallel: ParallelConfig, layout: Layout, blocks: tuple[BlockShape, ...] | None = None
    ) -> None:
        self.layout, self.parallel, self.tied = layout, parallel, model.tie_embeddings
        self.blocks = blocks or blocks_of(model)
        self.first, self.last = ends_of(model)
        kinds: dict[int, int] = {}
        self._kind = [kinds.setdefault(id(block), layer) for layer, block in enumerate(self.blocks)]
        self._ends = cache(self._of_ends)
        self._block = cache(lambda layer, *where: self._of_parts(self.blocks[layer].parts, *where))

    def of(self, at: Mapping[Axis, int], stage: Stage, *, sharded: bool) -> Share:
        """Of one stage what the rank at these coordinates holds, all of it or its shard."""
        found = self.of_ends(at, stage, sharded=sharded)
        for layer in stage.layers:
            found += self.of_block(at, layer, sharded=sharded)
        return found

    def of_block(self, at: Mapping[Axis, int], layer: int, *, sharded: bool) -> Share:
        """Of one block."""
        dp, edp = (at["dp"], at["edp"]) if sharded else (None, None)
        return self._block(self._kind[layer], dp, edp, self.slots(self.blocks[layer], at["ep"]))

    def of_ends(self, at: Mapping[Axis, int], stage: Stage, *, sharded: bool) -> Share:
        """Of embedding, final norm and head, where the stage has them."""
        dp, edp = (at["dp"], at["edp"]) if sharded else (None, None)
        return self._ends(stage.first, stage.last, dp, edp)

    def matrices(self, layer: int, ep: int) -> int:
        """Numbers in the matrices of a block, before FSDP shards them, that products read; routers multiply in fp32."""
        block = self.blocks[layer]
        parts = [part for part in block.parts if len(part.shape) > 1 and not part.name.startswith("ffn.router.")]
        return sum(math.prod(self.local_shape(part, self.slots(block, ep))) for part in parts)

    def kind(self, layer: int) -> int:
        """The first block of the same shape."""
        return self._kind[layer]

    def whole_model(self) -> Share:
        """Every parameter once, whoever holds it."""
        total = {"dense": 0, "experts": 0}
        ends = [part for part in (*self.first, *self.last) if not (self.tied and part.name == "head.weight")]
        for part in (*ends, *(part for block in self.blocks for part in block.parts)):
            total[part.kind] += math.prod(part.shape)
        return Share(total["dense"], total["experts"])

    def slots(self, block: BlockShape, ep: int) -> int:
        """Expert slots of a place along ep: spread evenly, replicas included (``Placement.even``)."""
        slots = block.experts + (self.parallel.replicas if block.experts else 0)
        return (ep + 1) * slots // self.layout.ep - ep * slots // self.layout.ep

    def _of_ends(self, first: bool, last: bool, dp: int | None, edp: int | None) -> Share:
        ends = [*(self.first if first else ()), *(self.last if last else ())]
        if self.tied and first and last:
            ends = [part for part in ends if part.name != "head.weight"]
        return self._of_parts(tuple(ends), dp, edp, 0)

    def _of_parts(self, parts: tuple[Part, ...], dp: int | None, edp: int | None, slots: int) -> Share:
        counts = {"dense": 0, "experts": 0}
        whole = 0
        for part in parts:
            shape = self.local_shape(part, slots)
            ranks, index = (self.layout.dp, dp) if part.kind == "dense" else (self.layout.edp, edp)
            if index is not None and ranks > 1:
                whole += math.prod(shape)
                shape = _shard(part, shape, ranks, index)
            counts[part.kind] += math.prod(shape)
        return Share(counts["dense"], counts["experts"], whole)

    def local_shape(self, part: Part, slots: int) -> tuple[int, ...]:
        """Of one parameter what stage, slots and slices leave."""
        shape = list(part.shape)
        if part.kind == "experts":
            shape[0] = slots
        if part.dim is not None and part.axis is not None:
            shape[part.dim] //= self.layout.size(part.axis)
        return tuple(shape)


def _shard(part: Part, shape: tuple[int, ...], ranks: int, index: int) -> tuple[int, ...]:
    dim = 1 if part.kind == "experts" and len(shape) > 1 and shape[1] % ranks == 0 else 0
    piece = -(-shape[dim] // ranks)
    held = min((index + 1) * piece, shape[dim]) - min(index * piece, shape[dim])
    return (*shape[:dim], held, *shape[dim + 1 :])
