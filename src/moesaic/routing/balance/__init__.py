"""Balancing: losses that are functions of a plan, and the bias that balances without a loss.

Every loss returns an fp32 scalar without coefficient. Means are over valid tokens; counts are the router's choices, before
capacity drops. Only scores carry gradient, counts never do. The keyword-only arguments of a loss are its options:

>>> balance_loss(plan, {"switch": 1e-2, "v2_device": 0.05}, ctx, {"v2_device": {"devices": 8}})

| page | losses |
|---|---|
| ``load.py`` | importance, load, switch, sequence |
| ``devices.py`` | v2_expert, v2_device, v2_communication |
| ``scores.py`` | z, logit_l2, entropy, entropy_local, entropy_global, semantic |
| ``prototype.py`` | prototype |
| ``bias.py`` | no loss: the selection bias and its rules |
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moesaic.errors import ConfigError, nearest
from moesaic.plan.plan import RoutingPlan, SoftPlan
from moesaic.routing.balance.bias import BiasController, BiasRule, Gains, bias_step
from moesaic.routing.balance.context import PLAIN, LossContext, Scope
from moesaic.routing.balance.devices import v2_communication_loss, v2_device_loss, v2_expert_loss
from moesaic.routing.balance.load import importance_loss, load_loss, sequence_loss, switch_loss
from moesaic.routing.balance.prototype import PrototypeMemory, check_prototype, prototype_loss
from moesaic.routing.balance.scores import (
    entropy_global_loss,
    entropy_local_loss,
    entropy_loss,
    logit_l2,
    semantic_loss,
    z_loss,
)
from moesaic.routing.facts import Facts
from moesaic.routing.options import check_options, options_of

Options = Mapping[str, Mapping[str, Any]]
NO_OPTIONS: Options = {}


@dataclass(frozen=True)
class Loss:
    """A balancing loss and what it asks for.

    Attributes:
        fn: ``(plan, ctx, *, options...) -> scalar``.
        rows: it counts rows, which soft plans do not have.
        check: ``(options, num_experts)``, raises ``ConfigError`` for values that cannot be.
    """

    fn: Callable[..., Tensor]
    rows: bool = False
    check: Callable[[Mapping[str, Any], int], None] | None = None

    def __call__(self, plan: RoutingPlan | SoftPlan, ctx: LossContext = PLAIN, **options: Any) -> Tensor:
        return self.fn(plan, ctx, **options)

    @property
    def required(self) -> tuple[str, ...]:
        """Options without a default."""
        parameters = inspect.signature(self.fn).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty)


def _check_devices(options: Mapping[str, Any], num_experts: int) -> None:
    devices = options["devices"]
    if not 1 <= devices <= num_experts:
        raise ConfigError(f"Option devices must be between 1 and the layer's {num_experts} experts, not {devices}.")
    if not 1 <= options.get("limit", 1) <= devices:
        raise ConfigError(f"Option limit must be between 1 and devices={devices}, not {options['limit']}.")


def _check_labels(options: Mapping[str, Any], num_experts: int) -> None:
    labels, tau = options.get("labels"), options.get("tau")
    if labels is not None and (not labels or not all(isinstance(n, int) and n >= 0 for n in labels)):
        raise ConfigError(f"Option labels must list numbers of labels from 0, not {labels!r}; null means all.")
    if tau is not None and not 0 < tau <= math.log(num_experts):
        raise ConfigError(
            f"Option tau must be above 0 and at most ln(E) = {math.log(num_experts):.4g} nats, the entropy of using all "
            f"{num_experts} experts alike, not {tau}."
        )


LOSSES: dict[str, Loss] = {
    "importance": Loss(importance_loss, rows=True),
    "load": Loss(load_loss, rows=True),
    "switch": Loss(switch_loss, rows=True),
    "sequence": Loss(sequence_loss, rows=True),
    "v2_expert": Loss(v2_expert_loss, rows=True),
    "v2_device": Loss(v2_device_loss, rows=True, check=_check_devices),
    "v2_communication": Loss(v2_communication_loss, rows=True, check=_check_devices),
    "z": Loss(z_loss),
    "logit_l2": Loss(logit_l2),
    "entropy": Loss(entropy_loss),
    "entropy_local": Loss(entropy_local_loss, check=_check_labels),
    "entropy_global": Loss(entropy_global_loss, check=_check_labels),
    "semantic": Loss(semantic_loss),
    "prototype": Loss(prototype_loss, check=check_prototype),
}


def check_losses(
    coefficients: Mapping[str, float], router: object, options: Options = NO_OPTIONS, *, has_rules: bool = False
) -> None:
    """Raises ``ConfigError`` for an unknown loss or option, and for a loss that could teach this router nothing.

    Args:
        router: a ``Router``; read are its ``facts`` and ``num_experts``.
        has_rules: whether the layer routes under hard rules, which "semantic" teaches.
    """
    for name in options:
        if name not in coefficients:
            raise ConfigError(
                f'There are options for loss "{name}", which is not among the losses.{nearest(name, coefficients)} '
                f"Give it a coefficient or remove its options."
            )
    kind, facts = type(router).__name__, getattr(router, "facts", Facts(has_gate=False))
    for name in coefficients:
        if name not in LOSSES:
            raise ConfigError(
                f'There is no balancing loss "{name}".{nearest(name, LOSSES)} Known: {", ".join(LOSSES)}.'
            )
        loss, mine = LOSSES[name], options.get(name, {})
        check_options(f'Loss "{name}"', mine, options_of(loss.fn))
        for missing in loss.required:
            if missing not in mine:
                raise ConfigError(
                    f'Loss "{name}" needs the option {missing}; set model.moe.loss_options.{name}.{missing}.'
                )
        if loss.check is not None:
            loss.check(mine, getattr(router, "num_experts", 1))
        if not facts.has_gate:
            raise ConfigError(
                f'Loss "{name}" has no gradient path into router {kind}, which has no gate; remove the loss.'
            )
        if name == "load" and not facts.has_load_estimate:
            raise ConfigError(
                f'Loss "load" needs the load estimate of a noisy gate, and {kind} has none; use "switch".'
            )
        if loss.rows and facts.experts == "all, mixed":
            raise ConfigError(
                f'Loss "{name}" counts rows, and {kind} mixes all experts for every token; remove the loss.'
            )
        if name == "semantic" and not has_rules:
            raise ConfigError(
                'Loss "semantic" teaches hard rules, and the layer has none; add rules or remove the loss.'
            )


def evidence_needed(coefficients: Mapping[str, float], options: Options = NO_OPTIONS) -> frozenset[str]:
    """What these losses want kept of the forward besides scores: "input_TD", "free_logits_TE" (``MoE.evidence``)."""
    needed = {"free_logits_TE"} if "semantic" in coefficients else set()
    if "prototype" in coefficients:
        space = options.get("prototype", {}).get("space", "input")
        needed |= {"input": {"input_TD"}, "router_proj": {"free_logits_TE"}}.get(space, set())
    return frozenset(needed)


def prototype_memory(
    coefficients: Mapping[str, float], options: Options, dim: int, num_experts: int
) -> PrototypeMemory | None:
    """What the loss "prototype" remembers between steps, if it is among the losses and has an EMA."""
    mine = options.get("prototype", {})
    if "prototype" not in coefficients or mine.get("ema") is None:
        return None
    space = mine.get("space", "input")
    width = dim if space == "input" else num_experts
    return PrototypeMemory(num_experts, width, space=space, most=mine.get("most", 64), ema=mine["ema"])


def balance_loss(
    plan: RoutingPlan | SoftPlan,
    coefficients: Mapping[str, float],
    ctx: LossContext = PLAIN,
    options: Options = NO_OPTIONS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the named losses of one layer, and each one's unweighted value (detached)."""
    values = {name: LOSSES[name](plan, ctx, **options.get(name, {})) for name in coefficients}
    zero = plan.weight_N.new_zeros(()) if isinstance(plan, RoutingPlan) else plan.combine_GTS.new_zeros(())
    total = sum((coefficients[name] * value for name, value in values.items()), start=zero)
    return total, {name: value.detach() for name, value in values.items()}


__all__ = [
    "LOSSES",
    "NO_OPTIONS",
    "BiasController",
    "BiasRule",
    "Gains",
    "Loss",
    "LossContext",
    "Options",
    "PrototypeMemory",
    "Scope",
    "balance_loss",
    "bias_step",
    "check_losses",
    "evidence_needed",
    "prototype_memory",
]
