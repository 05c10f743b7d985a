"""Cross entropy by blocks is PyTorch's to the last bit, value and gradient, and takes less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.data.packing import IGNORE
from moesaic.plan.plan import at_least_fp32
from moesaic.train import loss
from moesaic.train.loss import cross_entropy


def whole(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    return F.cross_entropy(at_least_fp32(logits_TV), targets_T, ignore_index=IGNORE, reduction="none")


def drawn(T: int, V: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets of which every fifth is missing, and a gradient that differs from row to row."""
    rng = torch.Generator().manual_seed(seed)
    logits_TV = (3 * torch.randn(T, V, generator=rng)).to(dtype)
    targets_T = torch.randint(V, (T,), generator=rng)
    targets_T[::5] = IGNORE
    return logits_TV, targets_T, torch.rand(T, generator=rng)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("T", [1, 7, 8, 30])
@pytest.mark.parametrize("block", [1, 8, 1000])
def test_the_same_bits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, T: int, block: int) -> None:
    V = 333
    monkeypatch.setattr(loss, "CACHED", block * V * 4)
    logits_TV, targets_T, grad_T = drawn(T, V, dtype)
    found, wanted = (logits_TV.clone().requires_grad_() for _ in range(2))
    losses_T, expected_T = cross_entropy(found, targets_T), whole(wanted, targets_T)
    losses_T.backward(grad_T)
    expected_T.backward(grad_T)
    assert losses_T.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(losses_T, expected_T)
    assert found.grad is not None
    assert found.grad.dtype == dtype
    assert torch.equal(found.grad, wanted.grad)  # type: ignore[arg-type]


def test_by_hand() -> None:
    logits_TV = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    losses_T = cross_entropy(logits_TV, torch.tensor([1, IGNORE]))
    losses_T.sum().backward()
    assert losses_T.tolist() == pytest.approx([0.6931472, 0.0])
    assert logits_TV.grad is not None
    assert logits_TV.grad.tolist() == [[0.5, -0.5], [0.0, 0.0]]


def test_a_view_of_logits_and_no_rows() -> None:
    logits_TV, targets_T, grad_T = drawn(12, 40, torch.float32)
    wide_TV = logits_TV.repeat(1, 2).requires_grad_()
    cross_entropy(wide_TV[:, :40], targets_T).backward(grad_T)
    plain_TV = logits_TV.clone().requires_grad_()
    whole(plain_TV, targets_T).backward(grad_T)
    assert torch.equal(wide_TV.grad[:, :40], plain_TV.grad)  # type: ignore[index, arg-type]
    assert not wide_TV.grad[:, 40:].any()  # type: ignore[index]
    assert cross_entropy(torch.empty(0, 5), torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_threads_do_not_change_the_bits() -> None:
    logits_TV, targets_T, grad_T = drawn(64, 5000, torch.bfloat16)
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        leaf_TV = logits_TV.clone().requires_grad_()
        losses_T = cross_entropy(leaf_TV, targets_T)
        losses_T.backward(grad_T)
        found.append((losses_T.detach(), leaf_TV.grad))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


class Large(TorchDispatchMode):
    """Counts the operations that make a new tensor of at least so many numbers."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.count = least, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        fresh = not any(returned.alias_info for returned in func._schema.returns)
        for tensor in out if isinstance(out, tuple) else (out,):
            self.count += fresh and isinstance(tensor, Tensor) and tensor.numel() >= self.least
        return out


def test_memory_is_the_gradient_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    T, V = 256, 1000
    monkeypatch.setattr(loss, "CACHED", 4 * V * 4)
    logits_TV, targets_T, grad_T = drawn(T, V, torch.bfloat16)

    def large(function: Callable[[Tensor, Tensor], Tensor]) -> int:
        leaf_TV = logits_TV.clone().requires_grad_()
        with Large(T * V) as counter:
            function(leaf_TV, targets_T).backward(grad_T)
        return counter.count

    assert large(whole) == 5  # fp32 copy, log-softmax, gradients of all three
    assert large(cross_entropy) == 1
