"""Router arithmetic is fp32 and stays so, whatever happens to the model around it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from moesaic.experts import MoE
from moesaic.plan import RoutingPlan
from tests.routing.cases import CASES, DIM, Case, some_input

every_router = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def _layer(case: Case) -> MoE:
    return MoE(DIM, 8, case.experts - case.special, case.k, case.name, case.options, zero=case.special)


def _names(layer: MoE) -> list[str]:
    """Tensors of the router that are not whole numbers."""
    return [
        name for name, tensor in layer.state_dict().items() if name.startswith("router.") and tensor.is_floating_point()
    ]


CASTS: list[Callable[[nn.Module], nn.Module]] = [
    lambda m: m.to(torch.bfloat16),
    lambda m: m.half(),
    lambda m: m.bfloat16(),
    lambda m: m.to("cpu", torch.float16),
    lambda m: nn.Sequential(m).to(torch.bfloat16)[0],
]


@pytest.mark.parametrize("cast", CASTS)
@every_router
def test_router_stays_fp32_through_casts_bit_for_bit(case: Case, cast: Callable[[nn.Module], nn.Module]) -> None:
    layer = _layer(case)
    before = {key: layer.state_dict()[key].clone() for key in _names(layer)}
    cast(layer)
    assert next(layer.experts.parameters()).dtype.itemsize == 2
    for key, value in before.items():
        assert torch.equal(layer.state_dict()[key], value)
        assert layer.state_dict()[key].dtype == torch.float32


@every_router
def test_weights_and_scores_are_fp32_and_the_output_keeps_the_input_dtype(case: Case) -> None:
    layer = _layer(case).to(torch.bfloat16)
    batch = some_input(2, 3, dtype=torch.bfloat16)
    y_BSD, plan = layer(batch.x_BSD, batch.context())
    assert y_BSD.dtype == torch.bfloat16
    assert (plan.weight_N if isinstance(plan, RoutingPlan) else plan.combine_GTS).dtype == torch.float32
    if plan.gate is not None:
        assert plan.gate.logits_TE.dtype == plan.gate.probs_TE.dtype == torch.float32
    # The product itself runs in fp32: bf16 products would be off by about 1e-2.
    if case.name == "topk" and not case.options.get("gate_bias"):
        assert plan.gate is not None
        exact_TE = batch.x_BSD.flatten(0, 1).double() @ layer.router.get_parameter("gate.weight").double().T
        torch.testing.assert_close(plan.gate.logits_TE.double(), exact_TE, atol=1e-6, rtol=1e-5)
    y_BSD.float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in layer.router.parameters())


def test_autocast_does_not_reach_the_router() -> None:
    layer, x_TD = MoE(8, 8, 4), torch.randn(6, 8)
    plain = layer(x_TD)[1]
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x_TD)[1]
    assert torch.equal(cast.gate.logits_TE, plain.gate.logits_TE)
    assert cast.gate.logits_TE.dtype == torch.float32


@every_router
def test_a_router_built_under_a_half_default_dtype_is_fp32(case: Case) -> None:
    torch.set_default_dtype(torch.bfloat16)
    router = _layer(case).router
    for tensor in router.state_dict().values():
        assert tensor.dtype == torch.float32 or not tensor.is_floating_point()


@pytest.mark.parametrize("assign", [False, True])
@every_router
def test_half_precision_checkpoints_are_read_into_fp32(case: Case, assign: bool) -> None:
    layer = _layer(case)
    saved = {
        key: torch.randn_like(value).to(torch.bfloat16) if value.is_floating_point() else value
        for key, value in layer.state_dict().items()
    }
    dtypes = {key: value.dtype for key, value in saved.items()}
    layer.load_state_dict(saved, assign=assign)
    for key in _names(layer):
        assert layer.state_dict()[key].dtype == torch.float32
        assert torch.equal(layer.state_dict()[key], saved[key].float())
    assert {key: value.dtype for key, value in saved.items()} == dtypes  # the caller's table is not touched


@every_router
def test_double_means_double(case: Case) -> None:
    layer, batch = _layer(case).double(), some_input(2, 3)
    y_BSD, plan = layer(batch.x_BSD, batch.context())
    assert all(layer.state_dict()[key].dtype == torch.float64 for key in _names(layer))
    assert y_BSD.dtype == torch.float64
    assert (plan.weight_N if isinstance(plan, RoutingPlan) else plan.combine_GTS).dtype == torch.float64
    if plan.gate is not None:
        assert plan.gate.logits_TE.dtype == torch.float64
