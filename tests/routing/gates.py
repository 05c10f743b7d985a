"""Routers whose logits are the input itself (identity gate), so that a test can write logits down."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.plan import RoutingPlan
from moesaic.routing import Router, TokenContext, build_router


def identity_router(name: str, num_experts: int, k: int, **options: Any) -> Router:
    """A router of width D = E with gate weight I: ``router(logits)`` routes by these logits."""
    router = build_router(name, num_experts, num_experts, k, options)
    with torch.no_grad():
        router.get_parameter("gate.weight").copy_(torch.eye(num_experts))
    return router


def route(logits: list[list[float]] | Tensor, k: int, name: str = "topk", **options: Any) -> RoutingPlan:
    """The plan of an identity router for these logits, in evaluation, without a graph."""
    logits_TE = torch.as_tensor(logits)
    router = identity_router(name, logits_TE.shape[1], k, **options).eval().to(logits_TE.dtype)
    with torch.no_grad():
        return router(logits_TE)


def padded(valid: list[int]) -> TokenContext:
    """A context in which tokens marked 0 are padding."""
    return TokenContext(valid_T=torch.tensor(valid, dtype=torch.bool))
