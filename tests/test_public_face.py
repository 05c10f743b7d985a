"""The public face, literally as documented: mo.MoE, mo.load, mo.save, mo.generate, mo.trace, mo.edit."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moesaic as mo
from moesaic.plan import read
from moesaic.tokenizer import train_bpe
from tests.models.tiny import lively, sparse


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model with a tokenizer."""
    model = lively(replace(sparse(), vocab_size=300, num_layers=4))
    model.tokenizer = train_bpe(["once upon a time there was a cat and a dog"] * 9, 300)
    mo.save(model, tmp_path / "model", format="moesaic")
    return tmp_path / "model"


def test_as_documented(folder: Path, tmp_path: Path) -> None:
    layer = mo.MoE(dim=512, hidden=1024, experts=64, k=8, router="topk")
    x = torch.randn(2, 3, 512)
    y, plan = layer(x)
    assert y.shape == x.shape
    assert isinstance(plan, mo.RoutingPlan)
    assert plan.counts_E.sum() == 2 * 3 * 8
    model = mo.load(folder)
    ids = torch.tensor([model.tokenizer.encode("once upon a time").ids])
    out = model(ids)
    assert out.logits.shape == (1, ids.shape[1], 300)
    assert set(out.plans) == {0, 1, 2, 3}
    assert out.cache is None
    text = mo.generate(model, "once upon", max_new_tokens=5)
    assert isinstance(text, str)
    assert text == mo.generate(model, "once upon", max_new_tokens=5)
    with mo.trace(model) as t:
        model(ids)
    assert set(t.plans[0]) == {0, 1, 2, 3}
    with mo.edit(model, layer=3, knockout=[1]):
        edited = model(ids)
    assert read.load(edited.plans[3])[1] == 0 or edited.plans[3].counts_E[1] == 0
    assert not torch.equal(edited.logits, out.logits)
    mo.save(model, tmp_path / "folder")
    assert (tmp_path / "folder" / "model.safetensors").exists()


def test_save_then_load_is_bitwise(folder: Path, tmp_path: Path) -> None:
    model = mo.load(folder)
    assert not model.training
    mo.save(model, tmp_path / "again")
    again = mo.load(str(tmp_path / "again"))
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == again.state_dict()[name].dtype
        assert torch.equal(tensor, again.state_dict()[name]), name
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert again.tokenizer.to_str() == model.tokenizer.to_str()
    files = [sorted((p.name, p.read_bytes()) for p in f.iterdir()) for f in (folder, tmp_path / "again")]
    assert files[0] == files[1]


def test_load_as_bf16_keeps_routers_in_fp32(folder: Path) -> None:
    model = mo.load(folder, dtype=torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".router." in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if ".experts." in name} == {torch.bfloat16}
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    mo.save(lively(sparse()), tmp_path / "bare")
    model = mo.load(tmp_path / "bare")
    assert model.tokenizer is None
    with pytest.raises(mo.ConfigError, match=r"generate needs a tokenizer: pass tokenizer=, or load a model folder"):
        mo.generate(model, "once")


def test_errors_are_one_family_and_in_words(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(mo.ConfigError, match="format must be one of .*, not 'onnx'"):
        mo.save(mo.load(folder), tmp_path / "x", format="onnx")
    assert not (tmp_path / "x").exists()
    with pytest.raises(mo.MoesaicError, match="There is nothing at"):
        mo.load(tmp_path / "gone")
    with pytest.raises(mo.MoesaicError, match="k=9"):
        mo.MoE(dim=8, hidden=8, experts=4, k=9)
    with pytest.raises(mo.ConfigError, match='no router "topkk". Did you mean "topk"?'):
        mo.MoE(dim=8, hidden=8, experts=4, router="topkk")


def test_everything_named_is_there_and_documented() -> None:
    assert sorted(mo.__all__) == mo.__all__
    for name in mo.__all__:
        assert (getattr(mo, name).__doc__ or "").strip(), name


def test_the_lines_in_the_docstring_parse() -> None:
    assert mo.__doc__ is not None
    lines = [line.removeprefix(">>> ") for line in mo.__doc__.splitlines() if line.startswith(">>> ")]
    assert len(lines) == 7
    ast.parse("\n".join(lines))
