"""Tensors beside the model: kept on the disk, counted, written back bit for bit; and fp32 routers through every form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moesaic as mo
from moesaic.checkpoint.aside import STEM, Aside
from moesaic.convert.convert import convert
from moesaic.convert.read import open_folder
from moesaic.convert.write import write_hf
from moesaic.errors import CheckpointError
from tests.convert.parity import load_hf, same_model, same_tensors, stored, tiny_hf
from tests.convert.test_parity_deepseek import LATENT
from tests.convert.test_storage import deepseek_fp8, edit_config, edit_tensors

transformers = pytest.importorskip("transformers")
LAYERS = 3


def with_further_layer(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny DeepSeek-V3 with a layer of multi-token prediction behind its last, named as in the release."""
    config = transformers.DeepseekV3Config(**LATENT | {"n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 1})
    tiny_hf(config).to(dtype).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    last, further = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    more = {further + name.removeprefix(last): t + 1 for name, t in tensors.items() if name.startswith(last)}
    dim = config.hidden_size
    more |= {
        f"{further}eh_proj.weight": torch.randn(dim, 2 * dim).to(dtype),
        f"{further}enorm.weight": torch.randn(dim).to(dtype),
        f"{further}hnorm.weight": torch.randn(dim).to(dtype),
        f"{further}embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{further}shared_head.norm.weight": torch.randn(dim).to(dtype),
        f"{further}shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }
    save_file(tensors | more, folder / "model.safetensors", {"format": "pt"})
    return folder


def further(folder: Path) -> set[str]:
    return {name for name in stored(folder) if name.startswith(f"model.layers.{LAYERS}.")}


def test_it_is_counted_apart(tmp_path: Path) -> None:
    folder = with_further_layer(tmp_path / "hf")
    names = further(folder)
    coverage = open_folder(folder).coverage()
    assert coverage.complete
    assert set(coverage.aside) == names
    assert coverage.aside_parameters == sum(stored(folder)[name].numel() for name in names)
    assert coverage.tensors.total == len(stored(folder)) - len(names)


def test_it_travels_and_is_never_in_memory(tmp_path: Path) -> None:
    """Hugging Face, ours, Hugging Face: all its tensors have the bits they had."""
    folder = with_further_layer(tmp_path / "hf")
    model = mo.load(folder)
    assert isinstance(model.aside, Aside)
    assert {slot.name for slot in model.aside.slots} == further(folder)
    assert not any(
        isinstance(value, torch.Tensor) for kept in model.aside.kept.values() for value in vars(kept).values()
    )
    mo.save(model, tmp_path / "native")
    assert set(load_file(tmp_path / "native" / f"{STEM}.safetensors")) == further(folder)
    assert f"{STEM}.safetensors" in json.loads((tmp_path / "native" / "manifest.json").read_text("utf-8"))["files"]
    again = mo.load(tmp_path / "native")
    same_model(model, again)
    mo.save(again, tmp_path / "back", format="hf")
    same_tensors(stored(folder), stored(tmp_path / "back"))
    mo.save(model, tmp_path / "straight", format="hf")
    same_tensors(stored(folder), stored(tmp_path / "straight"))


def test_a_streamed_conversion_keeps_the_same(tmp_path: Path) -> None:
    folder = with_further_layer(tmp_path / "hf", torch.bfloat16)
    convert(folder, tmp_path / "native")
    mo.save(mo.load(folder), tmp_path / "saved")
    same_tensors(stored(tmp_path / "saved"), stored(tmp_path / "native"))
    convert(tmp_path / "saved", tmp_path / "back")
    back, there = stored(tmp_path / "back"), stored(folder)
    same_tensors({name: there[name] for name in further(folder)}, {name: back[name] for name in further(folder)})
    assert back.keys() == there.keys()


def test_shards_of_either(tmp_path: Path) -> None:
    folder = with_further_layer(tmp_path / "hf")
    model = mo.load(folder)
    from moesaic.checkpoint.native import save_model

    save_model(model, tmp_path / "native", max_shard_bytes=6000)
    assert len(list((tmp_path / "native").glob(f"{STEM}-*.safetensors"))) > 1
    write_hf(mo.load(tmp_path / "native"), tmp_path / "back", max_shard_bytes=6000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    same_tensors(stored(folder), stored(tmp_path / "back"))


@pytest.mark.parametrize("format", ["moesaic", "hf"])
def test_saved_over_the_folder_it_lies_in(format: str, tmp_path: Path) -> None:
    """Twice, so that the second save reads what the first has written."""
    folder = with_further_layer(tmp_path / "hf")
    there = stored(folder)
    place = tmp_path / "place"
    mo.save(mo.load(folder), place, format=format)
    model = mo.load(place)
    with torch.no_grad():
        model.norm.weight += 1
    mo.save(model, place, format=format)
    mo.save(model, place, format=format)
    mo.save(model, tmp_path / "back", format="hf")
    names = further(folder)
    back = stored(tmp_path / "back")
    same_tensors({name: there[name] for name in names}, {name: back[name] for name in names})
    assert torch.equal(back["model.norm.weight"], there["model.norm.weight"] + 1)


def test_a_file_that_changed_meanwhile(tmp_path: Path) -> None:
    """Its bytes may be another model's by now: nothing is saved, and the error says what to do."""
    folder = with_further_layer(tmp_path / "hf")
    model = mo.load(folder)
    edit_tensors(folder, lambda t: t[f"model.layers.{LAYERS}.enorm.weight"].fill_(7))
    for format in ("moesaic", "hf"):
        with pytest.raises(
            CheckpointError, match=r"model.safetensors changed since the model was loaded.*model.aside = None"
        ):
            mo.save(model, tmp_path / "out", format=format)
        assert not (tmp_path / "out").exists()
    model.aside = None
    mo.save(model, tmp_path / "out", format="hf")
    assert not further(tmp_path / "out")
    load_hf(tmp_path / "out")


def test_layers_beyond_those_announced(tmp_path: Path) -> None:
    folder = with_further_layer(tmp_path / "hf")
    edit_config(folder, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=f'no place for: "model.layers.{LAYERS}'):
        open_folder(folder)
    edit_config(folder, num_nextn_predict_layers=1)
    edit_tensors(folder, lambda t: t.update({f"model.layers.{LAYERS + 1}.enorm.weight": torch.ones(32)}))
    with pytest.raises(CheckpointError, match=f'no place for: "model.layers.{LAYERS + 1}.enorm'):
        open_folder(folder)


def test_a_further_layer_in_fp8(tmp_path: Path) -> None:
    """Kept in the form that is read: numbers, without their scales."""
    folder = deepseek_fp8(tmp_path / "fp8")
    last, beyond = f"model.layers.{LAYERS - 1}.self_attn.o_proj", f"model.layers.{LAYERS}.self_attn.o_proj"
    edit_tensors(
        folder, lambda t: t.update({beyond + n: t[last + n].clone() for n in (".weight", ".weight_scale_inv")})
    )
    edit_config(folder, num_nextn_predict_layers=1)
    coverage = open_folder(folder).coverage()
    assert coverage.complete
    assert coverage.aside == (f"{beyond}.weight",)
    mo.save(mo.load(folder), tmp_path / "back", format="hf")
    back = stored(tmp_path / "back")
    assert back[f"{beyond}.weight"].dtype == torch.bfloat16
    assert torch.equal(back[f"{beyond}.weight"], back[f"{last}.weight"])
    assert not any("scale" in name for name in back)


# ---- routers stay fp32 ----


def test_fp32_gate_and_bias_survive_bf16(tmp_path: Path) -> None:
    """Values that bf16 would round: loaded as bf16, saved, exported, streamed, read again, they are the same bits."""
    folder = with_further_layer(tmp_path / "hf", torch.bfloat16)
    routers = [
        f"model.layers.{i}.mlp.gate.{n}" for i in range(1, LAYERS) for n in ("weight", "e_score_correction_bias")
    ]
    exact = {name: torch.randn(stored(folder)[name].shape) + 1e-4 for name in routers}
    assert all(not torch.equal(t, t.bfloat16().float()) for t in exact.values())
    edit_tensors(folder, lambda t: t.update(exact))
    model = mo.load(folder, dtype=torch.bfloat16).to(torch.bfloat16)
    assert model.embedding.weight.dtype == torch.bfloat16
    mo.save(model, tmp_path / "native")
    convert(folder, tmp_path / "streamed", dtype="bf16")
    for place in ("native", "streamed"):
        again = mo.load(tmp_path / place, dtype=torch.bfloat16)
        for layer in range(1, LAYERS):
            router = again.blocks[layer].ffn.router
            assert torch.equal(router.gate.weight, exact[f"model.layers.{layer}.mlp.gate.weight"])
            assert torch.equal(router.choice_bias_E, exact[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"])
        mo.save(again, tmp_path / f"{place}_hf", format="hf")
        there = stored(tmp_path / f"{place}_hf")
        same_tensors(exact, {name: there[name] for name in routers})
        same_model(again, mo.load(tmp_path / f"{place}_hf"))
    # transformers keeps the bias as it is, too.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "native_hf", dtype=torch.bfloat16
    ).state_dict()
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(theirs[name], exact[name])
