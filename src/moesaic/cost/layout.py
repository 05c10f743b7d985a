"""What every rank of a layout holds, keeps and sends in one training step: a forecast, nothing is allocated.

>>> training = Training(batch_size=128, accumulate=120)
>>> found = forecast(preset("deepseek-v3"), ParallelConfig(ep=64, pp=16), 2048, training)
>>> found.largest.memory.total

Numbers of parameters are exact. Bytes of exchanges are exact where the load is uniform and divides; activations are what
autograd keeps on the path of rows (``activations.py``). Not counted: what products need while they run, buffers of the
collectives, fragments, and the small sums of losses and loads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from moesaic.cost.check_layout import check_layout
from moesaic.cost.forecast import Forecast, Memory, RankForecast, Traffic, Training
from moesaic.cost.load import Load, uniform
from moesaic.cost.prepared import Prepared
from moesaic.cost.rank import RankWork
from moesaic.cost.schedule import bubble, even_stages
from moesaic.layout import Layout, ParallelConfig
from moesaic.models.config import ModelConfig

Split = Callable[[ModelConfig, int, int], Sequence[range]]

__all__ = ["Forecast", "Memory", "RankForecast", "Traffic", "Training", "forecast"]


def forecast(
    model: ModelConfig,
    parallel: ParallelConfig,
    world: int,
    training: Training,
    load: Load = uniform,
    *,
    split: Split | None = None,
    prepared: Prepared | None = None,
    some: bool = False,
) -> Forecast:
    """Every rank of ``world``.

    Args:
        load: how unevenly experts are used.
        split: the layers of every stage, from (model, pp, stages_per_rank); None cuts them into equal numbers. Training cuts by
            ``parallel.stages.split_stages``, which this folder must not know.
        prepared: of ``model`` and ``training.seq_len``, by who has checked its router (``check_layout``) before.
        some: of every stage only ranks that can be the largest, for a search among layouts.

    Raises ``ConfigError`` for a layout that cannot be.
    """
    layout = check_layout(
        model,
        parallel,
        world,
        batch_size=training.batch_size,
        accumulate=training.accumulate,
        ask_router=prepared is None,
    )
    number = parallel.pp * parallel.stages_per_rank
    ranges = split(model, parallel.pp, parallel.stages_per_rank) if split else even_stages(model.num_layers, number)
    work = RankWork(model, parallel, layout, training, load, prepared or Prepared(model, training.seq_len), ranges)
    known: dict[object, RankForecast] = {}
    alike: dict[RankForecast, list[int]] = {}
    for rank in _some(layout, load) if some else range(world):
        at = layout.coordinates(rank)
        if (key := work.alike(at)) not in known:
            known[key] = work.rank(at)
        alike.setdefault(known[key], []).append(rank)
    groups = tuple(replace(one, ranks=tuple(ranks)) for one, ranks in alike.items())
    pipeline = training.pipeline or parallel.schedule
    idle = bubble(pipeline, layout.pp, training.accumulate, parallel.stages_per_rank)
    return Forecast(layout, groups, idle, work.shares.whole_model(), work.rows.imbalance())


def _some(layout: Layout, load: Load) -> list[int]:
    """Of every stage the first rank, which has most of every shard, and whoever may have most experts, or most rows."""
    eps = (0, layout.ep - 1) if load is uniform else range(layout.ep)
    starts = range(0, layout.world, layout.dp * layout.tp)
    return [start + place for start in starts for place in dict.fromkeys(ep * layout.etp for ep in eps)]
