"""The plan of a whole batch, in processes that hold a part of it each, for decisions that cannot be made part by part.

>>> sizes = part_sizes(plan, peers)                   # numbers; always
>>> whole, mine = whole_plan(plan, sizes, peers)      # rows; where a routing group lies in two parts
>>> choice_N = decide(whole)[mine]

Legend: T tokens, N rows, E experts, P parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.plan.peers import Peers
from moesaic.plan.plan import Gate, RoutingPlan


@dataclass(frozen=True)
class PartSizes:
    """Of every part, in order: valid tokens, tokens, rows; and whether rules permit any of them some experts only."""

    valid: tuple[int, ...]
    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    ruled: bool


def part_sizes(plan: RoutingPlan, peers: Peers) -> PartSizes:
    """The sizes of all parts. Asks the device."""
    mine = [plan.num_tokens, plan.num_rows, plan.allowed_TE is not None]
    about = torch.cat([plan.num_valid[None], torch.tensor(mine, dtype=torch.int64, device=plan.token_N.device)])
    valid, tokens, rows, ruled = zip(*peers.each(about).tolist(), strict=True)
    return PartSizes(valid, tokens, rows, any(ruled))


def whole_plan(plan: RoutingPlan, sizes: PartSizes, peers: Peers, *, scores: bool = False) -> tuple[RoutingPlan, slice]:
    """The plans of all parts as one, without gradient, and which of its rows are this part's.

    The same for all. It holds what capacity asks for: ``choice_N`` is what rows are sent to now, and the gate, with ``scores``
    only, has no logits of its own. Loose rows stand part by part.
    """
    T, E, device = plan.num_tokens, plan.num_experts, plan.token_N.device
    first = sum(sizes.tokens[: peers.index])

    def rows(values_N: Tensor) -> Tensor:
        return _together(values_N, sizes.rows, peers)

    def tokens(values_T: Tensor) -> Tensor:
        return _together(values_T, sizes.tokens, peers)

    valid_T = torch.ones(T, dtype=torch.bool, device=device) if plan.valid_T is None else plan.valid_T
    gate = allowed_TE = None
    if scores and plan.gate is not None:
        probs_TE = tokens(plan.gate.probs_TE)
        gate = Gate(probs_TE, probs_TE)
    if sizes.ruled:
        ours_TE = torch.ones(T, E, dtype=torch.bool, device=device) if plan.allowed_TE is None else plan.allowed_TE
        allowed_TE = tokens(ours_TE.to(torch.uint8)).bool()
    expert_N = rows(plan.expert_N)
    whole = RoutingPlan(
        token_N=rows(plan.token_N + first),
        expert_N=expert_N,
        weight_N=rows(plan.weight_N),
        choice_N=expert_N,
        num_tokens=sum(sizes.tokens),
        num_experts=E,
        per_token=plan.per_token,
        valid_T=tokens(valid_T.to(torch.uint8)).bool(),
        gate=gate,
        allowed_TE=allowed_TE,
    )
    start = sum(sizes.rows[: peers.index])
    return whole, slice(start, start + plan.num_rows)


def _together(values: Tensor, lengths: tuple[int, ...], peers: Peers) -> Tensor:
    """The parts' tensors, so long along their first dimension, one after the other."""
    padded = values.new_zeros(max(lengths), *values.shape[1:])
    padded[: len(values)] = values.detach()
    return torch.cat([part[:n] for part, n in zip(peers.each(padded), lengths, strict=True)])
