"""Saved under one layout, loaded under every other: the same bits of weights, buffers and moments, and the same next loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.checkpoint.parts import is_sharded
from moesaic.checkpoint.shards import find_tensors, read_tensors
from moesaic.layout import ParallelConfig as Of
from moesaic.parallel.gradients import local
from moesaic.parallel.start import Started
from moesaic.parallel.watch import Watch
from moesaic.train.config import TrainConfig
from moesaic.train.keeper import Found, Keeper, held_tensors
from moesaic.train.optim import OptimConfig, make_optimizer
from moesaic.train.sharded.consolidate import consolidate
from moesaic.train.step import train_step
from moesaic.train.team import Team
from tests.distributed import run_distributed
from tests.parallel.truth import Case, batches_of, build, config_of, share

BASE = Case(
    "",
    Of(),
    {"num_experts": 10, "shared": 1},
    router={"score": "sigmoid", "balance_bias": True, "bias_rate": 1e-2},
    dtype="float64",
)
BASE = replace(BASE, accumulate=2, steps=2)
LAYOUTS: dict[str, tuple[int, Of]] = {
    "one": (1, Of()),
    "ep2": (2, Of(ep=2)),
    "dp2": (2, Of()),
    "fsdp2": (2, Of(fsdp=True)),
    "tp2": (2, Of(tp=2)),
    "pp2": (2, Of(pp=2)),
    "ep3": (3, Of(ep=3)),
    "ep4": (4, Of(ep=4)),
    "ep2 x tp2": (4, Of(ep=2, tp=2)),
    "fsdp2 x ep2": (4, Of(ep=2, fsdp=True)),
    "pp2 x ep2": (4, Of(pp=2, ep=2)),
}


class _Corpus:
    fingerprint = "text"
    tokenizer = None


class _Run:
    """A run in one layout: a model, its optimiser, its checkpoints."""

    def __init__(self, rank: int, name: str, folder: str, device: str = "cpu") -> None:
        size, parallel = LAYOUTS[name]
        self.team = Team(Started(rank=rank, world=size, watch=Watch(rank), device=torch.device(device)), parallel)
        config = TrainConfig(config_of(BASE), seq_len=12, parallel=parallel)
        corpus: Any = _Corpus()
        self.keeper = Keeper(Path(folder) / name, config, corpus, self.team)
        self.model = build(BASE)
        self.spread = self.team.spread(self.model, None)
        self.optimizer = make_optimizer(self.model, OptimConfig(lr=1e-3, eps=1e-4))

    def step(self, number: int) -> float:
        rows = share(batches_of(BASE, number), self.team.part, self.team.parts)
        reading, _ = train_step(
            self.model, self.optimizer, rows, lr=1e-3, clip=1.0, step=number + 1, spread=self.spread
        )
        return reading.loss

    def values(self) -> dict[str, Tensor]:
        """Everything that is held, by its name in a checkpoint."""
        tensors, trained = held_tensors(self.model, self.spread)
        found = {name: local(x).detach().clone() for name, (_, x) in tensors.items()}
        for name, (_, x) in trained.items():
            for key, value in self.optimizer.state[x].items():
                found[f"state/{name}/{key}"] = local(value).detach().clone()
        return found


def _save(rank: int, names: list[str], folder: str) -> dict[str, Tensor]:
    """Train two steps, save, read it back, go on; the loss of the third step."""
    out = {}
    for name in names:
        run = _Run(rank, name, folder)
        for number in range(2):
            run.step(number)
        state = {"corpus": "text"}
        run.keeper.save(2, run.model, run.optimizer, run.spread, state, is_best=False, wait=True)
        run.keeper.close()
        before = run.values()
        again = _Run(rank, name, folder)
        found = again.keeper.find(resume=True)
        assert found is not None
        assert found.sharded == (LAYOUTS[name][0] > 1)
        assert again.keeper.restore(found, again.model, again.optimizer, again.spread)["step"] == 2
        after = again.values()
        assert set(after) == set(before)
        assert [what for what in before if not torch.equal(before[what], after[what])] == []
        out[name] = torch.tensor(again.step(2), dtype=torch.float64)
        assert run.step(2) == float(out[name])
    return out


def _load(rank: int, names: list[str], folder: str) -> dict[str, Tensor]:
    """Every checkpoint under every one of these layouts, against the whole; the loss of the third step."""
    out = {}
    for saved in LAYOUTS:
        place = Path(folder) / saved / "checkpoints" / "step-00000002"
        whole_place = Path(folder) / f"{saved} whole"
        whole = dict(read_tensors(find_tensors(whole_place, "model")))
        whole |= dict(read_tensors(find_tensors(whole_place, "training")))
        for name in names:
            run = _Run(rank, name, folder)
            found = Found(place, is_sharded(place))
            assert run.keeper.restore(found, run.model, run.optimizer, run.spread)["step"] == 2
            tensors, _ = held_tensors(run.model, run.spread)
            compared = 0
            for what, mine in run.values().items():
                held = tensors[what.split("/")[1] if "/" in what else what][0]
                theirs = whole[what]
                if what.endswith("/step"):
                    assert torch.equal(mine, theirs.to(mine.dtype))
                    continue
                for box in held.boxes:
                    assert torch.equal(mine[box.local_slices], theirs[box.logical_slices]), (saved, name, what)
                compared += 1
            assert compared > 20
            out[f"{saved}, {name}"] = torch.tensor(run.step(2), dtype=torch.float64)
    return out


@pytest.mark.timeout(400)
def test_saved_under_one_loaded_under_every_other(tmp_path: Path) -> None:
    folder = str(tmp_path)
    by_size: dict[int, list[str]] = {}
    for name, (size, _) in LAYOUTS.items():
        by_size.setdefault(size, []).append(name)
    losses: dict[str, float] = {}
    for size, names in by_size.items():
        answers = run_distributed(size, _save, names, folder) if size > 1 else [_save(0, names, folder)]
        losses |= {name: float(value) for name, value in answers[0].items()}
    for name, (size, _) in LAYOUTS.items():
        place = tmp_path / name / "checkpoints" / "step-00000002"
        if size > 1:
            consolidate(place, tmp_path / f"{name} whole")
        else:
            (tmp_path / f"{name} whole").symlink_to(place)
    for size, names in by_size.items():
        answers = run_distributed(size, _load, names, folder) if size > 1 else [_load(0, names, folder)]
        for answer in answers:
            for pair, value in answer.items():
                want = losses[pair.split(", ")[0]]
                assert float(value) == pytest.approx(want, rel=1e-13), pair


def _draw(rank: int, saved: str, name: str, folder: str, device: str, seed: int | None) -> dict[str, Tensor]:
    """What is drawn next, by every part its own: after saving, or (seed None) after restoring."""
    run = _Run(rank, name, folder, device)
    if seed is None:
        torch.manual_seed(99 + rank)
        place = Path(folder) / saved / "checkpoints" / "step-00000000"
        run.keeper.restore(Found(place, is_sharded(place)), run.model, run.optimizer, run.spread)
    else:
        torch.manual_seed(seed + run.team.part)
        run.keeper.save(0, run.model, run.optimizer, run.spread, {"corpus": "text"}, is_best=False, wait=True)
        run.keeper.close()
    return {"drawn": torch.cat([torch.rand(3), torch.rand(3, device=device).cpu()])}


_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=_GPU)])
def test_random_numbers_go_on_where_parts_agree_and_else_anew(tmp_path: Path, device: str) -> None:
    def draw(saved: str, name: str, seed: int | None = None) -> list[list[float]]:
        size = LAYOUTS[name][0]
        args = saved, name, str(tmp_path), device, seed
        answers = run_distributed(size, _draw, *args) if size > 1 else [_draw(0, *args)]
        return [answer["drawn"].tolist() for answer in answers]

    was = {name: draw(name, name, seed=7) for name in ("one", "tp2", "dp2")}
    assert was["tp2"] == 2 * was["one"]
    assert was["dp2"][0] == was["one"][0] != was["dp2"][1]
    for name in ("tp2", "dp2"):
        place = tmp_path / name / "checkpoints" / "step-00000000"
        consolidate(place, tmp_path / f"{name} whole" / "checkpoints" / "step-00000000")
    for saved in ("one", "tp2", "tp2 whole"):
        assert draw(saved, "tp2") == was["tp2"], saved
        assert draw(saved, "one") == was["one"], saved
    for saved in ("dp2", "dp2 whole"):
        assert draw(saved, "dp2") == was["dp2"], saved
    other = draw("dp2", "one")
    assert other not in ([was["one"][0]], [was["dp2"][1]])
    assert draw("dp2 whole", "one") == other
    first, second = draw("one", "dp2")
    assert [first] == other
    assert second not in (first, *was["dp2"])
