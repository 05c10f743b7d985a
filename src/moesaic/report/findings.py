"""What the page says about the processes of a run, in words: what to look at, and the setting that may help."""

from __future__ import annotations

import numpy as np

from moesaic.config import from_dict
from moesaic.cost.layout import Training, forecast
from moesaic.errors import MoesaicError
from moesaic.layout import ParallelConfig
from moesaic.models.config import ModelConfig
from moesaic.report.figures import run_layer
from moesaic.report.ranks import Moves, RankSums
from moesaic.report.runs import Run
from moesaic.report.text import plural, times

EVEN = 1.1  # rows of the busiest process over the mean that are not worth a word of advice


def findings(run: Run, final: RankSums, even: float | None) -> list[str]:
    """What to look at, the most costly first, with the setting that may help. ``even``: bytes sent by an even load."""
    told = _of_rows(run, final) if final.imbalance > 0 else []
    moves = sum((w.ranks.moves for w in run.windows if w.ranks is not None), Moves())
    if moves.steps:
        gain = 1 - moves.rows / moves.rows_before if moves.rows_before else 0.0
        told.append(
            f"Experts were moved after {plural(moves.steps, 'step')}, into {plural(moves.slots, 'slot')} in all; by the load "
            f"they were moved by, the busiest processes then had {gain:.0%} fewer rows."
        )
    if final.shadows:
        told.append(
            f"On average {final.shadows / final.num_steps:.1f} experts had shadows in a step, all layers together."
        )
    travel, other = final.time_shares
    if travel > 0:
        hint = " parallel.chunks=2 lets rows travel while others are computed." if _may_chunk(run, travel) else ""
        told.append(
            f"All-to-alls took {travel:.0%} of a step's time, other collectives {other:.0%}; waiting for slower processes is "
            f"in both.{hint}"
        )
    elif other > 0:
        told.append(f"Collectives took {other:.0%} of a step's time; waiting for slower processes is in it.")
    sent, most = final.all_to_all_bytes
    if sent > 0:
        compared = f", {times(sent / even)} what an even load sends" if even else ""
        told.append(
            f"A process sent {_size(sent)} of rows to others per step{compared}; whoever sent most, {_size(most)}."
        )
    return told


def _of_rows(run: Run, final: RankSums) -> list[str]:
    """How even rows were, and what may make them so."""
    imbalance_L = final.imbalance_L
    worst = int(np.nanargmax(imbalance_L))
    layer, steps = run_layer(run, worst), last_steps(final.num_steps)
    if final.imbalance < EVEN:
        return [
            f"Rows were spread evenly over the processes in {steps}: the busiest of a step computed "
            f"{times(final.imbalance)} the mean, and {times(float(imbalance_L[worst]))} in layer {layer}, the least even one."
        ]
    told = (
        f"In {steps} the busiest process of a step computed {times(float(imbalance_L[worst]))} the mean rows in layer "
        f"{layer}; all layers together, steps waited for {times(final.imbalance)} the rows of an even spread."
    )
    rows_R = final.rows_RL[:, worst]
    if not final.over and np.nansum(rows_R) > 0:
        busiest = int(np.nanargmax(rows_R))
        share = float(rows_R[busiest] / np.nanmean(rows_R))
        told += f" Over all these steps rank {busiest} had most in that layer, {times(share)} the mean."
    return [told, *_advice(run, worst)]


def _advice(run: Run, worst: int) -> list[str]:
    """For uneven rows; ``worst``: the least even layer."""
    parallel = _parallel(run)
    if parallel is None:
        return []
    told = []
    if not parallel.rebalance_every:
        told.append("--set parallel.rebalance_every=100 moves experts between steps, which changes no result.")
    else:
        told.append(
            f"parallel.rebalance_every={parallel.rebalance_every} did not keep up with the load: a smaller number follows it "
            "closer, and a stronger balancing loss leaves less to follow."
        )
    load_E = run.final_load()[run.starts[worst] : run.starts[worst + 1]]
    alone = float(load_E.max() * parallel.ep / load_E.sum()) if load_E.sum() else 0.0
    if alone > EVEN and not parallel.replicas and not parallel.shadow:
        told.append(
            f"The busiest expert of layer {run_layer(run, worst)} alone has {times(alone)} the mean rows of a process, and "
            f"moving experts cannot get below that: parallel.replicas={parallel.ep} gives busy experts copies elsewhere."
        )
    return told


def _may_chunk(run: Run, travel: float) -> bool:
    parallel = _parallel(run)
    return (
        parallel is not None
        and travel >= 0.2
        and parallel.chunks == 1
        and not parallel.padded
        and parallel.exchange == "flat"
    )


def last_steps(count: int) -> str:
    """ "the last step", "the last 20 steps"."""
    return "the last step" if count == 1 else f"the last {plural(count, 'step')}"


def _size(count: float) -> str:
    size, unit = unit_of(count)
    return f"{count / size:.3g} {unit}"


def unit_of(count: float) -> tuple[float, str]:
    """A size and its name in which so many bytes are at least 1."""
    return next(((size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= size), (1.0, "B"))


def _parallel(run: Run) -> ParallelConfig | None:
    try:
        return from_dict(ParallelConfig, run.config.get("parallel"), "parallel")
    except MoesaicError:  # of another version
        return None


def even_bytes(run: Run) -> float | None:
    """What the mean process sends in all-to-alls of a step under uniform load (``cost/layout.py``); None without any, and where
    the config of the run does not tell: it is of another version, or only torchrun knew the size of nodes.
    """
    parallel = _parallel(run)
    if parallel is None or (parallel.exchange == "hierarchical" and parallel.ranks_per_node is None):
        return None
    names = ("batch_size", "accumulate", "seq_len", "dtype", "recompute")
    if not run.config.keys() >= {*names, "model"}:
        return None
    try:
        model = from_dict(ModelConfig, run.config["model"], "model")
        training = from_dict(Training, {name: run.config[name] for name in names})
        found = forecast(model, parallel, run.processes, training)
    except MoesaicError:
        return None
    return sum(len(group.ranks) * group.traffic.exchange for group in found.groups) / run.processes or None
