"""Experts with biases and clamped gates: every back end equals each expert on its own rows, and the layer its dumb twin."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.experts import MoE, StackedExperts
from moesaic.nn.mlp import MLP, apply_activation
from moesaic.plan import CapacityRule
from tests.experts.dumb import assert_truth
from tests.ops.kernels import using

F64 = torch.float64
KINDS = [("clamped_swiglu", True, True), ("clamped_swiglu", True, False), ("silu", True, True), ("relu", False, True)]
LOADS = {
    "all": [3, 1, 2, 4],
    "empty experts": [0, 5, 0, 3],
    "rows past the last group": [2, 0, 1, 2],
    "nothing but rows past the last group": [0, 0, 0, 0],
    "no rows": [],
}


def some_experts(activation: Any, gated: bool, bias: bool, backend: Any, D: int = 8, H: int = 4) -> StackedExperts:
    experts = StackedExperts(4, D, H, activation, gated, backend, bias=bias)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=1.5)
    return experts


def by_hand(experts: StackedExperts, x_ND: Tensor, counts: list[int]) -> Tensor:
    """``compute_one`` on every group; zeros after the last."""
    rows, start = [], 0
    for expert, count in enumerate(counts):
        rows.append(experts.compute_one(expert, x_ND[start : start + count]))
        start += count
    return torch.cat([*rows, torch.zeros_like(x_ND[start:])])


def gradients(y: Tensor, upstream: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((y * upstream).sum(), leaves, materialize_grads=True))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("activation", "gated", "bias"), KINDS)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("loop", F64), ("reference", F64), ("auto", F64), ("tiles", F64), ("grouped_mm", F64),
        ("loop", torch.float32), ("auto", torch.float32), ("tiles", torch.float32), ("grouped_mm", torch.float32),
    ],
)  # fmt: skip
def test_every_back_end(backend: str, dtype: Any, activation: str, gated: bool, bias: bool, load: str) -> None:
    experts = some_experts(activation, gated, bias, backend).to(dtype)
    counts, rows = LOADS[load] or [0] * 4, 0 if load == "no rows" else 10
    x_ND = (2 * torch.randn(rows, 8, dtype=dtype)).requires_grad_()
    leaves = [x_ND, *experts.parameters()]
    upstream_ND = torch.randn_like(x_ND)
    got, want = experts(x_ND, torch.tensor(counts)), by_hand(experts, x_ND, counts)
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == F64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got, want, **close)
    assert not got[sum(counts) :].any()
    for ours, theirs in zip(*(gradients(y, upstream_ND, leaves) for y in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    experts(x_ND, torch.tensor(counts)).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None  # zero for an expert without rows
        for e, count in enumerate(counts):
            assert count or not parameter.grad[e].any()


@pytest.mark.parametrize("backend", ["loop", "tiles", "auto", "grouped_mm"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bf16_rows(backend: str, weights: torch.dtype) -> None:
    torch.manual_seed(2)
    experts = StackedExperts(4, 32, 16, "clamped_swiglu", backend=backend, bias=True)  # type: ignore[arg-type]
    for bias in (experts.b_in, experts.b_out):
        assert bias is not None
        torch.nn.init.normal_(bias, std=0.5)
    experts.to(weights)
    x_ND, counts = torch.randn(20, 32, dtype=torch.bfloat16), [7, 0, 8, 3]
    with torch.no_grad():
        y_ND = experts(x_ND, torch.tensor(counts))
        want = by_hand(experts.float(), x_ND.float(), counts)
    assert y_ND.dtype == torch.bfloat16
    torch.testing.assert_close(y_ND.float(), want, rtol=0, atol=0.02 * float(want.abs().max()))
    assert not y_ND[18:].any()


@pytest.mark.parametrize("backend", ["loop", "grouped_mm", "tiles"])
def test_a_bias_gets_the_sum_over_more_rows_than_bf16_counts(backend: str) -> None:
    """3000 rows, each adding 1 to the gradient of the last bias: in bf16 the sum would stop at 256."""
    experts = StackedExperts(2, 8, 8, backend=backend, bias=True)  # type: ignore[arg-type]
    x_ND = torch.randn(3008, 8, dtype=torch.bfloat16)
    experts(x_ND, torch.tensor([3000, 4])).sum().backward()
    assert experts.b_out is not None
    assert experts.b_out.grad is not None
    assert experts.b_out.grad[0].tolist() == [3000.0] * 8
    assert experts.b_out.grad[1].tolist() == [4.0] * 8


def test_clamped_swiglu_by_hand() -> None:
    """(up + 1) gate sigmoid(1.702 gate), gate cut above 7, up on both sides."""

    def value(gate: float, up: float) -> float:
        return (up + 1) * gate / (1 + math.exp(-1.702 * gate))

    hidden = torch.tensor([[1.0, 0.5], [9.0, -20.0], [-30.0, 3.0], [0.0, 2.0], [-2.0, 8.0]], dtype=F64)
    want = [value(1, 0.5), value(7, -7), value(-30, 3), 0.0, value(-2, 7)]
    assert apply_activation(hidden, "clamped_swiglu", True)[:, 0].tolist() == pytest.approx(want)
    assert want[1] == pytest.approx(-42, abs=1e-3)
    mlp = MLP(3, 2, "clamped_swiglu", bias=True).double()
    torch.nn.init.normal_(mlp.w_in.bias)
    torch.nn.init.normal_(mlp.w_out.bias)
    x = torch.randn(3, dtype=F64)
    pre = (mlp.w_in.weight @ x + mlp.w_in.bias).detach()
    hand = torch.tensor([value(float(pre[i]), float(pre[i + 2])) for i in range(2)], dtype=F64)
    torch.testing.assert_close(mlp(x), mlp.w_out.weight @ hand + mlp.w_out.bias)
    mlp.reset_parameters(1.0, 1.0)
    assert not mlp.w_in.bias.any()
    assert not mlp.w_out.bias.any()


def test_views_of_one_expert_compute_it() -> None:
    experts = some_experts("clamped_swiglu", True, True, "loop").double()
    x_ND, views = torch.randn(5, 8, dtype=F64), experts.expert(2)
    assert list(views) == ["gate", "up", "out", "gate_bias", "up_bias", "out_bias"]
    gate, up = (x_ND @ views[name] + views[f"{name}_bias"] for name in ("gate", "up"))
    hidden = apply_activation(torch.cat([gate, up], -1), "clamped_swiglu", True)
    torch.testing.assert_close(hidden @ views["out"] + views["out_bias"], experts.compute_one(2, x_ND))
    with torch.no_grad():
        views["up_bias"].fill_(3.0)
    assert experts.b_in is not None
    assert (experts.b_in[2, 4:] == 3).all()
    assert not (experts.b_in[1] == 3).any()
    assert list(some_experts("relu", False, True, "loop").expert(0)) == ["in", "out", "in_bias", "out_bias"]


def test_new_experts_start_without_biases() -> None:
    experts = some_experts("silu", True, True, "auto")
    experts.reset_parameters()
    assert experts.b_in is not None
    assert experts.b_out is not None
    assert not experts.b_in.any()
    assert not experts.b_out.any()
    assert experts.w_in.any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bias": True}, 'backend="kernel" does not know biases of experts; use backend="auto".'),
        (
            {"activation": "clamped_swiglu"},
            'backend="kernel" does not know "clamped_swiglu" of experts; use backend="auto".',
        ),
    ],
)
def test_the_kernel_refuses_in_words(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        StackedExperts(2, 4, 4, backend="kernel", **options)
    assert str(error.value) == said
    with pytest.raises(ConfigError, match=r'backend="kernel" does not know'):
        MoE(
            4,
            4,
            2,
            2,
            backend="kernel",
            **{{"bias": "expert_bias"}.get(key, key): value for key, value in options.items()},
        )


def test_a_gate_without_a_gated_network_is_refused() -> None:
    with pytest.raises(ConfigError, match="clamped_swiglu"):
        StackedExperts(2, 4, 4, "clamped_swiglu", gated=False)
    with pytest.raises(ConfigError, match='expert_bias=True does not go with expert_kind="neuron"'):
        MoE(4, 1, 2, 1, "switch", expert_kind="neuron", expert_bias=True)


# ---- the whole layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("loop", F64, 1e-10), ("tiles", F64, 1e-10), ("auto", torch.float32, 5e-5), ("grouped_mm", torch.float32, 5e-5)],
)
@pytest.mark.parametrize("activation", ["silu", "clamped_swiglu"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared": 1, "shared_hidden": 7, "shared_gate": True},
        {"shared": 2},
        {"zero": 1, "copy": 1, "constant": 2},
        {"capacity": CapacityRule(0.6, minimum=0)},
    ],
    ids=str,
)
def test_the_layer_is_its_dumb_twin(options: Any, activation: Any, backend: Any, dtype: Any, tolerance: float) -> None:
    layer = MoE(
        8, 4, 4, 2, "topk", {"init_std": 0.7, "gate_bias": True}, activation=activation, backend=backend, expert_bias=True,
        **options,
    ).to(dtype)  # fmt: skip
    for name, parameter in layer.named_parameters():
        if name.endswith(("b_in", "b_out", "bias", "constant_v")):
            torch.nn.init.normal_(parameter)
    if "shared_hidden" in options:
        assert layer.shared is not None
        assert layer.shared.mlp.w_out.weight.shape == (8, 7)
    x_TD = torch.randn(9, 8, dtype=dtype)
    losses = {"switch": 0.3, "z": 0.1}
    got = assert_truth(layer, x_TD, losses=losses, tolerance=tolerance)
    assert any(name.endswith("b_out") for name in got)
    x_TD[3] = torch.nan
    assert_truth(layer, x_TD, valid=[1, 1, 1, 0, 1, 1, 1, 1, 1], losses=losses, tolerance=tolerance)


@pytest.fixture
def compiler() -> Iterator[None]:
    """Forgets what was compiled: dynamo gives up on a function after eight versions of it."""
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiler")
def test_the_layer_without_a_compiler_and_under_compile() -> None:
    layer = MoE(16, 8, 4, 2, activation="clamped_swiglu", expert_bias=True)
    x_TD = torch.randn(12, 16)
    want = layer(x_TD)[0]
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x_TD)[0], want)
    with using("off"):
        torch.testing.assert_close(layer(x_TD)[0], want)


def test_heads_route_into_biased_experts() -> None:
    from moesaic.experts.multi_head import MultiHeadMoE

    layer = MultiHeadMoE(8, 4, 4, 2, heads=2, expert_bias=True, shared=1, shared_hidden=5)
    y, plan = layer(torch.randn(3, 8))
    y.sum().backward()
    assert plan.num_tokens == 6
    assert layer.experts.b_out.grad.any()
    assert layer.shared.mlp.w_out.weight.shape == (4, 5)
