"""This process's part of a model, built where the whole would not fit.

>>> torch.manual_seed(seed)
>>> spread = build_spread(config, world, parallel, device=device)      # as apply(build_model(config), world, parallel)

1. the whole model on the meta device: shapes, without memory
2. ``apply`` cuts it, in the order it always has, and notes what of every tensor is here
3. memory for what is left
4. the numbers of the whole, piece by piece (``models/pieces.py``); of each the boxes that are here are copied

So a rank needs memory for what it keeps, and for one block with the experts it keeps of it. Weights, buffers and the random
state afterwards are bit for bit those of a model built whole and spread then.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moesaic.layout import ParallelConfig
from moesaic.models.build import build_model, warn
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder
from moesaic.models.pieces import draw_pieces
from moesaic.parallel.apply import Spread, apply
from moesaic.parallel.experts import stack_name
from moesaic.parallel.gradients import local
from moesaic.parallel.held import Box
from moesaic.parallel.world import World
from moesaic.plan.placement import Placement


def build_spread(
    config: ModelConfig,
    world: World,
    parallel: ParallelConfig,
    *,
    device: torch.device,
    recompute: Callable[[Decoder], None] | None = None,
    placements: dict[int, Placement] | None = None,
) -> Spread:
    """What ``apply`` makes of ``build_model(config)``, drawn from the random state as it is, the same in every process.

    Args:
        device: where the part is to be. recompute, placements: as of ``apply``.

    Raises ``ConfigError`` as ``build_model`` and ``apply`` do, before anything is allocated.
    """
    shapes = build_model(config, device="meta")
    warn(shapes)
    spread = apply(shapes, world, parallel, device=device, recompute=recompute, placements=placements)
    allocate(spread, device)
    fill = _Fill(spread)
    draw_pieces(config, fill.slots, fill.take)
    fill.check()
    return spread


def allocate(spread: Spread, device: torch.device) -> None:
    """Memory, not yet written, for a part that is on the meta device."""
    model = spread.model
    roots: list[nn.Module] = [model] if spread.pipeline is None else [*spread.pipeline.stages]  # those FSDP knows
    for root in roots:
        root.to_empty(device=device)
    if model.config.tie_embeddings and hasattr(model, "head"):
        model.head.weight = model.embedding.weight  # each got its own


class _Fill:
    """Copies of the pieces of a whole model what is here."""

    def __init__(self, spread: Spread) -> None:
        self.spread = spread
        self.missing: dict[str, Tensor] = dict([*spread.model.named_parameters(), *spread.model.named_buffers()])

    def slots(self, layer: int) -> list[int]:
        """Experts of a layer of which this rank holds anything, in order."""
        moe = self.spread.model.moe_layers().get(layer)
        if moe is None:
            return []
        held = self.spread.held[f"{stack_name(moe, f'blocks.{layer}.ffn')}.w_in"]
        return sorted({expert for box in held.boxes for expert in range(*box.logical[0])})

    @torch.no_grad()
    def take(self, prefix: str, piece: nn.Module) -> None:
        """A piece, of whose stacked experts there may be only ``slots``."""
        for part, tensor in [*piece.named_parameters(), *piece.named_buffers()]:
            name = f"{prefix}.{part}"
            if name not in self.missing:
                continue
            held, mine = self.spread.held[name], local(self.missing.pop(name))
            some = held.kind == "experts" and len(tensor) < held.shape[0]
            places = self.slots(int(prefix.split(".")[1])) if some else None
            for box in held.boxes:
                mine[box.local_slices].copy_(tensor[_there(box, places)])

    def check(self) -> None:
        """Raises ``ValueError`` where something has come with no piece."""
        if self.missing:
            raise ValueError(f"no piece of the model brought {', '.join(self.missing)}")


def _there(box: Box, places: list[int] | None) -> tuple[slice, ...]:
    """Where a box lies in a tensor that has, of all rows, those of ``places``; None is all."""
    if places is None:
        return box.logical_slices
    (first, last), *rest = box.logical
    start = places.index(first)  # rows of a box are all there, so side by side
    return slice(start, start + last - first), *(slice(*ends) for ends in rest)
