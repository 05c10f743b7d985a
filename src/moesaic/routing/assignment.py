"""Balanced linear assignment: one expert per token, equally many tokens per expert, and the greatest sum of scores.

``max sum_t a[t, e(t)]`` such that every expert serves T/E tokens. Where E does not divide T, the T mod E experts for which that
is best serve one token more: E - T mod E dummy tokens without preferences, at most one per expert, fill up the other places.

The dual has one unknown per expert, its price: ``min_p sum_t max_e (a_te - p_e) + sum_e places_e p_e``. So

1. ``_prices`` smooths the maximum at a temperature, takes Newton steps on the E prices and cools: batched, fp32, on the device
   of the scores. Nothing is promised and nothing needs to be.
2. ``_settle`` gives every token its best expert at those prices, which leaves a few experts over- and others undersubscribed,
   and moves tokens along shortest paths in the graph of experts (edge e -> f: the least that a token of e loses at f), lowering
   prices by the distances: successive shortest paths, fp64, on the host, a few dozen steps over arrays of E numbers.

Step 2 is exact from any prices, and ends: a path brings at least one token to a free place, so there are at most T of them,
each found in at most E rounds, whatever ties, infinities and ranges the scores have. Hence no tolerance and no iteration cap.
The result is optimal up to rounding (1e-13 of the range of scores over thousands of tokens), and ``duality_gap`` proves that
for the case at hand from the prices alone. Scores that span 2^60 within one batch defeat step 1, and step 2 then takes all T
paths: seconds instead of milliseconds for thousands of tokens.

Not an auction, which is what BASE layers use (Bertsekas 1988; fairseq bids with epsilon = range/50, at most 100 rounds): an
auction raises prices one bid at a time and is left within T * epsilon of the optimum. With hundreds of tokens per expert it
took ten times as long just to leave E tokens over (docs/log.md). The paths are those of Jonker and Volgenant 1987, over experts
instead of places; the smoothed dual is entropic transport (Cuturi 2013).

Legend: T tokens, E experts, S a sample of tokens, M tokens of one expert, F experts whose distance has just changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

COOLINGS = 8  # Newton steps, each at half the temperature of the one before
MOST_COOLINGS = 18  # where tokens come in tight clusters; beyond that fp32 sees no difference
MOST_HELD = 8  # steps without cooling
FIRST_SAMPLE = 256  # tokens that the first step looks at, then twice as many each time


@dataclass(frozen=True, eq=False)
class Solution:
    """An assignment and what proves it.

    Attributes:
        expert_T: int64 (T,) the expert of each token; counts differ by at most one.
        price_E: fp64 (E,) optimal prices: no token prefers another expert at them.
        paths: shortest paths it took, a measure of how good the smoothed prices were.
    """

    expert_T: Tensor
    price_E: Tensor
    paths: int


@torch.library.custom_op("moesaic::assign_balanced", mutates_args=())
def assign_balanced(scores_TE: Tensor) -> Tensor:
    """int64 (T,): the expert of each token in the best balanced assignment. One opaque operator to compilers and counters.

    Scores that are not finite count as the smallest finite one, as in fairseq.
    """
    return solve(scores_TE).expert_T


@assign_balanced.register_fake
def _(scores_TE: Tensor) -> Tensor:
    return scores_TE.new_empty(scores_TE.shape[0], dtype=torch.int64)


@torch.no_grad()
def solve(scores_TE: Tensor) -> Solution:
    """The best balanced assignment with its prices. Deterministic; any float dtype; on a GPU it waits for the device."""
    T, E = scores_TE.shape
    device = scores_TE.device
    if T == 0 or E == 1:
        nothing_E = torch.zeros(E, dtype=torch.float64, device=device)
        return Solution(torch.zeros(T, dtype=torch.int64, device=device), nothing_E, 0)
    a_TE, scale = _usable(scores_TE)
    expert_T, price_E, paths = _settle(a_TE.double().cpu().numpy(), _prices(a_TE).cpu().numpy())
    return Solution(torch.from_numpy(expert_T).to(device), torch.from_numpy(price_E).to(device) * scale, paths)


@torch.no_grad()
def duality_gap(scores_TE: Tensor, solution: Solution) -> float:
    """How far the assignment can be from the best one: the dual value of the prices minus the sum of its scores.

    Zero up to rounding for what ``solve`` returns; for any other assignment and prices an upper bound.
    """
    T, E = scores_TE.shape
    a_TE, scale = _usable(scores_TE)
    a_TE, price_E, expert_T = a_TE.double(), solution.price_E / scale, solution.expert_T
    best_T = (a_TE - price_E).amax(dim=1)
    own_T = a_TE.gather(1, expert_T[:, None])[:, 0] - price_E[expert_T]
    # Free places are worth their price; the E - T mod E cheapest experts are those that do without the extra token.
    places_E = torch.full_like(price_E, T // E)
    places_E[E - T % E :] += 1
    unsold = places_E @ price_E.sort().values - torch.bincount(expert_T, minlength=E).double() @ price_E
    return float(((best_T - own_T).sum() + unsold) * scale)


def _usable(scores_TE: Tensor) -> tuple[Tensor, float]:
    """Finite scores, fp32 or fp64, and the power of two they were divided by, lest differences of huge ones overflow."""
    a_TE = scores_TE if scores_TE.dtype == torch.float64 else scores_TE.float()
    low, high = (float(end) for end in a_TE.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        finite_TE = a_TE.isfinite()
        smallest = torch.where(finite_TE, a_TE, torch.inf).amin()
        a_TE = torch.where(finite_TE, a_TE, smallest if smallest.isfinite() else 0.0)
        low, high = (float(end) for end in a_TE.aminmax())
    scale = 2.0**60 if max(-low, high) > 1e300 else 1.0
    return a_TE / scale if scale > 1 else a_TE, scale


def _prices(a_TE: Tensor) -> Tensor:
    """fp64 (E,) prices at which demand is nearly balanced: Newton on the smoothed dual, cooled."""
    T, E = a_TE.shape
    centre_E = a_TE.mean(dim=0, dtype=torch.float64)
    rest_TE = a_TE - centre_E
    rest_TE -= rest_TE.mean(dim=1, keepdim=True)  # a token's own offset changes nothing and would cost precision
    spread = rest_TE.abs().mean().clamp(min=1e-300)
    z_TE = (rest_TE / spread).clamp(-1e3, 1e3).float()
    # Rough prices need few tokens. Drawn, because any regular step may fall in with a regularity of the batch.
    order_T = torch.randperm(T, generator=torch.Generator().manual_seed(0)).to(a_TE.device)
    price_E, share = z_TE.new_zeros(E), 1.0 / E
    cooling = 0
    for step in range(MOST_COOLINGS + MOST_HELD):
        if cooling == MOST_COOLINGS or (cooling >= COOLINGS and _excess(z_TE, price_E) <= E):
            break
        sample = max(FIRST_SAMPLE, 4 * E) << cooling
        z_SE = z_TE if sample >= T else z_TE[order_T[:sample]]
        probs_SE = ((z_SE - price_E) * 2.0**cooling).softmax(dim=1)
        demand_E = probs_SE.mean(dim=0)
        # Only differences of prices count: share^2 pins their sum. The small ridge is for experts that nobody wants.
        hessian_EE = torch.diag(demand_E + 1e-3 * share) - probs_SE.T @ probs_SE / len(probs_SE) + share**2
        newton_E, _ = torch.linalg.solve_ex(hessian_EE, demand_E - share)
        price_E = price_E + newton_E.nan_to_num(0.0).clamp(-3, 3) * 0.5**cooling
        # Far from balance these steps overshoot: cool only what is nearly balanced.
        cooling += step - cooling >= MOST_HELD or bool(demand_E.max() <= 3 * share)
    return price_E.double() * spread + centre_E


def _excess(z_TE: Tensor, price_E: Tensor) -> int:
    """Tokens that would not find a place if each took its best expert at these prices."""
    T, E = z_TE.shape
    demand_E = torch.bincount((z_TE - price_E).argmax(dim=1), minlength=E)
    return int((demand_E - -(-T // E)).clamp(min=0).sum())


def _settle(a_TE: Floats, price_E: Floats) -> tuple[Ints, Floats, int]:
    """The optimal assignment, its prices, and the number of paths: successive shortest paths from any prices."""
    T, E = a_TE.shape
    places = -(-T // E)
    expert_T: Ints = (a_TE - price_E).argmax(axis=1)
    # Experts that go without the extra token: the cheapest, so that no dummy would rather move.
    dummy_E = np.zeros(E, dtype=bool)
    dummy_E[np.argsort(price_E, kind="stable")[: places * E - T]] = True
    excess_E = np.bincount(expert_T, minlength=E) + dummy_E - places
    loss_EE = np.full((E, E), np.inf)
    for e in range(E):
        loss_EE[e] = _losses(a_TE, expert_T, dummy_E, e)
    paths = 0
    while (excess_E > 0).any():
        paths += 1
        path, distance_E = _shortest_path(loss_EE - price_E[:, None] + price_E, excess_E)
        price_E = price_E - distance_E
        steps = [_movers(a_TE, expert_T, loss_EE, e, f) for e, f in pairwise(path)]
        amount = min(excess_E[path[0]], -excess_E[path[-1]], *(max(len(movers), 1) for movers in steps))
        for movers, (e, f) in zip(steps, pairwise(path), strict=True):
            if len(movers):
                expert_T[movers[:amount]] = f
            else:
                dummy_E[e], dummy_E[f] = False, True
        excess_E[path[0]] -= amount
        excess_E[path[-1]] += amount
        for e in range(E) if not all(map(len, steps)) else path:  # a moved dummy opens and closes edges everywhere
            loss_EE[e] = _losses(a_TE, expert_T, dummy_E, e)
    return expert_T, price_E, paths


def _losses(a_TE: Floats, expert_T: Ints, dummy_E: Bools, e: int) -> Floats:
    """(E,): the least that any token of expert e, or its dummy, loses at each other expert, prices left out."""
    mine_ME = a_TE[expert_T == e]
    loss_E = (mine_ME[:, e, None] - mine_ME).min(axis=0, initial=np.inf)
    if dummy_E[e]:
        loss_E[~dummy_E] = np.minimum(loss_E[~dummy_E], 0.0)
    loss_E[e] = np.inf
    return loss_E


def _movers(a_TE: Floats, expert_T: Ints, loss_EE: Floats, e: int, f: int) -> Ints:
    """Tokens of e that lose exactly the least at f, lowest first; none if it is the dummy's edge."""
    mine_M = np.flatnonzero(expert_T == e)
    return mine_M[a_TE[mine_M, e] - a_TE[mine_M, f] == loss_EE[e, f]]


