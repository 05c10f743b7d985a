"""Experts laid out anew while a model is trained, by the load of its last steps (``parallel.rebalance_every``).

>>> balancer = Rebalancer(spread, every=100)
>>> figures = balancer.after_step(optimizer, step, {layer: load_E})       # after each step, on all ranks alike
>>> state = balancer.state_dict()                                         # JSON data for a checkpoint, the same on all ranks
>>> apply(model, world, config, placements=saved_placements(state, ep))   # and then balancer.load_state_dict(state)

All ranks are given the load of the whole batch and do the same arithmetic, so they agree without a word. Nothing but the
time of steps depends on where experts are.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.parallel.apply import Spread
from moesaic.parallel.migrate import move_experts
from moesaic.plan.placement import Placement
from moesaic.plan.rebalance import LoadAverage, improve, rank_loads

# The busiest rank's load must fall by this share to be worth moving weights and moments for.
LEAST_GAIN = 0.02


class Rebalancer:
    """Watches the load of this process's sparse layers and moves their experts.

    Args:
        every: steps between looks; 0 never looks. decay: of the average load (``plan.rebalance.LoadAverage``).
        least_gain: see ``plan.rebalance.improve``.
    """

    def __init__(self, spread: Spread, every: int, *, decay: float = 0.9, least_gain: float = LEAST_GAIN) -> None:
        self.spread, self.every, self.least_gain = spread, every, least_gain
        self.averages = {
            layer: LoadAverage(placement.num_experts, decay) for layer, placement in spread.placements.items()
        }

    def after_step(
        self, optimizer: torch.optim.Optimizer, step: int, loads: Mapping[int, Tensor]
    ) -> list[dict[str, Any]]:
        """Take the load of step ``step`` (from 1) in, and every ``every`` steps move experts where that helps.

        Args:
            loads: (E,) or more rows chosen for each expert of the whole batch by layer, special experts last, of at least the
                layers that are here.

        Returns for each layer that was laid out anew, of all pipeline stages: "layer", "moved" slots, "bytes" sent by all
        processes, "rows" of the busiest rank per step as the average load has it and "rows_before".
        """
        if not self.every:
            return []
        for layer, average in self.averages.items():
            average.update(loads[layer][: self.spread.placements[layer].num_experts])
        if step % self.every:
            return []
        world = self.spread.world
        found: list[dict[str, Any]] = []
        for layer, average in self.averages.items():
            old, load_E = self.spread.placements[layer], average.load_E.tolist()
            new = improve(old, load_E, least_gain=self.least_gain)
            if new is old:
                continue
            moved = move_experts(self.spread, optimizer, layer, new)
            copies = world["edp"].size  # each has its share of the batch
            found.append(
                {
                    "layer": layer,
                    "moved": len(moved.moves),
                    "bytes": sum(moved.sent_bytes) * copies * world["etp"].size,
                    "rows": max(rank_loads(new, load_E)) / copies,
                    "rows_before": max(rank_loads(old, load_E)) / copies,
                }
            )
        return list(
            of_all_stages({str(entry["layer"]): entry for entry in found}, self.spread, "experts moved").values()
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON data for ``load_state_dict`` and ``saved_placements``, of all stages. All ranks must ask at the same time."""
        mine = {}
        for layer, average in self.averages.items():
            state = average.state_dict()
            mine[str(layer)] = {
                "load": state["sum"].tolist(),
                "weight": float(state["weight"]),
                "placement": self.spread.placements[layer].to_list(),
            }
        return of_all_stages(mine, self.spread, "state of the rebalancer")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the averages of ``state``; layers it lacks start anew. Where experts are is no matter of this.

        Raises ``CheckpointError`` for anything that ``state_dict`` did not make.
        """
        for layer, average in self.averages.items():
            saved = state.get(str(layer))
            if saved is not None:
                load_E, weight = _averaged(saved)
                average.load_state_dict(
                    {name: torch.tensor(x, dtype=torch.float64) for name, x in (("sum", load_E), ("weight", weight))}
                )


def saved_placements(state: Mapping[str, Any], ranks: int) -> dict[int, Placement]:
    """Where the experts of a checkpoint were, by layer, from ``Rebalancer.state_dict``; of layers shared by ``ranks`` ranks.

    Raises ``CheckpointError`` for anything else, ``ConfigError`` for placements that are none.
    """
    found = {}
    for layer, saved in state.items():
        load_E, _ = _averaged(saved)
        if not layer.isdecimal() or "placement" not in saved:
            raise CheckpointError(f"The state of the rebalancer holds no placement for layer {layer!r:.80}.")
        placement = Placement.from_list(saved["placement"], len(load_E))
        if placement.num_ranks == ranks:
            found[int(layer)] = placement
    return found


def of_all_stages(mine: dict[str, Any], spread: Spread, what: str) -> dict[str, Any]:
    """JSON data by layer of every pipeline stage together, in the order of layers."""
    device = next(spread.model.parameters()).device
    stages = spread.world["pp"].values(mine, what=what, device=device)
    found = {layer: value for stage in stages for layer, value in stage.items()}
    return {layer: found[layer] for layer in sorted(found, key=int)}


def _averaged(saved: Any) -> tuple[list[float], float]:
    if isinstance(saved, dict):
        load_E, weight = saved.get("load"), saved.get("weight")
        numbers = isinstance(load_E, list) and load_E and all(type(n) in (int, float) for n in [*load_E, weight])
        if numbers and isinstance(load_E, list):
            return load_E, float(weight or 0.0)
    raise CheckpointError(f"The state of the rebalancer has a load and its weight for every layer, not {saved!r:.80}.")
