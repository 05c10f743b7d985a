"""Real FSDP2: parameters and moments that are DTensors, uneven and empty shards, saved by two and loaded by one and back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moesaic.parallel.comm import Group
from moesaic.parallel.held import Held, keep, whole
from moesaic.train.sharded.checkpoint import open_sharded
from moesaic.train.sharded.entries import Tensors
from moesaic.train.sharded.load import load_sharded
from moesaic.train.sharded.optimizer import merge_optimizers, optimizer_room, pack_optimizer, unpack_optimizer
from moesaic.train.sharded.save import save_sharded
from tests.distributed import run_distributed
from tests.train.sharded.layouts import everyone


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1))  # 5 rows on two ranks are 3 and 2, one row is 1 and 0


def _held(name: str, p: Tensor, rank: int) -> Held:
    held = whole(name, p.shape, "dense")
    if not isinstance(p, DTensor):
        return held
    block = -(-p.shape[0] // 2)
    return keep(held, 0, min(rank * block, p.shape[0]), min((rank + 1) * block, p.shape[0]), "dp")


def _run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def _trained(model: nn.Module, rank: int) -> Tensors:
    return {name: (_held(name, p, rank), p) for name, p in model.named_parameters()}


def _save(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer, group: Group) -> None:
    trained = _trained(model, group.index)
    packed, moments = pack_optimizer(optimizer, trained)
    merged = merge_optimizers(group.values(packed, what="optimizer"))
    save_sharded(folder, {**trained, **moments}, {"optimizer": merged}, group=group)


def _load(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer, group: Group) -> None:
    trained = _trained(model, group.index)
    room = optimizer_room(open_sharded(folder), optimizer, trained)
    extra = load_sharded(folder, {**trained, **room}, group=group)
    unpack_optimizer(extra["optimizer"], room, optimizer, trained)


def _whole(model: nn.Module) -> dict[str, Tensor]:
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}


def _two_ranks(rank: int, folder: str) -> dict[str, Tensor]:
    """Train and save; load what one process made of it into new modules, and go on."""
    mesh = init_device_mesh("cpu", (2,))
    model = _model(0)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    found = {}
    if not Path(folder, "back").exists():
        _run(model, optimizer, 3)
        _save(f"{folder}/there", model, optimizer, everyone())
    else:
        _load(f"{folder}/back", model, optimizer, everyone())
        assert all(isinstance(value, DTensor) for key, value in _state_of(optimizer) if key != "step")
        found["loaded"] = torch.tensor(1)
    _run(model, optimizer, 2)
    return {**found, **_whole(model)}


def _state_of(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [item for state in optimizer.state.values() for item in state.items()]


def test_two_ranks_one_process_and_two_ranks_again(tmp_path: Path) -> None:
    first = run_distributed(2, _two_ranks, str(tmp_path))[0]
    model = _model(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    _load(str(tmp_path / "there"), model, optimizer, everyone())
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert {float(value) for key, value in _state_of(optimizer) if key == "step"} == {3.0}
    _save(str(tmp_path / "back"), model, optimizer, everyone())
    second = run_distributed(2, _two_ranks, str(tmp_path))[0]
    assert second.pop("loaded")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    _run(model, optimizer, 2)
    torch.testing.assert_close(_whole(model), first, rtol=1e-6, atol=1e-7)
