"""The specification: the dumbest loops that say what every fast path must compute, differentiable by plain autograd.

Tests hold each back end, parallel path and quantised path against these, outputs and all gradients, in fp64.

Legend: T tokens, N rows, E experts, D model width, H expert width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def group_rows(expert_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Row order that puts expert 0's rows first (each in original order), rows that go nowhere last; and counts (E,)."""
    order = [n for e in range(num_experts + 1) for n in range(len(expert_N)) if int(expert_N[n]) == e]
    counts = [sum(int(x) == e for x in expert_N) for e in range(num_experts)]
    return torch.tensor(order, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64)


def grouped_mm(x_ND: Tensor, w_EDH: Tensor, counts_E: Tensor) -> Tensor:
    """Rows of group e times ``w[e]``; rows past the last group give zeros. Returns (N, H)."""
    rows = []
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        for n in range(start, start + count):
            rows.append(x_ND[n] @ w_EDH[expert])
        start += count
    for n in range(start, x_ND.shape[0]):
        rows.append((x_ND[n] * 0.0) @ w_EDH[0])
    # "+ 0 * w" keeps every expert in the graph: one without rows has a zero gradient, not None.
    return (torch.stack(rows) if rows else x_ND @ w_EDH[0]) + 0.0 * w_EDH.sum()


def moe(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor,
    expert: Callable[[int, Tensor], Tensor],
    num_experts: int,
) -> Tensor:
    """A whole MoE layer after routing: ``y[t] = sum over rows n of t: weight[n] * expert(e[n], x[t])``. Returns (T, D)."""
    outputs = [x_TD[t] * 0.0 for t in range(x_TD.shape[0])]
    for n in range(len(token_N)):
        t, e = int(token_N[n]), int(expert_N[n])
        if e < num_experts:
            outputs[t] = outputs[t] + weight_N[n] * expert(e, x_TD[t])
    return torch.stack(outputs) if outputs else x_TD.clone()
