"""What a run carries from step to step, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.train.evaluate import Evaluation


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        folder: the run folder. reason: "done" or "interrupted".
        step, tokens, seconds: reached in all, earlier sittings included; seconds of steps alone, without validation.
        val_loss, best_val_loss: last and best validation loss in nats per token; None if never measured.
        tokens_per_s: mean over these.
        evaluation: the last validation, or None.
    """

    folder: Path
    reason: str
    step: int
    tokens: int
    seconds: float
    val_loss: float | None
    best_val_loss: float | None
    tokens_per_s: float
    evaluation: Evaluation | None

    def record(self) -> dict[str, Any]:
        """Plain JSON data."""
        values = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("folder", "evaluation")
        }
        return {"folder": str(self.folder), **values}


@dataclass
class RunState:
    """What a run carries from step to step besides model and optimiser; all of it is in every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # in steps: validation and checkpoints left out, so that sparse and dense compare
    best_val_loss: float | None = None
    best_saved_loss: float | None = None
    val_loss: float | None = None
    last_used: dict[str, list[int]] | None = None
