"""Hostile metadata of sharded checkpoints: no code runs, nothing outside the folder is read, nothing changes."""

from __future__ import annotations

import copyreg
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)

from moesaic.errors import CheckpointError
from moesaic.train.sharded.metadata import read_metadata
from tests.train.sharded.damage import NAME, edit, refused, seal


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


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("../outside.safetensors", "could lie outside the folder"),
        ("/etc/outside.safetensors", "could lie outside the folder"),
        ("link.safetensors", "is a link to a file outside the folder"),
        ("sharded.json", "where only .safetensors files are read"),
        ("a\\b.safetensors", "is not a plain file name"),
    ],
)
def test_paths_are_checked_whatever_the_manifest_lists(folder: Path, path: str, why: str) -> None:
    (folder / "link.safetensors").symlink_to(folder.parent / "outside.safetensors")
    edit(folder, lambda metadata: _place(metadata, path))
    with pytest.raises(CheckpointError, match=why):
        read_metadata(folder, {".metadata", "rank-00000.safetensors", "rank-00001.safetensors", path})


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
