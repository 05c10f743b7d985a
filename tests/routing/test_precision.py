"""Router arithmetic is fp32 and stays so, whatever happens to the model around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moesaic.experts import MoE
from moesaic.routing import ROUTERS, build_router

V3: dict[str, Any] = {"score": "sigmoid", "balance_bias": True, "gate_bias": True}


def _layer(name: str, options: dict[str, Any] | None = None) -> MoE:
    return MoE(8, 8, 4, 1 if name == "switch" else 2, name, options)


def _names(layer: MoE) -> list[str]:
    return [name for name in layer.state_dict() if name.startswith("router.")]


CASES = [(name, {}) for name in ROUTERS] + [("topk", V3)]
CASTS: list[Callable[[nn.Module], nn.Module]] = [
    lambda m: m.to(torch.bfloat16),
    lambda m: m.half(),
    lambda m: m.bfloat16(),
    lambda m: m.to("cpu", torch.float16),
    lambda m: nn.Sequential(m).to(torch.bfloat16)[0],
]


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_router_stays_fp32_through_casts_bit_for_bit(
    name: str, options: dict[str, Any], cast: Callable[[nn.Module], nn.Module]
) -> None:
    layer = _layer(name, options)
    before = {key: layer.state_dict()[key].clone() for key in _names(layer)}
    assert before
    cast(layer)
    assert layer.get_parameter("experts.w_in").dtype.itemsize == 2
    for key, value in before.items():
        assert torch.equal(layer.state_dict()[key], value)
        assert layer.state_dict()[key].dtype == torch.float32


@pytest.mark.parametrize(("name", "options"), CASES)
def test_weights_and_scores_are_fp32_and_the_output_keeps_the_input_dtype(name: str, options: dict[str, Any]) -> None:
    layer = _layer(name, options).to(torch.bfloat16)
    x_TD = torch.randn(6, 8, dtype=torch.bfloat16)
    y_TD, plan = layer(x_TD)
    assert y_TD.dtype == torch.bfloat16
    assert plan.gate is not None
    assert plan.weight_N.dtype == plan.gate.logits_TE.dtype == plan.gate.probs_TE.dtype == torch.float32
    # The product itself runs in fp32: bf16 products would be off by about 1e-2.
    if name == "topk" and not options:
        exact_TE = x_TD.double() @ layer.router.get_parameter("gate.weight").double().T
        torch.testing.assert_close(plan.gate.logits_TE.double(), exact_TE, atol=1e-6, rtol=1e-5)
    y_TD.float().sum().backward()
    assert layer.router.get_parameter("gate.weight").grad.dtype == torch.float32


def test_autocast_does_not_reach_the_router() -> None:
    layer, x_TD = _layer("topk"), torch.randn(6, 8)
    plain = layer(x_TD)[1]
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x_TD)[1]
    assert torch.equal(cast.gate.logits_TE, plain.gate.logits_TE)
    assert cast.gate.logits_TE.dtype == torch.float32


def test_a_router_built_under_a_half_default_dtype_is_fp32() -> None:
    torch.set_default_dtype(torch.bfloat16)
    for name, options in CASES:
        router = build_router(name, 8, 4, 1 if name == "switch" else 2, options)
        assert all(tensor.dtype == torch.float32 for tensor in router.state_dict().values())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_half_precision_checkpoints_are_read_into_fp32(name: str, options: dict[str, Any], assign: bool) -> None:
    layer = _layer(name, options)
    saved = {key: torch.randn_like(value).to(torch.bfloat16) for key, value in layer.state_dict().items()}
    dtypes = {key: value.dtype for key, value in saved.items()}
    layer.load_state_dict(saved, assign=assign)
    for key in _names(layer):
        assert layer.state_dict()[key].dtype == torch.float32
        assert torch.equal(layer.state_dict()[key], saved[key].float())
    assert {key: value.dtype for key, value in saved.items()} == dtypes  # the caller's table is not touched


@pytest.mark.parametrize(("name", "options"), CASES)
def test_double_means_double(name: str, options: dict[str, Any]) -> None:
    layer = _layer(name, options).double()
    y_TD, plan = layer(torch.randn(4, 8, dtype=torch.float64))
    assert all(layer.state_dict()[key].dtype == torch.float64 for key in _names(layer))
    assert y_TD.dtype == plan.weight_N.dtype == plan.gate.logits_TE.dtype == torch.float64
