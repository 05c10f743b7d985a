"""Consolidation: model directories and exports, one tensor in memory, everything checked, nothing half done."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.checkpoint.aside import open_aside
from moesaic.checkpoint.atomic import MANIFEST, verify_folder
from moesaic.checkpoint.native import load_model, save_model
from moesaic.checkpoint.parts import is_sharded
from moesaic.convert.convert import convert
from moesaic.errors import CheckpointError, MoesaicError
from moesaic.train.sharded.checkpoint import open_sharded
from moesaic.train.sharded.consolidate import consolidate, stream_tensors
from moesaic.train.sharded.save import save_sharded
from moesaic.train.sharded.snapshots import model_files
from tests.checkpoint.test_atomic import tree
from tests.distributed import run_distributed
from tests.train.sharded.damage import seal
from tests.train.sharded.layouts import everyone
from tests.train.sharded.runs import part_of, save, started


class _Tokenizer:
    def to_str(self) -> str:
        return '{"ünicode": 1}'


def _experts(rank: int, run: str) -> dict[str, Tensor]:
    model, optimizer = started(steps=1, bias=False)
    save(run, 1, model, part_of(model, optimizer, "experts", rank), everyone())
    return {}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_distributed(2, _experts, str(folder))
    return folder / "checkpoints" / "step-00000001"


def _alone(folder: Path, **options: Any) -> Path:
    """A checkpoint of the model alone, without training."""
    model, optimizer = started(bias=False)
    part = part_of(model, optimizer, "one", 0)
    tensors = {name: held for name, held in part.tensors.items() if "/" not in name}
    return save_sharded(folder, tensors, {}, group=everyone(), files=model_files(model, _Tokenizer()), **options)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 700])
def test_it_is_the_model_directory_of_one_process(run: Path, tmp_path: Path, max_shard_bytes: int) -> None:
    consolidate(run, tmp_path / "out", max_shard_bytes)
    model, _ = started(steps=1, bias=False)
    save_model(model, tmp_path / "wanted", max_shard_bytes=max_shard_bytes)
    wanted = {name: data for name, data in tree(tmp_path / "wanted").items() if name != MANIFEST}
    assert {name: data for name, data in tree(tmp_path / "out").items() if name in wanted} == wanted
    assert (len([name for name in wanted if name.endswith(".safetensors")]) > 5) == (max_shard_bytes == 700)


def test_it_is_exported_to_hugging_face_and_back(run: Path, tmp_path: Path) -> None:
    consolidate(run, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "hf")
    assert "block_sparse_moe.experts.4.w1" in " ".join(load_file(tmp_path / "hf" / "model.safetensors"))
    convert(tmp_path / "hf", tmp_path / "back")
    state, wanted = load_model(tmp_path / "back").state_dict(), started(steps=1, bias=False)[0].state_dict()
    assert all(torch.equal(state[name], x) for name, x in wanted.items())


def test_a_model_alone_keeps_its_other_files(tmp_path: Path) -> None:
    kept = {"model.layers.9.eh_proj.weight": torch.randn(3, 4)}
    (tmp_path / "source").mkdir()
    save_file(kept, tmp_path / "source" / "aside.safetensors")
    folder = _alone(tmp_path / "a", aside=open_aside(tmp_path / "source"))
    consolidate(folder, tmp_path / "out")
    files = {"aside.safetensors", "config.json", "model.safetensors", "tokenizer.json"}
    assert verify_folder(tmp_path / "out") == files
    assert (tmp_path / "out" / "tokenizer.json").read_text() == _Tokenizer().to_str()
    aside = load_model(tmp_path / "out").aside
    assert aside is not None
    assert all(torch.equal(kept[name], x) for name, x in aside.tensors())


def test_one_tensor_is_in_memory_at_a_time(run: Path) -> None:
    checkpoint = open_sharded(run)
    names = [name for name in checkpoint.tensors if "/" not in name]
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    for _, x in stream_tensors(checkpoint, names):
        alive.append(weakref.ref(x))
        del x
        most = max(most, sum(ref() is not None for ref in alive))
    assert len(alive) == len(names) > 10
    assert most <= 1


def test_experts_come_stacked_in_their_order(run: Path) -> None:
    wanted = started(steps=1, bias=False)[0].state_dict()
    for name, x in stream_tensors(open_sharded(run), ["blocks.0.ffn.experts.w_in", "blocks.1.ffn.experts.w_out"]):
        assert torch.equal(x, wanted[name])


def test_a_changed_expert_is_named_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    folder = Path(tmp_path / "copy")
    folder.mkdir()
    for name, data in tree(run).items():
        (folder / name).write_bytes(data)
    file = next(path for path in folder.glob("rank-*") if "blocks.1.ffn.experts.3.w_out" in load_file(path))
    tensors = load_file(file)
    tensors["blocks.1.ffn.experts.3.w_out"][0, 0] += 1
    save_file(tensors, file)
    seal(folder)
    before = tree(tmp_path)
    for out in (tmp_path / "out", folder):
        with pytest.raises(CheckpointError, match=r"blocks.1.ffn.experts.3.w_out of .* is not what was saved"):
            consolidate(folder, out)
    assert tree(tmp_path) == before


def test_tensors_that_do_not_fit_the_config_are_refused_before_writing(tmp_path: Path) -> None:
    folder = _alone(tmp_path / "a")
    record = json.loads((folder / "config.json").read_text())
    record["model"]["num_layers"] = 3
    (folder / "config.json").write_text(json.dumps(record))
    seal(folder)
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors of the model"):
        consolidate(folder, tmp_path / "out")
    (folder / "config.json").unlink()
    seal(folder)
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        consolidate(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_not_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(MoesaicError, match=r"holds \"thesis.tex\", which was not saved with it"):
        consolidate(run, tmp_path / "out")
    assert is_sharded(run)
    with pytest.raises(CheckpointError, match=r"is no sharded checkpoint"):
        consolidate(tmp_path / "out", tmp_path / "other")


def test_training_state_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    model, optimizer = started(steps=1)
    folder = save(tmp_path, 1, model, part_of(model, optimizer, "one", 0), everyone())
    path = folder / "training.json"
    record = json.loads(path.read_text())
    record["optimizer"]["groups"][0]["names"][0] = "ghost"
    path.write_text(json.dumps(record))
    seal(folder)
    with pytest.raises(CheckpointError, match=r"training.json does not fit the model beside it: KeyError 'ghost'"):
        consolidate(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
