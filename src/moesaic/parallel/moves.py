"""What happens to experts between the steps of a run: moved by load (``rebalance.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesaic.parallel.apply import Spread
from moesaic.parallel.rebalance import Rebalancer


class ExpertMoves:
    """The movers of a spread model, as its config asks for them; of a run of one process none."""

    def __init__(self, spread: Spread | None) -> None:
        every = 0 if spread is None else spread.config.rebalance_every
        self.rebalancer = None if spread is None or not every else Rebalancer(spread, every)

    def after_step(self, optimizer: torch.optim.Optimizer, step: int, loads: Mapping[int, Tensor]) -> dict[str, Any]:
        """Once per step, on all ranks; see ``Rebalancer.after_step``. Returns what happened, for the step's record."""
        if self.rebalancer is None:
            return {}
        moved = self.rebalancer.after_step(optimizer, step, loads)
        return {"rebalanced": moved} if moved else {}

    def state_dict(self) -> dict[str, Any]:
        """JSON data for a checkpoint, the same on all ranks, which must ask together."""
        return {} if self.rebalancer is None else {"rebalancer": self.rebalancer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, which may hold other things, too. Raises ``CheckpointError`` for what is none."""
        if self.rebalancer is not None and "rebalancer" in state:
            self.rebalancer.load_state_dict(state["rebalancer"])
