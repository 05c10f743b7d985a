"""Where a run's checkpoints are written and found, in a run of one process or of many.

One process writes a snapshot (``train/snapshot.py``); many write a sharded one (``train/sharded``) in the background. Both lie
in ``checkpoints/step-XXXXXXXX``, and either kind is resumed by any number of processes in any layout. Random generators go on
where they were if there are as many parts of the batch and stages as before; otherwise each process starts from a seed made of
the run's, the step and its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.checkpoint.untrusted import read_json
from moesaic.data.corpus import Corpus
from moesaic.errors import CheckpointError, MoesaicError
from moesaic.models.decoder import Decoder
from moesaic.parallel.apply import Spread, hold
from moesaic.parallel.comm import Group
from moesaic.parallel.held import whole
from moesaic.parallel.rebalance import saved_placements
from moesaic.plan.placement import Placement
from moesaic.train.config import TrainConfig
from moesaic.train.sharded.background import AsyncSaver, saving_group
from moesaic.train.sharded.checkpoint import EXTRA, is_sharded
from moesaic.train.sharded.entries import Tensors
from moesaic.train.sharded.optimizer import pack_optimizer
from moesaic.train.sharded.snapshots import (
    model_files,
    newest_checkpoint,
    restore_sharded_snapshot,
    save_sharded_snapshot,
)
from moesaic.train.snapshot import random_states, restore_snapshot, save_snapshot, set_random_states
from moesaic.train.team import Team, everyone_of, hash_of
from moesaic.train.whole import restore_whole

_RANDOM = "random/"


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from."""

    folder: Path
    sharded: bool


