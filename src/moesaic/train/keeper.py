"""Where a run's checkpoints are written and found, in a run of one process or of many.

One process writes a snapshot (``train/snapshot.py``); many write a sharded one (``train/sharded``) in the background. Both lie
in ``checkpoints/step-XXXXXXXX``, and either kind is resumed by any number of processes in any layout. Random generators go on
where they were if there are as many parts of the batch and stages as before; otherwise each process starts from a seed made of
the run's, the step and its place. Looking, reading and writing go over a group of their own, as patient as a disk may be slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.checkpoint.parts import is_sharded
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
from moesaic.train.sharded.checkpoint import EXTRA
from moesaic.train.sharded.entries import Tensors
from moesaic.train.sharded.optimizer import pack_optimizer
from moesaic.train.sharded.snapshots import (
    model_files,
    newest_checkpoint,
    restore_sharded_snapshot,
    save_sharded_snapshot,
)
from moesaic.train.snapshot import restore_snapshot, save_snapshot
from moesaic.train.team import Team, hash_of

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

    @cached_property
    def _group(self) -> Group:
        """All processes, for checkpoints alone; all of them ask for it first at the same time."""
        here = self.team.here
        with here.watch.collective("group of checkpoints", "all", tuple(range(here.world)), 0):
            group = saving_group(range(here.world), here.rank)
        group.watch.beside(here.watch)
        return group

    # ---- finding -------------------------------------------------------------------------------------------------

    def find(self, resume: bool) -> Found | None:
        """The newest whole checkpoint if the run is resumed. Raises ``MoesaicError`` where a new run would write over one."""

        def look() -> bool:
            if not resume and (self.folder / "checkpoints").exists():
                raise MoesaicError(
                    f"{self.folder} already holds a training run; add --resume to go on with it, or choose another --out."
                )
            return any((self.folder / "checkpoints").glob("step-*"))

        some = self.team.from_first(look, "earlier checkpoints")
        if not resume:
            return None
        found = newest_checkpoint(self.folder, self._group)
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
        state = read_json(found.folder / EXTRA).get("state")
        state = state if isinstance(state, dict) else {}
        same = state.get("parts") == self._parts
        if not same:
            self.team.say(
                "Random numbers go on from a new seed: the parts of the batch or the stages are other than before."
            )
        if spread is None and not found.sharded:
            saved = restore_snapshot(found.folder, model, optimizer)
            if not same:
                self._seed(saved["step"])
        else:
            tensors, trained = held_tensors(model, spread)
            on_device = state.get("device") == self.team.device.type
            states = self._random(on_device) if same else {}
            wanted = {**tensors, **states}
            saved = restore_sharded_snapshot(
                found.folder, wanted, optimizer, trained, group=self._group, skip=(_RANDOM,)
            )
            self._seed(saved["step"])
            self._set_random({name: x for name, (_, x) in states.items()})
        if saved["corpus"] != self.corpus.fingerprint:
            raise CheckpointError(
                f"{self.folder} was trained on other text than it is resumed with: the files, their options or the tokenizer "
                "changed. Restore them, or start a new run."
            )
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
        state = {**state, "parts": self._parts, "device": self.team.device.type}
        if spread is None:
            save_snapshot(self.folder, step, model, optimizer, state, tokenizer, keep, is_best=is_best)
            return
        layout = self.team.layout.describe()
        tensors, trained = held_tensors(model, spread)
        packed, moments = pack_optimizer(optimizer, trained)
        files = model_files(model, tokenizer)
        if self._saver is None:
            self._saver = AsyncSaver(self._group)

        def write(tensors: Tensors, extra: dict[str, Any], group: Group) -> Path:
            return save_sharded_snapshot(
                self.folder,
                step,
                tensors,
                extra["state"],
                optimizer=extra["optimizer"],
                group=group,
                files=files,
                layout=layout,
                keep_last=keep,
                is_best=is_best,
            )

        self._saver.save(write, {**tensors, **moments, **self._random()}, {"state": state, "optimizer": packed})
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

    @property
    def _parts(self) -> list[int]:
        """Stages and parts of the batch: processes that differ in either draw numbers of their own."""
        return [self.team.layout.pp, self.team.layout.dp]

    def _random(self, with_device: bool = True) -> Tensors:
        """The states of this process's generators by their names in a checkpoint: as in a run of one process, those of later
        stages and parts under their place. Ranks that slice one layer draw alike.
        """
        at = self.team.layout.coordinates(self.team.here.rank)
        place = "" if not at["pp"] and not at["dp"] else f"part-{at['pp']}-{at['dp']}/"
        states = {f"{_RANDOM}{place}cpu": torch.get_rng_state()}
        if with_device and self.team.device.type == "cuda":
            states[f"{_RANDOM}{place}cuda/0"] = torch.cuda.get_rng_state(self.team.device)
        return {name: (whole(name, x.shape, "dense"), x) for name, x in states.items()}

    def _set_random(self, states: dict[str, Tensor]) -> None:
        """Go on from what ``_random`` gave."""
        for name, x in states.items():
            if name.endswith("/cpu"):
                torch.set_rng_state(x)
            else:
                torch.cuda.set_rng_state(x, self.team.device)

    def _seed(self, step: int) -> None:
        self.team.seed(hash_of(self.config.seed + 1, step))


def held_tensors(model: Decoder, spread: Spread | None) -> tuple[Tensors, Tensors]:
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
