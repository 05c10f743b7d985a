"""What a forecast of a layout says: bytes, traffic and work of every rank in one training step."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

from moesaic.cost.precision import PRECISIONS, Precision
from moesaic.cost.schedule import Pipeline
from moesaic.cost.shares import Share
from moesaic.layout import Layout

Sharded = Literal["nothing", "optimizer", "all"]


@dataclass(frozen=True)
class Training:
    """How a step is computed.

    Attributes:
        batch_size, accumulate: rows of a micro-batch over all processes, micro-batches of a step.
        seq_len: positions of a row.
        dtype, recompute: of activations; whether they are recomputed.
        precision: how parameters and their state are kept.
        sharded: what FSDP or ZeRO spreads over copies of the same parameters: "nothing", "optimizer" state alone (ZeRO-1, for
            forecasts of others' layouts), "all"; None follows ``parallel.fsdp``.
        pipeline: the schedule; None follows ``parallel.schedule``.
        dispatched, combined: bytes of a number on its way to experts and back; None is that of ``dtype``. (DeepSeek-V3: FP8
            with a 4-byte scale per 128, and bf16.)
    """

    batch_size: int
    accumulate: int = 1
    seq_len: int = 4096
    dtype: Literal["fp32", "bf16"] = "bf16"
    recompute: bool = False
    precision: Precision = PRECISIONS["moesaic"]
    sharded: Sharded | None = None
    pipeline: Pipeline | None = None
    dispatched: Fraction | None = None
    combined: Fraction | None = None

    @property
    def b(self) -> int:
        """Bytes of an activation."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.batch_size * self.accumulate


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at their largest.

    Attributes:
        weights, gradients, optimizer: of what it holds.
        gathered: parameters that FSDP makes whole for a while: two units, one in use and the next.
        activations: kept for the backward, of all micro-batches at once; with those of one block that is recomputed.
        casts: 16-bit copies of fp32 weights among what is kept.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    casts: int

    @property
    def state(self) -> int:
        """Without activations."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.gathered + self.activations + self.casts


@dataclass(frozen=True)
class Traffic:
    """Bytes that leave one rank in a step.

    Attributes:
        exchange: rows to experts and back (all-to-all).
        gradients: their sums over copies, and with FSDP their scattering.
        weights: gathers of FSDP or ZeRO.
        slices: sums of tensor parallelism.
        stages: activations and gradients between pipeline stages.
    """

    exchange: int
    gradients: int
    weights: int
    slices: int
    stages: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.exchange + self.gradients + self.weights + self.slices + self.stages


@dataclass(frozen=True)
class RankForecast:
    """One rank, or several alike.

    Attributes:
        ranks: who.
        layers: its blocks, of all its stages.
        parameters: held, shards included.
        memory, traffic: as above.
        expert_rows: rows that its experts compute in a step, all layers together.
        flops: of its forwards and backwards in a step.
    """

    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    parameters: Share
    memory: Memory
    traffic: Traffic
    expert_rows: int
    flops: float


@dataclass(frozen=True)
class Forecast:
    """All ranks of a layout.

    Attributes:
        layout: what it is of.
        groups: ranks alike, in the order of their first.
        bubble: share of a step in which a rank waits for the pipeline to fill and drain.
        parameters: of the model, each once.
        imbalance: rows of the busiest rank over the mean, summed over layers: what the slowest expert rank adds.
    """

    layout: Layout
    groups: tuple[RankForecast, ...]
    bubble: float
    parameters: Share
    imbalance: float

    @cached_property
    def largest(self) -> RankForecast:
        """The rank that needs most memory."""
        return max(self.groups, key=lambda group: group.memory.total)

    @cached_property
    def busiest(self) -> RankForecast:
        """The rank that sends most."""
        return max(self.groups, key=lambda group: group.traffic.total)
