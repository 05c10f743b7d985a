"""Model directories: bitwise round trips, and every way a folder can be wrong told in words."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.checkpoint import native, shards
from moesaic.checkpoint.native import load_config, load_into, load_model, read_header, save_model
from moesaic.errors import CheckpointError, ConfigError, MoesaicError
from tests.checkpoint.standin import TinyConfig, TinyMoE, build_tiny, same, values
from tests.checkpoint.test_atomic import file_size_limit, tree

pytestmark = pytest.mark.usefixtures("tiny")


class Tokenizer:
    def to_str(self) -> str:
        return '{"ünicode": 1}'


def saved(folder: Path, config: TinyConfig | None = None, **options: Any) -> Path:
    save_model(build_tiny(config or TinyConfig(), seed=1), folder, **options)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 100])
def test_a_round_trip_is_bitwise(tmp_path: Path, tied: bool, dtype: torch.dtype, max_shard_bytes: int) -> None:
    model = build_tiny(TinyConfig(tied=tied), seed=1).to(dtype)
    model.seen.fill_(2**40 + 1)
    with torch.no_grad():
        model.up_EDH[0, 0, :4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-40])
    save_model(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    again = load_model(tmp_path / "m")
    assert same(values(model), values(again))
    assert (again.head.weight is again.embed.weight) == tied
    assert again.router.weight.dtype == torch.float32
    assert all(p.requires_grad for p in again.parameters())
    assert not again.training
    assert again.config == model.config == load_config(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == (
        1 if max_shard_bytes > 100 else (4 if dtype == torch.bfloat16 else 5) - tied
    )


def test_a_tied_weight_is_stored_once_and_trains_as_one(tmp_path: Path) -> None:
    saved(tmp_path / "m", TinyConfig(tied=True))
    assert set(read_header(tmp_path / "m")) == {"embed.weight", "router.weight", "router.bias_E", "up_EDH", "seen"}
    model = load_model(tmp_path / "m")
    model(torch.tensor([[1, 2]])).sum().backward()
    assert len(list(model.parameters())) == 3
    assert model.head.weight.grad is model.embed.weight.grad


def test_asking_for_bf16_keeps_the_router_in_fp32(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    model = load_model(tmp_path / "m", dtype=torch.bfloat16)
    assert same(values(model), values(build_tiny(TinyConfig(), seed=1).to(torch.bfloat16)))
    assert (model.router.weight.dtype, model.router.bias_E.dtype) == (torch.float32, torch.float32)
    assert (model.up_EDH.dtype, model.seen.dtype) == (torch.bfloat16, torch.int64)


def test_a_router_stored_too_narrow_is_widened(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    edit_tensors(folder, **{"router.weight": torch.ones(3, 4, dtype=torch.bfloat16)})
    assert load_model(folder, verify=False).router.weight.dtype == torch.float32


def test_the_header_tells_names_shapes_types_and_bytes(tmp_path: Path) -> None:
    header = read_header(saved(tmp_path / "m", max_shard_bytes=100))
    up = header["up_EDH"]
    assert (up.shape, up.dtype, up.numel, up.nbytes) == ((3, 4, 8), torch.float32, 96, 384)
    assert up.file.name == "model-00001-of-00005.safetensors"
    assert (header["seen"].shape, header["seen"].dtype) == ((), torch.int64)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in header.values())


def test_the_files_of_a_model_directory(tmp_path: Path) -> None:
    saved(tmp_path / "m", tokenizer=Tokenizer(), extra_files={"notes/a.json": {"x": 1}, "b.txt": b"\0"})
    assert set(tree(tmp_path / "m")) == {
        *("config.json", "model.safetensors", "tokenizer.json", "manifest.json", "notes/a.json", "b.txt")
    }
    assert (tmp_path / "m" / "tokenizer.json").read_text(encoding="utf-8") == '{"ünicode": 1}'
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["format"], config["version"], config["model"]["moe"]) == ("moesaic", 1, {"experts": 3, "k": 1})
    # The library makes files only their owner may read: a team would be locked out of its checkpoints.
    assert (tmp_path / "m" / "model.safetensors").stat().st_mode & 0o777 == (tmp_path / "m").stat().st_mode & 0o666


@pytest.mark.parametrize("name", ["../x", "config.json", "model.safetensors", "manifest.json"])
def test_an_extra_file_cannot_take_a_reserved_or_hostile_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="refused|cannot be called"):
        saved(tmp_path / "m", extra_files={name: b"x"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100])
def test_one_flipped_byte_in_any_file_is_refused_by_name(tmp_path: Path, max_shard_bytes: int) -> None:
    folder = saved(tmp_path / "m", tokenizer=Tokenizer(), max_shard_bytes=max_shard_bytes)
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        middle = len(good) - 5
        path.write_bytes(good[:middle] + bytes([good[middle] ^ 0x40]) + good[middle + 1 :])
        with pytest.raises(CheckpointError, match=path.name):
            load_model(folder)
        path.write_bytes(good[:-7])
        with pytest.raises(CheckpointError, match=path.name):
            load_model(folder)
        path.unlink()
        with pytest.raises(CheckpointError, match=path.name):
            load_model(folder)
        path.write_bytes(good)
    load_model(folder)


def test_without_the_manifest_a_folder_loads_only_when_asked(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        load_model(folder)
    assert same(values(load_model(folder, verify=False)), values(build_tiny(TinyConfig(), seed=1)))


def test_truncation_and_random_damage_are_typed_errors_even_unverified(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    path, draw = folder / "model.safetensors", random.Random(0)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    refused = 0
    for trial in range(400):
        bad = bytearray(good)
        if trial % 4 == 0:
            bad = bad[: draw.randrange(len(good))]
        for _ in range(draw.randint(1, 3)):
            if len(bad) > header:
                bad[draw.randrange(header)] = draw.randrange(256)
        path.write_bytes(bad)
        try:
            load_model(folder, verify=False)
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017 - most trials raise, a few mutations are harmless
            refused += 1
    assert refused > 350


def test_wrong_tensors_are_named_and_counted(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    good = (folder / "model.safetensors").read_bytes()
    cases: list[tuple[dict[str, torch.Tensor | None], str]] = [
        ({"up_EDH": None, "router.bias_E": None}, r'lacks 2 tensors of the model: "up_EDH", "router.bias_E"'),
        (
            {"extra": torch.ones(1), "../../x": torch.ones(1)},
            r'holds 2 tensors .* "../../x", "extra"|"extra", "../../x"',
        ),
        ({"a\n\x1b[2J": torch.ones(1)}, r'"a\\n\\u001b\[2J"'),
        ({"up_EDH": torch.ones(3, 8, 4)}, r'"up_EDH": \[3, 8, 4\] there, \[3, 4, 8\] by the config'),
        ({"up_EDH": torch.ones(3, 4, 8, dtype=torch.int32)}, r'"up_EDH" is int32, not float32'),
        ({"seen": torch.ones(())}, r'"seen" is float32, not int64'),
    ]
    for changes, message in cases:
        edit_tensors(folder, **changes)
        with pytest.raises(CheckpointError, match=message):
            load_model(folder, verify=False)
        (folder / "model.safetensors").write_bytes(good)
    assert not list(tmp_path.parent.glob("x*"))


def test_a_config_of_something_else_is_told_apart(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    good = (folder / "config.json").read_bytes()
    model = json.loads(good)["model"]
    cases: list[tuple[dict[str, Any], type[MoesaicError], str]] = [
        ({"format": ..., "model_type": "mixtral"}, CheckpointError, 'Hugging Face folder .*"mixtral".* later version'),
        ({"format": ..., "model": ...}, CheckpointError, 'lacks "format"'),
        ({"version": 2}, CheckpointError, "format version 2.* Update"),
        ({"version": "1"}, CheckpointError, 'version "1"'),
        ({"auto_map": {"AutoModel": "x.py"}}, CheckpointError, 'unknown key "auto_map"'),
        ({"model": ...}, ConfigError, "config.json: model must be a table"),
        ({"model": model | {"dims": 3}}, ConfigError, 'Did you mean "dim"'),
        ({"model": model | {"moe": {"k": 2.5}}}, ConfigError, "moe.k must be a whole number, not 2.5"),
        ({"model": model | {"num_layers": 10**9}}, CheckpointError, "num_layers=1000000000 is impossible"),
        ({"model": model | {"dim": 8}}, CheckpointError, "wrong shape"),
        ({"model": model | {"dim": 2**20, "vocab_size": 2**40}}, CheckpointError, "wrong shape"),  # nothing allocated
    ]
    for changes, kind, message in cases:
        edit_config(folder, **changes)
        with pytest.raises(kind, match=message):
            load_model(folder, verify=False)
        (folder / "config.json").write_bytes(good)
    for text in (b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": "moesaic", "version": 1e999}'):
        (folder / "config.json").write_bytes(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_config(folder)


def test_places_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in (("none", "does not exist"), ("file", "is a file"), ("empty", r"config\.json is missing")):
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / name)


class Bomb:
    """Unpickling it writes the sentinel."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.sentinel,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "rng_state.pt", "optimizer.pth", "a.PKL", "x.ckpt"])
