"""Bytes that leave a rank in each kind of exchange, counted as ``parallel/comm.py`` counts them (fieldguide 4.2).

What a rank keeps to itself is not traffic. Sums and gathers are rings: an all-reduce of n bytes over P ranks sends
``2 n (P - 1) / P``, an all-gather or a reduce-scatter of n bytes in all half of it.

>>> all_to_all_bytes(rows_away=96, width=512, element_bytes=2)
"""

from __future__ import annotations

import math
from fractions import Fraction


def all_to_all_bytes(rows_away: int, width: int, element_bytes: int) -> int:
    """One all-to-all: the rows that go to other ranks. Exact for the rows of a plan."""
    return rows_away * width * element_bytes


def rows_away(rows: int, slots_here: int, slots: int) -> Fraction:
    """Of a rank's rows those for other ranks' slots, under uniform load; a whole number where slots divide the rows."""
    return Fraction(rows * (slots - slots_here), slots)


def passes(recompute: bool) -> int:
    """Times that rows travel in a step: to their experts and back, their gradients too, and once more if recomputed."""
    return 6 if recompute else 4


def step_bytes(rows: int, width: int, element_bytes: int, ranks: int, *, recompute: bool = False) -> Fraction:
    """Of one sparse layer and step on each of ``ranks`` ranks under uniform load: ``4 T k d b (P - 1) / P``, T k the rows."""
    return passes(recompute) * rows_away(rows, 1, ranks) * width * element_bytes


def two_level_bytes(rows: int, width: int, element_bytes: int, per_node: int, nodes: int) -> tuple[Fraction, Fraction]:
    """One hierarchical all-to-all under uniform load: bytes sent within the node, and between nodes.

    First to the rank at the right place of this node, ``(G - 1)/G`` of the rows; then to the right node, ``(N - 1)/N``.
    """
    size = rows * width * element_bytes
    return Fraction(size * (per_node - 1), per_node), Fraction(size * (nodes - 1), nodes)


def all_reduce_bytes(size: int, ranks: int) -> int:
    """A ring passes everything round twice, but for each rank's own part."""
    return 2 * size * (ranks - 1) // ranks


def gather_bytes(size: int, ranks: int) -> int:
    """An all-gather of ``size`` bytes in all, or a reduce-scatter of as many."""
    return size * (ranks - 1) // ranks


def nodes_reached(experts: int, k: int, nodes: int, limit: int | None = None) -> float:
    """Nodes other than its own that hold one or more of a token's k experts, on average: a token goes to each of them once.

    Experts lie evenly on nodes, the token's own is one of them by chance; ``limit`` nodes are chosen first (DeepSeek), then k
    of their experts; all alike. At most min(k, limit).
    """
    chosen = nodes if limit is None else min(limit, nodes)
    each = experts // nodes
    # A chosen node is left out where all k come from the others.
    left_out = math.comb((chosen - 1) * each, k) / math.comb(chosen * each, k)
    return chosen * (1 - left_out) * (nodes - 1) / nodes
