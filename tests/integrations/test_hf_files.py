"""Loading and saving through Hugging Face's names: bitwise, strict, and never a tensor made up."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

import moesaic as mo
from moesaic.checkpoint.native import load_model
from moesaic.errors import CheckpointError, ConfigError, MoesaicError
from moesaic.integrations.hf_model import MoesaicForCausalLM
from moesaic.integrations.hook import install
from tests.integrations.folders import saved_folder, sparse_config

install()


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
    )


@pytest.mark.parametrize("tied", [True, False])
def test_through_hugging_face_and_back_every_bit_stays(tied: bool, tmp_path: Path) -> None:
    model, folder = saved_folder(tmp_path / "m", sparse_config(tie_embeddings=tied))
    model.source = {"family": "test", "keys": [1, 2]}
    mo.save(model, folder)
    hf = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(hf, MoesaicForCausalLM)
    assert not hf.training
    assert same(hf.model, model)
    assert hf.config.source == model.source
    hf.save_pretrained(tmp_path / "again")
    ours, theirs = load_model(tmp_path / "again"), AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert same(ours, model)
    assert same(theirs.model, model)
    assert ours.source == model.source
    hf.config.save_pretrained(tmp_path / "config")
    assert AutoConfig.from_pretrained(tmp_path / "config").shape == model.config


def test_several_shards(tmp_path: Path) -> None:
    model, folder = saved_folder(tmp_path / "m")
    hf = AutoModelForCausalLM.from_pretrained(folder)
    hf.save_pretrained(tmp_path / "again", max_shard_size="8KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    assert same(load_model(tmp_path / "again"), model)
    with pytest.raises(ConfigError, match="no size"):
        hf.save_pretrained(tmp_path / "never", max_shard_size="many")
    assert not (tmp_path / "never").exists()


def test_dtypes_and_devices(tmp_path: Path) -> None:
    model, folder = saved_folder(tmp_path / "m")
    for dtype in (torch.bfloat16, "bfloat16"):
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu")
        assert hf.dtype == torch.bfloat16
        for name, tensor in hf.model.state_dict().items():
            wanted = torch.float32 if "router" in name else torch.bfloat16
            assert tensor.dtype == wanted, name
            if "router" in name:
                assert torch.equal(tensor, model.state_dict()[name])
    hf.save_pretrained(tmp_path / "half")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").model, hf.model)
    where = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert str(AutoModelForCausalLM.from_pretrained(folder, device_map="auto").device) == where
    assert hf.hf_device_map == {"": torch.device("cpu")}


def edited(folder: Path, to: Path, change: Any) -> Path:
    """A copy of a folder with other tensors and no manifest, so that only the tensors themselves can be wrong."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors")
    return to


