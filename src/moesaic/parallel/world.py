"""This process among the others: a group for every axis of the layout, and what the rest of moesaic may ask of them.

>>> world = World(Layout.of(config, 4), rank)          # torch.distributed is initialised
>>> world["ep"].size, world["ep"].index
>>> world.peers.total(counts_E)                        # over all parts of the batch
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moesaic.errors import ConfigError
from moesaic.layout import Axis, Layout
from moesaic.parallel.comm import Group
from moesaic.parallel.watch import Watch
from moesaic.plan.peers import Peers

AXES: tuple[Axis, ...] = ("pp", "dp", "tp", "ep", "etp", "edp")


class World:
    """The groups of one process.

    Args:
        layout: the sizes. rank: this process. watch: sees every collective. ranks_per_node: makes the groups of a two-level
            exchange, ``inside`` and ``between``; None makes none.

    Every process of the run must build it, with the same arguments, at the same time.
    """

    def __init__(
        self, layout: Layout, rank: int = 0, watch: Watch | None = None, *, ranks_per_node: int | None = None
    ) -> None:
        self.layout, self.rank = layout, rank
        self.watch = watch or Watch(rank)
        self.at = layout.coordinates(rank)
        self._handles: dict[tuple[int, ...], Any] = {}
        self._groups = {axis: self._make(axis, layout.groups(axis)) for axis in AXES}
        self.everyone = self._make("all", (tuple(range(layout.world)),))
        self.peers = Peers(layout.dp, self._total, self._most, self["dp"].index)
        self.two_levels = None if ranks_per_node is None else self._levels(ranks_per_node)

    def __getitem__(self, axis: Axis) -> Group:
        return self._groups[axis]

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes what comes out once."""
        return self.rank == 0

    def mesh(self, axis: Axis, device_type: str) -> DeviceMesh:
        """The group of an axis as PyTorch's FSDP wants it."""
        handle = self[axis].handle
        if handle is None:
            raise ValueError(f"there is one rank on {axis}, which needs no mesh")
        return DeviceMesh.from_group(handle, device_type)

    def _make(self, axis: str, groups: tuple[tuple[int, ...], ...]) -> Group:
        mine = None
        for ranks in groups:  # torch: every process makes every group, in one order
            if len(ranks) > 1 and ranks not in self._handles:
                whole = len(ranks) == self.layout.world
                self._handles[ranks] = dist.group.WORLD if whole else self._new(ranks)
            if self.rank in ranks:
                mine = Group(axis, ranks, self.rank, self._handles.get(ranks), self.watch)
        assert mine is not None
        return mine

    def _new(self, ranks: tuple[int, ...]) -> Any:
        # torch gives a group half an hour otherwise, whatever the default group has.
        return dist.new_group(list(ranks), timeout=self.watch.library_timeout)

    def _levels(self, ranks_per_node: int) -> tuple[Group, Group]:
        """The ranks of the ep group in this node, and those at this place of every node."""
        insides, betweens = [], []
        for ranks in self.layout.groups("ep"):
            nodes: dict[int, list[int]] = {}
            for rank in ranks:
                nodes.setdefault(rank // ranks_per_node, []).append(rank)
            sizes = {len(node) for node in nodes.values()}
            if len(sizes) > 1:
                raise ConfigError(
                    f'parallel.exchange="hierarchical" needs as many ranks of an ep group in every node; with '
                    f"{ranks_per_node} ranks per node the group {list(ranks)} has {sorted(map(len, nodes.values()))}. "
                    'Choose another ep, or exchange="flat".'
                )
            insides += [tuple(node) for node in nodes.values()]
            betweens += list(zip(*nodes.values(), strict=True))
        return self._make("ep within a node", tuple(insides)), self._make("ep between nodes", tuple(betweens))

    def _total(self, x: Tensor) -> Tensor:
        total: Tensor = _Total.apply(x, self["dp"])
        return total

    def _most(self, x: Tensor) -> Tensor:
        return self["dp"].all_reduce(x.detach().clone(), "max", what="maximum over the batch")


class _Total(torch.autograd.Function):
    """The sum over a group; the gradient passes unchanged (``plan/peers.py``)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.all_reduce(x.clone(memory_format=torch.contiguous_format), what="sum over the batch")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
