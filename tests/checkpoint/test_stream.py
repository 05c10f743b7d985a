"""Shards written tensor by tensor: the library's own bytes, whatever the order, and no file that is not whole."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.checkpoint import stream
from moesaic.checkpoint.shards import find_tensors, read_tensors
from moesaic.checkpoint.stream import DTYPES, ShardWriter, Slot, index_of, plan_shards, write_shards
from moesaic.errors import CheckpointError


def tensors() -> dict[str, torch.Tensor]:
    """One of every type, odd lengths, a scalar, an empty one, names that sort in another order than they come."""
    rng = torch.Generator().manual_seed(0)
    made = {f"t.{name}.é": torch.randint(0, 2, (3, 5), generator=rng).to(dtype) for name, dtype in DTYPES.items()}
    return {"z": torch.tensor(3.5), "half": torch.randn(7, generator=rng).bfloat16(), "none": torch.zeros(0, 4), **made}


def slots(found: dict[str, torch.Tensor]) -> list[Slot]:
    return [Slot(name, t.dtype, tuple(t.shape)) for name, t in found.items()]


def bits(found: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    return {n: (t.dtype, list(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in found.items()}


@pytest.mark.parametrize("seed", range(3))
def test_the_bytes_are_those_of_the_library_in_any_order(tmp_path: Path, seed: int) -> None:
    made = tensors()
    names = list(made)
    random.Random(seed).shuffle(names)
    write_shards(tmp_path, "model", plan_shards(slots(made), "model", 10**9), [(name, made[name]) for name in names])
    save_file(made, tmp_path / "library.safetensors", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    assert bits(load_file(tmp_path / "model.safetensors")) == bits(made)


def test_four_byte_numbers_are_aligned_beside_two_byte_ones() -> None:
    (shard,) = plan_shards([Slot("a", torch.bfloat16, (3,)), Slot("b", torch.float32, (2,))], "m", 10**9)
    (_, first), (_, second) = shard.places["a"], shard.places["b"]
    assert (first % 2, second % 4, first - second) == (0, 0, 8)
    assert shard.nbytes == first + 6
    assert len(shard.header) % 8 == 0


@pytest.mark.parametrize(
    ("sizes", "limit", "groups"),
    [
        ([4, 4, 4], 8, [[0, 1], [2]]),
        ([4, 4, 4], 100, [[0, 1, 2]]),
        ([4, 40, 4], 8, [[0], [1], [2]]),  # larger than a file: one of its own
        ([0, 8, 0, 1], 8, [[0, 1, 2], [3]]),
        ([], 8, [[]]),
    ],
)
def test_which_file_a_tensor_goes_to(sizes: list[int], limit: int, groups: list[list[int]]) -> None:
    shards = plan_shards([Slot(str(i), torch.uint8, (n,)) for i, n in enumerate(sizes)], "m", limit)
    assert [sorted(int(name) for name in shard.places) for shard in shards] == groups
    many = len(groups) > 1
    assert [s.file for s in shards] == [
        f"m-{i:05d}-of-{len(groups):05d}.safetensors" if many else "m.safetensors" for i in range(1, len(groups) + 1)
    ]
    index = json.loads(index_of(shards))
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {str(i): shards[g].file for g, group in enumerate(groups) for i in group}


def test_shards_are_read_back_as_one(tmp_path: Path) -> None:
    made = tensors()
    shards = plan_shards(slots(made), "model", 40)
    assert len(shards) > 3
    write_shards(tmp_path, "model", shards, reversed(made.items()))
    assert bits(dict(read_tensors(find_tensors(tmp_path, "model")))) == bits(made)
    assert not list(tmp_path.glob("*.part"))


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    made = {"a": torch.ones(4), "b": torch.zeros(4), "c": torch.ones(2)}
    shards = plan_shards(slots(made), "m", 32)
    seen: list[str] = []

    def half() -> None:
        with ShardWriter(tmp_path, shards, finished=lambda p: seen.append(p.name)) as writer:
            writer.write("c", made["c"])
            assert (tmp_path / shards[1].file).is_file()
            writer.write("a", made["a"])
            assert not (tmp_path / shards[0].file).exists()
            assert [writer.wants(name) for name in "abcx"] == [False, True, False, False]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert seen == [shards[1].file]
    assert sorted(os.listdir(tmp_path)) == sorted([shards[0].file + ".part", shards[1].file])
    # Another writer leaves what is done alone and makes the rest.
    with ShardWriter(tmp_path, shards, done=[shards[1].file]) as writer:
        assert not writer.wants("c")
        writer.write("b", made["b"])
        writer.write("a", made["a"])
    assert bits(load_file(tmp_path / shards[0].file)) == bits({"a": made["a"], "b": made["b"]})


def test_what_was_not_planned_is_a_programming_error(tmp_path: Path) -> None:
    shards = plan_shards([Slot("a", torch.float32, (2,)), Slot("b", torch.float32, (2,))], "m", 100)
    for name, tensor, words in (
        ("x", torch.ones(2), "not planned"),
        ("a", torch.ones(3), "planned was"),
        ("a", torch.ones(2).bfloat16(), "planned was"),
        ("a", torch.ones(2, device="meta"), "planned was"),
    ):
        with pytest.raises(RuntimeError, match=words), ShardWriter(tmp_path, shards) as writer:
            writer.write(name, tensor)
    with (
        pytest.raises(RuntimeError, match="2 planned tensors were not written, first a"),
        ShardWriter(tmp_path, shards),
    ):
        pass
    with pytest.raises(RuntimeError, match="there already"):
        write_shards(tmp_path, "m", shards, [("a", torch.ones(2)), ("a", torch.ones(2))])
    for name in ("a", "__metadata__"):
        with pytest.raises(ValueError, match="cannot be called"):
            plan_shards([Slot("a", torch.float32, (2,)), Slot(name, torch.float32, (2,))], "m", 100)


def test_what_the_library_cannot_read_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = plan_shards([Slot("a", torch.float32, (2,))], "m", 100)
    fsync = os.fsync

    def spoil(handle: int) -> None:
        os.pwrite(handle, b"\xff" * 8, 0)
        fsync(handle)

    monkeypatch.setattr(stream.os, "fsync", spoil)
    with pytest.raises(CheckpointError, match=r"m.safetensors.part is damaged right after"):
        write_shards(tmp_path, "m", shards, [("a", torch.ones(2))])
    assert os.listdir(tmp_path) == ["m.safetensors.part"]


def test_views_and_other_strides_are_written_as_they_read(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    made = {"t": base.T, "part": base[1:3, ::2], "wide": torch.ones(1).expand(5)}
    write_shards(tmp_path, "m", plan_shards(slots(made), "m", 10**9), made.items())
    assert bits(load_file(tmp_path / "m.safetensors")) == bits({n: t.contiguous() for n, t in made.items()})
