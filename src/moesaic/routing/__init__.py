"""Routers and balancing. A new router is one file here, one hand-worked test, and one line in ``ROUTERS``."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any

from moesaic.errors import ConfigError, nearest
from moesaic.routing.balance import LOSSES, LossContext, balance_loss, bias_step, check_losses
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import LinearGate, Outcome, Router, StepStats, TextStatistics
from moesaic.routing.noisy import NoisyTopK
from moesaic.routing.token_choice import GShardTop2, Switch, TopK

ROUTERS: dict[str, type[Router]] = {
    "topk": TopK,
    "switch": Switch,
    "gshard": GShardTop2,
    "noisy_topk": NoisyTopK,
}


def build_router(
    name: str, dim: int, num_experts: int, k: int, options: dict[str, Any] | None = None, num_special: int = 0
) -> Router:
    """The named router for E experts, the last ``num_special`` of which compute nothing (zero, copy, constant experts).

    ``num_special`` goes to routers whose constructor has an argument of that name. Raises ``ConfigError`` for an unknown name
    or option (with the nearest valid one) or a bad value.
    """
    if name not in ROUTERS:
        raise ConfigError(f'There is no router "{name}".{nearest(name, ROUTERS)} Known: {", ".join(ROUTERS)}.')
    cls = ROUTERS[name]
    options = options or {}
    valid = router_options(name)
    for key, value in options.items():
        if key not in valid:
            known = ", ".join(valid) or "none"
            raise ConfigError(f'Router "{name}" has no option "{key}".{nearest(key, valid)} Options: {known}.')
        _check_option(name, key, value, valid[key])
    known_special = {"num_special": num_special} if "num_special" in inspect.signature(cls).parameters else {}
    router: Router = cls(dim, num_experts, k, **known_special, **options)  # type: ignore[call-arg]
    return router


def router_options(name: str) -> dict[str, Any]:
    """Option name -> type hint, read off the router's constructor (its keyword-only arguments)."""
    cls = ROUTERS[name]
    hints = typing.get_type_hints(cls.__init__)
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: hints.get(p.name, Any) for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "num_special"}


def _check_option(router: str, key: str, value: Any, hint: Any) -> None:
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else None
    if choices is not None:
        if value not in choices:
            raise ConfigError(
                f'Option {key} of router "{router}" must be one of {", ".join(map(repr, choices))}, not {value!r}.'
                f"{nearest(str(value), map(str, choices))}"
            )
        return
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if kind is Any or not isinstance(kind, type):
            return
        if isinstance(value, bool) != (kind is bool):
            continue
        if isinstance(value, kind) or (kind is float and isinstance(value, int)):
            return
    names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ConfigError(f'Option {key} of router "{router}" must be {names}, not {value!r}.')


__all__ = [
    "LOSSES",
    "NO_CONTEXT",
    "ROUTERS",
    "Cost",
    "Facts",
    "GShardTop2",
    "LinearGate",
    "LossContext",
    "NoisyTopK",
    "Outcome",
    "Router",
    "StepStats",
    "Switch",
    "TextStatistics",
    "TokenContext",
    "TopK",
    "balance_loss",
    "bias_step",
    "build_router",
    "check_losses",
    "router_options",
]
