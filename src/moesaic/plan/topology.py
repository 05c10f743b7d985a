"""Experts that tokens often choose together, placed on one node: a row then crosses between nodes once for both.

Splitting experts into equal parts so that little co-activation is cut is graph partition. Here greedily: parts are grown from
the experts most tied to what is left, then pairs of experts are exchanged while that helps (Kernighan and Lin 1970), and the
even placement is bettered in the same way; the better of the two is taken. (fieldguide 4.8)

>>> placement = by_coactivation(co_activation(plan), ranks=8, nodes=2)
>>> cut(placement, co_activation(plan), nodes=2)             # of co-activation, the share between nodes

It looks at ties alone; for load see ``plan/rebalance.py``, which takes no notice of ties.

Legend: E experts, P parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan.placement import Placement


def by_coactivation(coactivation_EE: Tensor, ranks: int, nodes: int | None = None) -> Placement:
    """Every expert once, as many on each rank as in ``Placement.even``, with little co-activation between nodes.

    Within a node ties are kept on one rank in the same way. Never more between nodes than in the even placement.

    Args:
        coactivation_EE: how often expert [i] and expert [j] share a token, on any scale (``plan.read.co_activation``, counts of
            pairs); both directions are added up.
        ranks: of the expert-parallel group. nodes: of ranks / nodes ranks each; None takes every rank for a node.

    Raises ``ConfigError`` for a matrix that is none of this, or nodes that do not divide the ranks.
    """
    nodes = ranks if nodes is None else nodes
    tie_EE = _ties(coactivation_EE)
    even = Placement.even(tie_EE.shape[0], ranks)
    size = _ranks_per_node(even, nodes)
    by_node = _split(
        tie_EE, [_experts(even.slots[n * size : (n + 1) * size]) for n in range(nodes)], list(range(even.num_experts))
    )
    slots: list[tuple[int, ...]] = []
    for n, experts in enumerate(by_node):
        sizes = even.slots_per_rank[n * size : (n + 1) * size]
        places = [sum(sizes[:r]) for r in range(size + 1)]
        in_order = [experts[places[r] : places[r + 1]] for r in range(size)]
        slots += map(tuple, _split(tie_EE, in_order, experts))
    return Placement(tuple(slots), even.num_experts)


def cut(placement: Placement, coactivation_EE: Tensor, nodes: int | None = None) -> float:
    """Of all co-activation of different experts the share between experts that no node holds together; 0 without any."""
    nodes = placement.num_ranks if nodes is None else nodes
    size = _ranks_per_node(placement, nodes)
    tie_EE = _ties(coactivation_EE)
    here_EM = torch.zeros(placement.num_experts, nodes, dtype=torch.float64)
    for rank, experts in enumerate(placement.slots):
        here_EM[list(experts), rank // size] = 1
    apart_EE = (here_EM @ here_EM.T) == 0
    total = float(tie_EE.sum())
    return float(tie_EE[apart_EE].sum()) / total if total else 0.0


def _split(tie_EE: Tensor, in_order: Sequence[Sequence[int]], experts: Sequence[int]) -> list[list[int]]:
    """``experts`` in parts of the sizes of ``in_order``, cutting no more than those; ascending within a part."""
    sizes = [len(part) for part in in_order]
    found = [_exchanged(tie_EE, parts) for parts in (in_order, _grown(tie_EE, sizes, experts))]
    inside = [sum(float(tie_EE[part][:, part].sum()) for part in parts) for parts in found]
    return [sorted(part) for part in (found[1] if inside[1] > inside[0] else found[0])]


def _grown(tie_EE: Tensor, sizes: Sequence[int], experts: Sequence[int]) -> list[list[int]]:
    """Part by part: the expert most tied to those left, then again and again the one most tied to the part."""
    left = list(experts)
    parts = []
    for size in sizes:
        part: list[int] = []
        while len(part) < size:
            towards = tie_EE[left][:, part or left].sum(dim=1)
            part.append(left.pop(int(towards.argmax())))
        parts.append(part)
    return parts


def _exchanged(tie_EE: Tensor, parts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Swap the pair of experts that saves most, again and again while one saves anything."""
    part_E = torch.full((tie_EE.shape[0],), -1)
    for p, part in enumerate(parts):
        part_E[list(part)] = p
    all_N = (part_E >= 0).nonzero().flatten()
    tie_NN, part_N = tie_EE[all_N][:, all_N], part_E[all_N]
    least = 1e-12 * float(tie_NN.sum())  # rounding must not turn in circles
    for _ in range(len(all_N) ** 2):
        towards_NP = tie_NN @ torch.nn.functional.one_hot(part_N, len(parts)).to(tie_NN.dtype)
        # What n would gain in the part of m, and m in that of n; the tie between them stays cut.
        gain_NN = towards_NP[:, part_N] - towards_NP.gather(1, part_N[:, None])
        saved_NN = gain_NN + gain_NN.T - 2 * tie_NN
        saved_NN[part_N[:, None] == part_N] = 0
        if saved_NN.numel() == 0 or not float(saved_NN.max()) > least:
            break
        n, m = divmod(int(saved_NN.argmax()), len(all_N))
        part_N[[n, m]] = part_N[[m, n]]
    return [all_N[part_N == p].tolist() for p in range(len(parts))]


def _ties(coactivation_EE: Tensor) -> Tensor:
    """fp64 (E, E) on the CPU: symmetric, 0 on the diagonal."""
    shape = tuple(coactivation_EE.shape)
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ConfigError(f"Co-activation is a square matrix over experts, not a tensor of shape {shape}.")
    tie_EE = coactivation_EE.detach().to("cpu", torch.float64)
    if not (torch.isfinite(tie_EE) & (tie_EE >= 0)).all():
        raise ConfigError("Co-activation is made of finite numbers of at least 0, and this matrix has others.")
    return (tie_EE + tie_EE.T).fill_diagonal_(0)


def _ranks_per_node(placement: Placement, nodes: int) -> int:
    if nodes < 1 or placement.num_ranks % nodes:
        raise ConfigError(f"{placement.num_ranks} ranks cannot be spread over {nodes} nodes; choose a divisor of them.")
    return placement.num_ranks // nodes


def _experts(ranks: Sequence[Sequence[int]]) -> list[int]:
    return [expert for rank in ranks for expert in rank]
