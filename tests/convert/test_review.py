"""Ways users come to a model and go on with it that once lost something or said something false."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moesaic as mo
from moesaic.convert.read import open_folder
from moesaic.models.build import build_model
from moesaic.upcycle import UpcycleConfig, densify, difference, random_ids, upcycle
from tests.command import call
from tests.convert.tiny_checkpoint import edit_config, make_hf
from tests.models.tiny import tiny


def test_one_expert_per_token_at_weight_1_is_read_and_written_back(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "hf", dtype=torch.float32)
    edit_config(folder, num_experts_per_tok=1)
    model = mo.load(folder)
    plan = model(torch.arange(8)[None]).plans[0]
    assert plan.weight_N.tolist() == [1.0] * 8
    mo.save(model, tmp_path / "again", format="hf")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (again["num_experts_per_tok"], again["model_type"]) == (1, "mixtral")
    assert open_folder(tmp_path / "again").config == model.config
    with pytest.raises(mo.ConfigError, match="the router gets no gradient"):  # built anew, it is refused as ever
        mo.MoE(dim=8, hidden=8, experts=4, k=1)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt"])
def test_pickles_beside_safetensors_are_left_alone(tmp_path: Path, name: str) -> None:
    folder = make_hf(tmp_path / "hf")
    (folder / name).write_bytes(b"\x80\x04cos\nsystem\n")
    assert mo.load(folder).config.num_layers == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": {"a": 1}}, "are not read"),
        ({"max_position_embeddings": 10**400}, "max_position_embeddings=10*.* is impossible"),
    ],
    ids=["type", "length"],
)
def test_values_no_config_has(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = make_hf(tmp_path / "hf")
    edit_config(folder, **changes)
    with pytest.raises(mo.MoesaicError, match=words):
        mo.load(folder)


def test_bf16_copies_are_the_same_function() -> None:
    dense = build_model(tiny(), seed=0).to(torch.bfloat16)
    made = upcycle(dense, UpcycleConfig(method="copy", experts=4, k=4))
    assert difference(dense, made, random_ids(dense)).same
    assert dense.compute_dtype is None
    assert made.compute_dtype is None
    back = densify(made)
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in dense.state_dict().items())


def test_saving_knows_a_model_in_disguise(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    mo.save(build_model(tiny(), seed=0).eval(), tmp_path / "m")
    wrapped = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    mo.save(wrapped, tmp_path / "n")
    assert mo.load(tmp_path / "n").config == wrapped.model.config
    wrapped.model.blocks[0].attention.wq.lora_A = torch.nn.Linear(2, 2)
    for format in ("moesaic", "hf"):
        with pytest.raises(mo.ConfigError, match="merge its adapters first"):
            mo.save(wrapped, tmp_path / "o", format=format)
    assert not (tmp_path / "o").exists()
    with pytest.raises(mo.ConfigError, match="attn_implementation"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="flash_attention_2")


def test_what_is_kept_aside_goes_through_auto_classes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from moesaic.checkpoint.aside import open_aside

    model = build_model(tiny(), seed=0).eval()
    (tmp_path / "beside").mkdir()
    save_file({"model.layers.9.x": torch.arange(3.0)}, tmp_path / "beside" / "aside.safetensors")
    model.aside = open_aside(tmp_path / "beside")
    mo.save(model, tmp_path / "m")
    AutoModelForCausalLM.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "n")
    again = mo.load(tmp_path / "n")
    assert [(name, t.tolist()) for name, t in again.aside.tensors()] == [("model.layers.9.x", [0.0, 1.0, 2.0])]
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "n")
    same.save_pretrained(tmp_path / "n")  # over itself
    same.save_pretrained(tmp_path / "n")
    assert len(mo.load(tmp_path / "n").aside.kept) == 1


def test_info_of_a_gguf_file_and_of_a_name_on_the_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.gguf").write_bytes(b"GGUF\xac")
    assert "is a GGUF file" in call(capsys, "info", "x.gguf").err
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    done = call(capsys, "info", "owner/name")
    assert done.status == 2
    assert "moesaic convert fetches it" in done.err
