"""Saved under one layout, loaded under every other: the same bits, on one, two and four processes."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.train.sharded.checkpoint import open_sharded
from moesaic.train.sharded.load import fingerprints, load_sharded
from moesaic.train.sharded.metadata import as_dcp
from moesaic.train.sharded.save import save_sharded
from tests.distributed import run_distributed
from tests.train.sharded.layouts import CUTS, everyone, held_by, same


def _save_all(rank: int, world: int, folder: str) -> dict[str, Tensor]:
    for name, cut in CUTS[world].items():
        save_sharded(
            f"{folder}/{world} {name}", held_by(cut, rank), {"from": name}, group=everyone(), layout=f"{world}: {name}"
        )
    return {}


def _load_all(rank: int, world: int, folder: str, every: int = 1) -> dict[str, Tensor]:
    """Of every so-many-th (checkpoint, layout) whether it came out bitwise."""
    found = {}
    for path, (name, cut) in list(product(sorted(Path(folder).iterdir()), CUTS[world].items()))[::every]:
        tensors = held_by(cut, rank, seed=None)
        extra = load_sharded(path, tensors, group=everyone())
        assert path.name.endswith(extra["from"])
        found[f"{path.name} -> {world} {name}"] = torch.tensor(same(tensors, held_by(cut, rank)))
    return found


def _fingerprints(rank: int, world: int) -> dict[str, Tensor]:
    return {
        name: torch.tensor(fingerprints(held_by(cut, rank), everyone())["blocks.1.ffn.experts.3.w_in"] - 2**63)
        for name, cut in CUTS[world].items()
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of every layout of one and of two processes."""
    folder = tmp_path_factory.mktemp("saved")
    _save_all(0, 1, str(folder))
    run_distributed(2, _save_all, 2, str(folder))
    return folder


def test_one_process_loads_every_layout(saved: Path) -> None:
    found = _load_all(0, 1, str(saved))
    assert len(found) == 10 * 2
    assert all(found.values()), [name for name, good in found.items() if not good]


def test_two_processes_load_every_layout(saved: Path) -> None:
    """Every third pair: each checkpoint and each layout comes up."""
    for found in run_distributed(2, _load_all, 2, str(saved), 3):
        assert len(found) == 27
        assert len({name.partition(" -> ")[0] for name in found}) == 10
        assert len({name.partition(" -> ")[2] for name in found}) == 8
        assert all(found.values()), [name for name, good in found.items() if not good]


@pytest.mark.slow
def test_two_processes_load_every_layout_in_every_other(saved: Path) -> None:
    for found in run_distributed(2, _load_all, 2, str(saved)):
        assert len(found) == 10 * 8
        assert all(found.values()), [name for name, good in found.items() if not good]


@pytest.mark.slow
def test_four_processes_save_and_load_every_layout(saved: Path, tmp_path: Path) -> None:
    run_distributed(4, _save_all, 4, str(tmp_path))
    for found in run_distributed(4, _load_all, 4, str(saved)) + run_distributed(4, _load_all, 4, str(tmp_path)):
        assert all(found.values()), [name for name, good in found.items() if not good]
    for found in [*run_distributed(2, _load_all, 2, str(tmp_path)), _load_all(0, 1, str(tmp_path))]:
        assert all(found.values()), [name for name, good in found.items() if not good]


def test_fingerprints_do_not_depend_on_the_layout(saved: Path) -> None:
    checkpoints = [open_sharded(path) for path in sorted(saved.iterdir())]
    assert all(checkpoint.fingerprints == checkpoints[0].fingerprints for checkpoint in checkpoints)
    assert all(checkpoint.tensors == checkpoints[0].tensors for checkpoint in checkpoints)
    assert {checkpoint.world for checkpoint in checkpoints} == {1, 2}
    alone = checkpoints[0].fingerprints["blocks.1.ffn.experts.3.w_in"] - 2**63
    for found in run_distributed(2, _fingerprints, 2):
        assert {int(number) for number in found.values()} == {alone}


