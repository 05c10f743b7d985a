"""Where a run's checkpoints are written and found, in a run of one process or of many.

One process writes a snapshot (``train/snapshot.py``); many write a sharded one. Both lie in ``checkpoints/step-XXXXXXXX``, and
either kind is resumed by any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.data.corpus import Corpus
from moesaic.errors import CheckpointError, MoesaicError
from moesaic.models.decoder import Decoder
from moesaic.parallel.apply import Spread
from moesaic.plan.placement import Placement
from moesaic.train.config import TrainConfig
from moesaic.train.snapshot import latest_snapshot, restore_snapshot, save_snapshot
from moesaic.train.team import Team


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from."""

    folder: Path


class Keeper:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, config: TrainConfig, corpus: Corpus, team: Team) -> None:
        self.folder, self.config, self.corpus, self.team = folder, config, corpus, team

    def find(self, resume: bool) -> Found | None:
        """The newest whole checkpoint if the run is resumed. Raises ``MoesaicError`` where a new run would write over one."""

        def look() -> str | None:
            if not resume and (self.folder / "checkpoints").exists():
                raise MoesaicError(
                    f"{self.folder} already holds a training run; add --resume to go on with it, or choose another --out."
                )
            if not resume:
                return None
            found = latest_snapshot(self.folder)
            if found is None and any((self.folder / "checkpoints").glob("step-*")):
                raise CheckpointError(
                    f"Every checkpoint in {self.folder / 'checkpoints'} is damaged; restore one from a copy, or start a new "
                    "run."
                )
            if found is None:
                self.team.say(f"{self.folder} has no checkpoint yet, so the run starts from step 0.")
            return None if found is None else str(found)

        path = self.team.from_first(look, "the newest checkpoint")
        return None if path is None else Found(Path(path))

    def placements(self, found: Found) -> dict[int, Placement]:
        """Where experts were, if as many ranks share them now."""
        return {}

    def restore(
        self, found: Found, model: Decoder, optimizer: torch.optim.Optimizer, spread: Spread | None
    ) -> dict[str, Any]:
        """Put everything saved back; returns the caller's state with "step"."""
        saved = restore_snapshot(found.folder, model, optimizer)
        if saved["corpus"] != self.corpus.fingerprint:
            raise CheckpointError(
                f"{self.folder} was trained on other text than it is resumed with: the files, their options or the tokenizer "
                "changed. Restore them, or start a new run."
            )
        return saved

    def save(
        self,
        step: int,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        spread: Spread | None,
        state: dict[str, Any],
        *,
        is_best: bool,
        wait: bool,
    ) -> None:
        """Write a checkpoint. ``wait``: it must be whole when this returns."""
        save_snapshot(
            self.folder, step, model, optimizer, state, self.corpus.tokenizer, self.config.keep_last, is_best=is_best
        )

    def close(self) -> None:
        """Wait for what is still being written."""
