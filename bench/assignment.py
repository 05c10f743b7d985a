"""Claim: the balanced assignment is exact, takes milliseconds where SciPy's takes seconds, and an auction is slower and worse.

    python bench/assignment.py                       # T = 1024..8192, E = 16..128; SciPy is most of the hours
    python bench/assignment.py --max-tokens 2048     # a minute

Scores are a linear gate on vectors with a common direction, so that demand is skewed as in a real router. Per size, the three
run in turn, ``--repeats`` times, on one thread; figures are medians of processor time, so that other programs count little.
"ours" is ``routing/assignment.py``; "scipy" is ``linear_sum_assignment`` on columns tiled T/E times (tiling not timed);
"auction" is the rule of BASE layers as rounds of bids by all unassigned tokens at once with epsilon = range / 50, stopped after
2,000 rounds (fairseq stops after 100). Gaps are (optimum - sum of scores) / T in standard deviations of the scores; ``left``
are tokens the auction had not placed. Where SciPy is not run, the optimum is known from the duality gap.
The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moesaic.routing.assignment import duality_gap, solve


def main() -> None:
    """Run all sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--max-tokens", type=int, default=8192, help="leave larger sizes out")
    parser.add_argument("--scipy-max-tokens", type=int, default=8192, help="beyond this SciPy is not run")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("    T    E   ours ms  scipy ms  auction ms  scipy/ours  ours gap  auction gap  left  paths")
    for T in filter(args.max_tokens.__ge__, args.tokens):
        for E in args.experts:
            row = _size(T, E, args.repeats, with_scipy=args.scipy_max_tokens >= T)
            rows.append(row)
            scipy_ms, ratio = (f"{row[c]:.1f}" if row[c] is not None else "-" for c in ("scipy_ms", "ratio"))
            print(
                f"{T:5} {E:4} {row['ours_ms']:9.1f} {scipy_ms:>9} {row['auction_ms']:11.1f} {ratio:>11} "
                f"{row['ours_gap']:9.0e} {row['auction_gap']:12.1e} {row['auction_left']:5} {row['paths']:6}",
                flush=True,
            )
    print(json.dumps({"rows": rows, "repeats": args.repeats, "threads": 1, "torch": torch.__version__}))


def _size(T: int, E: int, repeats: int, *, with_scipy: bool) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(T + E)
    x_TD = torch.randn(T, 64, generator=rng) + torch.randn(64, generator=rng)
    scores_TE = x_TD @ torch.randn(64, E, generator=rng)
    tiled = scores_TE.double().repeat(1, T // E).numpy() if with_scipy else None
    epsilon = float(scores_TE.max() - scores_TE.min()) / 50
    solve(scores_TE)  # the first call of a process pays for loading
    times: dict[str, list[float]] = {"ours": [], "scipy": [], "auction": []}
    for _ in range(repeats):
        solution = _timed(times["ours"], lambda: solve(scores_TE))
        if tiled is not None:
            rows, columns = _timed(times["scipy"], lambda: linear_sum_assignment(tiled, maximize=True))
            optimum = float(tiled[rows, columns].sum())
        bids_T = _timed(times["auction"], lambda: _auction(scores_TE, epsilon, most_rounds=2000))
    a_TE = scores_TE.double()
    ours = float(a_TE.gather(1, solution.expert_T[:, None]).sum())
    if tiled is None:
        optimum = ours + duality_gap(scores_TE, solution)
    placed_T = bids_T < E
    worst = a_TE.min()  # what the auction did not place counts as the worst score
    auction = float(torch.where(placed_T, a_TE.gather(1, bids_T.clamp(max=E - 1)[:, None])[:, 0], worst).sum())
    unit = T * float(a_TE.std())
    median = {name: statistics.median(seconds) * 1e3 if seconds else None for name, seconds in times.items()}
    return {
        "T": T,
        "E": E,
        **{f"{name}_ms": ms for name, ms in median.items()},
        "ratio": median["scipy"] / median["ours"] if median["scipy"] and median["ours"] else None,
        "ours_gap": max(optimum - ours, 0.0) / unit,
        "auction_gap": (optimum - auction) / unit,
        "auction_left": int((~placed_T).sum()),
        "paths": solution.paths,
    }


def _timed(seconds: list[float], run: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = run()
    seconds.append(time.process_time() - start)
    return result


def _auction(scores_TE: Tensor, epsilon: float, most_rounds: int) -> Tensor:
    """int64 (T,): every round all unassigned tokens bid; an expert keeps its T/E highest bids, the lowest is its price."""
    T, E = scores_TE.shape
    places = T // E
    price_E = torch.zeros(E)
    bid_T, expert_T = torch.full((T,), -torch.inf), torch.full((T,), E)
    for _ in range(most_rounds):
        waiting = (expert_T == E).nonzero()[:, 0]
        if not len(waiting):
            break
        value_W2, expert_W2 = (scores_TE[waiting] - price_E).topk(2, dim=1)
        expert_T[waiting] = expert_W2[:, 0]
        bid_T[waiting] = price_E[expert_W2[:, 0]] + value_W2[:, 0] - value_W2[:, 1] + epsilon
        order_T = bid_T.argsort(descending=True)
        order_T = order_T[expert_T[order_T].argsort(stable=True)]
        counts_E = torch.bincount(expert_T, minlength=E + 1)[:E]
        first_E = counts_E.cumsum(0) - counts_E
        by_expert_T = expert_T[order_T]
        rank_T = torch.arange(T) - torch.cat([first_E, first_E.new_tensor([T])])[by_expert_T]
        lost = order_T[(rank_T >= places) & (by_expert_T < E)]
        last_E = (first_E + places - 1).clamp(max=T - 1)
        price_E = torch.where(counts_E >= places, bid_T[order_T[last_E]], price_E)
        expert_T[lost], bid_T[lost] = E, -torch.inf
    return expert_T


if __name__ == "__main__":
    main()
