"""The MoE layer: router, plan edits, dispatcher, experts. Returns ``(y, plan)`` and stores nothing.

>>> layer = MoE(dim=512, hidden=1024, experts=64, k=8, router="topk")
>>> y, plan = layer(x)                     # x: (..., 512)

Legend: T tokens (all leading dimensions flattened), D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError, one_of
from moesaic.experts.capacity import AdaptedCapacity
from moesaic.experts.dispatch import Dispatcher, dispatch_local
from moesaic.experts.neurons import ExpertKind, NeuronExperts
from moesaic.experts.special import SharedExperts, WithSpecialExperts
from moesaic.experts.stacked import StackedExperts
from moesaic.nn.mlp import Activation
from moesaic.ops.grouped import Backend
from moesaic.plan.capacity import CapacityRule
from moesaic.plan.edit import restrict
from moesaic.plan.lift import lift, lower
from moesaic.plan.peers import ALONE, Peers
from moesaic.plan.plan import RoutingPlan, SoftPlan
from moesaic.routing import NO_CONTEXT, Router, RuleSet, StepStats, TokenContext, build_router
from moesaic.routing.balance import PrototypeMemory
from moesaic.routing.dropout import agreed, falls_on, keep_local, mask_whole_experts

Edit = Callable[[Any], Any]  # plan -> plan


class MoE(nn.Module):
    """A sparse feed-forward layer.

    Args:
        dim, hidden: D and the width of each expert.
        experts: feed-forward experts.
        k: experts per token.
        router: a name in ``routing.ROUTERS`` or a ready ``Router``; ``router_options`` go to the named one.
        shared: shared experts (one network of ``shared * hidden``, or of ``shared_hidden``); ``shared_gate`` scales it by a
            sigmoid per token.
        expert_bias: biases in both products of every expert.
        zero, copy, constant: zero-computation experts, added after the feed-forward ones; the router sees them all.
        capacity: drop rows over capacity by this rule; None is dropless.
        backend: of the grouped products.
        expert_kind: "ffn", or "neuron": single neurons for layers of very many experts (``hidden`` must be 1; never gated).
        rules: which tokens may use which experts.
        expert_dropout: in training, dropout on the hidden units of experts.
        expert_masking: in training, probability of each expert to be out for a whole batch.
        gating_dropout, gating_groups: in training, probability of a whole batch to keep to the experts of its own group, and
            the number of groups (``routing/dropout.py``).
        slots: the feed-forward experts whose weights are made here (``StackedExperts``); None makes all. The router knows all
            of them, and the dispatcher must know where the others are. Single neurons are always made.

    Attributes:
        rules: may also be set from outside, at any time; nothing that routes, drops, reroutes or edits can break them.
        edits: plan edits applied after routing and capacity, in order; set from outside (``moesaic.edit``).
        dispatcher: how a plan is executed; replaced from outside for recomputation or parallel experts.
        evidence: what losses want kept in ``plan.gate.extra`` in training: "input_TD" (the router's input, with its graph),
            "free_logits_TE" (logits before rules).
        memory: prototypes remembered between steps, for the loss "prototype" with an EMA.
        peers: who holds the other parts of the batch this layer is given a part of; set from outside. What is about the whole
            batch (capacity, its groups, draws for all tokens alike) is then asked of all, in every forward.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        k: int = 2,
        router: str | Router = "topk",
        router_options: dict[str, Any] | None = None,
        *,
        shared: int = 0,
        shared_gate: bool = False,
        shared_hidden: int | None = None,
        expert_bias: bool = False,
        zero: int = 0,
        copy: int = 0,
        constant: int = 0,
        activation: Activation = "silu",
        gated: bool = True,
        capacity: CapacityRule | None = None,
        backend: Backend = "auto",
        expert_kind: ExpertKind = "ffn",
        rules: RuleSet | None = None,
        expert_dropout: float = 0.0,
        expert_masking: float = 0.0,
        gating_dropout: float = 0.0,
        gating_groups: int = 1,
        slots: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or hidden < 1 or min(shared, zero, copy, constant) < 0:
            raise ConfigError(
                f"A MoE layer needs positive widths and no negative counts; got dim={dim}, hidden={hidden}."
            )
        one_of("expert_kind", expert_kind, get_args(ExpertKind))
        if expert_kind == "neuron" and hidden != 1:
            raise ConfigError(
                f'expert_kind="neuron" has experts of one hidden unit, so hidden must be 1, not {hidden}.'
            )
        if shared_gate and not shared:
            raise ConfigError("shared_gate=True needs at least one shared expert; set shared=1.")
        if capacity is not None and capacity.tau is not None and not zero + copy + constant:
            raise ConfigError(
                "capacity.tau needs zero-computation experts to give room to; set zero, copy or constant."
            )
        self.dim, self.num_special = dim, zero + copy + constant
        special = self.num_special
        total = experts + special
        if not isinstance(router, Router):
            router = build_router(router, dim, total, k, router_options, special)
        self.router = router
        if self.router.num_experts != total:
            raise ConfigError(f"The router serves {self.router.num_experts} experts, but the layer has {total}.")
        stacked: StackedExperts | NeuronExperts
        if expert_kind == "neuron":
            if expert_dropout:
                raise ConfigError(
                    f"expert_dropout={expert_dropout} drops hidden units, and neurons have one; use expert_masking."
                )
            if expert_bias:
                raise ConfigError('expert_bias=True does not go with expert_kind="neuron".')
            stacked = NeuronExperts(experts, dim, activation)
        else:
            stacked = StackedExperts(
                experts, dim, hidden, activation, gated, backend, expert_dropout, expert_bias, slots
            )
        self.experts = WithSpecialExperts(stacked, zero, copy, constant) if special else stacked
        self.shared = (
            SharedExperts(shared, dim, hidden, activation, gated, shared_gate, shared_hidden) if shared else None
        )
        if capacity is not None:
            _check_capacity(capacity, self.router)
        self.capacity = capacity
        self.adapted = AdaptedCapacity(capacity) if capacity is not None and capacity.adapt is not None else None
        _check_narrowing(expert_masking, gating_dropout, gating_groups, total, self.router.k)
        self.expert_masking, self.gating_dropout, self.gating_groups = expert_masking, gating_dropout, gating_groups
        self.evidence: frozenset[str] = frozenset()
        self.memory: PrototypeMemory | None = None
        self.rules = rules
        self.edits: tuple[Edit, ...] = ()
        self.dispatcher: Dispatcher = dispatch_local
        self.peers: Peers = ALONE

    @property
    def rules(self) -> RuleSet | None:
        """The rules in force; setting them raises ``ConfigError`` where they do not fit this layer's experts."""
        return self._rules

    @rules.setter
    def rules(self, rules: RuleSet | None) -> None:
        if rules is not None:
            rules.check(self.router.num_experts)
        self._rules = rules

    def reset_parameters(self, scale: float = 1.0, out_scale: float = 1.0) -> None:
        """Fan-in initialisation of all experts; the router keeps its own."""
        self.experts.reset_parameters(scale, out_scale)
        if self.shared is not None:
            self.shared.reset_parameters(scale, out_scale)

    def active_parameters(self) -> int:
        """Parameters one token uses: the router, k feed-forward experts at most, and the shared experts.

        An upper bound where zero-computation experts may take some of the k.
        """
        stacked = self.experts.stacked if isinstance(self.experts, WithSpecialExperts) else self.experts
        used = min(self.router.k, stacked.num_experts)
        per_expert = sum(p.numel() for p in stacked.parameters()) // stacked.num_experts
        always = [self.router] if self.shared is None else [self.router, self.shared]
        return used * per_expert + sum(p.numel() for module in always for p in module.parameters())

    def forward(self, x: Tensor, ctx: TokenContext = NO_CONTEXT) -> tuple[Tensor, RoutingPlan | SoftPlan]:
        """(..., D) to (..., D) and the plan that was executed. Padding tokens are read as zeros.

        Raises ``ConfigError`` if the input is not D wide.
        """
        if x.shape[-1] != self.dim:
            raise ConfigError(f"This layer was built for dim={self.dim}, but its input is {x.shape[-1]} wide.")
        x_TD = x.reshape(-1, self.dim)
        if ctx.num_sequences is None and x.dim() > 2:
            ctx = replace(ctx, num_sequences=math.prod(x.shape[:-2]))
        if ctx.valid_T is not None:
            # Padding may hold anything; a NaN there would reach every gradient of the router and of shared experts as 0 * NaN.
            x_TD = torch.where(ctx.valid_T[:, None], x_TD, 0.0)
        y_TD, plan = self.compute(x_TD, ctx)
        return y_TD.view_as(x), plan if ctx.part is None else lift(plan, ctx.part)

    def compute(self, x_TD: Tensor, ctx: TokenContext) -> tuple[Tensor, RoutingPlan | SoftPlan]:
        """Route and execute: what ``forward`` does once tokens are flat and padding is zero."""
        plan = self.route(x_TD, ctx)
        if self.shared is not None and getattr(self.dispatcher, "overlaps", False):
            overlapping: Any = self.dispatcher  # shared experts are computed while rows travel
            return overlapping(x_TD, plan, self.experts, beside=self.shared), plan
        y_TD = self.dispatcher(x_TD, plan, self.experts)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD, plan

    def route(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan | SoftPlan:
        """The decision alone: router, capacity, edits. Made once per forward; recomputation never comes here.

        Edits come last: capacity that reroutes must not undo a knockout, and a replayed plan is what was executed. Rules
        win over all of them.
        """
        if self.rules is not None:
            ctx = self.rules.apply(ctx, len(x_TD), self.router.num_experts, x_TD.device, self.training)
        if self.training:
            ctx = self._in_training(ctx, x_TD)
        plan: RoutingPlan | SoftPlan = self.router(x_TD, ctx)
        if ctx.evidence and plan.gate is not None:
            plan = replace(plan, gate=replace(plan.gate, extra={**plan.gate.extra, **ctx.evidence}))
        if ctx.allowed_TE is not None:
            plan = restrict(plan, ctx.allowed_TE)  # whatever the router made of the rules
        if self.capacity is not None and isinstance(plan, RoutingPlan):
            k = self.router.k if self.router.facts.varies else None  # adaptive routers own more rows than they use
            factor = None if self.adapted is None or not self.training else self.adapted.in_use()
            plan = self.capacity.apply(
                plan,
                self.training,
                k=k,
                num_special=self.num_special,
                factor=factor,
                generator=ctx.generator,
                peers=self.peers,
            )
        for edit in self.edits:
            plan = edit(plan) if ctx.part is None else lower(edit(lift(plan, ctx.part)), ctx.part)
        if self.edits and ctx.allowed_TE is not None:
            plan = restrict(plan, ctx.allowed_TE)  # an edit may return any plan, one that knows no rules included
        return plan

    def _in_training(self, ctx: TokenContext, x_TD: Tensor) -> TokenContext:
        """The context after gating dropout and expert masking, with a place for the evidence that losses asked for."""
        T, E, k, device = len(x_TD), self.router.num_experts, self.router.k, x_TD.device
        if self.gating_dropout:
            local = falls_on(self.gating_dropout, ctx.generator) if ctx.stay_local is None else ctx.stay_local
            if agreed(local, device, self.peers):
                ctx = keep_local(ctx, T, E, k, self.gating_groups, device, self.peers)
        if self.expert_masking:
            ctx = mask_whole_experts(ctx, T, E, k, self.expert_masking, device, self.peers)
        if not self.evidence and self.memory is None:
            return ctx
        kept = {} if self.memory is None else self.memory.recall()
        if "input_TD" in self.evidence:
            kept["input_TD"] = x_TD
        return replace(ctx, evidence={**(ctx.evidence or {}), **kept})

    def statistics(self, plan: RoutingPlan | SoftPlan) -> dict[str, Tensor]:
        """What ``after_step`` must know of this forward besides counts; adds up over micro-batches and their parts."""
        mine = {} if self.memory is None else self.memory.statistics(plan, self.peers)
        return {**self.router.statistics(plan), **mine}

    def after_step(self, stats: StepStats) -> None:
        """Called once per optimiser step: state that follows load (selection biases, controllers)."""
        self.router.after_step(stats)
        if self.adapted is not None:
            self.adapted.after_step(stats)
        if self.memory is not None:
            self.memory.after_step(stats)


def _check_capacity(rule: CapacityRule, router: Router) -> None:
    """Raises ``ConfigError`` for a rule this router's plans could not follow."""
    E = router.num_experts
    if rule.fallback_expert is not None and not 0 <= rule.fallback_expert < E:
        raise ConfigError(f"capacity.fallback_expert must name one of the {E} experts, not {rule.fallback_expert}.")
    if rule.overflow == "next_best" and not router.facts.has_gate:
        raise ConfigError(
            'capacity.overflow="next_best" needs a router that gives every token scores for all experts; use "residual".'
        )


def _check_narrowing(masking: float, local: float, groups: int, num_experts: int, k: int) -> None:
    """Raises ``ConfigError`` unless masking and gating dropout leave every token k experts."""
    for name, p in (("expert_masking", masking), ("gating_dropout", local)):
        if not 0 <= p < 1:
            raise ConfigError(f"{name} is a probability below 1, not {p}.")
    if local and groups < 2:
        raise ConfigError(f"gating_dropout={local} needs gating_groups of at least 2 to keep tokens in, not {groups}.")
    if local and num_experts // groups < k:
        raise ConfigError(
            f"gating_groups={groups} groups of {num_experts} experts hold {num_experts // groups} each, fewer than k={k}; "
            "use fewer groups."
        )
