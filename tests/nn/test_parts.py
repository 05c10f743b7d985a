"""Norms, rotary positions and feed-forward networks against plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.nn.linear import Linear, init_fan_in_
from moesaic.nn.mlp import ACTIVATIONS, MLP
from moesaic.nn.norm import LayerNorm, RMSNorm, make_norm
from moesaic.nn.rope import rope_tables, rotate

F64 = torch.float64


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(4, eps=0.5)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x = torch.tensor([1.0, -1.0, 2.0, 0.0])  # mean square 6 / 4 = 1.5, plus 0.5 is 2
    torch.testing.assert_close(norm(x), torch.tensor([1.0, -2.0, 6.0, 0.0]) / math.sqrt(2))


def test_layer_norm_by_hand() -> None:
    norm = LayerNorm(2, eps=3.0)
    norm.weight.data, norm.bias.data = torch.tensor([2.0, 3.0]), torch.tensor([0.5, -0.5])
    x = torch.tensor([5.0, 3.0])  # centred +-1, variance 1, plus 3 is 4
    torch.testing.assert_close(norm(x), torch.tensor([2 * 0.5 + 0.5, 3 * -0.5 - 0.5]))


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norm_statistics_are_fp32_for_half_precision_input(kind: str) -> None:
    norm = make_norm(kind, 256, 1e-6)  # type: ignore[arg-type]
    x = (torch.randn(3, 256) * 300).to(torch.float16)  # squares overflow fp16
    y = norm(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, norm(x.float()).half(), rtol=0, atol=0)
    assert norm(x.double()).dtype == F64


def test_rope_is_a_rotation_of_complex_numbers() -> None:
    """Pair i, (x_i, x_{i + R/2}) as a complex number, turned by position * theta^(-2i/R)."""
    position_BS = torch.tensor([[0, 1, 2, 3, 50], [7, 3, 3, 0, 1]])
    x = torch.randn(2, 3, 5, 8, dtype=F64)
    cos, sin = rope_tables(position_BS, 8, theta=100.0)
    turned = rotate(x, cos, sin)
    rate = 100.0 ** (-2 * torch.arange(4, dtype=F64) / 8)
    turn = torch.polar(torch.ones(2, 1, 5, 4, dtype=F64), position_BS[:, None, :, None] * rate)
    expected = torch.complex(x[..., :4], x[..., 4:]) * turn
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], -1), rtol=1e-5, atol=1e-5)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(turned[0, :, 0], x[0, :, 0])  # position 0 stays
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_rope_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 1, 8, dtype=F64), torch.randn(1, 1, 1, 8, dtype=F64)

    def score(a: int, b: int) -> torch.Tensor:
        turned = [rotate(x, *rope_tables(torch.tensor([[p]]), 8, 1e4)) for x, p in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(5, 2), score(30, 27), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(score(5, 2), score(2, 5), rtol=1e-3)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_mlp_is_the_written_formula(name: str, gated: bool) -> None:
    formula = {
        "silu": lambda x: x / (1 + torch.exp(-x)),
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": lambda x: x.clamp(min=0),
        "squared_relu": lambda x: x.clamp(min=0) ** 2,
    }[name]
    mlp = MLP(4, 6, name, gated).double()  # type: ignore[arg-type]
    x = torch.randn(5, 4, dtype=F64)
    hidden = x @ mlp.w_in.weight.T
    hidden = formula(hidden[:, :6]) * hidden[:, 6:] if gated else formula(hidden)
    torch.testing.assert_close(mlp(x), hidden @ mlp.w_out.weight.T)


def test_linear_computes_in_the_dtype_of_its_input_and_learns_in_its_own() -> None:
    linear = Linear(3, 2)
    y = linear(torch.randn(4, 3, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32


def test_fan_in_initialisation_takes_a_generator() -> None:
    one, two = torch.empty(50, 40), torch.empty(50, 40)
    for weight in (one, two):
        init_fan_in_(weight, 4, 0.25, torch.Generator().manual_seed(7))
    assert torch.equal(one, two)
    assert one.abs().max() <= 0.5  # two standard deviations of sqrt(0.25 / 4)
    assert one.std().item() == pytest.approx(0.25 * 0.88, rel=0.05)
