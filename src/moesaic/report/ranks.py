"""What the processes of a run did, read from the "ranks" of its log's steps (``train/ranks.py`` says what is in them).

Legend: R processes, or least, mean and most of more processes than are logged one by one; L sparse layers; F figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

_FIGURES = ("step_s", "all_to_all_s", "collective_s", "all_to_all_bytes", "collective_bytes")
_OVER = ["min", "mean", "max"]


@dataclass(frozen=True)
class Moves:
    """Experts that moved: steps after which some did, slots, and the busiest processes' rows by the load they were moved by."""

    steps: int = 0
    slots: int = 0
    rows_before: float = 0.0
    rows: float = 0.0

    def __add__(self, other: Moves) -> Moves:
        return Moves(
            self.steps + other.steps,
            self.slots + other.slots,
            self.rows_before + other.rows_before,
            self.rows + other.rows,
        )


@dataclass(frozen=True)
class RankSums:
    """Consecutive steps, summed.

    Attributes:
        over: whether R are least, mean and most.
        num_steps: how many; ``row_steps`` of them are in ``rows_RL``: the last ones of one layout.
        rows_RL: rows that experts computed; NaN where a process has not the layer.
        mean_L, most_L: of each step's mean and busiest process.
        mean_F, most_F: of ``_FIGURES``; of time only steps that have all of it.
        shadows: experts that had one in the next step, all layers together.
    """

    over: bool
    num_steps: int
    row_steps: int
    rows_RL: np.ndarray
    mean_L: np.ndarray
    most_L: np.ndarray
    mean_F: np.ndarray
    most_F: np.ndarray
    moves: Moves = Moves()
    shadows: int = 0

    def merged(self, later: RankSums) -> RankSums:
        """Both, in this order. Rows of another layout are forgotten."""
        same = self.over == later.over and self.rows_RL.shape == later.rows_RL.shape
        same = same and bool((np.isnan(self.rows_RL) == np.isnan(later.rows_RL)).all())
        return replace(
            later,
            num_steps=self.num_steps + later.num_steps,
            row_steps=later.row_steps + (self.row_steps if same else 0),
            rows_RL=later.rows_RL + (self.rows_RL if same else 0.0),
            mean_L=self.mean_L + later.mean_L,
            most_L=self.most_L + later.most_L,
            mean_F=self.mean_F + later.mean_F,
            most_F=self.most_F + later.most_F,
            moves=self.moves + later.moves,
            shadows=self.shadows + later.shadows,
        )

    @property
    def imbalance_L(self) -> np.ndarray:
        """Rows of each step's busiest process over the mean; NaN for a layer whose rows nobody logged."""
        return np.where(self.mean_L > 0, self.most_L / np.where(self.mean_L > 0, self.mean_L, 1.0), np.nan)

    @property
    def imbalance(self) -> float:
        """The same of all layers, each of which waits for its busiest process; NaN without rows."""
        return float(self.most_L.sum() / self.mean_L.sum()) if self.mean_L.sum() > 0 else np.nan

    @property
    def time_shares(self) -> tuple[float, float]:
        """Of a step's time: all-to-alls, other collectives; means over processes, NaN where no time was logged."""
        step_s, travel_s, other_s, *_ = self.mean_F.tolist()
        return (travel_s / step_s, other_s / step_s) if step_s > 0 else (np.nan, np.nan)

    @property
    def all_to_all_bytes(self) -> tuple[float, float]:
        """Per step: of the mean process, and of the one that sent most."""
        place = _FIGURES.index("all_to_all_bytes")
        return float(self.mean_F[place]) / self.num_steps, float(self.most_F[place]) / self.num_steps


def read_ranks(record: Mapping[str, Any], layers: Sequence[int]) -> RankSums | None:
    """Of one step's record; None where it has no "ranks". Raises what comes of data of another form."""
    entries = record.get("ranks")
    if not entries:
        return None
    keys = [str(layer) for layer in layers]
    unknown = {layer for entry in entries for layer in entry["rows"]}.difference(keys)
    if unknown:
        raise ValueError(f"ranks have rows of layer {min(unknown)}, which the run has not")
    over = "over" in entries[0]
    if over and [entry["over"] for entry in entries] != _OVER:
        raise ValueError(f"ranks are over {[entry['over'] for entry in entries]}, not {_OVER}")
    rows_RL = _numbers([[entry["rows"].get(key) for key in keys] for entry in entries])
    value_RF = _numbers([[entry.get(name) for name in _FIGURES] for entry in entries])
    mean_L, most_L = _mean_and_most(rows_RL, over)
    mean_F, most_F = _mean_and_most(value_RF, over)
    if np.isnan(value_RF[:, :3]).any():
        mean_F[:3] = most_F[:3] = 0.0
    moved = record.get("rebalanced") or []
    moves = Moves(
        int(bool(moved)),
        sum(int(entry["moved"]) for entry in moved),
        sum(float(entry["rows_before"]) for entry in moved),
        sum(float(entry["rows"]) for entry in moved),
    )
    shadows = sum(len(experts) for experts in (record.get("shadows") or {}).values())
    return RankSums(over, 1, 1, rows_RL, mean_L, most_L, mean_F, most_F, moves, shadows)


def merge(earlier: RankSums | None, later: RankSums | None) -> RankSums | None:
    """Both, where there are two."""
    return later if earlier is None else earlier if later is None else earlier.merged(later)


def _numbers(rows: list[list[Any]]) -> np.ndarray:
    value_RX = np.array(rows, dtype=float).reshape(len(rows), -1)  # None is NaN
    return np.where(np.isfinite(value_RX), value_RX, np.nan)


def _mean_and_most(value_RX: np.ndarray, over: bool) -> tuple[np.ndarray, np.ndarray]:
    """Over the processes; 0 where none has any."""
    known_RX = np.nan_to_num(value_RX)
    if over:
        return known_RX[1].copy(), known_RX[2].copy()
    count_X = (~np.isnan(value_RX)).sum(axis=0)
    return known_RX.sum(axis=0) / np.maximum(count_X, 1), known_RX.max(axis=0)
