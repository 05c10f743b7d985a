"""The whole MoE layer as dumb loops, and the comparison of a fast layer with it: output and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moesaic.experts import MoE
from moesaic.nn.mlp import ACTIVATIONS, GATES, MLP
from moesaic.ops import reference
from moesaic.plan import RoutingPlan, SoftPlan
from moesaic.routing import Router, TokenContext, balance_loss

Run = Callable[[Tensor, TokenContext], tuple[Tensor, RoutingPlan | SoftPlan]]


class Scripted(Router):
    """A router that turns logits into a plan by the function it is given."""

    def __init__(self, dim: int, num_experts: int, plan: Callable[[Tensor, TokenContext], Any]) -> None:
        super().__init__()
        self.num_experts, self.k, self.plan = num_experts, 1, plan
        self.weight = torch.nn.Parameter(torch.randn(num_experts, dim))

    def forward(self, x_TD: Tensor, ctx: TokenContext = TokenContext()) -> RoutingPlan:  # noqa: B008 - frozen
        return self.plan(x_TD.to(self.weight.dtype) @ self.weight.T, ctx)


def reference_layer(layer: MoE, x_TD: Tensor, ctx: TokenContext) -> tuple[Tensor, RoutingPlan | SoftPlan]:
    """``layer`` row by row, from its plan and its parameters."""
    plan = layer.route(x_TD, ctx)
    one, E = layer.experts.compute_one, layer.router.num_experts
    if isinstance(plan, SoftPlan):
        G, size, S = plan.dispatch_GTS.shape
        outputs = []
        for g in range(G):
            group = x_TD[g * size : (g + 1) * size]
            slots = [sum(plan.dispatch_GTS[g, t, s] * group[t] for t in range(size)) for s in range(S)]
            done = [one(s // plan.slots_per_expert, slot) for s, slot in enumerate(slots)]
            outputs += [sum(plan.combine_GTS[g, t, s] * y for s, y in enumerate(done)) for t in range(size)]
        y_TD = torch.stack(outputs)
    elif plan.input_weight_N is None:
        y_TD = reference.moe(x_TD, plan.token_N, plan.expert_N, plan.weight_N, one, E)
    else:
        rows = [x_TD[t] * plan.input_weight_N[n] for n, t in enumerate(plan.token_N.tolist())]
        zero = x_TD * 0.0
        y_TD = torch.stack([
            sum(
                (plan.weight_N[n] * one(e, rows[n]) for n, e in enumerate(plan.expert_N.tolist())
                 if e < E and int(plan.token_N[n]) == t),
                start=zero[t],
            )
            for t in range(len(x_TD))
        ])  # fmt: skip
    if layer.shared is not None:
        mlp = layer.shared.mlp
        for t in range(len(x_TD)):
            hidden = mlp.w_in.weight @ x_TD[t]
            half = len(hidden) // 2
            out = mlp.w_out.weight @ _active(hidden[:half], hidden[half:], hidden, mlp)
            if layer.shared.output_gate is not None:
                out = out / (1 + (-(layer.shared.output_gate.weight[0] @ x_TD[t])).exp())
            y_TD = torch.cat([y_TD[:t], (y_TD[t] + out)[None], y_TD[t + 1 :]])
    return y_TD, plan


def _active(gate: Tensor, up: Tensor, hidden: Tensor, mlp: MLP) -> Tensor:
    if mlp.activation in GATES:
        return GATES[mlp.activation](gate, up)
    act = ACTIVATIONS[mlp.activation]
    return act(gate) * up if mlp.gated else act(hidden)


def gradients(
    layer: MoE, run: Run, x_TD: Tensor, ctx: TokenContext, losses: dict[str, float], upstream_TD: Tensor
) -> dict[str, Tensor]:
    """Output, input gradient and every parameter's gradient of a task loss plus balancing losses of the returned plan.

    A parameter outside the graph has no entry: nothing stands in for a gradient that is None.
    """
    x_TD = x_TD.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y_TD, plan = run(x_TD, ctx)
    # where: on padding the output is of no interest, whatever it is.
    valid = torch.ones(len(x_TD), dtype=torch.bool) if ctx.valid_T is None else ctx.valid_T
    loss = torch.where(valid[:, None], y_TD * upstream_TD, 0.0).sum()
    if losses:
        loss = loss + balance_loss(plan, losses)[0]
    loss.backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    assert x_TD.grad is not None
    return {"output": y_TD.detach()[valid], "input": x_TD.grad.clone()} | found


def assert_truth(
    layer: MoE,
    x_TD: Tensor,
    *,
    valid: list[int] | None = None,
    losses: dict[str, float] | None = None,
    tolerance: float = 1e-10,
    context: Callable[[], TokenContext] | None = None,
) -> dict[str, Tensor]:
    """The layer equals its dumb twin: output and all gradients, none of them None, all finite. Returns the layer's own."""
    losses = {} if losses is None else losses
    upstream_TD = torch.randn_like(x_TD)

    def ctx() -> TokenContext:  # noise must be the same twice
        valid_T = None if valid is None else torch.tensor(valid, dtype=torch.bool)
        if context is not None:
            return replace(context(), valid_T=valid_T)
        return TokenContext(valid_T=valid_T, generator=torch.Generator().manual_seed(3))

    def dumb(x_TD: Tensor, ctx: TokenContext) -> tuple[Tensor, RoutingPlan | SoftPlan]:
        return reference_layer(layer, x_TD, ctx)

    clean_TD = x_TD if valid is None else torch.where(torch.tensor(valid, dtype=torch.bool)[:, None], x_TD, 0.0)
    got = gradients(layer, layer, x_TD, ctx(), losses, upstream_TD)
    want = gradients(layer, dumb, clean_TD, ctx(), losses, upstream_TD)
    names = {name for name, _ in layer.named_parameters() if not name.startswith("router.")}
    assert names <= set(got), f"no gradient at all: {names - set(got)}"
    for name, ours in got.items():
        theirs = want.get(name, torch.zeros_like(ours))  # the loops leave an unused expert out of the graph
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        assert ours.isfinite().all(), name
        torch.testing.assert_close(
            ours, theirs, atol=tolerance * max(scale, 1.0), rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert set(want) <= set(got)
    return got
