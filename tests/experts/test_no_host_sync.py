"""The path of GPUs asks for no value: run on the processor with everything that would wait for a device forbidden.

Operators whose result's shape depends on values (nonzero, masked selection, unique) wait as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.experts.layer import MoE
from moesaic.ops.kernel import call
from moesaic.plan.capacity import CapacityRule
from moesaic.routing import TokenContext

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"shared": 1, "shared_gate": True},
    "special": {"zero": 1, "copy": 1, "constant": 1},
    "capacity": {"capacity": CapacityRule(1.0, minimum=0)},
    "sigmoid": {"router_options": {"score": "sigmoid", "balance_bias": True}},
}
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount", "equal")


class Waited(Exception):
    pass


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS:
            raise Waited(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_values(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it once layers are built: building may read values."""

    def waited(*_: Any) -> Any:
        raise Waited("a value was read")

    def forbid() -> None:
        monkeypatch.setattr(call, "loaded", lambda: False)  # what is C on the processor is PyTorch's on a GPU
        for name in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            monkeypatch.setattr(torch.Tensor, name, waited)

    return forbid


def _run(layer: MoE, dtype: torch.dtype, padding: bool, forbid: Callable[[], None]) -> None:
    x_TD = torch.randn(32, 64, dtype=dtype, requires_grad=True)
    valid_T = (torch.arange(32) % 3 > 0) if padding else None
    forbid()
    with NoWaiting():
        y_TD, plan = layer(x_TD, TokenContext(valid_T=valid_T))
        (y_TD.sum() + plan.gate.logits_TE.sum()).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "padding"),
    # Capacity with padding waits once, for the number of real tokens (``CapacityRule.apply`` says so).
    [(kind, padding) for kind in LAYERS for padding in (False, True) if not (kind == "capacity" and padding)],
)
def test_forward_and_backward_ask_no_value(
    kind: str, padding: bool, dtype: torch.dtype, no_values: Callable[[], None]
) -> None:
    _run(MoE(64, 32, 8, 2, backend="grouped_mm", **LAYERS[kind]).to(dtype), dtype, padding, no_values)


@pytest.mark.parametrize("backend", ["loop", "tiles"])
def test_back_ends_that_read_counts_are_caught(backend: Any, no_values: Callable[[], None]) -> None:
    with pytest.raises(Waited):
        _run(MoE(64, 32, 8, 2, backend=backend), torch.float32, False, no_values)
