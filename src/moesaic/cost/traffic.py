"""Bytes that must move: what a decoded token reads, and what ranks send one another for the rows of a step.

Decoding reads the weights a token uses, and the keys and values of the tokens before it:

>>> sum(decode_bytes(model).values()) / (read_gb_per_s() * 1e9)      # no token can take fewer seconds than this

What a cache keeps from one token to the next costs less; a model that fits into it can beat this limit.

Exchanges are exact, from plans and their placement (under uniform load: ``communication.py``):

>>> rows_RR = rows_between(placement, [(plan.expert_N, plan.token_N) for plan in plans])      # plans[r]: of source rank r
>>> sent_bytes(rows_RR, rank=0, row_bytes=dim * 2).total()

Legend: R ranks of an expert-parallel group, G of them on a node, M nodes, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.cost.count import count_parameters
from moesaic.errors import ConfigError
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder
from moesaic.plan.placement import Placement


def decode_bytes(model: Decoder) -> dict[str, int]:
    """Part -> bytes of weights that one token of one stream uses, in the dtypes the model holds them in.

    The k experts of each sparse layer (of multi-head layers k for every sub-token, at most all), one row of the embedding, and
    the whole of everything else. An upper bound for routers that read only some of their table.
    """
    counts = count_parameters(model)
    size = model.embedding.weight.element_size()
    parts = {}
    for part, active in counts.active_parts.items():
        held = counts.parts[part]
        width = size
        if part == "router":  # fp32 whatever the rest is in
            width = max(
                (p.element_size() for moe in model.moe_layers().values() for p in moe.router.parameters()), default=4
            )
        parts[part] = min(active, held) * width
    if not counts.parts["head"]:  # tied: the head reads the embedding's matrix
        parts["head"] = parts["embedding"]
    parts["embedding"] = model.config.dim * size
    return {part: amount for part, amount in parts.items() if amount}


def cache_bytes(model: Decoder, context: float) -> float:
    """Bytes of keys and values that one token attends to after ``context`` tokens, itself included."""
    config = model.config
    size = (model.compute_dtype or model.embedding.weight.dtype).itemsize
    tokens = 0.0
    for layer in range(config.num_layers):
        window = config.window(layer)
        tokens += context if window is None else min(context, window)
    return tokens * cache_width(config) * size


def cache_width(config: ModelConfig) -> int:
    """Numbers the cache holds per token in one layer: keys and values of every head, or with latent attention one vector."""
    if config.latent is not None:
        return config.latent.kv_rank + config.latent.rope_dim
    return 2 * config.kv_heads * config.heads_dim


# ---- between ranks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends to each rank of its group, for one sparse layer and micro-batch; none to itself.

    Attributes:
        dispatch: rows to the ranks of their experts. combine: outputs to the ranks of their tokens. combine_backward: gradients
            of outputs, the way of ``dispatch``. dispatch_backward: gradients of rows, the way of ``combine``.
    """

    dispatch: tuple[int, ...]
    combine: tuple[int, ...]
    combine_backward: tuple[int, ...]
    dispatch_backward: tuple[int, ...]

    def total(self, *, recompute: bool = False) -> int:
        """All of a training step; with the layer recomputed in the backward its forward counts twice."""
        forward = sum(self.dispatch) + sum(self.combine)
        return forward * (2 if recompute else 1) + sum(self.combine_backward) + sum(self.dispatch_backward)


def sent_bytes(rows_RR: Tensor, rank: int, row_bytes: int, back_bytes: int | None = None) -> Sent:
    """What ``rank`` sends, by fieldguide 4.1: a dispatch sends its row of the matrix, a combine its column.

    Summed over ranks it is formula 4.2, ``4 T k d b (P - 1) / P`` each, where every rank sends every other alike.

    Args:
        rows_RR: int64, rows from rank [r] to rank [c] (``plan/predict.py``, or one stage of ``two_level_rows``).
        row_bytes: of a row on its way to experts, width times bytes of an element (FP8 with a scale per 128: ``1 + 4 / 128``).
        back_bytes: of an output; None is as many.
    """
    back_bytes = row_bytes if back_bytes is None else back_bytes
    away = rows_RR.clone().fill_diagonal_(0)
    out, back = away[rank].tolist(), away[:, rank].tolist()
    return Sent(
        dispatch=tuple(rows * row_bytes for rows in out),
        combine=tuple(rows * back_bytes for rows in back),
        combine_backward=tuple(rows * back_bytes for rows in out),
        dispatch_backward=tuple(rows * row_bytes for rows in back),
    )


def two_level_rows(rows_RR: Tensor, ranks_per_node: int) -> tuple[Tensor, Tensor]:
    """Rows of a hierarchical dispatch (fieldguide 4.3), within nodes and then between them: twice (R, R), int64.

    First every rank collects what the ranks of its node send to its place in any node; then it sends this on to the node. Rows
    between two nodes are as many as in a flat dispatch.
    """
    G = ranks_per_node
    M = _nodes(rows_RR.shape[0], G)
    within_RR, between_RR = torch.zeros_like(rows_RR), torch.zeros_like(rows_RR)
    rows_MGMG = rows_RR.view(M, G, M, G)
    for node in range(M):
        here = slice(node * G, (node + 1) * G)
        within_RR[here, here] = rows_MGMG[node].sum(dim=1)
        for place in range(G):
            between_RR[node * G + place, place::G] = rows_MGMG[node, :, :, place].sum(dim=0)
    return within_RR, between_RR


def rows_to_nodes(placement: Placement, routed: Sequence[tuple[Tensor, Tensor]], ranks_per_node: int) -> Tensor:
    """Tokens of each rank with an expert on each node, int64 (R, M): rows to send where each crosses to a node only once.

    So DeepEP sends them (fieldguide 4.2 and 4.3): to a node once, to the experts' ranks from there. Its own node is included.

    Args:
        routed: for every rank (expert_N, token_N) of its plan, as in ``rows_between``.
    """
    M = _nodes(placement.num_ranks, ranks_per_node)
    nodes = [rank // ranks_per_node for rank, n in enumerate(placement.slots_per_rank) for _ in range(n)]
    found = []
    for rank, (expert_N, token_N) in enumerate(routed):
        slot_N = placement.choose(expert_N.clamp(max=placement.num_experts), token_N, rank)
        kept_N = slot_N < placement.num_slots
        node_N = torch.tensor(nodes, device=slot_N.device)[slot_N[kept_N]]
        pairs = torch.unique(token_N[kept_N] * M + node_N)
        found.append(torch.bincount(pairs % M, minlength=M).cpu())
    return torch.stack(found)


def _nodes(ranks: int, ranks_per_node: int) -> int:
    if ranks_per_node < 1 or ranks % ranks_per_node:
        raise ConfigError(
            f"{ranks} ranks cannot be spread over nodes of {ranks_per_node}; choose a divisor of {ranks}."
        )
    return ranks // ranks_per_node
