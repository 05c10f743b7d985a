"""What all processes did in a step, as a record has it under "ranks", and the two figures of it that a person watches.

A dictionary for each process, in the order of ranks, with

    "rows"                              {layer: rows that its experts computed}, of the sparse layers it has; layers whose
                                        experts are not spread over processes are left out
    "step_s"                            seconds that the step took it
    "all_to_all_s", "all_to_all_bytes"  of rows on their way to experts and back, and of their gradients
    "collective_s", "collective_bytes"  of all other collectives but FSDP's, which nobody counts

Seconds include waiting for slower processes; bytes are those sent to others. For more than ``MOST_SEPARATE`` processes there
are three such dictionaries instead, with "over": "min", "mean" or "max", of each figure over the processes that have it.

>>> in_short(record["ranks"])                                   # ["rows x1.3", "all-to-all 23%"]

Legend: R processes, F figures: those of time and of traffic, then the rows of every sparse layer of the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOST_SEPARATE = 64  # a line of a log with more would be longer than anybody reads
NOT_HERE = -1.0  # for rows of a layer that a process has not
SECONDS = ("step_s", "all_to_all_s", "collective_s")
BYTES = ("all_to_all_bytes", "collective_bytes")


def to_entries(figures_RF: Tensor, layers: Sequence[int]) -> list[dict[str, Any]]:
    """The dictionaries, from the figures of all processes: fp64 (R, F) of ``SECONDS``, ``BYTES``, then ``layers``."""
    if len(figures_RF) <= MOST_SEPARATE:
        return [_entry(figures_F, layers) for figures_F in figures_RF]
    here_RF = figures_RF != NOT_HERE
    count_F = here_RF.sum(dim=0)
    over = {
        "min": torch.where(here_RF, figures_RF, torch.inf).amin(dim=0),
        "mean": torch.where(here_RF, figures_RF, 0.0).sum(dim=0) / count_F.clamp(min=1),
        "max": figures_RF.amax(dim=0),
    }
    return [
        {"over": name, **_entry(torch.where(count_F > 0, figures_F, NOT_HERE), layers)}
        for name, figures_F in over.items()
    ]


def _entry(figures_F: Tensor, layers: Sequence[int]) -> dict[str, Any]:
    values = figures_F.tolist()
    split = len(SECONDS) + len(BYTES)
    times, sent, rows = values[: len(SECONDS)], values[len(SECONDS) : split], values[split:]
    return {
        "rows": {str(layer): _short(n) for layer, n in zip(layers, rows, strict=True) if n != NOT_HERE},
        **{name: round(value, 6) for name, value in zip(SECONDS, times, strict=True)},
        **{name: _short(value) for name, value in zip(BYTES, sent, strict=True)},
    }


def _short(value: float) -> float | int:
    return int(value) if value == int(value) else round(value, 2)


def in_short(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of the busiest process over the mean, added up over layers, each of which waits for its busiest process; the share
    of the step's time in all-to-alls. What cannot be said is left out.
    """
    over = {entry["over"]: entry for entry in ranks if "over" in entry}
    timed = [over["mean"]] if over else ranks
    if over:
        most, mean = (sum(over[name]["rows"].values()) for name in ("max", "mean"))
    else:
        layers = dict.fromkeys(layer for entry in ranks for layer in entry["rows"])
        rows = [[entry["rows"][layer] for entry in ranks if layer in entry["rows"]] for layer in layers]
        most, mean = sum(max(row) for row in rows), sum(sum(row) / len(row) for row in rows)
    step_s, travel_s = (sum(entry[name] for entry in timed) for name in ("step_s", "all_to_all_s"))
    words = [f"rows x{most / mean:.1f}"] if mean > 0 else []
    return words + ([f"all-to-all {travel_s / step_s:.0%}"] if travel_s > 0 and step_s > 0 else [])
