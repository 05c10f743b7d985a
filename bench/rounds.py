"""Interleaved rounds of whole runs that report several times each; ``common.interleave`` is for short calls.

A contender is a function of the round's number that runs once and returns its seconds by name. Within a round everybody gets
the same input, and the order rotates from round to round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common import Seconds, ratio, spread

Laps = dict[str, float]  # name of a part -> its seconds in one run
Run = Callable[[int], Laps]


def in_rounds(
    runs: Mapping[str, Run],
    rounds: int,
    *,
    limit_s: float = 300.0,
    say: Callable[[str], None],
    advance: Callable[[], None],
) -> dict[str, list[Laps | None]]:
    """What each contender reported in each round, None where a slow one sat out.

    Args:
        limit_s: a contender whose rounds would take longer by its warm-up run takes part in fewer, at least one.
        advance: called after every turn, sat out or not, warm-up included: ``len(runs) * (rounds + 1)`` times.
    """
    turns = {}
    for name, run in runs.items():
        say(f"warming up {name}")
        start = time.perf_counter()
        run(0)
        turns[name] = max(1, min(rounds, int(limit_s / max(time.perf_counter() - start, 1e-6))))
        advance()
    laps: dict[str, list[Laps | None]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            say(f"round {turn + 1} of {rounds}: {name}")
            laps[name].append(runs[name](turn) if turn < turns[name] else None)
            advance()
    return laps


def column(laps: Sequence[Laps | None], part: str) -> Seconds:
    """Seconds of one part by round."""
    return [None if one is None else one.get(part) for one in laps]


def medians(laps: Sequence[Laps | None], parts: Sequence[str]) -> dict[str, float]:
    """Median seconds of each part."""
    return {part: spread(column(laps, part))["median"] for part in parts}


def summary(laps: Mapping[str, Sequence[Laps | None]], part: str) -> dict[str, dict[str, Any]]:
    """Median, range and all rounds of one part, by contender that reports it."""
    found = {}
    for name, mine in laps.items():
        seconds = column(mine, part)
        if any(one is not None for one in seconds):
            found[name] = spread(seconds) | {"all": seconds}
    return found


def fastest(found: Mapping[str, Mapping[str, Any]], start: str) -> str | None:
    """Of the contenders whose name begins so, the one with the smallest median."""
    names = [name for name in found if name.startswith(start)]
    return min(names, key=lambda name: float(found[name]["median"]), default=None)


def verdict(number: int, what: str, value: float | None, goal: str | None) -> dict[str, Any]:
    """A target, what was reached (None: not measured here), and whether it is met; ``goal`` None only reports."""
    met, text = None, "not measured here"
    if value is not None:
        text = f"{value:.2f}"
        if goal is not None:
            bound = float(goal.split()[1])
            met = value <= bound if goal.startswith("<") else value >= bound
            text += f"  (goal {goal})  {'met' if met else 'NOT MET'}"
    return {
        "target": number,
        "what": what,
        "value": value,
        "goal": goal,
        "met": met,
        "text": f"  {number}  {what}: {text}",
    }


def times_faster(slow: Sequence[Laps | None], fast: Sequence[Laps | None], part: str) -> dict[str, float]:
    """Seconds of ``slow`` over those of ``fast`` within each round: median, smallest, largest."""
    return ratio(column(slow, part), column(fast, part))
