"""The records of a run for metrics.jsonl: what it is, what a step did, and what every process did in it (``ranks.py``)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.config import to_dict
from moesaic.cost.count import count_parameters
from moesaic.models.build import build_model
from moesaic.parallel.apply import Spread
from moesaic.plan.read import num_logged
from moesaic.train.config import TrainConfig
from moesaic.train.ranks import NOT_HERE, to_entries
from moesaic.train.reading import StepReading
from moesaic.train.result import RunState
from moesaic.train.team import Team


def run_record(config: TrainConfig, folder: Path, name: str, domains: tuple[str, ...], team: Team) -> dict[str, Any]:
    """What a run is."""
    model = build_model(config.model, device="meta")  # whole, where this process may hold a part
    sparse = model.moe_layers()
    counts = count_parameters(model)
    return {
        "kind": "run",
        "time": time.time(),
        "name": name or folder.name,
        "config": to_dict(config),
        "params_total": counts.total,
        "params_active": counts.active,
        "layers": list(sparse),
        "num_experts": [num_logged(layer.router.num_experts) for layer in sparse.values()],
        "routers": sorted({config.model.moe.router.name} if sparse and config.model.moe is not None else set()),
        "domains": list(domains),
        "model": "sparse" if sparse else "dense",
        "dead_window": config.dead_window,
        "processes": team.layout.world,
        "layout": team.layout.describe(),
    }


def step_record(
    config: TrainConfig, state: RunState, reading: StepReading, lr: float, seconds: float
) -> dict[str, Any]:
    """What a step did; ``state`` is brought up to date with it."""
    positions = config.batch_size * config.accumulate * config.seq_len
    state.tokens += positions
    state.seconds += seconds
    return {
        "kind": "step",
        "step": state.step,
        "tokens": state.tokens,
        "time_s": state.seconds,
        "loss": reading.loss,
        "lm_loss": reading.lm_loss,
        "lr": lr,
        "grad_norm": reading.grad_norm,
        "tokens_per_s": positions / seconds,
        "losses": reading.losses,
        "dead": _dead(config, state, reading),
        **reading.record(),
    }


def _dead(config: TrainConfig, state: RunState, reading: StepReading) -> list[int]:
    """Experts of each layer that no token chose in the last ``dead_window`` steps."""
    used = state.last_used or {}
    dead = []
    for layer, mine in reading.layers.items():
        last_E: Tensor = torch.tensor(used.get(str(layer), [0] * len(mine.load_E)))
        last_E = torch.where(mine.load_E.cpu() > 0, state.step, last_E)
        used[str(layer)] = last_E.tolist()
        dead.append(int((state.step - last_E >= config.dead_window).sum()))
    state.last_used = used
    return dead


def begin_step(team: Team) -> None:
    """Forget the collectives since the last step: those of the start, of validation and of checkpoints are in none."""
    if team.world is not None:
        team.world.watch.take()


def ranks_record(team: Team, spread: Spread | None, seconds: float) -> dict[str, Any]:
    """{"ranks": what every process did since ``begin_step``}, for the one log (see ``ranks.py``: one dictionary per process, or
    three of all where there are very many); {} in a run of one process. All processes call it together.

    ``seconds``: what the step took this process.
    """
    if team.world is None or spread is None:
        return {}
    spent, rows = team.world.watch.take(), spread.take_rows()
    travel = [s for what, s in spent.items() if what.startswith(("dispatch", "combine"))]
    others = [s for what, s in spent.items() if not what.startswith(("dispatch", "combine"))]
    mine = [seconds, *(sum(s.seconds for s in kind) for kind in (travel, others))]
    mine += [sum(s.sent_bytes for s in kind) for kind in (travel, others)]
    mine += [rows.get(str(layer), NOT_HERE) for layer in spread.sizes]
    figures_F = torch.tensor(mine, dtype=torch.float64, device=team.device)  # holds counts exactly
    figures_RF = torch.stack(team.world.everyone.all_gather(figures_F, what="figures of the step")).cpu()
    return {"ranks": to_entries(figures_RF, list(spread.sizes))}
