"""Claim: both balanced assignments take milliseconds where SciPy takes seconds; the exact one is faster than the auction.

    python bench/assignment.py                       # T = 1024..8192, E = 16..128; SciPy is most of the hours
    python bench/assignment.py --max-tokens 2048     # a minute

Scores are a linear gate on vectors with a common direction, so that demand is skewed as in a real router. Per size, the three
run in turn, ``--repeats`` times, on one thread; figures are medians of processor time, so that other programs count little.
"ours" is ``routing/assignment.py``; "scipy" is ``linear_sum_assignment`` on columns tiled T/E times (tiling not timed);
"auction" is ``routing/auction.py`` with epsilon scaling down to ``--epsilon`` of the range of scores. Gaps are (optimum - sum
of scores) / T in units of the range; the auction promises at most epsilon. Where SciPy is not run, the duality gap gives the
optimum.
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

from moesaic.routing.assignment import duality_gap, solve
from moesaic.routing.auction import auction


def main() -> None:
    """Run all sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--max-tokens", type=int, default=8192, help="leave larger sizes out")
    parser.add_argument("--scipy-max-tokens", type=int, default=8192, help="beyond this SciPy is not run")
    parser.add_argument("--epsilon", type=float, default=1e-3, help="of the auction, relative to the range of scores")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("    T    E   ours ms  scipy ms  auction ms  scipy/ours  ours gap  auction gap  rounds  paths")
    for T in filter(args.max_tokens.__ge__, args.tokens):
        for E in args.experts:
            row = _size(T, E, args.repeats, args.epsilon, with_scipy=args.scipy_max_tokens >= T)
            rows.append(row)
            scipy_ms, ratio = (f"{row[c]:.1f}" if row[c] is not None else "-" for c in ("scipy_ms", "ratio"))
            print(
                f"{T:5} {E:4} {row['ours_ms']:9.1f} {scipy_ms:>9} {row['auction_ms']:11.1f} {ratio:>11} "
                f"{row['ours_gap']:9.0e} {row['auction_gap']:12.1e} {row['rounds']:7} {row['paths']:6}",
                flush=True,
            )
    print(json.dumps({"rows": rows, "repeats": args.repeats, "threads": 1, "torch": torch.__version__}))


def _size(T: int, E: int, repeats: int, epsilon: float, *, with_scipy: bool) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(T + E)
    x_TD = torch.randn(T, 64, generator=rng) + torch.randn(64, generator=rng)
    scores_TE = x_TD @ torch.randn(64, E, generator=rng)
    tiled = scores_TE.double().repeat(1, T // E).numpy() if with_scipy else None
    solve(scores_TE)  # the first call of a process pays for loading
    times: dict[str, list[float]] = {"ours": [], "scipy": [], "auction": []}
    for _ in range(repeats):
        solution = _timed(times["ours"], lambda: solve(scores_TE))
        if tiled is not None:
            rows, columns = _timed(times["scipy"], lambda: linear_sum_assignment(tiled, maximize=True))
            optimum = float(tiled[rows, columns].sum())
        bids = _timed(times["auction"], lambda: auction(scores_TE, epsilon))
    a_TE = scores_TE.double()
    ours = float(a_TE.gather(1, solution.expert_T[:, None]).sum())
    if tiled is None:
        optimum = ours + duality_gap(scores_TE, solution)
    sold = float(a_TE.gather(1, bids.expert_T[:, None]).sum())
    unit = T * float(a_TE.max() - a_TE.min())
    median = {name: statistics.median(seconds) * 1e3 if seconds else None for name, seconds in times.items()}
    return {
        "T": T,
        "E": E,
        **{f"{name}_ms": ms for name, ms in median.items()},
        "ratio": median["scipy"] / median["ours"] if median["scipy"] and median["ours"] else None,
        "ours_gap": max(optimum - ours, 0.0) / unit,
        "auction_gap": max(optimum - sold, 0.0) / unit,
        "rounds": bids.rounds,
        "paths": solution.paths,
    }


def _timed(seconds: list[float], run: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = run()
    seconds.append(time.process_time() - start)
    return result


if __name__ == "__main__":
    main()
