"""A tiny model in training, and the part of it and of its optimizer that a rank would hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.experts import StackedExperts
from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig, MoEConfig, RouterConfig
from moesaic.models.decoder import Decoder
from moesaic.parallel.comm import Group
from moesaic.parallel.held import Held, keep, rows, whole
from moesaic.train.optim import OptimConfig, make_optimizer
from moesaic.train.sharded.entries import Tensors
from moesaic.train.sharded.optimizer import pack_optimizer
from moesaic.train.sharded.snapshots import model_files, restore_sharded_snapshot, save_sharded_snapshot

Cut = Callable[[int, str, Held], Held | None]


def started(steps: int = 0, seed: int = 0, bias: bool = True) -> tuple[Decoder, torch.optim.AdamW]:
    """A model of two blocks with 5 experts and a tied head, after some steps; ``bias``: with a buffer in the router."""
    router = RouterConfig(options={"balance_bias": True, "bias_rate": 0.1} if bias else {})
    moe = MoEConfig(num_experts=5, k=2, hidden=6, router=router)
    config = ModelConfig(vocab_size=32, dim=8, num_layers=2, num_heads=2, hidden=12, max_seq_len=16, moe=moe)
    model = build_model(config, seed=seed)
    optimizer = make_optimizer(model, OptimConfig())
    for step in range(steps):
        one_step(model, optimizer, step)
    return model, optimizer


def one_step(model: Decoder, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Train on some tokens of this step; the loss before."""
    ids = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(step))
    model.train()
    logits = model(ids[:, :-1]).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _same(rank: int, name: str, held: Held) -> Held:
    return held


def _experts(rank: int, name: str, held: Held) -> Held:
    return rows(held, ((0, 3, 1), (2, 4, 0))[rank]) if held.kind == "experts" else held


def _rows(rank: int, name: str, held: Held) -> Held:
    block = -(-held.local[0] // 2) if held.shape else 0
    return keep(held, 0, rank * block, min((rank + 1) * block, held.local[0]), "dp") if held.shape else held


def _stages(rank: int, name: str, held: Held) -> Held | None:
    stage = 1 if name.startswith(("blocks.1", "norm")) else 0
    return held if rank == stage else None


CUTS: dict[str, Cut] = {"one": _same, "experts": _experts, "rows": _rows, "stages": _stages}


@dataclass
class Part:
    """What one rank holds. ``trained``: of ``tensors`` the parameters."""

    tensors: dict[str, tuple[Held, Tensor]]
    trained: Tensors
    optimizer: torch.optim.AdamW

    def values(self) -> dict[str, Tensor]:
        """Everything there is, by name."""
        _, moments = pack_optimizer(self.optimizer, self.trained)
        return {name: x.detach().clone() for name, (_, x) in {**self.tensors, **moments}.items()}


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen = set()
    for name, x in model.state_dict(keep_vars=True).items():
        if id(x) not in seen:  # a tied tensor comes once
            seen.add(id(x))
            yield name, x


def part_of(model: Decoder, optimizer: torch.optim.AdamW, cut: str, rank: int, blank: bool = False) -> Part:
    """The part of ``rank`` under a cut; ``blank``: zeros, and an optimizer that has not trained yet."""
    stacked = {id(p) for m in model.modules() if isinstance(m, StackedExperts) for p in m.parameters()}
    tensors: dict[str, tuple[Held, Tensor]] = {}
    local: dict[Tensor, nn.Parameter] = {}

    def pick(held: Held, x: Tensor) -> Tensor:
        mine = x.new_zeros(held.local)
        for box in held.boxes if not blank else ():
            mine[box.local_slices] = x.detach()[box.logical_slices]
        return mine

    for name, x in _stored(model):
        held = CUTS[cut](rank, name, whole(name, x.shape, "experts" if id(x) in stacked else "dense"))
        if held is None:
            continue
        mine = pick(held, x)
        if isinstance(x, nn.Parameter):
            local[x] = nn.Parameter(mine)
            mine = local[x]
        tensors[name] = held, mine
    tensors["random/cpu"] = whole("random/cpu", (5056,), "dense"), torch.get_rng_state()
    helds = {id(x): held for held, x in tensors.values()}
    groups = [{**g, "params": [local[p] for p in g["params"] if p in local]} for g in optimizer.param_groups]
    mine_optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    for p, state in [] if blank else list(optimizer.state.items()):
        if p in local:
            held = helds[id(local[p])]
            mine_optimizer.state[local[p]] = {
                key: pick(held, value) if value.dim() else value.clone() for key, value in state.items()
            }
    trained = {name: (held, x) for name, (held, x) in tensors.items() if isinstance(x, nn.Parameter)}
    return Part(tensors, trained, mine_optimizer)


def save(run: str | Path, step: int, model: Decoder, part: Part, group: Group, **options: Any) -> Path:
    """``save_sharded_snapshot`` of a rank's part."""
    packed, moments = pack_optimizer(part.optimizer, part.trained)
    tensors = {**part.tensors, **moments}
    files = model_files(model)
    state = {"step_of_caller": step}
    return save_sharded_snapshot(run, step, tensors, state, optimizer=packed, group=group, files=files, **options)


def restore(folder: str | Path, part: Part, group: Group) -> dict[str, Any]:
    """``restore_sharded_snapshot`` into a rank's part."""
    return restore_sharded_snapshot(folder, part.tensors, part.optimizer, part.trained, group=group)
