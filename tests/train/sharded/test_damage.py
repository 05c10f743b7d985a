"""Damaged sharded checkpoints: refused in one sentence that names the file or tensor, on all ranks; nothing changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.train.sharded.checkpoint import open_sharded
from moesaic.train.sharded.load import load_sharded
from tests.distributed import run_distributed
from tests.train.sharded.damage import ALONE, NAME, refused, seal
from tests.train.sharded.layouts import CUTS, everyone, held_by, same


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
