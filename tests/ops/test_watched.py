"""Tensors that C must not read: every way PyTorch watches or stands in for tensors gets operators, and right results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from moesaic.errors import ConfigError
from moesaic.experts.layer import MoE
from moesaic.experts.stacked import StackedExperts
from moesaic.nn.linear import Linear
from moesaic.ops import phases
from moesaic.ops.top import top_k
from moesaic.train.loss import cross_entropy


def _linear() -> tuple[Linear, Tensor]:
    return Linear(16, 12, bias=False).requires_grad_(False), torch.randn(3, 16)


def test_a_default_device_does_not_move_buffers() -> None:
    scores_TE = torch.randn(5, 9)
    want_TK = top_k(scores_TE, 3)
    layer, x_TD = MoE(8, 4, 4, 2).eval(), torch.randn(6, 8)
    with torch.no_grad():
        want_TD = layer(x_TD)[0]
        with torch.device("meta"):
            assert torch.equal(top_k(scores_TE, 3), want_TK)
            y_TD = layer.experts(x_TD, torch.tensor([6, 0, 0, 0], device="cpu"))
    assert y_TD.device.type == "cpu"
    assert torch.equal(layer(x_TD)[0].detach(), want_TD)


def test_fake_tensors() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        linear, x = _linear()
        y = linear(mode.from_tensor(x))
    assert y.shape == (3, 12)


def test_tracing_records_operators() -> None:
    linear, x = _linear()
    other = torch.randn(3, 16)
    with torch.no_grad():
        for traced in (torch.jit.trace(linear, x), make_fx(linear)(x)):
            torch.testing.assert_close(traced(other), F.linear(other, linear.weight))


def test_functorch() -> None:
    linear, x = _linear()
    torch.testing.assert_close(torch.func.vmap(linear)(x), F.linear(x, linear.weight))
    _, tangent = torch.func.jvp(linear, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(x), linear.weight))


def test_forward_mode_tangents_are_not_lost() -> None:
    linear, x = _linear()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(linear(dual)).tangent
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(x), linear.weight))


def test_flops_are_counted() -> None:
    counts = []
    for backend in ("auto", "loop"):
        layer: Any = MoE(16, 8, 4, 2, backend=backend)
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(20, 16))[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("backend", ["auto", "tiles", "loop"])
def test_second_derivatives_raise(backend: Any) -> None:
    layer, x_TD = MoE(8, 4, 4, 2, backend=backend), torch.randn(5, 8, requires_grad=True)
    (first_TD,) = torch.autograd.grad(layer(x_TD)[0].square().sum(), x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="Second derivatives"):
        torch.autograd.grad(first_TD.sum(), x_TD)
    first_TD = torch.autograd.grad(layer(x_TD)[0].square().sum(), x_TD)[0]  # without a graph: as ever
    assert not first_TD.requires_grad


def test_second_derivatives_of_the_loss_are_right() -> None:
    targets_T = torch.tensor([1, -100, 3, 0])

    def hvp(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        torch.manual_seed(0)
        logits_TV = torch.randn(4, 5, requires_grad=True)
        (first,) = torch.autograd.grad(loss(logits_TV, targets_T).square().sum(), logits_TV, create_graph=True)
        return torch.autograd.grad((first * torch.arange(5.0)).sum(), logits_TV)[0]

    torch.testing.assert_close(hvp(cross_entropy), hvp(lambda z, t: F.cross_entropy(z, t, reduction="none")))


def test_listeners_may_be_nested() -> None:
    layer, x_TD = MoE(8, 4, 4, 2), torch.randn(5, 8)
    with phases.listen() as outer:
        with phases.listen() as inner:
            pass
        layer(x_TD)
        assert phases.listening()
    assert inner == {}
    assert "grouping" in outer
    assert not phases.listening()


def test_a_kernel_that_cannot_be_is_refused() -> None:
    layer = MoE(8, 4, 4, 2, backend="kernel").double()
    with pytest.raises(ConfigError, match='backend="kernel"'):
        layer(torch.randn(3, 8, dtype=torch.float64))


class RowsAlone(StackedExperts):
    """A forward of its own, as an adapter has."""

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x_ND, counts_E) * 2


def test_a_subclass_with_its_own_forward_gets_rows() -> None:
    layer, x_TD = MoE(8, 4, 4, 2), torch.randn(5, 8)
    want_TD = layer(x_TD)[0] * 2
    layer.experts.__class__ = RowsAlone
    torch.testing.assert_close(layer(x_TD)[0], want_TD)
