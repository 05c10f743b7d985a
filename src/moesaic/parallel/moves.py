"""What happens to experts between the steps of a run: moved by load (``rebalance.py``), then given shadows (``shadow.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.parallel.apply import Spread
from moesaic.parallel.rebalance import Rebalancer, of_all_stages


class ExpertMoves:
    """The movers of a spread model, as its config asks for them; of a run of one process none."""

    def __init__(self, spread: Spread | None) -> None:
        self.spread = spread
        every = 0 if spread is None else spread.config.rebalance_every
        self.rebalancer = None if spread is None or not every else Rebalancer(spread, every)

    def after_step(self, optimizer: torch.optim.Optimizer, step: int, loads: Mapping[int, Tensor]) -> dict[str, Any]:
        """Once per step, on all ranks; see ``Rebalancer.after_step`` and ``Shadows.decide``.

        Returns what happened, for the step's record: "rebalanced" layers, "shadows" of the next step by layer.
        """
        found: dict[str, Any] = {}
        if self.rebalancer is not None:
            found["rebalanced"] = self.rebalancer.after_step(optimizer, step, loads)
        if self.spread is not None and self.spread.shadows is not None:
            self.spread.shadows.decide()
            found["shadows"] = self._shadows()
        return {what: value for what, value in found.items() if value}

    def state_dict(self) -> dict[str, Any]:
        """JSON data for a checkpoint, the same on all ranks, which must ask together."""
        found = {} if self.rebalancer is None else {"rebalancer": self.rebalancer.state_dict()}
        if self.spread is not None and self.spread.shadows is not None:
            found["shadows"] = self._shadows()
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, which may hold other things, too. Raises ``CheckpointError`` for what is none."""
        for name in ("rebalancer", "shadows"):
            if not isinstance(state.get(name, {}), dict):
                raise CheckpointError(f"The checkpoint's {name} should be named by layer, not {state[name]!r:.80}.")
        if self.rebalancer is not None:
            self.rebalancer.load_state_dict(state.get("rebalancer", {}))
        if self.spread is not None and self.spread.shadows is not None:
            self.spread.shadows.load(state.get("shadows", {}))

    def _shadows(self) -> dict[str, list[int]]:
        assert self.spread is not None
        assert self.spread.shadows is not None
        mine = {str(layer): list(experts) for layer, experts in self.spread.shadows.chosen.items()}
        return of_all_stages(mine, self.spread, "shadows")
