"""Damaged and hostile sharded checkpoints: refused in one sentence, no code run, nothing outside read, nothing changed."""

from __future__ import annotations

import copyreg
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)

from moesaic.checkpoint import atomic
from moesaic.errors import CheckpointError
from moesaic.train.sharded.checkpoint import open_sharded
from moesaic.train.sharded.load import load_sharded
from moesaic.train.sharded.save import save_sharded
from tests.distributed import run_distributed
from tests.train.sharded.layouts import CUTS, everyone, held_by, same

ALONE = CUTS[1]["alone"]
NAME = "embedding.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two ranks, so that there are two files and tensors in pieces."""
    folder = tmp_path_factory.mktemp("good") / "step"
    run_distributed(2, _save, str(folder))
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "step"))


def _save(rank: int, folder: str) -> dict[str, Tensor]:
    save_sharded(folder, held_by(CUTS[2]["fsdp"], rank), {"step": 1}, group=everyone())
    return {}


def seal(folder: Path) -> None:
    """What somebody does who wants the changes to pass: a manifest that fits."""
    (folder / atomic.MANIFEST).unlink()
    atomic._seal(folder, {})


def refused(folder: Path) -> str:
    """The sentence; fails if anything of the model changed on the way to it."""
    tensors = held_by(ALONE, 0, seed=1)
    with pytest.raises(CheckpointError) as caught:
        load_sharded(folder, tensors, group=everyone())
    assert same(tensors, held_by(ALONE, 0, seed=1))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def edit(folder: Path, change: Callable[[Metadata], Any]) -> None:
    """Change the metadata as torch sees it, with the manifest to fit."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # noqa: S301 - our own
    path.write_bytes(pickle.dumps(change(metadata) or metadata))
    seal(folder)


# ---- damage ------------------------------------------------------------------------------------------------------


def test_what_is_good_loads(folder: Path) -> None:
    seal(folder)  # resealing alone must change nothing, or the tests below would prove nothing
    tensors = held_by(ALONE, 0, None)
    assert load_sharded(folder, tensors, group=everyone()) == {"step": 1}
    assert same(tensors, held_by(ALONE, 0))


@pytest.mark.parametrize(
    "file", [".metadata", "sharded.json", "training.json", "rank-00000.safetensors", "rank-00001.safetensors"]
)
def test_one_flipped_byte_is_found_in_every_file(folder: Path, file: str) -> None:
    path = folder / file
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 4
    path.write_bytes(data)
    assert f"{file} is damaged: its bytes changed" in refused(folder)


@pytest.mark.parametrize(
    "file", [".metadata", "sharded.json", "training.json", "rank-00001.safetensors", "manifest.json"]
)
def test_truncated_and_missing_files_are_named(folder: Path, file: str) -> None:
    path = folder / file
    path.write_bytes(path.read_bytes()[:-9])
    assert file in refused(folder)
    path.unlink()
    assert file in refused(folder)


def test_a_changed_tensor_is_named_even_with_a_manifest_to_fit(folder: Path) -> None:
    path = folder / "rank-00001.safetensors"
    tensors = load_file(path)
    key = "blocks.1.ffn.experts.3.w_in[3:6,0:8]"
    tensors[key].view(torch.int32)[1, 2] ^= 1
    save_file(tensors, path)
    seal(folder)
    assert "blocks.1.ffn.experts.3.w_in of" in refused(folder)
    with pytest.raises(CheckpointError, match=r"experts.3.w_in of .* is not what was saved: its fingerprint is"):
        load_sharded(folder, held_by(ALONE, 0), group=everyone(), verify=False)


def test_a_shard_cut_short_is_refused_with_a_manifest_to_fit(folder: Path) -> None:
    path = folder / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    seal(folder)
    assert "rank-00000.safetensors is damaged" in refused(folder)


def test_a_piece_of_another_shape_or_dtype_is_refused(folder: Path) -> None:
    path = folder / "rank-00000.safetensors"
    tensors = load_file(path)
    key = f"{NAME}[0:5,0:6]"
    for other in (tensors[key][:4].clone(), tensors[key].double()):
        save_file({**tensors, key: other}, path)
        seal(folder)
        assert f'has no "{key}" of the dtype and shape' in refused(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", [10, 7]),
        ("dtype", "F64"),
        ("experts", True),
        ("fingerprints", []),
        ("shape", [-1, 6]),
        ("dtype", "F7"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(folder: Path, key: str, value: Any) -> None:
    path = folder / "sharded.json"
    record = json.loads(path.read_text())
    record["tensors"][NAME][key] = value
    path.write_text(json.dumps(record))
    seal(folder)
    assert "sharded.json" in refused(folder)


def test_a_description_of_too_little_or_of_the_future_is_refused(folder: Path) -> None:
    path = folder / "sharded.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "version": 99}))
    seal(folder)
    assert "is of version 99" in refused(folder)
    del record["tensors"][NAME]
    path.write_text(json.dumps(record))
    seal(folder)
    assert f'do not hold the same tensors: "{NAME}"' in refused(folder)


def test_other_folders_are_refused_in_words(tmp_path: Path) -> None:
    assert "There is no folder" in refused(tmp_path / "none")
    assert "is no sharded checkpoint: it has no sharded.json" in refused(tmp_path)


# ---- hostile metadata --------------------------------------------------------------------------------------------


class _Runs:
    """Pickled as a call of os.system."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("where", ["whole", "planner_data", "inside"])
