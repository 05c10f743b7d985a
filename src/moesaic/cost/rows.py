"""Tokens and rows of every rank of a layout, and the bytes of their exchange.

A rank's tokens own ``T k`` rows a layer; those for experts of other ranks leave it, and what its experts compute comes from
its whole expert-parallel group. Tensor parallelism with whole experts (etp 1) shares out the rows of its tokens.

Legend: T tokens of a rank and micro-batch, E experts, P ranks of an expert-parallel group, G of them on one node.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from functools import cache

from moesaic.cost.communication import passes
from moesaic.cost.forecast import Training
from moesaic.cost.load import Load, uniform
from moesaic.cost.shares import Shares
from moesaic.layout import Axis, Layout, ParallelConfig
from moesaic.plan.placement import Placement
from moesaic.plan.rebalance import improve, rank_loads

At = Mapping[Axis, int]


class Rows:
    """Of one layout, batch and load. Numbers are of one micro-batch; fractions where a load does not divide."""

    def __init__(
        self, parallel: ParallelConfig, layout: Layout, training: Training, load: Load, shares: Shares, dim: int
    ) -> None:
        self.parallel, self.layout, self.training, self.load, self.shares = parallel, layout, training, load, shares
        self.dim = dim
        self._shares, self._per_token = cache(self._share_of_ep), cache(self._rows_per_token)
        self.loads, self.placement = cache(self._loads), cache(self._placement)
        self.group_tokens = cache(self._group_tokens)

    def tokens(self, dp: int) -> int:
        """T: consecutive rows of the micro-batch, as many as others or one more (``torch.tensor_split``)."""
        rows, extra = divmod(self.training.batch_size, self.layout.dp)
        return (rows + (dp < extra)) * self.training.seq_len

    def own_tokens(self, place: int) -> int:
        """Tokens whose rows the rank at ``place`` of its stage sends: all of its own, or its share of the tp group's."""
        dp, tp = divmod(place, self.layout.tp)
        T, ranks = self.tokens(dp), self.layout.tp
        return T if self.layout.etp == ranks else (tp + 1) * T // ranks - tp * T // ranks

    def _group_tokens(self, edp: int, etp: int) -> int:
        """Of all ranks of an expert-parallel group."""
        EP, ETP = self.layout.ep, self.layout.etp
        return sum(self.own_tokens((edp * EP + ep) * ETP + etp) for ep in range(EP))

    def like(self, layer: int) -> int:
        """The first layer that the same is sent in."""
        return self.shares.kind(layer) if self.load is uniform else layer

    def share_of_ep(self, layer: int, ep: int) -> Fraction:
        """Share of a layer's rows for feed-forward experts that those at ``ep`` compute."""
        return self._shares(self.like(layer), ep)

    def _share_of_ep(self, layer: int, ep: int) -> Fraction:
        block = self.shares.blocks[layer]
        if self.load is uniform and not self.parallel.replicas:
            return Fraction(self.shares.slots(block, ep), block.experts)
        return Fraction(rank_loads(self.placement(layer), self.loads(layer))[ep]).limit_denominator(10**9)

    def _loads(self, layer: int) -> tuple[float, ...]:
        block = self.shares.blocks[layer]
        return self.load(layer, block.experts, block.rows)

    def _placement(self, layer: int) -> Placement:
        """Where experts are: evenly; with replicas as EPLB lays them out for this load."""
        even = Placement.even(self.shares.blocks[layer].experts, self.layout.ep)
        if not self.parallel.replicas:
            return even
        return improve(even, self.loads(layer), slots=even.num_experts + self.parallel.replicas)

    def imbalance(self) -> float:
        """Rows of the busiest rank over the mean, added up over layers, each of which waits for its busiest rank."""
        sparse = [layer for layer, block in enumerate(self.shares.blocks) if block.experts]
        if not sparse:
            return 1.0
        counts = Counter(self.like(layer) for layer in sparse)
        total = sum(self.per_token(layer) * often for layer, often in counts.items())
        if self.load is uniform and not self.parallel.replicas:
            most = {layer: self.share_of_ep(layer, self.layout.ep - 1) for layer in counts}
        else:
            most = {layer: max(self.share_of_ep(layer, ep) for ep in range(self.layout.ep)) for layer in counts}
        busiest = sum(most[layer] * self.per_token(layer) * often for layer, often in counts.items())
        return float(busiest * self.layout.ep / total)

    def per_token(self, layer: int) -> Fraction:
        """Rows per token for feed-forward experts; load that zero-computation experts take goes nowhere."""
        return self._per_token(self.shares.kind(layer))

    def _rows_per_token(self, layer: int) -> Fraction:
        block = self.shares.blocks[layer]
        true = Fraction(block.experts, max(1, block.experts + block.special))
        return Fraction(block.rows).limit_denominator(10**6) * true * Fraction(block.taken).limit_denominator(10**6)

    def of(self, at: At, layer: int) -> tuple[Fraction, Fraction]:
        """Rows for feed-forward experts that this rank's tokens own, and those that its experts compute."""
        if not self.shares.blocks[layer].experts:
            return Fraction(0), Fraction(0)
        own = self.own_tokens(at["dp"] * self.layout.tp + at["tp"]) * self.per_token(layer)
        group = self.group_tokens(at["edp"], at["etp"]) * self.per_token(layer)
        return own, group * self.share_of_ep(layer, at["ep"])

    def exchange(self, at: At, layer: int, own: Fraction, received: Fraction) -> Fraction:
        """Bytes of a micro-batch: every pass sends away own rows, and once as many times what came from others."""
        block, P = self.shares.blocks[layer], self.layout.ep
        if P == 1 or not block.experts:
            return Fraction(0)
        out, back = self._away(at, layer, own, received)
        width = self.dim // block.heads
        there = Fraction(self.training.dispatched or self.training.b)
        home = Fraction(self.training.combined or self.training.b)
        return (out * there + back * home) * width * passes(self.training.recompute) / 2

    def _away(self, at: At, layer: int, own: Fraction, received: Fraction) -> tuple[Fraction, Fraction]:
        """Rows sent to other ranks' experts, and outputs sent back to theirs."""
        block, P, share = self.shares.blocks[layer], self.layout.ep, self.share_of_ep(layer, at["ep"])
        if self.parallel.padded:  # as many rows for every slot from everywhere as the fullest has anywhere
            copies_E = self.placement(layer).replicas_E
            fullest = max(load / copies for load, copies in zip(self.loads(layer), copies_E, strict=True))
            room, mine = math.ceil(own * Fraction(fullest).limit_denominator(10**9)), self.shares.slots(block, at["ep"])
            return Fraction((sum(copies_E) - mine) * room), Fraction(mine * room * (P - 1))
        if self.parallel.exchange == "hierarchical" and (G := self._on_node()):
            both = Fraction(G - 1, G) + Fraction(P // G - 1, P // G)
            return own * both, received * both
        return own * (1 - share), received - own * share

    def _on_node(self) -> int:
        """Ranks of an expert-parallel group on one node; 0 where nobody said how large nodes are."""
        size = self.parallel.ranks_per_node
        group = self.layout.group_of("ep", 0)
        return 0 if size is None else sum(rank < size for rank in group)
