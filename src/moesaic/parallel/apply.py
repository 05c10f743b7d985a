"""A finished model spread over processes, from outside. ``apply`` lists the order; the model never asks for a rank.

| step | what | why there |
|---|---|---|
| 1 stages | keep this rank's blocks | nothing below need look at blocks that are not here |
| 2 experts | keep this rank's slots; dispatchers become exchanges | slots are rows of whole tensors |
| 3 slices | attention, feed-forward, expert widths | cuts what step 2 left |
| 4 recomputation | around attention and dispatchers | runs step 2 again in the backward, never the router |
| 5 compilation | of attention and dense feed-forward modules | sees plain tensors of their final shape |
| 6 FSDP | shards what is left over dp (experts: edp) | wraps modules whose forward is final |

Mixed precision is no step: parameters stay fp32, ``model.compute_dtype`` sets the activations, and modules cast at use.

No step reads a number, so the model may be one of shapes alone, whose part gets memory and numbers afterwards (``build.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from moesaic.errors import ConfigError
from moesaic.experts.layer import MoE
from moesaic.layout import Axis, ParallelConfig
from moesaic.models.decoder import Decoder
from moesaic.parallel.dispatch import ExchangeDispatch, inside
from moesaic.parallel.exchange import FlatPath, TwoLevelPath
from moesaic.parallel.experts import keep_slots, stack_name, stack_of
from moesaic.parallel.gradients import gradient_norm, sum_gradients
from moesaic.parallel.held import Held, Kind, keep, whole
from moesaic.parallel.pipeline import Pipeline
from moesaic.parallel.shadow import ShadowDispatch, Shadows
from moesaic.parallel.stages import split_stages, take_stages
from moesaic.parallel.tensor import slice_dispatch, slice_model
from moesaic.parallel.world import World
from moesaic.plan.peers import Peers
from moesaic.plan.placement import Placement
from moesaic.plan.rebalance import initial


class Spread:
    """A model that this process holds a part of, and what the training step asks of it.

    Attributes:
        model: the module to run; parameter names are those of the whole model.
        held: what of every parameter and buffer is here, by name.
        placements: of every sparse layer that is here, by index.
        sizes: experts of every sparse layer of the whole model, special ones included, by index.
        num_depth: Mixture-of-Depths blocks of the whole model.
        pipeline: runs the stages; None where the model is not cut into any.
        shadows: of busy experts, where the config asks for them.
    """

    def __init__(self, model: Decoder, world: World, config: ParallelConfig) -> None:
        self.model, self.world, self.config = model, world, config
        self.held: dict[str, Held] = hold(model)
        self.sizes = {i: layer.router.num_experts for i, layer in model.moe_layers().items()}
        self.num_depth = len(model.depth_routers())
        self.pipeline: Pipeline | None = None
        self.placements: dict[int, Placement] = {}
        self.shadows: Shadows | None = None

    @property
    def peers(self) -> Peers:
        """The ranks with the other parts of the batch."""
        return self.world.peers

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name; a tied one comes once."""
        return dict(self.model.named_parameters())

    def copied(self) -> dict[str, Placement]:
        """Placements by the names of the expert parameters they are about."""
        found = {}
        for layer, placement in self.placements.items():
            moe = self.model.moe_layers()[layer]
            for name, _ in stack_of(moe).named_parameters():
                found[f"{stack_name(moe, f'blocks.{layer}.ffn')}.{name}"] = placement
        return found

    def take_rows(self) -> dict[str, int]:
        """Rows that the experts of every sparse layer here computed since the last call, by layer."""
        found = {}
        for index, layer in self.model.moe_layers().items():
            exchange = inside(layer.dispatcher)
            if exchange is not None:
                found[str(index)], exchange.computed = exchange.computed, 0
        return found

    def begin_step(self) -> None:
        """Before the first forward of a step."""
        if self.shadows is not None:
            self.shadows.fetch()

    def sum_gradients(self) -> None:
        """After the last backward of a step: every rank has the gradients of the whole batch for what it holds."""
        if self.shadows is not None:
            self.shadows.give_back()
        sum_gradients(self.parameters(), self.held, self.world, self.copied())

    def gradient_norm(self) -> Tensor:
        """The norm over the whole model, the same on every rank."""
        copies = () if self.pipeline is None else self.pipeline.copies
        counted = {name: p for name, p in self.parameters().items() if name not in copies}
        return gradient_norm(counted, self.held, self.world, self.copied())


