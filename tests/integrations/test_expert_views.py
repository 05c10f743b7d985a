"""Views of every expert: the same function, the same memory, the same state dict, and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moesaic as mo
from moesaic.errors import ConfigError
from moesaic.integrations.expert_views import ExpertViews, expert_views, stack_experts
from tests.integrations.folders import VOCAB, loud_model, sparse_config
from tests.models.tiny import tiny

KINDS: dict[str, dict[str, Any]] = {
    "gated": {},
    "plain": {"gated": False, "activation": "gelu"},
    "biases and clamps": {"expert_bias": True, "activation": "clamped_swiglu", "shared": 0},
    "special experts": {"zero": 1, "copy": 1, "constant": 1},
    "several heads": {"heads": 2},
    "dense gates": {"router": "dense_soft", "k": 5, "losses": {}},
}
every_kind = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


def model_of(changes: dict[str, Any]) -> mo.Decoder:
    model = loud_model(sparse_config(**changes))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("b_in", "b_out")):
                parameter.normal_(generator=generator)
    return model


def ids_of(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))


@every_kind
def test_the_same_function_and_gradients(changes: dict[str, Any]) -> None:
    stacked, viewed = model_of(changes), model_of(changes)
    assert expert_views(viewed) == 10
    outputs = [model(ids_of()).logits for model in (stacked, viewed)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.square().mean().backward()
    with_stack = {name: p.grad for name, p in stacked.named_parameters()}
    for name, parameter in viewed.named_parameters():
        if name in with_stack:
            torch.testing.assert_close(parameter.grad, with_stack[name], rtol=1e-4, atol=1e-6)
    for layer, moe in viewed.moe_layers().items():
        views = getattr(moe.experts, "stacked", moe.experts)
        assert isinstance(views, ExpertViews)
        inside: Any = stacked.moe_layers()[layer].experts
        inside = getattr(inside, "stacked", inside)
        for expert, linears in enumerate(views):
            assert isinstance(linears, nn.ModuleDict)
            parts = dict(zip(("gate", "up"), inside.w_in.grad[expert].chunk(2, dim=-1), strict=True))
            if not inside.gated:
                parts = {"in": inside.w_in.grad[expert]}
            for name, part in {**parts, "out": inside.w_out.grad[expert]}.items():
                torch.testing.assert_close(linears[name].weight.grad, part.T, rtol=1e-4, atol=1e-6)


@every_kind
def test_one_memory_and_back(changes: dict[str, Any]) -> None:
    model = model_of(changes)
    before = dict(model.named_parameters())
    expert_views(model)
    moe = model.moe_layers()[1]
    views: Any = getattr(moe.experts, "stacked", moe.experts)
    first = "gate" if views.gated else "in"
    with torch.no_grad():
        views[3][first].weight[1, 2] = 7.0
        views[4]["out"].weight.mul_(2)
        expected = model(ids_of()).logits
    stack_experts(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    inside: Any = getattr(moe.experts, "stacked", moe.experts)
    assert inside.w_in[3, 2, 1] == 7.0
    with torch.no_grad():
        torch.testing.assert_close(model(ids_of()).logits, expected, rtol=1e-5, atol=1e-5)
    stack_experts(model)  # twice is harmless


def test_an_expert_without_tokens_has_a_zero_gradient() -> None:
    model = model_of({})
    expert_views(model)
    model(ids_of(1, 1)).logits.sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if ".experts." in name]
    assert all(grad is not None for grad in grads)
    assert sum(not grad.any() for grad in grads if grad is not None) == 2 * 3 * 3  # 3 of 5 experts, in 2 layers


def test_names_tools_look_for() -> None:
    model = model_of({})
    expert_views(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "experts" in name}
    assert "blocks.1.ffn.experts.4.gate" in linears
    assert linears == {
        f"blocks.{b}.ffn.experts.{e}.{m}" for b in (1, 2) for e in range(5) for m in ("gate", "up", "out")
    }


@pytest.mark.parametrize("changes", [KINDS["gated"], KINDS["biases and clamps"]], ids=["gated", "biases"])
def test_a_model_with_views_saves_and_loads_as_without(changes: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(changes)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expert_views(model)
    assert set(model.state_dict()) == set(plain)
    mo.save(model, tmp_path / "m")
    loaded = mo.load(tmp_path / "m").state_dict()
    assert all(torch.equal(loaded[name], plain[name]) for name in plain)
    other = {name: torch.randn_like(tensor) if tensor.is_floating_point() else tensor for name, tensor in plain.items()}
    other["head.weight"] = other["embedding.weight"]
    assert not model.load_state_dict(other).missing_keys
    stack_experts(model)
    assert all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())
    wrong = dict(plain) | {"blocks.1.ffn.experts.w_in": torch.zeros(2, 3, 4)}
    expert_views(model)
    with pytest.raises(RuntimeError, match=r"experts\.w_in is \[2, 3, 4\]"):
        model.load_state_dict(wrong)


def test_casting_copying_and_foreign_tensors_reach_the_stack() -> None:
    model = model_of({})
    expert_views(model)
    model.to(torch.bfloat16)
    views: Any = model.moe_layers()[1].experts
    assert views[0]["gate"].weight.dtype == torch.bfloat16
    assert model.moe_layers()[1].router.gate.weight.dtype == torch.float32
    views[0]["gate"].weight.data = torch.ones_like(views[0]["gate"].weight)  # as a merge that checks for NaN does
    twin = copy.deepcopy(model)
    twin_views: Any = twin.moe_layers()[1].experts
    with torch.no_grad():
        twin_views[1]["up"].weight.zero_()
    assert bool(views[1]["up"].weight.any())
    stack_experts(model)
    stacked: Any = model.moe_layers()[1].experts
    assert stacked.w_in.dtype == torch.bfloat16
    assert bool((stacked.w_in[0, :, :12] == 1).all())
    stack_experts(twin)
    assert not twin.moe_layers()[1].experts.w_in[1, :, 12:].any()  # type: ignore[union-attr, index]


def test_a_model_without_such_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="no stacked feed-forward experts"):
        expert_views(mo.build_model(tiny(vocab_size=VOCAB)))
