"""Regions that the ranks of a group compute in slices: what goes in, what comes out, and what is counted once.

Outside a region all ranks of the group hold the same numbers, bit for bit; inside, each computes its slice of the width, and
what comes out is a sum over slices (Megatron-LM, Shoeybi et al. 2019, whose f and g are ``enter`` and ``leave``).

| operator | forward | gradient | of |
|---|---|---|---|
| ``enter`` | as it is | summed over the group | what goes in, parameters that all slices use whole included |
| ``leave`` | summed over the group | as it is | what comes out |
| ``once`` | zeros but on the first rank | as it is | what such a sum must hold once: biases added inside |

So everything outside, and every parameter that is not cut, has the whole gradient on every rank, and nothing is summed over the
group later. Regions of modules begin and end in hooks, hence outside ``forward``: whatever recomputes or compiles a module's
forward, before or after, repeats no collective. (One is repeated: the sum inside a norm over all heads, a number per token.)

Legend: T tokens, N rows, E experts, D width, G groups and S slots of soft plans, P slots of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moesaic.experts.dispatch import Dispatcher, Experts
from moesaic.nn.norm import RMSNorm
from moesaic.parallel.comm import Group
from moesaic.plan.plan import RoutingPlan, SoftPlan

Change = Callable[[Tensor], Tensor]


def enter(x: Tensor, group: Group, what: str) -> Tensor:
    """``x``, the same on every rank, into a region: each rank's gradient is of its slice, and theirs are summed (f)."""
    if group.size == 1:
        return x
    entered: Tensor = _Enter.apply(x, group, f"{what} backward")
    return entered


def leave(x: Tensor, group: Group, what: str) -> Tensor:
    """The sum of every rank's ``x`` out of a region; its gradient is the same on every rank already (g)."""
    if group.size == 1:
        return x
    left: Tensor = _Leave.apply(x, group, what)
    return left


def once(x: Tensor, group: Group) -> Tensor:
    """``x`` on the first rank and zeros on the others, to be added inside a region; every rank gets the whole gradient."""
    if group.size == 1:
        return x
    counted: Tensor = _Once.apply(x, group.index == 0)
    return counted


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, what: str) -> Tensor:
        ctx.group, ctx.what = group, what
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # A gradient may be shared with other branches of the graph, and the sum is in place.
        return ctx.group.all_reduce(_copy(grad), what=ctx.what), None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, what: str) -> Tensor:
        return group.all_reduce(_copy(x), what=what)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: bool) -> Tensor:
        return x.view_as(x) if first else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


# ---- modules ----


def make_region(module: nn.Module, group: Group, what: str) -> None:
    """Let the first argument of ``module`` enter and its output leave."""
    enter_input(module, group, what)
    leave_output(module, group, what)


def enter_input(module: nn.Module, group: Group, what: str) -> None:
    """Let the first argument of ``module`` enter."""
    module.register_forward_pre_hook(lambda _, args: (enter(args[0], group, what), *args[1:]))


def leave_output(module: nn.Module, group: Group, what: str) -> None:
    """Let the output of ``module`` leave."""
    module.register_forward_hook(lambda _, _args, y: leave(y, group, what))


def enter_output(module: nn.Module, group: Group, what: str, start: int = 0) -> None:
    """Let the columns of ``module``'s output from ``start`` on enter, after a part that all ranks compute alike."""

    def hook(_: nn.Module, _args: tuple[Any, ...], y: Tensor) -> Tensor:
        inside = enter(y[..., start:], group, what)
        return inside if start == 0 else torch.cat([y[..., :start], inside], dim=-1)

    module.register_forward_hook(hook)


class Substituted:
    """A module's forward with other tensors in place of some of its parameters while it runs.

    Args:
        module: whose ``forward`` this becomes. change: from a parameter to what stands in for it, by name.
    """

    def __init__(self, module: nn.Module, **change: Change) -> None:
        self.module, self.inner, self.change = module, module.forward, change

    def __call__(self, *args: Any, **named: Any) -> Any:
        parameters: dict[str, Any] = self.module._parameters
        own = {name: parameters[name] for name in self.change}
        try:
            parameters.update({name: change(own[name]) for name, change in self.change.items()})
            return self.computed([parameters[name] for name in self.change], *args, **named)
        finally:
            parameters.update(own)

    def computed(self, instead: list[Tensor], *args: Any, **named: Any) -> Any:
        """The module's output, while ``instead`` stand in for its parameters."""
        return self.inner(*args, **named)