def test_code_in_the_metadata_never_runs(folder: Path, tmp_path: Path, where: str) -> None:
    sentinel = tmp_path / "ran"

    def change(metadata: Metadata) -> Any:
        if where == "whole":
            return _Runs(sentinel)
        if where == "planner_data":
            metadata.planner_data = [_Runs(sentinel)]
        else:
            metadata.state_dict_metadata[NAME].chunks.append(_Runs(sentinel))  # type: ignore[union-attr]
        return None

    edit(folder, change)
    assert 'asks for "posix.system", which no description of tensors needs' in refused(folder)
    assert not sentinel.exists()
    pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 - the proof that it was live
    assert sentinel.exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"cbuiltins\neval\n(V1\ntR.",
        b"cbuiltins\ngetattr\n.",
        b"ctorch.distributed.checkpoint.metadata\nMetadata.__init__.__globals__\n.",
        b"\x80\x04\x8c\x05torch\x8c\x04load\x93.",
        b"\x80\x04\x8c\x23torch.distributed.checkpoint.metadata\x8c\x02os\x93.",
        b"cos\nsystem\n.",
        b"(S'touch x'\nios\nsystem\n.",
        b"\x80\x02\x82\x01.",
        b"Pid\n.",
    ],
)
def test_no_other_name_is_known(folder: Path, payload: bytes) -> None:
    (folder / ".metadata").write_bytes(payload)
    seal(folder)
    assert ".metadata" in refused(folder)


def test_a_pickle_cannot_change_the_classes_it_names(folder: Path) -> None:
    """BUILD with a state of two parts sets attributes on whatever is below it, also on a class."""
    before = dict(vars(ChunkStorageMetadata)), dict(vars(TensorProperties))
    (folder / ".metadata").write_bytes(
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nChunkStorageMetadata\n(N}\x8c\x08__init__K\x05stb."
    )
    seal(folder)
    assert ".metadata is damaged" in refused(folder)
    assert (dict(vars(ChunkStorageMetadata)), dict(vars(TensorProperties))) == before


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04", b"no pickle at all", b"\x80\x04N.", b"\x80\x04}.", b"]" * 5000 + b"."]
)
def test_what_is_no_metadata_is_damaged(folder: Path, data: bytes) -> None:
    (folder / ".metadata").write_bytes(data)
    seal(folder)
    assert ".metadata is damaged" in refused(folder)


def _place(metadata: Metadata, path: Any) -> None:
    index = next(index for index in metadata.storage_data if index.fqn == NAME)
    metadata.storage_data[index] = _StorageInfo(path, 0, 0)


