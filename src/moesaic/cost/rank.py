"""The forecast of one rank, added up over its stages and their blocks.

Legend: T tokens of a rank and micro-batch, D model width, b bytes of an activation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from moesaic.cost.activations import Activations, block_activations, head_activations
from moesaic.cost.communication import all_reduce_bytes, gather_bytes
from moesaic.cost.forecast import Memory, RankForecast, Sharded, Traffic, Training
from moesaic.cost.load import Load
from moesaic.cost.prepared import Prepared
from moesaic.cost.rows import At, Rows
from moesaic.cost.schedule import Stage, stages_of
from moesaic.cost.shares import Share, Shares
from moesaic.layout import Layout, ParallelConfig
from moesaic.models.config import ModelConfig


class RankWork:
    """All that ranks of one layout have in common."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        layout: Layout,
        training: Training,
        load: Load,
        prepared: Prepared,
        ranges: Sequence[range],
    ) -> None:
        self.model, self.parallel, self.layout, self.training, self.load = model, parallel, layout, training, load
        self.shares = Shares(model, parallel, layout, prepared.blocks)
        self.pipeline = training.pipeline or parallel.schedule
        self.stages = stages_of(ranges, layout.pp, training.accumulate, self.pipeline)
        self.sharded: Sharded = training.sharded or ("all" if parallel.fsdp else "nothing")
        self.rows = Rows(parallel, layout, training, load, self.shares, model.dim)
        first: dict[object, int] = {}
        self._alike = [
            first.setdefault((self.rows.like(layer), self.shares.kind(layer), model.window(layer)), layer)
            for layer in range(model.num_layers)
        ]
        self.flops_of = prepared.flops_of

    def alike(self, at: At) -> object:
        """Equal for two ranks that everything is the same for."""
        layers = dict.fromkeys(self.rows.like(i) for i, block in enumerate(self.shares.blocks) if block.experts)
        sharded = self.sharded != "nothing"
        return (
            at["pp"],
            self.rows.tokens(at["dp"]),
            self.rows.own_tokens(at["dp"] * self.layout.tp + at["tp"]),
            self.rows.group_tokens(at["edp"], at["etp"]),
            tuple(self.rows.share_of_ep(layer, at["ep"]) for layer in layers),
            tuple(self.shares.of(at, stage, sharded=sharded) for stage in self.stages[at["pp"]]),
        )

    # ---- one rank ------------------------------------------------------------------------------------------------

    def rank(self, at: At) -> RankForecast:
        """Everything about the rank at these coordinates; ``ranks`` stay empty."""
        stages = self.stages[at["pp"]]
        held = sum((self.shares.of(at, stage, sharded=self.sharded == "all") for stage in stages), Share(0, 0))
        exchange = slices = rows = flops = sent = Fraction(0)
        for stage in stages:
            M, T = stage.micro_batches, self.rows.tokens(at["dp"])
            for layer, often in self._layers(stage).items():
                own, received = self.rows.of(at, layer)
                rows += received * M * often
                exchange += self.rows.exchange(at, layer, own, received) * M * often
                slices += self._slices(at, layer) * M * often
                flops += self._block_flops(at, layer, received) * M * often
            if stage.last:
                flops += 3 * 2 * self.model.dim * self.model.vocab_size * T * M
            if self.layout.pp > 1:
                sent += ((not stage.first) + (not stage.last)) * T * self.model.dim * self.training.b * M
        gradients, weights = self._copies(at, stages)
        return RankForecast(
            ranks=(),
            layers=tuple(layer for stage in stages for layer in stage.layers),
            parameters=held,
            memory=self._memory(at, stages, held),
            traffic=Traffic(round(exchange), gradients, weights, round(slices), round(sent)),
            expert_rows=round(rows),
            flops=float(flops),
        )

    def _layers(self, stage: Stage) -> Counter[int]:
        """Its blocks, those alike counted under the first of them."""
        alike = (self._alike[layer] for layer in stage.layers)
        return Counter(alike)

    def _slices(self, at: At, layer: int) -> int:
        """Bytes of the sums of tensor parallelism in a micro-batch (``parallel/regions.py``): out of regions forward, into them
        backward. Of gradients of single weights that all slices use, a few numbers a layer, nothing is counted.
        """
        tp, block, model, b = self.layout.tp, self.shares.blocks[layer], self.model, self.training.b
        if tp == 1:
            return 0
        T, D = math.ceil(self.rows.tokens(at["dp"]) * block.taken), model.dim
        sums = [T * D * b]  # attention leaves
        if model.latent is None:
            sums.append(T * D * b)
        else:
            q_width = D if model.latent.q_rank is None else model.latent.q_rank
            sums += [T * width * b for width in (q_width, model.latent.kv_rank, model.latent.rope_dim)]
        if model.qk_norm == "projection":
            sums += [T * 4] * (6 if self.training.recompute else 4)
        sums += [T * D * b] * 2  # a feed-forward layer, or experts
        if block.experts:
            sums.append(round(T * block.rows) * 4)  # weights of rows
        if block.shared:
            sums += [T * D * b] * 2
        return sum(all_reduce_bytes(size, tp) for size in sums)

    def _copies(self, at: At, stages: tuple[Stage, ...]) -> tuple[int, int]:
        """Bytes of a step between ranks with copies of the same parameters: sums of gradients, gathers of weights."""
        layout, precision, M = self.layout, self.training.precision, self.training.accumulate
        gradients = weights = 0
        for stage in stages:
            ends = self.shares.of_ends(at, stage, sharded=False)
            blocks = [
                (self.shares.of_block(at, layer, sharded=False), 2, count)
                for layer, count in self._layers(stage).items()
            ]
            for share, gathers, count in [(ends, 1, 1), *blocks]:
                for number, ranks in ((share.dense, layout.dp), (share.experts, layout.edp)):
                    if self.sharded == "nothing":
                        gradients += all_reduce_bytes(number * precision.gradient, ranks) * count
                        continue
                    # FSDP gathers a block for its forward and again for its backward, the rest once, in every micro-batch.
                    often = count * (M if self.sharded == "all" else 1)
                    gradients += gather_bytes(number * precision.gradient, ranks) * often
                    weights += (
                        gather_bytes(number * precision.weight, ranks)
                        * often
                        * (gathers if self.sharded == "all" else 1)
                    )
            if self.model.tie_embeddings and stage.first != stage.last:
                shards = layout.dp if self.sharded == "all" else 1
                matrix = -(-self.model.vocab_size // shards) * self.model.dim
                gradients += all_reduce_bytes(matrix * precision.gradient, 2)  # with the other stage that holds it
            gradients += sum(self._replica_gradients(layer) for layer in stage.layers)
        return gradients, weights

    def _replica_gradients(self, layer: int) -> int:
        """Gradients of copied experts, each a copy of another expert, summed over the group."""
        if not self.parallel.replicas or not (E := self.shares.blocks[layer].experts):
            return 0
        parts = [part for part in self.shares.blocks[layer].parts if part.kind == "experts"]
        one = sum(math.prod(self.shares.local_shape(part, E)) // E for part in parts)
        size = min(self.parallel.replicas, E) * one * self.training.precision.gradient
        return all_reduce_bytes(size, self.layout.ep)

    # ---- memory --------------------------------------------------------------------------------------------------

    def _memory(self, at: At, stages: tuple[Stage, ...], held: Share) -> Memory:
        precision = self.training.precision
        state = held.total
        if self.sharded == "optimizer":
            state = sum(self.shares.of(at, stage, sharded=True).total for stage in stages)
        # DualPipe has every stage on two ranks, which share the state of its optimiser.
        state //= 2 if self.pipeline == "dualpipe" else 1
        kept, casts, again = Fraction(0), Fraction(0), 0
        for stage in stages:
            for layer, count in self._layers(stage).items():
                found = self._activations(at, layer)
                if self.training.recompute:
                    kept += found.recomputed * stage.kept * count
                    again = max(again, found.kept - found.recomputed + found.casts)
                else:
                    kept += found.kept * stage.kept * count
                    casts += found.casts * stage.kept * count
            if stage.last:
                kept += head_activations(self.model, self.rows.tokens(at["dp"]), self.training.b)
                casts += 2 * self.model.vocab_size * self.model.dim * (self.training.b < 4 == precision.weight)
        return Memory(
            weights=held.total * precision.weight,
            gradients=held.total * precision.gradient,
            optimizer=state * precision.optimizer,
            gathered=2 * held.gathered * precision.weight,
            activations=round(kept) + again,
            casts=round(casts),
        )

    def _activations(self, at: At, layer: int) -> Activations:
        block, layout, T = self.shares.blocks[layer], self.layout, self.rows.tokens(at["dp"])
        _, received = self.rows.of(at, layer)
        # Weights that are kept in 16 bits need no copies.
        numbers = self.shares.matrices(layer, at["ep"]) if self.training.precision.weight == 4 else 0
        # Of a plan all rows are kept, those too that another rank of the tp group sends.
        rows = T * block.taken * block.rows
        return block_activations(
            self.model, block, T, rows, float(received), self.training.b, tp=layout.tp, etp=layout.etp, casts=numbers
        )

    # ---- work ----------------------------------------------------------------------------------------------------

    def _block_flops(self, at: At, layer: int, received: Fraction) -> Fraction:
        """Forward and backward of a block in one micro-batch; all ranks of a tp group compute the router."""
        block = self.shares.blocks[layer]
        parts = self.flops_of(self.shares.kind(layer), self.model.window(layer))
        T = self.rows.tokens(at["dp"]) * block.taken
        experts = float(received) * parts["row"] / self.layout.etp
        shared_out = {name: flops for name, flops in parts.items() if name not in ("router", "experts", "row")}
        forward = T * (parts.get("router", 0.0) + sum(shared_out.values()) / self.layout.tp) + experts
        return Fraction(forward) * (4 if self.training.recompute else 3)
