"""Routers of upcycled layers: how they start, and what their weights add up to.

Experts that begin alike are summed with the router's weights, so the layer gives the dense output times the sum of the weights.
Where that sum is the same for every token (orders B and C), dividing it out keeps the function exactly. Where it is not (order
A), a gate that starts small makes every weight 1/E up to what is small: the sum is k/E, and the choice, which depends on
directions alone, still differs between tokens.

Legend: T tokens, D model width, E experts, C copies, G shards of a copy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.models.config import ModelConfig, RouterConfig
from moesaic.plan.plan import RoutingPlan
from moesaic.routing import ROUTERS, LinearGate, Router, TokenContext, build_router, router_options

SMALL_STD = 2e-7  # of logits on normalised inputs: weights equal to fp32 rounding, and loads no worse than with 1e-6
_PROBES = 512
_CONSTANT = 1e-6  # relative spread of the sum of weights up to which it counts as the same for every token


def make_router(dense: ModelConfig, config: RouterConfig, E: int, k: int, seed: int, dtype: torch.dtype) -> Router:
    """A router of one layer from its own seed; fp32 or wider. Raises ``ConfigError`` for what cannot be."""
    options: dict[str, Any] = dict(config.options)
    if config.name in ROUTERS and "vocab_size" in router_options(config.name):
        options.setdefault("vocab_size", dense.vocab_size)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        router = build_router(config.name, dense.dim, E, k, options)
    return router.to(torch.promote_types(dtype, torch.float32)).eval()


@torch.no_grad()
def weight_sums(router: Router, dim: int, vocab_size: int, seed: int = 0) -> Tensor:
    """fp64 (T,): what the weights of each of some random, normalised tokens add up to, in evaluation.

    Raises ``ConfigError`` for routers whose plans are not rows of tokens and experts (Soft MoE): no expert of theirs sees a
    token as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = next((p.dtype for p in router.parameters()), torch.float32)
    x_TD = torch.randn(_PROBES, dim, generator=generator, dtype=torch.float64).to(dtype)
    place_T = torch.arange(_PROBES)
    context = TokenContext(
        ids_T=torch.randint(vocab_size, (_PROBES,), generator=generator),
        position_T=place_T,
        sequence_T=torch.zeros_like(place_T),
        num_sequences=1,
        task_T=torch.zeros_like(place_T),
        generator=generator,
    )
    plan = router(x_TD, context)
    if not isinstance(plan, RoutingPlan):
        raise ConfigError(
            f'Router "{type(router).__name__}" gives experts mixtures of tokens, which the dense layer never saw; choose one '
            'that sends whole tokens, such as "topk".'
        )
    return sums_of(plan)


def sums_of(plan: RoutingPlan) -> Tensor:
    """fp64 (T,): the sum of the weights of each token's rows that reach an expert, weights on inputs included."""
    weight_N = plan.weight_N.double() * plan.kept_N
    if plan.input_weight_N is not None:
        weight_N = weight_N * plan.input_weight_N.double()
    return torch.zeros(plan.num_tokens, dtype=torch.float64).index_add_(0, plan.token_N.cpu(), weight_N.cpu())


@torch.no_grad()
def settle_weights(router: Router, dense: ModelConfig, std: float | None) -> float:
    """Give the gate its starting scale, in place, and return what a token's weights then add up to, on average.

    ``std``: of the gate's weights; None changes nothing where the sum is constant, and else makes the gate small.
    """
    gate = getattr(router, "gate", None)
    sums_T = weight_sums(router, dense.dim, dense.vocab_size)
    if isinstance(gate, LinearGate):
        if std is None and not _constant(sums_T):
            std = SMALL_STD / math.sqrt(gate.weight.shape[1])
        if std is not None:
            gate.weight.mul_(std / gate.weight.std().clamp(min=1e-30) if gate.weight.any() else 0.0)
            sums_T = weight_sums(router, dense.dim, dense.vocab_size)
    elif std is not None:
        raise ConfigError(
            f'Router "{type(router).__name__}" has no linear gate, so router_std does not apply; leave it out.'
        )
    total = float(sums_T.mean())
    if not total > 0:
        raise ConfigError(
            f'Router "{type(router).__name__}" starts with weights that add up to {total:g}; choose another.'
        )
    # What is 1 up to rounding is 1: the experts then stay the very numbers of the dense model.
    return round(total, 6) if abs(total - round(total, 6)) < 1e-6 * total and _constant(sums_T) else total


def _constant(sums_T: Tensor) -> bool:
    return float(sums_T.std()) <= _CONSTANT * float(sums_T.mean().abs())


@torch.no_grad()
def tie_shards(router: Router, shards: int) -> None:
    """Virtual groups: the shards of a copy get one and the same row, so that top-k takes whole copies. In place.

    Expert ``c * G + g`` is shard g of copy c. Raises ``ConfigError`` for routers without a linear gate.
    """
    gate = getattr(router, "gate", None)
    if not isinstance(gate, LinearGate):
        raise ConfigError(
            f'method="granular" needs equal scores for the shards of a copy, and router "{type(router).__name__}" has no '
            'linear gate to give them; use "topk".'
        )
    for parameter in (gate.weight, gate.bias):
        if parameter is not None:
            parameter.copy_(parameter[::shards].repeat_interleave(shards, dim=0))


@torch.no_grad()
def point_at(router: Router, rows_ED: Tensor, x_TD: Tensor) -> None:
    """Set the gate's rows, scaled so that logits on these inputs have a standard deviation of 1. In place."""
    gate = getattr(router, "gate", None)
    if not isinstance(gate, LinearGate):
        raise ConfigError(
            f'Router "{type(router).__name__}" has no linear gate to initialise; set router_init="random".'
        )
    logits_TE = x_TD.double() @ rows_ED.double().T
    spread = (logits_TE - logits_TE.mean(dim=1, keepdim=True)).std().clamp(min=1e-12)
    gate.weight.copy_(rows_ED / spread)


def rows_from_targets(x_TD: Tensor, target_TE: Tensor, ridge: float = 1e-2) -> Tensor:
    """fp64 (E, D): rows of the linear map that predicts the targets from the inputs best, both centred (ridge regression).

    Centred, so that no expert is preferred over the whole text.
    """
    x_TD, target_TE = x_TD.double(), target_TE.double()
    x_TD, target_TE = x_TD - x_TD.mean(dim=0), target_TE - target_TE.mean(dim=0)
    target_TE = target_TE / target_TE.std(dim=0).clamp(min=1e-12)
    gram_DD = x_TD.T @ x_TD
    gram_DD = gram_DD + ridge * gram_DD.diagonal().mean() * torch.eye(len(gram_DD), dtype=torch.float64)
    return torch.linalg.solve(gram_DD, x_TD.T @ target_TE).T


def rows_from_means(inputs: list[Tensor]) -> Tensor:
    """fp64 (E, D): for each text the direction of its mean input (T, D) away from the mean of all texts (mergekit's "hidden",
    centred, because what all texts share distinguishes none).
    """
    mean_ED = torch.stack([x_TD.double().mean(dim=0) for x_TD in inputs])
    return F.normalize(mean_ED - mean_ED.mean(dim=0), dim=1)
