"""``causal`` and ``batch_invariant`` (proven per router in test_contract.py) end where capacity begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.experts import MoE
from moesaic.plan import CapacityRule


def _layer(name: str, options: dict[str, Any], capacity: CapacityRule | None = None) -> MoE:
    options = options | {"init_std": 1.0}
    layer = MoE(8, 8, 8, 1 if name == "switch" else 2, name, options, shared=1, capacity=capacity)
    return layer.double().eval()


def _moved(layer: MoE, x_BSD: Tensor, other_BSD: Tensor) -> Tensor:
    """bool (B, S): tokens whose output differs between the two inputs."""
    return ((layer(x_BSD)[0] - layer(other_BSD)[0]).abs() > 1e-12).any(dim=-1)


def _leaks_back(rule: CapacityRule, name: str = "topk", trials: int = 40) -> bool:
    """Whether changing the last token ever changes the output of an earlier one."""
    layer = _layer(name, {"normalize": "none"} if name == "topk" else {}, rule)
    for _ in range(trials):
        x_BSD = torch.randn(1, 12, 8, dtype=torch.float64)
        other_BSD = x_BSD.clone()
        other_BSD[0, 11] = torch.randn(8) * 3
        if _moved(layer, x_BSD, other_BSD)[0, :11].any():
            return True
    return False


@pytest.mark.parametrize("priority", ["batch", "probability"])
def test_capacity_by_weight_leaks_the_future(priority: Any) -> None:
    assert _leaks_back(CapacityRule(eval_factor=0.5, minimum=0, priority=priority), "switch")


def test_capacity_by_position_is_causal_for_one_choice_only() -> None:
    rule = CapacityRule(eval_factor=0.5, minimum=0, priority="position")
    assert not _leaks_back(rule, "switch")
    # With two choices a later first choice goes before an earlier second one.
    assert _leaks_back(rule, "topk")


@pytest.mark.parametrize("priority", ["position", "batch", "probability"])
def test_capacity_depends_on_batch_mates(priority: Any) -> None:
    layer = _layer("topk", {}, CapacityRule(eval_factor=0.5, minimum=0, priority=priority))
    moved = False
    for _ in range(20):
        x_BSD = torch.randn(2, 8, 8, dtype=torch.float64)
        other_BSD = torch.cat([torch.randn(1, 8, 8, dtype=torch.float64), x_BSD[1:]])
        moved |= bool(_moved(layer, x_BSD, other_BSD)[1].any())
    assert moved


def test_capacity_that_cannot_drop_changes_nothing() -> None:
    # CF >= E/k: every expert has room for every token.
    layer, x_TD = _layer("topk", {}), torch.randn(16, 8, dtype=torch.float64)
    dropless = layer(x_TD)[0]
    layer.capacity = CapacityRule(eval_factor=4.0)
    capped, plan = layer(x_TD)
    assert int(plan.dropped) == 0
    assert torch.equal(capped, dropless)