def _shortest_path(cost_EE: Floats, excess_E: Ints) -> tuple[list[int], Floats]:
    """Experts on the shortest path from any with excess to any with free places, and all distances, cut at its length.

    Bellman-Ford from all sources at once; what is farther than the nearest free place is never followed.
    """
    cost_EE = np.maximum(cost_EE, 0.0)  # below 0 by rounding only
    distance_E = np.where(excess_E > 0, 0.0, np.inf)
    free_E = excess_E < 0
    before_E = np.full(len(excess_E), -1)
    length = np.inf
    front = np.flatnonzero(excess_E > 0)
    while len(front):
        reach_FE = distance_E[front, None] + cost_EE[front]
        via_E = reach_FE.argmin(axis=0)
        reach_E = reach_FE[via_E, np.arange(len(via_E))]
        better_E = reach_E < np.minimum(distance_E, length)
        distance_E[better_E] = reach_E[better_E]
        before_E[better_E] = front[via_E[better_E]]
        length = distance_E[free_E].min()
        front = np.flatnonzero(better_E & ~free_E)
    path = [int(np.flatnonzero(free_E & (distance_E == length))[0])]
    while before_E[path[-1]] >= 0:
        path.append(int(before_E[path[-1]]))
    return path[::-1], np.minimum(distance_E, length)