def test_experts_are_stored_one_by_one_and_everything_once(saved: Path) -> None:
    entries = open_sharded(saved / "2 replicas").entries
    experts = [name for name in entries if ".experts." in name and "/" not in name]
    parts = ("w_in", "w_out")
    assert sorted(experts) == [f"blocks.1.ffn.experts.{expert}.{part}" for expert in range(5) for part in parts]
    assert entries["blocks.1.ffn.experts.0.w_in"].shape == (6, 8)
    for stored in entries.values():
        elements = sum(torch.Size([stop - start for start, stop in region]).numel() for region, _ in stored.pieces)
        assert elements == torch.Size(stored.shape).numel()
    gated = open_sharded(saved / "2 tp").entries["blocks.1.ffn.experts.0.w_in"]
    columns = sorted(region[1] for region, _ in gated.pieces)
    assert columns == [(0, 2), (2, 4), (4, 6), (6, 8)]  # gate of rank 0, gate of rank 1, then up of both


def test_the_work_of_writing_is_shared(saved: Path) -> None:
    for name in ("2 dp", "2 ep uneven", "2 tp"):
        sizes = [path.stat().st_size for path in sorted((saved / name).glob("*.safetensors"))]
        assert len(sizes) == 2
        assert max(sizes) < 1.5 * min(sizes), name


def test_torch_planners_understand_what_was_read(saved: Path) -> None:
    metadata = as_dcp(open_sharded(saved / "2 fsdp").entries)
    chunks = metadata.state_dict_metadata["embedding.weight"].chunks
    assert sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks) == [
        ((0, 0), (5, 6)),
        ((5, 0), (5, 6)),
    ]


def _wrong(rank: int, folder: str, wanted: str) -> dict[str, Tensor]:
    """Every way a request can fail to fit, on one rank or both: the same sentence on both, and nothing changed."""
    group = everyone()
    tensors = dict(held_by(CUTS[2]["fsdp"], rank, seed=1))
    if wanted == "unread":
        del tensors["embedding.weight"]
    elif wanted == "lacks" and rank == 1:
        tensors["blocks.9.weight"] = tensors["embedding.weight"]
    elif wanted == "shape" and rank == 1:
        tensors["embedding.weight"] = held_by(CUTS[1]["alone"], 0)["blocks.0.norm.weight"]
    elif wanted == "dtype":
        held, x = tensors["embedding.weight"]
        tensors["embedding.weight"] = held, x.double()
    elif wanted == "half" and rank == 1:
        del tensors["embedding.weight"]
    before = {name: x.clone() for name, (_, x) in tensors.items()}
    with pytest.raises(CheckpointError) as caught:
        load_sharded(f"{folder}/2 ep uneven", tensors, group=group)
    assert all(torch.equal(x, before[name]) for name, (_, x) in tensors.items())
    return {"sentence": torch.tensor(list(str(caught.value).encode()))}


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("unread", 'Rank 0: The checkpoint holds "embedding.weight", which nothing here reads.'),
        ("lacks", 'Rank 1: The checkpoint lacks "blocks.9.weight".'),
        ("shape", "Rank 1: embedding.weight is [10, 6] in the checkpoint and [6] here."),
        (
            "dtype",
            "Rank 0: embedding.weight is torch.float32 in the checkpoint and torch.float64 here; "
            "resume with the precision it was trained in.",
        ),
        ("half", "Rank 0: Only 30 of the 60 elements of embedding.weight are read by any rank."),
    ],
)
def test_what_does_not_fit_is_refused_by_all(saved: Path, wanted: str, sentence: str) -> None:
    answers = run_distributed(2, _wrong, str(saved), wanted)
    assert [bytes(answer["sentence"].tolist()).decode() for answer in answers] == [sentence, sentence]


def test_what_may_stay_unread_is_said(saved: Path) -> None:
    model = {name: held for name, held in held_by(CUTS[1]["alone"], 0, None).items() if "/" not in name}
    with pytest.raises(CheckpointError, match="optimizer/exp_avg"):
        load_sharded(saved / "2 tp", model, group=everyone())
    load_sharded(saved / "2 tp", model, group=everyone(), skip=["optimizer/"])
    assert all(torch.equal(x, held_by(CUTS[1]["alone"], 0)[name][1]) for name, (_, x) in model.items())
