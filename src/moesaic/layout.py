"""How processes share a model and its batch: names and sizes, checked before anything is allocated. No torch in here.

``ParallelConfig`` is what a user asks for; ``Layout.of(config, world)`` is what it means for a number of processes. Two grids
lie over the same ranks (Megatron's parallel folding; fieldguide 4.4), pipeline stages outermost:

    dense layers   W = PP * DP * TP          rank  = (pp * DP + dp) * TP + tp
    experts        W = PP * EDP * EP * ETP   place = dp * TP + tp = (edp * EP + ep) * ETP + etp

>>> layout = Layout.of(ParallelConfig(ep=2, tp=2), world=4)      # dp 2, tp 2; experts: ep 2, etp 2, edp 1
>>> layout.groups("ep")                                          # ((0, 2), (1, 3))

Axes: pp pipeline stages; dp parts of the batch; tp slices of attention and feed-forward networks; ep parts of the experts; etp
slices of each expert; edp copies of the same experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from moesaic.errors import ConfigError, one_of

Axis = Literal["pp", "dp", "tp", "ep", "etp", "edp"]
Schedule = Literal["1f1b", "interleaved"]
Exchange = Literal["flat", "hierarchical"]


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over processes. It changes where numbers are computed, never which.

    Attributes:
        ep: parts that the experts of a layer are spread over; any number of experts, divisible or not.
        tp: slices of attention heads and feed-forward widths.
        pp: pipeline stages; the micro-batches of a step (``accumulate``) flow through them.
        etp: slices of each expert's width: ``tp`` (None: where ``ep`` fits into the data-parallel ranks), or 1, which lets the
            ranks of a tensor-parallel group hold different experts.
        fsdp: shard dense parameters, their gradients and optimiser state over dp, and those of experts over edp.
        schedule, stages_per_rank: of the pipeline; "interleaved" gives every rank several stages, 2 or more.
        exchange: "flat" all-to-all, or "hierarchical": within nodes, then between them.
        ranks_per_node: processes of one node, for "hierarchical"; None is what torchrun says (LOCAL_WORLD_SIZE).
        chunks: pieces a flat exchange is cut into, so that one travels while another is computed; 1 is none, and more than a
            rank has slots are as many as it has.
        padded: exchange equal numbers of rows per expert, as many as the fullest has anywhere; a run needs a capacity for it.
        replicas: spare slots per layer for copies of busy experts.
        rebalance_every: steps between looks at the load that may move experts; 0 never.
        shadow: hold the busiest experts everywhere for one step where that saves traffic (FasterMoE).
        compile: compile the dense parts of every block with ``torch.compile``.
        timeout_s: a collective that takes longer ends the run in words.
        consolidate: when the run ends, its first process makes the newest and the best checkpoint whole, which takes the disk
            as much again for a while; false leaves them in parts, which any number of processes can go on with.
    """

    ep: int = 1
    tp: int = 1
    pp: int = 1
    etp: int | None = None
    fsdp: bool = False
    schedule: Schedule = "1f1b"
    stages_per_rank: int = 1
    exchange: Exchange = "flat"
    ranks_per_node: int | None = None
    chunks: int = 1
    padded: bool = False
    replicas: int = 0
    rebalance_every: int = 0
    shadow: bool = False
    compile: bool = False
    timeout_s: float = 600.0
    consolidate: bool = True

    def __post_init__(self) -> None:
        for name in ("ep", "tp", "pp", "stages_per_rank", "chunks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("replicas", "rebalance_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"parallel.{name} must be at least 0, not {getattr(self, name)}.")
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            raise ConfigError(f"parallel.ranks_per_node must be at least 1, not {self.ranks_per_node}.")
        if not self.timeout_s > 0:
            raise ConfigError(f"parallel.timeout_s must be above 0, not {self.timeout_s}; 600 is usual.")
        one_of("parallel.schedule", self.schedule, get_args(Schedule))
        one_of("parallel.exchange", self.exchange, get_args(Exchange))
        if self.etp not in (None, 1, self.tp):
            raise ConfigError(
                f"parallel.etp slices experts over the ranks of a tensor-parallel group, so it is 1 or tp={self.tp}, not "
                f"{self.etp}."
            )
        if self.schedule == "interleaved" and (self.pp == 1 or self.stages_per_rank == 1):
            raise ConfigError(
                f'parallel.schedule="interleaved" needs pp and stages_per_rank of at least 2, not pp={self.pp} and '
                f"stages_per_rank={self.stages_per_rank}."
            )
        if self.schedule == "1f1b" and self.stages_per_rank != 1:
            raise ConfigError(
                f'parallel.stages_per_rank={self.stages_per_rank} needs schedule="interleaved"; "1f1b" has one stage per rank.'
            )
        if (self.replicas or self.rebalance_every or self.shadow) and self.ep == 1:
            name = "replicas" if self.replicas else "rebalance_every" if self.rebalance_every else "shadow"
            raise ConfigError(
                f"parallel.{name} is about experts on other ranks; with ep=1 every rank holds all. Set ep."
            )
        if self.shadow and self.replicas:
            raise ConfigError(
                "parallel.shadow and parallel.replicas both copy busy experts; choose one of them, the other stays 0 or false."
            )
        if self.exchange == "hierarchical" and self.chunks > 1:
            raise ConfigError(
                f'parallel.chunks={self.chunks} cuts the flat exchange; with exchange="hierarchical" it must be 1.'
            )
        if self.padded and self.chunks > 1:
            raise ConfigError("parallel.chunks cuts exchanges of as many rows as there are; with padded it must be 1.")


