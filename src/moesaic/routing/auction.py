"""Balanced linear assignment by auction with epsilon scaling (Bertsekas 1988; Bertsekas and Castanon 1989 for similar objects).

Every expert owns T/E equal places. In a round each token without a place bids for a place of the expert it values most at the
going prices: the price, plus its lead over its second choice, plus epsilon. An expert keeps its highest bids; tokens outbid are
without a place again; an expert's price is the lowest bid it holds once it is full. Prices only rise, so this ends, and the
assignment is within T * epsilon of the best one (epsilon-complementary slackness). Starting at range/10 and dividing epsilon
by 4, prices kept and places cleared, avoids the price wars that a small epsilon alone would fight bid by bid.

All tokens without a place bid at once (Jacobi), so a round is a few operations on tensors. Where E does not divide T, an expert
has floor(T/E) places and one more that E - T mod E dummies without preferences compete for, so counts differ by at most one.

``assignment.py`` solves the same problem exactly, and faster where experts have many places; this one needs no host arithmetic
beyond a count per round, and its slackness is what BASE layers were published with.

Legend: T tokens, E experts, C classes of places, P bidders (tokens and dummies), U bidders without a place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.errors import ConfigError

ROUNDS = 20_000  # far beyond any batch seen; then the rest is seated greedily and the result says so


@dataclass(frozen=True, eq=False)
class Auction:
    """How an auction ended.

    Attributes:
        expert_T: int64 (T,), the expert of each token; counts differ by at most one.
        epsilon: the last one: the sum of scores is within T * epsilon of the best, unless ``capped``.
        rounds: of bidding, over all phases. capped: the round limit was hit and the rest seated greedily.
    """

    expert_T: Tensor
    epsilon: float
    rounds: int
    capped: bool


@torch.no_grad()
def auction(scores_TE: Tensor, epsilon: float = 1e-4, *, scaling: float = 4.0, most_rounds: int = ROUNDS) -> Auction:
    """Assign tokens to experts, balanced, with the sum of scores within T * epsilon * range of the greatest.

    Args:
        scores_TE: any float dtype; entries that are not finite count as the smallest finite one, as in fairseq.
        epsilon: relative to the range of the scores (largest minus smallest). Floored where fp64 could not tell bids apart.
        scaling: factor between the phases' epsilons.

    Raises ``ConfigError`` for an epsilon or a scaling that cannot be.
    """
    if not epsilon > 0 or not scaling > 1 or most_rounds < 0:
        raise ConfigError(f"An auction needs epsilon above 0 and scaling above 1, not {epsilon} and {scaling}.")
    T, E = scores_TE.shape
    if T == 0 or E == 1:
        return Auction(torch.zeros(T, dtype=torch.int64, device=scores_TE.device), 0.0, 0, False)
    a_TE, unit = _usable(scores_TE)
    a_PC, places_C = _classes(a_TE)
    price_C, step = a_PC.new_zeros(a_PC.shape[1]), max(0.1, epsilon)
    rounds, capped = 0, False
    while True:
        place_P, price_C, used = _bidding(a_PC, places_C, price_C, step, most_rounds - rounds)
        rounds += used
        capped = bool((place_P < 0).any())
        if capped or step <= epsilon:
            break
        step = max(step / scaling, epsilon)
    if capped:
        place_P = _greedy(a_PC, places_C, place_P)
    return Auction(place_P[:T] % E, step * unit, rounds, capped)


def _usable(scores_TE: Tensor) -> tuple[Tensor, float]:
    """Finite fp64 scores scaled to a range of 1 from 0 up, and the unit they were divided by."""
    a_TE = scores_TE.double()
    finite_TE = a_TE.isfinite()
    low = torch.where(finite_TE, a_TE, torch.inf).amin()
    low = torch.where(low.isfinite(), low, 0.0)
    a_TE = torch.where(finite_TE, a_TE, low)
    # Halves first: the difference of two huge scores may overflow.
    half_TE = a_TE / 2 - low / 2
    unit = float(half_TE.amax())
    return (half_TE / unit if unit > 0 else half_TE), 2 * unit


def _classes(a_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Bidders' scores (P, C) and places (C,): experts as they are, or floor places and an extra one each, and dummies."""
    T, E = a_TE.shape
    spare = -T % E
    if not spare:
        return a_TE, torch.full((E,), T // E, device=a_TE.device)
    # A dummy may only have an extra place. -2 is below anything a real score (0 to 1) and its price could make it take.
    dummies_DC = torch.cat([a_TE.new_full((spare, E), -2.0 * (T + 1)), a_TE.new_zeros(spare, E)], dim=1)
    places_C = torch.cat([torch.full((E,), T // E), torch.ones(E, dtype=torch.int64)]).to(a_TE.device)
    return torch.cat([torch.cat([a_TE, a_TE], dim=1), dummies_DC]), places_C


def _bidding(
    a_PC: Tensor, places_C: Tensor, price_C: Tensor, epsilon: float, most_rounds: int
) -> tuple[Tensor, Tensor, int]:
    """One phase from empty places: the class of each bidder (-1: none when the limit was hit), prices, rounds."""
    P, C = a_PC.shape
    class_P = torch.full((P,), -1, device=a_PC.device)
    bid_P = a_PC.new_full((P,), -torch.inf)
    usable_C = torch.where(places_C > 0, 0.0, torch.inf)  # T < E: floor is 0, nobody may want those
    for used in range(most_rounds):
        free_U = (class_P < 0).nonzero()[:, 0]
        if not len(free_U):
            return class_P, price_C, used
        value_UC = a_PC[free_U] - (price_C + usable_C)
        best_U2 = value_UC.topk(min(2, C), dim=1)
        wish_U = best_U2.indices[:, 0]
        lead_U = best_U2.values[:, 0] - best_U2.values[:, -1]
        # Someone with a single class open to it leads without bound; one whole range is more than any rival's lead.
        bid_P[free_U] = price_C[wish_U] + lead_U.clamp(max=2.0 * (P + 1)) + epsilon
        class_P[free_U] = wish_U
        # Highest bids first within each class; stable, so the earlier token wins a tie.
        order_P = torch.sort(bid_P, descending=True, stable=True).indices
        order_P = order_P[torch.sort(class_P[order_P], stable=True).indices]
        sorted_P = class_P[order_P]
        rank_P = torch.arange(P, device=a_PC.device) - torch.searchsorted(sorted_P, sorted_P)
        out_P = order_P[rank_P >= places_C[sorted_P]]
        class_P[out_P] = -1
        last_P = order_P[rank_P == places_C[sorted_P] - 1]  # the lowest bid kept by a class that is full
        price_C = price_C.scatter(0, class_P[last_P], bid_P[last_P])
    return class_P, price_C, most_rounds


def _greedy(a_PC: Tensor, places_C: Tensor, class_P: Tensor) -> Tensor:
    """Seat whoever is left at the best class that still has a place, in order."""
    class_P = class_P.clone()
    left_C = places_C - torch.bincount(class_P[class_P >= 0], minlength=len(places_C))
    # Dummies first: they may only have the extra places.
    for bidder in reversed((class_P < 0).nonzero()[:, 0].tolist()):
        choice = int(torch.where(left_C > 0, a_PC[bidder], -torch.inf).argmax())
        class_P[bidder] = choice
        left_C[choice] -= 1
    return class_P
