"""The plan passes through what wraps layers: checkpointing, ``torch.compile`` and FSDP2, gradients equal to plain eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from moesaic.experts import MoE
from moesaic.plan import CapacityRule, RoutingPlan
from moesaic.routing import Rule, RuleSet, TokenContext, balance_loss
from tests.distributed import run_distributed

LOSSES = {"switch": 0.3, "z": 0.1, "importance": 0.2}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("topk", {}, {"shared": 1, "shared_gate": True}),
    ("topk", {"score": "sigmoid", "balance_bias": True, "groups": 2, "groups_kept": 1}, {}),
    ("switch", {"jitter": 0.2}, {"zero": 1, "copy": 1, "constant": 1}),
    ("gshard", {}, {"capacity": CapacityRule(1.0, minimum=0)}),
    ("noisy_topk", {}, {"backend": "grouped_mm"}),
    ("topk", {"normalize": "none"}, {"rules": RuleSet((Rule(forbid=(2,)), Rule(allow=(0,), weight=0.5)))}),
]
Call = Callable[[Tensor, TokenContext], tuple[Tensor, RoutingPlan]]


def _layer(name: str, options: dict[str, Any], kwargs: dict[str, Any]) -> MoE:
    torch.manual_seed(1)
    return MoE(8, 8, 4, 1 if name == "switch" else 2, name, {**options, "init_std": 0.7}, **kwargs)


def _step(layer: MoE, call: Call, x_TD: Tensor, valid: bool = False) -> dict[str, Tensor]:
    """One training step through ``call``: output, plan and all gradients, those of losses on the returned plan included."""
    layer.zero_grad(set_to_none=True)
    x_TD = x_TD.clone().requires_grad_()
    torch.manual_seed(2)  # router noise
    y_TD, plan = call(x_TD, TokenContext(valid_T=torch.arange(len(x_TD)) % 5 != 3 if valid else None))
    assert isinstance(plan, RoutingPlan)
    assert plan.gate is not None
    losses = LOSSES | ({"load": 0.2} if plan.gate.load_probs_TE is not None else {})
    (y_TD.square().sum() + balance_loss(plan, losses)[0]).backward()
    found = {"y": y_TD.detach(), "expert": plan.expert_N, "weight": plan.weight_N.detach(), "x": x_TD.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert all(tensor is not None for tensor in found.values())
    return found  # type: ignore[return-value]


def _assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, ours in got.items():
        torch.testing.assert_close(ours, want[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize(("name", "options", "kwargs"), CASES)
def test_checkpointing(name: str, options: dict[str, Any], kwargs: dict[str, Any], valid: bool) -> None:
    layer, x_TD = _layer(name, options, kwargs), torch.randn(10, 8)
    want = _step(layer, layer, x_TD, valid)
    _assert_equal(_step(layer, lambda x, ctx: checkpoint(layer, x, ctx, use_reentrant=False), x_TD, valid), want, 0.0)


def test_a_recomputed_dispatch_executes_the_saved_decision() -> None:
    """The router runs once per step although the experts run twice."""
    layer, x_TD = _layer("switch", {"jitter": 0.5}, {}), torch.randn(10, 8)
    want = _step(layer, layer, x_TD)
    local, calls = layer.dispatcher, {"router": 0, "experts": 0}
    layer.dispatcher = lambda x, plan, experts: checkpoint(local, x, plan, experts, use_reentrant=False)

    def count(kind: str) -> Any:
        def hook(*_: Any) -> None:
            calls[kind] += 1

        return hook

    layer.router.register_forward_hook(count("router"))
    layer.experts.register_forward_pre_hook(count("experts"))  # recomputation may stop inside
    _assert_equal(_step(layer, layer, x_TD), want, 0.0)
    assert calls["router"] == 1
    assert calls["experts"] == 2


# Capacity counts valid tokens on the host, so with padding it cannot be one graph.
COMPILED = [case for case in CASES if case[0] != "gshard"]


@pytest.mark.parametrize(("name", "options", "kwargs"), [*COMPILED, CASES[3]])
def test_compiled(name: str, options: dict[str, Any], kwargs: dict[str, Any]) -> None:
    layer, x_TD = _layer(name, options, kwargs), torch.randn(10, 8)
    want = _step(layer, layer, x_TD)
    _assert_equal(_step(layer, torch.compile(layer, fullgraph=True, backend="aot_eager"), x_TD), want, 1e-6)


def test_compiled_with_padding() -> None:
    layer, x_TD = _layer(*CASES[0]), torch.randn(10, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    _assert_equal(_step(layer, compiled, x_TD, valid=True), _step(layer, layer, x_TD, valid=True), 1e-6)


def test_compiled_with_rules_on_facts() -> None:
    rules = RuleSet((Rule({"token": ((3, 5), 9)}, allow=(0,)), Rule({"tenant": (1,)}, forbid=(2,), weight=1.0)))
    layer, x_TD = MoE(8, 4, 4, 2, rules=rules), torch.randn(12, 8)
    ctx = TokenContext(ids_T=torch.arange(12), tenant_T=torch.arange(12) % 2)
    _, plan = torch.compile(layer, fullgraph=True, backend="aot_eager")(x_TD, ctx)
    assert torch.equal(plan.expert_N, layer.route(x_TD, ctx).expert_N)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "kwargs"), [CASES[0], CASES[1]])
def test_compiled_by_inductor(name: str, options: dict[str, Any], kwargs: dict[str, Any]) -> None:
    layer, x_TD = _layer(name, options, kwargs), torch.randn(10, 8)
    want = _step(layer, layer, x_TD)
    _assert_equal(_step(layer, torch.compile(layer, fullgraph=True), x_TD), want, 1e-5)


class _Stack(nn.Module):
    """Two residual sparse layers that return their plans."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_layer(*CASES[i]) for i in (0, 1))
        self.recompute = recompute

    def forward(self, x_TD: Tensor) -> tuple[Tensor, dict[int, RoutingPlan]]:
        plans = {}
        for i, layer in enumerate(self.layers):
            y_TD, plans[i] = checkpoint(layer, x_TD, use_reentrant=False) if self.recompute else layer(x_TD)
            x_TD = x_TD + y_TD
        return x_TD, plans


