"""Routers and balancing. A new router is one file here, one hand-worked test, and one line in ``ROUTERS``."""

from __future__ import annotations

import inspect
from typing import Any

from moesaic.errors import ConfigError, nearest
from moesaic.routing.adaptive import Budget, TopP
from moesaic.routing.balance import LOSSES, LossContext, balance_loss, bias_step, check_losses
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.contextual import AttentionRouter, Conv, Recurrent
from moesaic.routing.dynmoe import TopAny
from moesaic.routing.estimators import GumbelSoftmax, Reinforce, StraightThrough
from moesaic.routing.expert_choice import ExpertChoice
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.fixed import RandomRouter, RoundRobin
from moesaic.routing.gate import LinearGate, Outcome, Router, StepStats, TextStatistics
from moesaic.routing.hashing import Hash
from moesaic.routing.hierarchical import Hierarchical
from moesaic.routing.memory import MemoryRouter
from moesaic.routing.noisy import NoisyTopK
from moesaic.routing.options import check_options, options_of
from moesaic.routing.product_keys import ProductKeys
from moesaic.routing.projected import Cosine, LowRank
from moesaic.routing.prototype import Prototypes
from moesaic.routing.relu import ReLURouter
from moesaic.routing.rules import Rule, RuleCounts, RuleSet
from moesaic.routing.segment import Segment
from moesaic.routing.soft import DenseSoft, SoftMoE
from moesaic.routing.sparsemixer import SparseMixer, SparseMixerV2
from moesaic.routing.special_choice import MoEPlusPlus, NullExperts
from moesaic.routing.task import Constant, Demix, Sentence, Task
from moesaic.routing.token_choice import GShardTop2, Switch, TopK
from moesaic.routing.transport import Base, Sinkhorn
from moesaic.routing.tree import Tree

ROUTERS: dict[str, type[Router]] = {
    "topk": TopK,
    "switch": Switch,
    "gshard": GShardTop2,
    "noisy_topk": NoisyTopK,
    "low_rank": LowRank,
    "cosine": Cosine,
    "top_p": TopP,
    "top_any": TopAny,
    "budget": Budget,
    "null_experts": NullExperts,
    "moepp": MoEPlusPlus,
    "random": RandomRouter,
    "round_robin": RoundRobin,
    "hash": Hash,
    "task": Task,
    "sentence": Sentence,
    "demix": Demix,
    "constant": Constant,
    "conv": Conv,
    "attention": AttentionRouter,
    "recurrent": Recurrent,
    "segment": Segment,
    "straight_through": StraightThrough,
    "gumbel": GumbelSoftmax,
    "reinforce": Reinforce,
    "sparsemixer": SparseMixer,
    "sparsemixer_v2": SparseMixerV2,
    "relu": ReLURouter,
    "soft_moe": SoftMoE,
    "dense_soft": DenseSoft,
    "prototype": Prototypes,
    "hierarchical": Hierarchical,
    "tree": Tree,
    "product_keys": ProductKeys,
    "memory": MemoryRouter,
    "base": Base,
    "sinkhorn": Sinkhorn,
    "expert_choice": ExpertChoice,
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
    check_options(f'Router "{name}"', options, router_options(name))
    known_special = {"num_special": num_special} if "num_special" in inspect.signature(cls).parameters else {}
    router: Router = cls(dim, num_experts, k, **known_special, **options)
    return router


def router_options(name: str) -> dict[str, Any]:
    """Option name -> type hint, read off the router's constructor (its keyword-only arguments)."""
    return options_of(ROUTERS[name], hidden=("num_special",))


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
    "Rule",
    "RuleCounts",
    "RuleSet",
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