def hold(model: nn.Module) -> dict[str, Held]:
    """A whole model: everything is here."""
    experts = {id(p) for m in model.modules() if isinstance(m, MoE) for p in stack_of(m).parameters()}
    found = {}
    named: Iterable[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        kind: Kind = "experts" if id(tensor) in experts else "dense"
        found[name] = whole(name, tensor.shape, kind)
    return found


def apply(
    model: Decoder,
    world: World,
    config: ParallelConfig,
    *,
    device: torch.device | None = None,
    recompute: Callable[[Decoder], None] | None = None,
    placements: dict[int, Placement] | None = None,
) -> Spread:
    """Spread ``model``, which every process has built whole from the same seed, over the processes of ``world``. In place.

    Args:
        device: where it will be, if it is on the meta device.
        recompute: makes a model recompute activations.
        placements: where experts are, by layer; others lie evenly, with ``config.replicas`` copies.

    Raises ``ConfigError`` for experts with copies, or that may move, whose widths FSDP cannot cut into equal shards.
    """
    spread = Spread(model, world, config)
    ranges: tuple[range, ...] = ()
    if world.layout.pp > 1:
        ranges = split_stages(model.config, world.layout.pp, config.stages_per_rank)
        take_stages(model, ranges, world.layout.pp, world["pp"].index)
        here = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        spread.held = {name: held for name, held in spread.held.items() if name in here}
    for layer in model.moe_layers().values():
        layer.peers = world.peers
    _place_experts(spread, placements or {})
    slice_model(model, world["tp"], world["etp"], spread.held)
    if recompute is not None:
        recompute(model)
    slice_dispatch(model, world["tp"], world["etp"])
    if config.compile:
        compile_dense(model)
    if ranges:
        spread.pipeline = Pipeline(model, ranges, world["pp"])
    if config.fsdp:
        _shard(spread, device or next(model.parameters()).device)
    return spread


def _place_experts(spread: Spread, placements: dict[int, Placement]) -> None:
    world, config = spread.world, spread.config
    ep = world["ep"]
    for index, layer in spread.model.moe_layers().items():
        E = stack_of(layer).num_experts
        placement = placements.get(index) or initial(E, ep.size, config.replicas)
        if ep.size > 1:
            spread.placements[index] = placement
            keep_slots(layer, f"blocks.{index}.ffn", placement, ep.index, spread.held)
            path = make_path(world, placement)
            layer.dispatcher = ExchangeDispatch(
                path, placement, ep.index, chunks=config.chunks, padded=ep if config.padded else None
            )
            if config.shadow:
                layer.dispatcher = ShadowDispatch(layer.dispatcher)
    if config.shadow:
        spread.shadows = Shadows(spread.model.moe_layers(), spread.placements, world)


def make_path(world: World, placement: Placement) -> FlatPath | TwoLevelPath:
    """The way of rows to these slots."""
    if world.two_levels is not None:
        return TwoLevelPath(*world.two_levels, placement.slots_per_rank)
    return FlatPath(world["ep"], placement.slots_per_rank)


def compile_dense(model: Decoder) -> None:
    """Compile attention, dense and shared feed-forward modules; an exchange asks the host for numbers, which no graph holds."""
    for _, block in model.layers():
        attention: Any = block.attention
        attention.compile()
        ffn: Any = block.ffn
        dense = ffn.shared if isinstance(ffn, MoE) else ffn
        if dense is not None:
            dense.compile()


def _shard(spread: Spread, device: torch.device) -> None:
    """FSDP2: the experts of a layer over edp, every block and what is left over dp. Gradients are summed."""
    model, world = spread.model, spread.world
    # Blocks return views; nothing here adds to one in place, which is what FSDP warns of.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    units: list[tuple[Any, Axis]] = []
    # Experts without copies stay whole; blocks must not shard them over dp.
    own = {p for layer in model.moe_layers().values() for p in stack_of(layer).parameters()}
    scalars = {p for p in model.parameters() if not p.dim()}  # FSDP takes none; they are summed like unsharded ones
    for _, block in model.layers():
        if isinstance(block.ffn, MoE):
            units.append((stack_of(block.ffn), "edp"))
        units.append((block, "dp"))
    units += [(root, "dp") for root in ([model] if spread.pipeline is None else spread.pipeline.stages)]
    for unit, axis in units:
        if world[axis].size == 1:
            continue
        group = world[axis]
        moves = spread.config.rebalance_every or spread.config.shadow
        if axis == "edp" and (moves or any(p.replicated for p in spread.placements.values())):
            _cuts_widths(unit, group.size)

        def place(parameter: nn.Parameter, size: int = group.size, axis: Axis = axis) -> Shard | None:
            # Slots of one expert must be cut alike everywhere, and few slots leave ranks with nothing: cut the next dimension.
            even = parameter.dim() > 1 and parameter.shape[1] % size == 0
            return Shard(1) if axis == "edp" and even else None

        ignored = scalars | (own if axis == "dp" and world["edp"].size == 1 else set())
        fully_shard(unit, mesh=world.mesh(axis, device.type), shard_placement_fn=place, ignored_params=ignored)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    for name, parameter in model.named_parameters():
        placed = getattr(parameter, "placements", None)
        if placed is not None:
            axis = "edp" if spread.held[name].kind == "experts" else "dp"
            start, stop = shard_ends(spread.held[name].local[placed[0].dim], world[axis].size, world[axis].index)
            spread.held[name] = keep(spread.held[name], placed[0].dim, start, stop, axis)


def _cuts_widths(stack: nn.Module, ranks: int) -> None:
    """Raises ``ConfigError`` where some parameter would be sharded by slots: copies and moves need whole slots everywhere."""
    for name, parameter in stack.named_parameters():
        if parameter.dim() < 2 or parameter.shape[1] % ranks:
            raise ConfigError(
                f"parallel.fsdp would shard {name} of the experts by experts, because its next dimension, "
                f"{parameter.shape[1]}, is no multiple of the {ranks} ranks with the same experts; copies of experts and "
                "experts that move need equal parts of each. Set fsdp=false, or replicas=0, rebalance_every=0 and "
                "shadow=false, or choose a width or ep that divides."
            )


def shard_ends(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """The part of a dimension that FSDP gives a rank: equal parts rounded up, the last ones shorter or empty."""
    part = -(-size // ranks)
    return min(rank * part, size), min((rank + 1) * part, size)


def parts(batch: Tensor, ranks: int, rank: int) -> Tensor:
    """The consecutive share of rows that a rank of the dp group computes; shares differ by one row at most."""
    return torch.tensor_split(batch, ranks)[rank]