def _total(stack: _Stack, x_TD: Tensor, plans_only: bool) -> Tensor:
    y_TD, plans = stack(x_TD)
    loss = sum((balance_loss(plan, LOSSES)[0] for plan in plans.values()), start=torch.zeros(()))
    return loss if plans_only else loss + y_TD.square().mean()


def _sharded(rank: int, x_RTD: Tensor, recompute: bool, plans_only: bool) -> dict[str, Tensor]:
    stack = _Stack(recompute)
    mesh = init_device_mesh("cpu", (len(x_RTD),))
    for layer in stack.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(stack, mesh=mesh)
    x_TD = x_RTD[rank].clone().requires_grad_()
    _total(stack, x_TD, plans_only).backward()
    found = {"x": x_TD.grad}
    for name, parameter in stack.named_parameters():
        if parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor)
            found[name] = parameter.grad.full_tensor()
    return found  # type: ignore[return-value]


# Losses of the plans alone must reach every router, too: then no output tensor outside a plan has a gradient.
@pytest.mark.parametrize(("recompute", "plans_only"), [(False, False), (True, False), (False, True)])
def test_fsdp2_over_gloo(recompute: bool, plans_only: bool) -> None:
    x_RTD = torch.randn(2, 9, 8)
    stack = _Stack(recompute=False)
    inputs = [x_TD.clone().requires_grad_() for x_TD in x_RTD]
    # FSDP averages over ranks; balancing losses are per rank here (scope "micro_batch"), on both sides.
    (sum(_total(stack, x_TD, plans_only) for x_TD in inputs) / 2).backward()
    answers = run_distributed(2, _sharded, x_RTD, recompute, plans_only)
    for rank, answer in enumerate(answers):
        x_grad = inputs[rank].grad
        assert x_grad is not None
        torch.testing.assert_close(answer["x"] / 2, x_grad, atol=1e-6, rtol=1e-5)
        with_grad = {name: p.grad for name, p in stack.named_parameters() if p.grad is not None}
        assert plans_only or len(with_grad) == len(list(stack.parameters()))
        assert answer.keys() == {"x"} | with_grad.keys()
        for name, grad in with_grad.items():
            torch.testing.assert_close(answer[name], grad, atol=1e-6, rtol=1e-5)
