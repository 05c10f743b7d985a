"""Layouts of a number of processes that fit into a memory, least traffic first.

>>> search_layouts(model, world=256, training=training, memory=80e9)

Tried are all divisors of the number of processes as stages, slices (within nodes) and expert parallelism, with FSDP or
without, one row of a rank and micro-batch or as many as asked for; activations are recomputed only where they do not fit
otherwise. Rows of a step stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from moesaic.cost.check_layout import check_router
from moesaic.cost.forecast import Forecast, Training
from moesaic.cost.layout import Split, forecast
from moesaic.cost.load import Load, uniform
from moesaic.cost.prepared import Prepared
from moesaic.errors import ConfigError
from moesaic.layout import ParallelConfig
from moesaic.models.config import ModelConfig


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, and what was forecast of it."""

    parallel: ParallelConfig
    training: Training
    forecast: Forecast


def search_layouts(
    model: ModelConfig,
    world: int,
    training: Training,
    memory: float,
    load: Load = uniform,
    *,
    ranks_per_node: int = 8,
    split: Split | None = None,
) -> list[Candidate]:
    """All that fit, by the bytes that the busiest rank sends in a step.

    Args:
        training: its rows of a step are kept; whether it recomputes is asked again for every layout.
        memory: bytes of a rank. ranks_per_node: slices of tensor parallelism stay within a node.
        load, split: as for ``forecast``.
    """
    prepared = Prepared(model, training.seq_len)
    found = []
    for parallel in _layouts(model, world, ranks_per_node, prepared):
        best = None
        for asked in _batches(training, world // (parallel.pp * parallel.tp)):
            one = _least(
                asked, memory, partial(forecast, model, parallel, world, load=load, split=split, prepared=prepared)
            )
            if one and (best is None or one[1].busiest.traffic.total < best[1].busiest.traffic.total):
                best = one
        if best is not None:
            found.append(Candidate(parallel, *best))
    return sorted(found, key=lambda candidate: candidate.forecast.busiest.traffic.total)


def _least(asked: Training, memory: float, forecast_of: Callable[..., Forecast]) -> tuple[Training, Forecast] | None:
    """The training that fits, recomputed only if it has to be; None for what does not fit or cannot be."""
    for recompute in (False, True):
        tried = replace(asked, recompute=recompute)
        try:
            found = forecast_of(training=tried, some=True)
        except ConfigError:
            return None
        if found.largest.memory.total <= memory:
            return tried, found
        if found.largest.memory.state > memory:
            return None
    return None


def divisors(number: int, most: int) -> list[int]:
    """Of ``number``, up to ``most``."""
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def _layouts(model: ModelConfig, world: int, ranks_per_node: int, prepared: Prepared) -> Iterator[ParallelConfig]:
    most_experts = max(1, *(block.experts for block in prepared.blocks))
    alone = _must_stay_together(model)
    for pp in divisors(world, model.num_layers):
        for tp in divisors(world // pp, ranks_per_node):
            if alone and world > pp * tp:
                continue
            for ep in divisors(world // pp, most_experts):
                for fsdp in (False, True) if world > pp * tp else (False,):
                    yield ParallelConfig(ep=ep, tp=tp, pp=pp, fsdp=fsdp)


def _must_stay_together(model: ModelConfig) -> bool:
    """Whether the router has to see all sequences."""
    try:
        check_router(model, 2)
    except ConfigError:
        return True
    return False


def _batches(training: Training, dp: int) -> Iterator[Training]:
    """The same rows of a step in micro-batches of what ``dp`` ranks can share, most rows first; none where they cannot."""
    sizes = dict.fromkeys((max(training.batch_size // dp, 1) * dp, dp))
    for size in sizes:
        if training.rows % size == 0:
            yield replace(training, batch_size=size, accumulate=training.rows // size)
