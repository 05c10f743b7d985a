"""Dealing hidden units out to experts: equally many to each, like ones together (Zhang et al. 2021; LLaMA-MoE 2024).

Legend: H units, E groups, F features of a unit, T tokens, D model width, P input matrices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing.assignment import solve
from moesaic.upcycle.neurons import Neurons

_ACTIVE = 0.25  # share of the units that count as excited by a token


def balanced_kmeans(feature_HF: Tensor, E: int, generator: torch.Generator, rounds: int = 30) -> Tensor:
    """int64 (H,): the group of each unit, H / E units in each, by cosine to the groups' means.

    Each round is an exact balanced assignment (``routing/assignment.py``) to the means of the last one; it ends when nothing
    moves. Deterministic for a generator.
    """
    H = feature_HF.shape[0]
    if H % E:
        raise ConfigError(f"{H} hidden units cannot be dealt out to {E} experts equally.")
    feature_HF = F.normalize(feature_HF.double(), dim=1)
    centre_EF = feature_HF[torch.randperm(H, generator=generator)[:E]]
    group_H = torch.full((H,), -1)
    for _ in range(rounds):
        before_H, group_H = group_H, solve(feature_HF @ centre_EF.T).expert_T
        if torch.equal(before_H, group_H):
            break
        sum_EF = torch.zeros_like(centre_EF).index_add_(0, group_H, feature_HF)
        centre_EF = F.normalize(sum_EF, dim=1)
    return group_H


def by_weights(ffn: Neurons) -> Tensor:
    """(H, P * D): units are alike whose input weights point the same way."""
    rows_HPD = F.normalize(ffn.w_in_PHD.float(), dim=2).transpose(0, 1)
    return rows_HPD.reshape(ffn.count, -1)


def excited(hidden_TH: Tensor) -> Tensor:
    """bool (T, H): for each token the quarter of the units with the largest activations by magnitude."""
    most = max(1, round(_ACTIVE * hidden_TH.shape[1]))
    top_TM = hidden_TH.abs().topk(most, dim=1).indices
    return torch.zeros_like(hidden_TH, dtype=torch.bool).scatter_(1, top_TM, True)


def groups_of(
    ffn: Neurons, how: str, E: int, shared: int, hidden_TH: Tensor | None, seed: int
) -> tuple[Tensor, Tensor]:
    """int64 (shared,) units of the shared expert and (E, (H - shared) / E) units of each other one, in ascending order.

    ``hidden_TH`` are the activations of the units on some text; None where there is none.
    """
    generator = torch.Generator().manual_seed(seed)
    often_H = None if hidden_TH is None else excited(hidden_TH).float().mean(dim=0)
    shared_S = torch.arange(shared) if often_H is None else often_H.argsort(descending=True, stable=True)[:shared]
    left_H = torch.ones(ffn.count, dtype=torch.bool)
    left_H[shared_S] = False
    rest_R = left_H.nonzero()[:, 0]
    if how == "order":
        group_R = torch.arange(len(rest_R)) * E // len(rest_R)
    elif how == "random":
        group_R = (torch.arange(len(rest_R)) * E // len(rest_R))[torch.randperm(len(rest_R), generator=generator)]
    elif how == "weights":
        group_R = balanced_kmeans(by_weights(ffn)[rest_R], E, generator)
    else:
        if hidden_TH is None:
            raise ConfigError('split_by="activations" clusters units by the tokens that excite them; give some text.')
        group_R = balanced_kmeans(excited(hidden_TH).T.float()[rest_R], E, generator)
    return shared_S.sort().values, rest_R[group_R.argsort(stable=True)].view(E, -1)