class Keeper:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, config: TrainConfig, corpus: Corpus, team: Team) -> None:
        self.folder, self.config, self.corpus, self.team = folder, config, corpus, team
        self._saver: AsyncSaver | None = None

    # ---- finding -------------------------------------------------------------------------------------------------

    def find(self, resume: bool) -> Found | None:
        """The newest whole checkpoint if the run is resumed. Raises ``MoesaicError`` where a new run would write over one."""
        everyone = everyone_of(self.team.here)

        def look() -> bool:
            if not resume and (self.folder / "checkpoints").exists():
                raise MoesaicError(
                    f"{self.folder} already holds a training run; add --resume to go on with it, or choose another --out."
                )
            return any((self.folder / "checkpoints").glob("step-*"))

        some = self.team.from_first(look, "earlier checkpoints")
        if not resume:
            return None
        found = newest_checkpoint(self.folder, everyone)
        if found is None and some:
            raise CheckpointError(
                f"Every checkpoint in {self.folder / 'checkpoints'} is damaged; restore one from a copy, or start a new run."
            )
        if found is None:
            self.team.say(f"{self.folder} has no checkpoint yet, so the run starts from step 0.")
            return None
        return Found(found, is_sharded(found))

    def placements(self, found: Found) -> dict[int, Placement]:
        """Where experts were, if as many ranks share them now."""
        state = read_json(found.folder / EXTRA).get("state", {})
        saved = state.get("rebalancer") if isinstance(state, dict) else None
        return saved_placements(saved, self.team.layout.ep) if isinstance(saved, dict) else {}

    def restore(
        self, found: Found, model: Decoder, optimizer: torch.optim.Optimizer, spread: Spread | None
    ) -> dict[str, Any]:
        """Put everything saved back; returns the caller's state with "step". Raises ``CheckpointError`` if it does not fit."""
        if not found.sharded and spread is None:
            saved = restore_snapshot(found.folder, model, optimizer)
        elif not found.sharded:
            saved = restore_whole(found.folder, *_held_tensors(model, spread), optimizer, everyone_of(self.team.here))
            self._seed(saved["step"])
        else:
            saved = self._restore_sharded(found, model, optimizer, spread)
        if saved["corpus"] != self.corpus.fingerprint:
            raise CheckpointError(
                f"{self.folder} was trained on other text than it is resumed with: the files, their options or the tokenizer "
                "changed. Restore them, or start a new run."
            )
        return saved

    def _restore_sharded(
        self, found: Found, model: Decoder, optimizer: torch.optim.Optimizer, spread: Spread | None
    ) -> dict[str, Any]:
        tensors, trained = _held_tensors(model, spread)
        state = read_json(found.folder / EXTRA).get("state")
        parts = state.get("parts") if isinstance(state, dict) else None
        same = parts == [self.team.layout.pp, self.team.layout.dp]
        states = {name: (whole(name, x.shape, "dense"), x) for name, x in self._random().items()} if same else {}
        saved = restore_sharded_snapshot(
            found.folder,
            {**tensors, **states},
            optimizer,
            trained,
            group=everyone_of(self.team.here),
            skip=() if same else (_RANDOM,),
        )
        if same:
            set_random_states({self._plain(name): x for name, (_, x) in states.items()})
        else:
            self._seed(saved["step"])
        return saved

    # ---- saving --------------------------------------------------------------------------------------------------

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
        """Write a checkpoint. ``wait``: it must be whole when this returns; else many processes write it in the background.

        Raises what the one before raised, if it failed by now.
        """
        keep, tokenizer = self.config.keep_last, self.corpus.tokenizer
        if spread is None:
            save_snapshot(self.folder, step, model, optimizer, state, tokenizer, keep, is_best=is_best)
            return
        layout = self.team.layout
        tensors, trained = _held_tensors(model, spread)
        packed, moments = pack_optimizer(optimizer, trained)
        states = {name: (whole(name, x.shape, "dense"), x) for name, x in self._random().items()}
        files = model_files(model, tokenizer)
        if self._saver is None:
            everyone = self.team.layout.world
            self._saver = AsyncSaver(saving_group(range(everyone), self.team.here.rank))

        def write(tensors: Tensors, extra: dict[str, Any], group: Group) -> Path:
            return save_sharded_snapshot(
                self.folder,
                step,
                tensors,
                extra["state"],
                optimizer=extra["optimizer"],
                group=group,
                files=files,
                layout=layout.describe(),
                keep_last=keep,
                is_best=is_best,
            )

        extra = {"state": {**state, "parts": [layout.pp, layout.dp]}, "optimizer": packed}
        self._saver.save(write, {**tensors, **moments, **states}, extra)
        if wait:
            self._saver.wait()

    def check(self) -> None:
        """Raise what the save in the background raised, if it has failed by now."""
        if self._saver is not None:
            self._saver.check()

    def close(self) -> None:
        """Wait for what is still being written."""
        if self._saver is not None:
            self._saver.close()

    # ---- random generators ---------------------------------------------------------------------------------------

    def _random(self) -> dict[str, Tensor]:
        """This process's random states by their names in a checkpoint: those of the first part as of one process, the others by
        stage and part. Ranks that slice one layer draw alike.
        """
        at = self.team.layout.coordinates(self.team.here.rank)
        place = "" if not at["pp"] and not at["dp"] else f"part-{at['pp']}-{at['dp']}/"
        return {name.replace(_RANDOM, f"{_RANDOM}{place}"): x for name, x in random_states().items()}

    def _plain(self, name: str) -> str:
        """The name ``random_states`` has for it."""
        kept = [part for part in name.split("/") if not part.startswith("part-")]
        return "/".join(kept)

    def _seed(self, step: int) -> None:
        self.team.say(
            "Random numbers go on from a new seed: the parts of the batch or the stages are other than before."
        )
        self.team.seed(hash_of(self.config.seed + 1, step))


def _held_tensors(model: Decoder, spread: Spread | None) -> tuple[Tensors, Tensors]:
    """All that is saved of a model besides the optimiser's state, and the parameters among it, with what of each is here."""
    held = hold(model) if spread is None else spread.held
    tensors = {name: (held[name], x) for name, x in _stored(model)}
    trained = {n: (h, x) for n, (h, x) in tensors.items() if isinstance(x, nn.Parameter) and x.requires_grad}
    return tensors, trained


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers; a tied one comes once."""
    seen = set()
    for name, x in model.state_dict(keep_vars=True).items():
        if id(x) not in seen:
            seen.add(id(x))
            yield name, x
