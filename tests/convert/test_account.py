"""What is counted of a checkpoint: complete exactly if everything stored is read, and everything of the model filled once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moesaic.convert import read
from moesaic.convert.account import account
from moesaic.convert.convert import convert
from moesaic.convert.coverage import Coverage, Share
from moesaic.convert.pieces import Entry
from moesaic.convert.read import Foreign, open_folder
from moesaic.errors import CheckpointError
from tests.command import call
from tests.convert.tiny_checkpoint import edit_tensors, make_hf

EXPERTS = "blocks.1.ffn.experts.w_in"
Table = list[Entry]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    """Two layers of three experts of width 12, in 8 dimensions."""
    return open_folder(make_hf(tmp_path_factory.mktemp("account") / "hf"))


def counted(found: Foreign, table: Table, without: str = "") -> Coverage:
    shapes = {entry.ours: tuple(found.shapes[entry.ours]) for entry in found.table}
    stored = {name: tensor for name, tensor in found.stored.items() if name != without}
    return account(table, shapes, 6, stored, found.aside, found.repeated, found.keys)


def changed(table: Table, change: Callable[[Entry], Entry | None]) -> Table:
    """The table with ``change`` of the experts' entry, None taking it out."""
    entries = [change(entry) if entry.ours == EXPERTS else entry for entry in table]
    return [entry for entry in entries if entry is not None]


def gate_for_up(entry: Entry) -> Entry:
    """The first expert's gate filled twice and its up never: as many numbers as there are."""
    gate, up, *rest = entry.pieces
    return replace(entry, pieces=(gate, replace(up, part=gate.part), *rest))


def test_a_whole_one_is_complete(found: Foreign) -> None:
    coverage = counted(found, found.table)
    assert coverage.complete
    assert coverage == found.coverage()
    numbers = sum(torch.Size(s.shape).numel() for s in found.stored.values())
    assert coverage.tensors == Share(len(found.stored), len(found.stored))
    assert coverage.parameters == Share(numbers, numbers)
    assert coverage.bytes.used == sum(torch.Size(s.shape).numel() * s.dtype.itemsize for s in found.stored.values())
    assert coverage.experts == Share(6, 6)


def test_an_entry_left_out(found: Foreign) -> None:
    """Six tensors of 96 numbers of the last layer, gates and ups of three experts."""
    coverage, whole = counted(found, changed(found.table, lambda entry: None)), found.coverage()
    assert not coverage.complete
    assert coverage.tensors == Share(whole.tensors.total - 6, whole.tensors.total)
    assert coverage.parameters == Share(whole.parameters.total - 6 * 96, whole.parameters.total)
    assert coverage.bytes == Share(whole.bytes.total - 6 * 96 * 2, whole.bytes.total)
    assert coverage.experts == Share(3, 6)


def test_a_half_filled_twice_and_another_never(found: Foreign) -> None:
    """Every tensor is read, and the numbers read are as many as the model has; yet 96 of them are memory of nobody."""
    coverage, whole = counted(found, changed(found.table, gate_for_up)), found.coverage()
    assert coverage.tensors.complete
    assert coverage.bytes.complete
    assert coverage.parameters == Share(whole.parameters.total - 2 * 96, whole.parameters.total)
    assert coverage.experts == Share(5, 6)
    assert not coverage.complete


def test_a_tensor_that_is_not_there(found: Foreign) -> None:
    """What is stored is all used then; the model shows what it lacks."""
    lost = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    coverage, whole = counted(found, found.table, without=lost), found.coverage()
    assert coverage.tensors == Share(whole.tensors.total - 1, whole.tensors.total - 1)
    assert coverage.parameters == Share(whole.parameters.total - 96, whole.parameters.total)
    assert coverage.experts == Share(5, 6)
    assert not coverage.complete


def test_a_family_whose_table_is_wrong_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_hf(tmp_path / "hf")
    mixtral = read.FAMILIES["mixtral"]
    wrong = replace(mixtral, table=lambda *given: changed(mixtral.table(*given), gate_for_up), layouts=("per_expert",))
    monkeypatch.setitem(read.FAMILIES, "mixtral", wrong)
    with pytest.raises(RuntimeError, match=f"of {EXPERTS} the pieces leave out 96 and fill 96 more than once"):
        open_folder(folder)


# ---- what lies beside the model ----


def test_a_tied_head_stored_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_hf(tmp_path / "hf", tie_embeddings=True)
    edit_tensors(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    coverage = convert(source, tmp_path / "equal").coverage
    assert coverage.complete
    assert coverage.repeated == ("lm_head.weight",)
    edit_tensors(source, lambda t: t["lm_head.weight"][-1, -1].add_(1))
    words = '"lm_head.weight" beside "model.embed_tokens.weight", which its config ties together, and they differ'
    with pytest.raises(CheckpointError, match=words):
        read.read_model(source)
    with pytest.raises(CheckpointError, match=words):
        convert(source, tmp_path / "differing")
    done = call(capsys, "convert", str(source), str(tmp_path / "differing"))
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert not (tmp_path / "differing").exists()


@pytest.mark.parametrize("name", ["model-00003-of-00007.safetensors", "model.old.safetensors"])
def test_shards_of_another_save(name: str, tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", max_shard_bytes=2000)
    save_file({"x": torch.zeros(2)}, source / name)
    with pytest.raises(CheckpointError, match=f"{name} is not among the files of this checkpoint.*move it away"):
        open_folder(source)
    with pytest.raises(CheckpointError, match=f"{name} is not among"):
        convert(source, tmp_path / "out")
    (source / name).rename(source / "other.safetensors")  # no part by its name
    assert open_folder(source).coverage().complete