def test_a_tensor_that_does_not_fit_is_an_error_never_a_warning(tmp_path: Path) -> None:
    _, folder = saved_folder(tmp_path / "m")
    name = "blocks.1.ffn.experts.w_in"
    cases = {
        "lacks 1 tensors": lambda t: t.pop(name),
        "no place for": lambda t: t.update(extra=torch.ones(2)),
        "wrong shape": lambda t: t.update({name: t[name][:, :-1].contiguous()}),
    }
    for number, (words, change) in enumerate(cases.items()):
        bad = edited(folder, tmp_path / str(number), change)
        with pytest.raises(CheckpointError, match=words):
            AutoModelForCausalLM.from_pretrained(bad, verify=False)
        with pytest.raises(CheckpointError, match="changed since it was saved|is damaged"):
            AutoModelForCausalLM.from_pretrained(bad)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        AutoModelForCausalLM.from_pretrained(folder)
    other = edited(folder, tmp_path / "pickle", lambda t: None)
    torch.save({}, other / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickles"):
        AutoModelForCausalLM.from_pretrained(other, verify=False)


def test_config_files_that_are_not_ours(tmp_path: Path) -> None:
    _, folder = saved_folder(tmp_path / "m")
    good = json.loads((folder / "config.json").read_text())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"version": 9}, "version"),
        ({"architectures": ["Other"]}, "architectures"),
        ({"source": 3}, "source"),
        ({"model": good["model"] | {"dims": 1}}, 'Did you mean "dim"'),
        ({"extra": 1}, "unknown key"),
    ]
    for changes, words in cases:
        (folder / "config.json").write_text(json.dumps(good | changes))
        with pytest.raises(MoesaicError, match=words):
            AutoModelForCausalLM.from_pretrained(folder, verify=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device_map": {"model.embedding": "cpu", "model.blocks": "disk"}}, "cpu, disk.*one device"),
        ({"device_map": "nowhere"}, "no device"),
        ({"dtype": "int8"}, "no floating dtype"),
        ({"dtype": "float33"}, "no floating dtype"),
        ({"ignore_mismatched_sizes": True}, "ignore_mismatched_sizes"),
        ({"use_safetensors": False}, "use_safetensors"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation"),
        ({"experts_view": True}, 'Did you mean "expert_views"'),
    ],
)
def test_arguments_that_do_not_go_are_refused(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    _, folder = saved_folder(tmp_path / "m")
    with pytest.raises(ConfigError, match=words):
        MoesaicForCausalLM.from_pretrained(folder, **arguments)


def test_another_shape_asked_for_is_refused(tmp_path: Path) -> None:
    _, folder = saved_folder(tmp_path / "m")
    config = AutoConfig.from_pretrained(folder)
    config.model["moe"]["k"] = 3
    with pytest.raises(CheckpointError, match=r"moe\.k is 2 there and 3 here"):
        AutoModelForCausalLM.from_pretrained(folder, config=config)


def test_saving_beside_what_is_there(tmp_path: Path) -> None:
    """Where a Trainer saves, its checkpoints and a tokenizer lie already; all of them stay."""
    model, folder = saved_folder(tmp_path / "m")
    hf = AutoModelForCausalLM.from_pretrained(folder)
    target = tmp_path / "run"
    (target / "checkpoint-5").mkdir(parents=True)
    (target / "checkpoint-5" / "model.safetensors").write_bytes(b"of another model")
    (target / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    torch.save({}, target / "training_args.bin")
    hf.save_pretrained(target, max_shard_size="8KB")
    hf.save_pretrained(target)
    (target / "checkpoint-5" / "model.safetensors").rename(target / "checkpoint-5" / "moved")
    assert len(list(target.glob("*.safetensors"))) == 1
    assert same(mo.load(target), model)
    assert mo.load(target).tokenizer is not None
    assert not list(target.glob(".saving-*"))
    (target / "config.json").unlink()
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(target, config=hf.config)


def test_a_kill_between_two_files_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved_folder(tmp_path / "m")
    hf = AutoModelForCausalLM.from_pretrained(folder)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    hf.save_pretrained(tmp_path / "run")
    with torch.no_grad():
        hf.model.embedding.weight.add_(1)
    real = os.replace

    def replace_once(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "run" / "model.safetensors":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr("moesaic.integrations.hf_files.os.replace", replace_once)
    with pytest.raises(KeyboardInterrupt):
        hf.save_pretrained(tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(CheckpointError):
        mo.load(tmp_path / "run")
    assert (tmp_path / "run" / "notes.txt").exists()
    hf.save_pretrained(tmp_path / "run")
    assert same(mo.load(tmp_path / "run"), hf.model)


def test_a_pipeline_generates(tmp_path: Path) -> None:
    model, folder = saved_folder(tmp_path / "m")
    made = pipeline("text-generation", model=str(folder))(
        "a cat", max_new_tokens=6, do_sample=False, return_full_text=False
    )
    assert made[0]["generated_text"].strip() == mo.generate(model, "a cat", max_new_tokens=6, temperature=0).strip()


def test_a_repository_is_fetched_through_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = saved_folder(tmp_path / "m")
    asked: dict[str, Any] = {}

    def snapshot(name: str, **arguments: Any) -> str:
        asked.update(arguments, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    hf = MoesaicForCausalLM.from_pretrained("owner/name", revision="abc", token=None)
    assert same(hf.model, model)
    assert (asked["name"], asked["revision"]) == ("owner/name", "abc")
    assert "manifest.json" in asked["allow_patterns"]
    assert "*.bin" in asked["ignore_patterns"]


def test_pushing_uploads_a_model_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = saved_folder(tmp_path / "m")
    hf = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match="push_to_hub"):
        hf.save_pretrained(tmp_path / "x", push_to_hub=True)
    with pytest.raises(ConfigError, match="safe_serialization=False.*asks for pickles.*leave it out"):
        hf.save_pretrained(tmp_path / "x", safe_serialization=False)
    assert not (tmp_path / "x").exists()
    taken = tmp_path / "taken"
    monkeypatch.setattr(
        MoesaicForCausalLM, "_upload_modified_files", lambda self, place, *a, **k: shutil.copytree(place, taken)
    )

    class Api:
        def create_repo(self, name: str, **arguments: Any) -> Any:
            return type("Repo", (), {"repo_id": name, "url": ""})()

    monkeypatch.setattr("transformers.utils.hub.hf_api", Api)

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("a card")

    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *a, **k: Card())
    hf.push_to_hub("owner/name")
    assert same(load_model(taken), model)