def test_pickle_payloads_are_refused_unopened(tmp_path: Path, name: str) -> None:
    folder, sentinel = saved(tmp_path / "m"), tmp_path / "ran"
    torch.save({"x": Bomb(sentinel)}, folder / name)
    for load in (load_model, load_config, read_header):
        with pytest.raises(CheckpointError, match="pickles"):
            load(folder)
    with pytest.raises(CheckpointError, match="pickles"):
        shards.header_of(folder / name)
    (folder / name).rename(folder / "model.safetensors")  # a pickle under a good name
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_model(folder, verify=False)
    assert not sentinel.exists()


def test_hostile_index_files(tmp_path: Path) -> None:
    folder, outside = saved(tmp_path / "m", max_shard_bytes=100), saved(tmp_path / "outside") / "model.safetensors"
    path = folder / "model.safetensors.index.json"
    good = json.loads(path.read_text())["weight_map"]
    (folder / "link.safetensors").symlink_to(outside)
    hostile = ["../outside/model.safetensors", str(outside), "link.safetensors", "a\0.safetensors", "config.json"]
    for file in [*hostile, "x.bin", 3, None, ["model-00001-of-00005.safetensors"], {}]:
        path.write_text(json.dumps({"weight_map": good | {"up_EDH": file}}))
        with pytest.raises(CheckpointError, match="refused"):
            load_model(folder, verify=False)
    (folder / "link.safetensors").unlink()
    cases: list[tuple[Any, str]] = [
        (good | {"up_EDH": good["embed.weight"]}, 'lacks the tensor "up_EDH"|does not place'),
        ({k: v for k, v in good.items() if k != "seen"}, "lacks 1 tensors|does not place"),
        (good | {"new": good["seen"]}, 'lacks the tensor "new"'),
        (good | {"up_EDH": "gone.safetensors"}, r"gone\.safetensors is missing"),
        ({}, "no .weight_map."),
        ([], "no .weight_map."),
    ]
    for weight_map, message in cases:
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            load_model(folder, verify=False)
    path.write_text(json.dumps({"weight_map": good}))
    load_model(folder, verify=False)
    (folder / "model.safetensors").write_bytes(outside.read_bytes())
    with pytest.raises(CheckpointError, match="holds both"):
        load_model(folder, verify=False)


