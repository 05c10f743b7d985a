"""The processes of a run, or the only one: who writes, which rows are whose, what all must decide alike.

>>> team = Team(here, config.parallel)          # ``here`` of start_processes; None is one process
>>> team.say("printed once")
>>> corpus = in_turn(everyone_of(here), load, "the corpus")       # the first process before the others, for caches it fills
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moesaic.layout import Layout, ParallelConfig
from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder
from moesaic.parallel.agree import Agreement
from moesaic.parallel.apply import Spread, apply, compile_dense
from moesaic.parallel.build import build_spread
from moesaic.parallel.comm import Group
from moesaic.parallel.layers import name_layers
from moesaic.parallel.start import Started
from moesaic.parallel.world import World
from moesaic.plan.peers import ALONE, Peers
from moesaic.plan.placement import Placement
from moesaic.train.sharded.agree import first_says, together

T = TypeVar("T")


class Team:
    """One process and its peers.

    Args:
        here: this process among the others. config: how they share the work. say: prints; silent on all but the first.

    Attributes:
        layout, world: sizes and groups; ``world`` is None in a run of one process. device: of this process.
    """

    def __init__(
        self, here: Started | None, config: ParallelConfig, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.here, self.config = here or Started(), config
        self.layout = Layout.of(config, self.here.world)
        self.device = self.here.device if here is not None else default_device()
        self.world: World | None = None
        if self.here.world > 1:
            nodes = (config.ranks_per_node or self.here.local_world) if config.exchange == "hierarchical" else None
            self.world = World(self.layout, self.here.rank, self.here.watch, ranks_per_node=nodes)
        self.first = self.here.rank == 0
        self.say: Callable[[str], None] = say if self.first else lambda _: None

    @property
    def peers(self) -> Peers:
        """The processes with the other parts of the batch."""
        return ALONE if self.world is None else self.world.peers

    @property
    def part(self) -> int:
        """Which part of every micro-batch's rows is this process's."""
        return 0 if self.world is None else self.world["dp"].index

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return self.layout.dp

    def build(
        self,
        config: ModelConfig,
        recompute: Callable[[Decoder], None] | None,
        placements: dict[int, Placement] | None = None,
    ) -> tuple[Decoder, Spread | None]:
        """A new model, drawn from the random state as it is, on this process's device: all of it in a run of one process, else
        the part that is here, without ever holding the whole.
        """
        if self.world is None:
            model = build_model(config).to(self.device)
            return model, self.spread(model, recompute)
        spread = build_spread(
            config, self.world, self.config, device=self.device, recompute=recompute, placements=placements
        )
        name_layers(spread.model, self.world.watch)
        return spread.model, spread

    def spread(
        self,
        model: Decoder,
        recompute: Callable[[Decoder], None] | None,
        placements: dict[int, Placement] | None = None,
    ) -> Spread | None:
        """A whole model over all processes, in place; None (and the model recomputing) in a run of one."""
        if self.world is None:
            if recompute is not None:
                recompute(model)
            if self.config.compile:
                compile_dense(model)
            return None
        spread = apply(model, self.world, self.config, recompute=recompute, placements=placements)
        name_layers(model, self.world.watch)
        return spread

    def seed(self, seed: int) -> None:
        """Seed what is drawn while training: parts of the batch and stages draw their own, slices of a layer the same."""
        at = self.layout.coordinates(self.here.rank)
        torch.manual_seed(seed if not at["dp"] and not at["pp"] else hash_of(seed, at["pp"], at["dp"]))

    def agreement(self, stop: Callable[[], bool]) -> Agreement:
        """On stopping and on refusing a step; ``stop``: whether this process was asked to."""
        return Agreement(None if self.world is None else self.world.everyone, self.device, stop)

    def all_values(self, value: Any, what: str) -> list[Any]:
        """What every process says, JSON data."""
        return [value] if self.world is None else self.world.everyone.values(value, what=what, device=self.device)

    def together(self, work: Callable[[], T], what: str) -> T:
        """What ``work`` gives on every process; an error of one is one of all, in the same words."""
        return work() if self.world is None else together(self.world.everyone, what, work)

    def from_first(self, work: Callable[[], T], what: str) -> T:
        """What ``work`` gives on the first process, JSON data, to all; an error there is one of all, in the same words."""
        return work() if self.world is None else first_says(self.world.everyone, what, work)

    def own_folder(self, folder: Path) -> Path:
        """A folder for what every process writes by itself."""
        return folder if self.world is None else folder / f"rank-{self.here.rank:05d}"


def everyone_of(here: Started) -> Group:
    """All processes, before there is a layout."""
    handle = dist.group.WORLD if here.world > 1 else None
    return Group("all", range(here.world), here.rank, handle, here.watch)


def in_turn(everyone: Group, work: Callable[[], T], what: str) -> T:
    """What ``work`` gives on every process; the others begin when the first is done, and find the caches it filled."""
    first = everyone.index == 0
    mine = together(everyone, what, lambda: work() if first else None)
    theirs = together(everyone, what, lambda: None if first else work())
    found = mine if first else theirs
    assert found is not None
    return found


def default_device() -> torch.device:
    """One GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hash_of(*numbers: int) -> int:
    """A seed below 2**63 from several numbers (splitmix64's mixing)."""
    value = 0
    for number in numbers:
        value = (value + number + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        value ^= value >> 31
    return value >> 1