@pytest.mark.parametrize(
    "path",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "a/../../outside.safetensors",
        "rank-00000.safetensors\x00.safetensors",
        "sharded.json",
        "unlisted.safetensors",
        "link.safetensors",
        "",
        7,
        None,
        ["rank-00000.safetensors"],
    ],
)
def test_paths_that_leave_the_folder_are_refused(folder: Path, path: Any) -> None:
    shutil.copy(folder / "rank-00000.safetensors", folder.parent / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(folder.parent / "outside.safetensors")
    edit(folder, lambda metadata: _place(metadata, path))
    if path == "unlisted.safetensors":
        (folder / path).write_bytes(b"x")
    assert str(folder) in refused(folder)


def _chunk(metadata: Metadata, offsets: Any, sizes: Any) -> None:
    record = metadata.state_dict_metadata[NAME]
    record.chunks[0] = ChunkStorageMetadata(offsets, sizes)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: _chunk(m, (0, 0), (4, 6)), "overlap or are not all of it"),
        (lambda m: _chunk(m, (0, 0), (6, 6)), "overlap or are not all of it"),
        (lambda m: _chunk(m, (0, 0), (50, 6)), "lies outside it"),
        (lambda m: _chunk(m, (-1, 0), (6, 6)), "no number of elements"),
        (lambda m: _chunk(m, (0,), (5,)), "another number of dimensions"),
        (lambda m: _chunk(m, (0, True), (5, 6)), "no number of elements"),
        (lambda m: _chunk(m, "00", (5, 6)), "has no offsets"),
        (lambda m: _chunk(m, (1, 0), (5, 6)), "lies in no file"),
        (lambda m: m.state_dict_metadata[NAME].chunks.clear(), "overlap or are not all of it"),
        (lambda m: m.state_dict_metadata.pop(NAME), "that the tensor has not"),
        (lambda m: m.state_dict_metadata.update({"": m.state_dict_metadata[NAME]}), "a tensor is called"),
        (lambda m: m.state_dict_metadata.update({NAME: BytesStorageMetadata()}), "asks for"),
        (lambda m: setattr(m.state_dict_metadata[NAME], "properties", None), "has no properties"),
        (lambda m: setattr(m.state_dict_metadata[NAME], "size", (1 << 70, 6)), "no number of elements"),
        (lambda m: setattr(m.state_dict_metadata[NAME], "chunks", {}), "has no chunks"),
        (lambda m: m.storage_data.clear(), "lies in no file"),
        (
            lambda m: m.storage_data.update(
                {MetadataIndex("ghost", (0,)): _StorageInfo("rank-00000.safetensors", 0, 0)}
            ),
            "ghost",
        ),
    ],
)
def test_regions_that_do_not_fit_are_refused(folder: Path, change: Callable[[Metadata], Any], why: str) -> None:
    edit(folder, lambda metadata: (change(metadata), None)[1])
    if why == "that the tensor has not" or "ghost" in why:
        why = "the tensor has not"
    assert why in refused(folder)


class _Again:
    """Pickled as a ``MetadataIndex``, and as a key of a dict another than its equal."""

    __class__ = property(lambda self: MetadataIndex)  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copyreg.__newobj__, (MetadataIndex,), {"fqn": NAME, "offset": torch.Size((0, 0))}  # type: ignore[attr-defined]


def test_two_files_for_one_piece_are_refused(folder: Path) -> None:
    """Which of the two counts is unclear; a dict of indices cannot hold both, a pickle can."""
    twice = {_Again(): _StorageInfo("rank-00001.safetensors", 0, 0)}
    edit(folder, lambda metadata: metadata.storage_data.update(twice))
    assert f'places a part of "{NAME}" in two files' in refused(folder)


def test_metadata_that_is_no_plain_file_is_refused(folder: Path) -> None:
    path = folder / ".metadata"
    path.unlink()
    os.mkfifo(path)
    assert ".metadata is not a plain file" in refused(folder)


# ---- on several ranks --------------------------------------------------------------------------------------------


def _refused_by(rank: int, folder: str) -> dict[str, Tensor]:
    tensors = held_by(CUTS[2]["replicas"], rank, seed=1)
    with pytest.raises(CheckpointError) as caught:
        load_sharded(folder, tensors, group=everyone())
    assert same(tensors, held_by(CUTS[2]["replicas"], rank, seed=1))
    return {"sentence": torch.tensor(list(str(caught.value).encode()))}


def test_both_ranks_raise_what_one_of_them_found(folder: Path) -> None:
    path = folder / "rank-00001.safetensors"  # hashed by one rank only
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    first, second = (
        bytes(answer["sentence"].tolist()).decode() for answer in run_distributed(2, _refused_by, str(folder))
    )
    assert first == second
    assert "rank-00001.safetensors is damaged" in first
    seal(folder)
    first, second = (
        bytes(answer["sentence"].tolist()).decode() for answer in run_distributed(2, _refused_by, str(folder))
    )
    assert first == second
    assert "is not what was saved" in first


def test_opening_reads_no_tensor(good: Path) -> None:
    checkpoint = open_sharded(good)
    assert checkpoint.world == 2
    assert checkpoint.extra == {"step": 1}
    assert checkpoint.tensors[NAME].shape == (10, 6)