def test_two_hundred_thousand_tensors_are_refused_in_words(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    entry = '"t%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % i for i in range(200_000)) + "}").encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="lacks 6 tensors"):
        load_model(folder, verify=False)


def test_loading_into_a_model_fills_it_in_place(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", TinyConfig(tied=True), max_shard_bytes=100)
    model = build_tiny(TinyConfig(tied=True), seed=9)
    weights = list(model.parameters())
    load_into(model, folder)
    assert same(values(model), values(build_tiny(TinyConfig(tied=True), seed=1)))
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))


def test_loading_into_another_model_changes_nothing_and_names_the_settings(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    model = build_tiny(replace(TinyConfig(), moe=TinyMoE(experts=5, k=2)), seed=9)
    before = values(model)
    with pytest.raises(CheckpointError, match=r"another architecture: moe.experts is 3 there and 5 here; moe.k is 1 "):
        load_into(model, folder)
    assert same(values(model), before)
    model = build_tiny(TinyConfig(), seed=9).to(torch.bfloat16)
    before = values(model)
    with pytest.raises(CheckpointError, match='"embed.weight" is float32 and bfloat16 in this model'):
        load_into(model, folder)
    assert same(values(model), before)


def test_a_full_disk_leaves_the_older_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    before = tree(tmp_path)
    with file_size_limit(600), pytest.raises(MoesaicError, match="larger than this system allows"):
        saved(folder)
    assert tree(tmp_path) == before
    load_model(folder)


def test_a_loaded_model_does_not_depend_on_its_file(tmp_path: Path) -> None:
    """A view of the mapped file would change, or kill the process, when the file is written over."""
    folder = saved(tmp_path / "m")
    model = load_model(folder)
    before = values(model)
    with open(folder / "model.safetensors", "r+b") as f:
        f.write(b"\xff" * (folder / "model.safetensors").stat().st_size)
        f.truncate(10)
    assert same(values(model), before)


def test_a_tensor_that_is_a_part_of_a_larger_memory(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    tensors = {"a": whole[:8], "b": whole[4:], "c": whole[:8].view(2, 4).T, "d": whole[:0]}
    shards.write_tensors(tensors, tmp_path, "x")
    found = dict(shards.read_tensors(shards.find_tensors(tmp_path, "x")))
    assert same(found, {name: t.contiguous() for name, t in tensors.items()})
    assert (tmp_path / "x.safetensors").stat().st_size < 600


def test_saving_what_has_no_values_is_a_programming_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="meta device"):
        save_model(build_tiny(TinyConfig(), device="meta"), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    assert native.config_differences({"a": {"b": 1}}, {"a": None}) == ['a is {"b": 1} there and null here']