class SubstitutedAlways(Substituted):
    """The same where some ranks do not use those parameters: they get a zero gradient, and no collective misses a rank."""

    def computed(self, instead: list[Tensor], *args: Any, **named: Any) -> Any:
        return _Tie.apply(self.inner(*args, **named), *instead)


class _Tie(torch.autograd.Function):
    """``y``, with further tensors in its graph."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(other) for other in ctx.saved_tensors)


class NormOverSlices:
    """RMSNorm over a vector of which every rank holds a slice; its weight is cut alike.

    Args:
        width: of the whole vector.
    """

    def __init__(self, norm: RMSNorm, width: int, group: Group, what: str) -> None:
        self.norm, self.width, self.group, self.what = norm, width, group, what

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D / ranks) to the same, in ``x``'s dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        square = leave(wide.square().sum(dim=-1, keepdim=True), self.group, self.what)
        square = enter(square, self.group, self.what)  # every rank divides its slice by it
        weight = self.norm.weight.type_as(wide)
        return (wide * torch.rsqrt(square / self.width + self.norm.eps) * weight).type_as(x)


# ---- dispatchers ----


class SlicedDispatch:
    """Any dispatcher over experts of which every rank of the group holds a slice of the width: all ranks execute the plan.

    Put around all other dispatchers (recomputation, exchange), so that nothing repeats its collectives.
    """

    def __init__(self, inner: Dispatcher, group: Group) -> None:
        self.inner, self.group = inner, group

    @property
    def overlaps(self) -> bool:
        """Whether the inner dispatcher takes ``beside``."""
        return bool(getattr(self.inner, "overlaps", False))

    def __call__(
        self,
        x_TD: Tensor,
        plan: RoutingPlan | SoftPlan,
        experts: Experts,
        beside: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """(T, D) to (T, D). ``beside`` (shared experts) is no part of the region; see ``ExchangeDispatch``."""
        inner: Any = self.inner
        inside_TD, own = enter(x_TD, self.group, "slices of experts"), self.own_part(enter_plan(plan, self.group))
        if beside is None:
            return leave(inner(inside_TD, own, experts), self.group, "slices of experts")
        kept: list[Tensor] = []
        # None: nothing for the inner dispatcher to add, since what it returns is summed over the group.
        y_TD = inner(inside_TD, own, experts, beside=lambda _: kept.append(beside(x_TD)))
        return leave(y_TD, self.group, "slices of experts") + kept[0]

    def own_part(self, plan: RoutingPlan | SoftPlan) -> RoutingPlan | SoftPlan:
        """What this rank executes."""
        return plan


class SplitRowsDispatch(SlicedDispatch):
    """Any dispatcher over whole experts: every rank executes the rows of its consecutive share of the tokens.

    Of soft plans, whose slots mix all tokens, its share of every expert's slots.
    """

    def own_part(self, plan: RoutingPlan | SoftPlan) -> RoutingPlan | SoftPlan:
        """The other rows go nowhere."""
        ranks, index = self.group.size, self.group.index
        if isinstance(plan, RoutingPlan):
            first, last = (i * plan.num_tokens // ranks for i in (index, index + 1))
            mine_N = (plan.token_N >= first) & (plan.token_N < last)
            return plan.send(torch.where(mine_N, plan.expert_N, plan.num_experts))
        E, P = plan.num_experts, plan.slots_per_expert
        slots = slice(index * P // ranks, (index + 1) * P // ranks)
        dispatch_GTS, combine_GTS = (
            weight_GTS.unflatten(2, (E, P))[..., slots].flatten(2)
            for weight_GTS in (plan.dispatch_GTS, plan.combine_GTS)
        )
        return replace(plan, dispatch_GTS=dispatch_GTS, combine_GTS=combine_GTS)


def enter_plan(plan: RoutingPlan | SoftPlan, group: Group) -> RoutingPlan | SoftPlan:
    """The plan with its weights entered, so that the router learns from all slices on every rank."""
    what = "weights of slices of experts"
    if isinstance(plan, SoftPlan):
        dispatch_GTS, combine_GTS = (enter(w_GTS, group, what) for w_GTS in (plan.dispatch_GTS, plan.combine_GTS))
        return replace(plan, dispatch_GTS=dispatch_GTS, combine_GTS=combine_GTS)
    scale_N = plan.input_weight_N
    scale_N = None if scale_N is None else enter(scale_N, group, what)
    return replace(plan, weight_N=enter(plan.weight_N, group, what), input_weight_N=scale_N)