@dataclass(frozen=True)
class Layout:
    """A ``ParallelConfig`` for a number of processes: the sizes of all axes, who is where, who belongs together."""

    world: int
    pp: int
    dp: int
    tp: int
    ep: int
    etp: int
    edp: int

    @classmethod
    def of(cls, config: ParallelConfig, world: int) -> Layout:
        """The layout of ``world`` processes. Raises ``ConfigError`` with the reason where they cannot be laid out so."""
        inner = config.pp * config.tp
        if world < 1 or world % inner:
            raise ConfigError(
                f"{world} processes cannot form pp={config.pp} stages of tp={config.tp}: their number must be a multiple of "
                f"pp * tp = {inner}. Start {-(-world // inner) * inner} processes, or change pp or tp."
            )
        dp = world // inner
        etp = config.etp
        if etp is None:
            etp = config.tp if dp % config.ep == 0 else 1
        places = dp * config.tp // etp
        if places % config.ep:
            raise ConfigError(
                f"ep={config.ep} does not divide the {places} places for experts in a stage (dp={dp} * tp={config.tp} / "
                f"etp={etp}) of {world} processes; choose ep among the divisors of {places}, or another number of processes."
            )
        return cls(world, config.pp, dp, config.tp, config.ep, etp, places // config.ep)

    def size(self, axis: Axis) -> int:
        """Ranks along an axis."""
        size: int = getattr(self, axis)
        return size

    def coordinates(self, rank: int) -> dict[Axis, int]:
        """Where a rank is on every axis."""
        if not 0 <= rank < self.world:
            raise ConfigError(f"There is no rank {rank} among {self.world} processes.")
        stage, place = divmod(rank, self.dp * self.tp)
        dp, tp = divmod(place, self.tp)
        rest, etp = divmod(place, self.etp)
        edp, ep = divmod(rest, self.ep)
        return {"pp": stage, "dp": dp, "tp": tp, "ep": ep, "etp": etp, "edp": edp}

    def groups(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """The ranks that differ in this axis alone (of their grid), group by group, in the order of the axis."""
        grid: tuple[Axis, ...] = ("pp", "dp", "tp") if axis in ("pp", "dp", "tp") else ("pp", "edp", "ep", "etp")
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            at = self.coordinates(rank)
            found.setdefault(tuple(at[other] for other in grid if other != axis), []).append(rank)
        return tuple(tuple(group) for group in found.values())

    def group_of(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """The group of ``axis`` that ``rank`` is in."""
        return next(group for group in self.groups(axis) if rank in group)

    def describe(self) -> str:
        """One line for logs: only the axes that are more than 1."""
        parts = [f"{axis} {self.size(axis)}" for axis in ("pp", "dp", "tp", "ep", "etp", "edp") if self.size(axis) > 1]
        return f"{self.world} processes" + (f": {', '.join(parts)}" if parts else "")
