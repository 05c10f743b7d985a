"""Read a run folder's ``metrics.jsonl`` into one small value, however long the run was.

``read_run(folder)`` streams the file once. Scalars are kept for every step (a few bytes each); what has one number per
layer or per expert is summed into windows of consecutive steps, and whenever there are too many windows neighbours are
merged. Memory and page size therefore depend on the model's shape, not on the number of steps.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.errors import DataError, MoesaicError
from moesaic.report.ranks import RankSums, merge, read_ranks

MONITORS = ("max_vio", "entropy", "margin", "dead", "drop_rate")
CELL_BUDGET = 480_000  # load numbers kept for the page: windows x layers x experts
MAX_WINDOWS = 120
MIN_WINDOWS = 16
KEPT_SAMPLES = 4

Record = dict[str, Any]


@dataclass
class Window:
    """Consecutive logged steps, summed. ``load_X`` joins the layers' experts end to end; (M, L) holds the monitors."""

    tokens: float
    first_step: int
    last_step: int
    num_steps: int
    load_X: np.ndarray
    total_ML: np.ndarray
    count_ML: np.ndarray
    ranks: RankSums | None = None  # of a run of more than one process

    def merged(self, later: Window) -> Window:
        return Window(
            later.tokens,
            self.first_step,
            later.last_step,
            self.num_steps + later.num_steps,
            self.load_X + later.load_X,
            self.total_ML + later.total_ML,
            self.count_ML + later.count_ML,
            merge(self.ranks, later.ranks),
        )

    @property
    def mean_ML(self) -> np.ndarray:
        """Mean of each monitor per layer over the window; NaN where nothing was logged."""
        return np.where(self.count_ML > 0, self.total_ML / np.maximum(self.count_ML, 1), np.nan)


@dataclass
class Val:
    """One validation record. ``information_L``: bits between domain and expert per MoE layer."""

    step: int
    tokens: float
    time_s: float | None
    loss: float | None
    by_domain: dict[str, float | None]
    information_L: list[float | None]


@dataclass
class Run:
    """All the page needs to know of one run. Per-step arrays hold NaN where the log has null."""

    folder: Path
    name: str = ""
    config: Record = field(default_factory=dict)
    params_total: int | None = None
    params_active: int | None = None
    layers: list[int] = field(default_factory=list)
    num_experts: list[int] = field(default_factory=list)
    routers: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    processes: int = 1
    layout: str = ""  # of the processes, in words
    step: array[int] = field(default_factory=lambda: array("q"))
    tokens: array[float] = field(default_factory=lambda: array("d"))
    time_s: array[float] = field(default_factory=lambda: array("d"))
    loss: array[float] = field(default_factory=lambda: array("d"))
    tokens_per_s: array[float] = field(default_factory=lambda: array("d"))
    windows: list[Window] = field(default_factory=list)
    window_steps: int = 1  # logged steps in a full window
    clock_offset: float = 0.0  # seconds of earlier sittings, when a resumed run starts its clock anew
    resumed: bool = False
    vals: list[Val] = field(default_factory=list)
    domain_load: dict[str, list[np.ndarray]] = field(default_factory=dict)
    samples: list[Record] = field(default_factory=list)
    end_reason: str | None = None
    cut_line: bool = False

    @property
    def starts(self) -> list[int]:
        """Where each layer's experts begin in ``Window.load_X``; one more entry for the end."""
        return [0, *np.cumsum(self.num_experts, dtype=int).tolist()]

    @property
    def max_windows(self) -> int:
        fit = CELL_BUDGET // max(1, sum(self.num_experts))
        return max(MIN_WINDOWS, min(MAX_WINDOWS, fit - fit % 2))

    def final_load(self) -> np.ndarray:
        """Load summed over (at least) the last tenth of the steps, laid out as ``Window.load_X``."""
        return sum((window.load_X for window in self.last_tenth()), np.zeros(sum(self.num_experts), dtype=np.int64))

    def final_ranks(self) -> RankSums | None:
        """What the processes did in (at least) the last tenth of the steps; None where nobody logged it."""
        found = None
        for window in self.last_tenth():
            found = merge(found, window.ranks)
        return found

    def last_tenth(self) -> list[Window]:
        """The fewest last windows with at least a tenth of the steps, in order."""
        want, have, found = max(1, len(self.step) // 10), 0, []
        for window in reversed(self.windows):
            found.append(window)
            have += window.num_steps
            if have >= want:
                break
        return found[::-1]


def read_run(folder: Path) -> Run:
    """Read ``folder/metrics.jsonl``.

    Errors: DataError if the file is missing or holds no record; MoesaicError naming ``file:line`` for a line that is
    not a record of the known format. A broken last line (the run was killed while writing it) is ignored and noted.
    A resumed run may repeat steps: the later record of a step wins.
    """
    path = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}: give the folder of a run, the one that holds metrics.jsonl.")
    if not path.is_file():
        raise DataError(f"{folder} has no metrics.jsonl: give the folder of a run that `moesaic train` has written.")
    run = Run(folder, name=folder.name)
    seen = False
    for where, record in _records(path, run):
        try:
            _take(run, record)
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError) as error:
            raise MoesaicError(
                f"{where}: not a record this version of moesaic writes ({_reason(error)}); "
                "delete the line, or run the training again."
            ) from error
        seen = True
    if not seen:
        raise DataError(f"{path} holds no records yet: let the run write its first step, then ask again.")
    return run


def information(load_DE: np.ndarray) -> float | None:
    """Mutual information between domain and expert in bits, every domain weighted equally; None without tokens."""
    load_DE = load_DE[load_DE.sum(1) > 0].astype(float)
    if not len(load_DE):
        return None
    joint_DE = load_DE / load_DE.sum(1, keepdims=True) / len(load_DE)
    expected_DE = joint_DE.sum(1, keepdims=True) * joint_DE.sum(0, keepdims=True)
    here = joint_DE > 0
    return max(0.0, float((joint_DE[here] * np.log2(joint_DE[here] / expected_DE[here])).sum()))


def _records(path: Path, run: Run) -> Iterator[tuple[str, Record]]:
    broken: str | None = None
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if broken:
                    raise MoesaicError(
                        f"{broken}: the line is not JSON, and it is not the last line of the file; repair or delete it."
                    )
                where = f"{path}:{number}"
                try:
                    record = json.loads(line, parse_constant=lambda _: None)
                except (ValueError, RecursionError):
                    broken = where
                    continue
                yield where, record
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from error
    run.cut_line = broken is not None


def _reason(error: Exception) -> str:
    return f"missing {error}" if isinstance(error, KeyError) else str(error)


def _number(value: object) -> float:
    """A float; NaN for null. Anything else is not a number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, found {str(value)[:40]!r}")
    return float(value) if math.isfinite(value) else math.nan


def _take(run: Run, record: Record) -> None:
    if not isinstance(record, dict):
        raise TypeError("expected an object with a kind")
    kind = record["kind"]
    if kind == "run":
        _take_header(run, record)
    elif kind == "step":
        _take_step(run, record)
    elif kind == "val":
        _take_val(run, record)
    elif kind == "sample":
        run.samples = [*run.samples, record][-KEPT_SAMPLES:]
    elif kind == "end":
        run.end_reason = str(record.get("reason") or "unknown")


def _take_header(run: Run, record: Record) -> None:
    run.resumed = bool(run.step)
    run.end_reason = None  # a resumed run writes a new header after an earlier end
    run.name = str(record.get("name") or run.name)
    run.config = dict(record.get("config") or run.config)
    total, active = _number(record.get("params_total")), _number(record.get("params_active"))
    run.params_total = None if math.isnan(total) else int(total)
    run.params_active = None if math.isnan(active) else int(active)
    run.domains = [str(name) for name in record.get("domains") or []]
    run.processes, run.layout = int(record.get("processes") or 1), str(record.get("layout") or "")
    experts = [int(count) for count in record.get("num_experts") or []]
    if run.windows and run.num_experts and experts != run.num_experts:
        raise ValueError("the number of experts changed within one file")
    _set_layers(run, experts, record.get("layers") or list(range(len(experts))))
    run.routers = [str(name) for name in record.get("routers") or []]


def _set_layers(run: Run, experts: list[int], layers: Sequence[int]) -> None:
    if len(layers) != len(experts) or any(count < 1 for count in experts):
        raise ValueError(f"{len(layers)} layers but num_experts is {experts}")
    run.num_experts, run.layers = experts, [int(layer) for layer in layers]


def _take_step(run: Run, record: Record) -> None:
    step = int(record["step"])
    _forget_from(run, step)
    if not run.windows and not run.num_experts and record.get("load"):
        experts = [len(row or []) for row in record["load"]]
        _set_layers(run, experts, list(range(len(experts))))
    tokens, time_s = _number(record.get("tokens")), _number(record.get("time_s"))
    lm_loss = _number(record.get("lm_loss"))
    run.step.append(step)
    run.tokens.append(step if math.isnan(tokens) else tokens)
    last = run.time_s[-1] if run.time_s else 0.0
    if run.resumed and time_s + run.clock_offset < last:
        run.clock_offset = last
    run.resumed = False
    run.time_s.append(last if math.isnan(time_s) else time_s + run.clock_offset)
    run.loss.append(_number(record.get("loss")) if math.isnan(lm_loss) else lm_loss)
    run.tokens_per_s.append(_number(record.get("tokens_per_s")))
    _add_window(run, record)


def _forget_from(run: Run, step: int) -> None:
    """Drop what was logged at ``step`` or later: a resumed run goes through those steps again."""
    if not run.step or run.step[-1] < step:
        return
    while run.step and run.step[-1] >= step:
        for column in (run.step, run.tokens, run.time_s, run.loss, run.tokens_per_s):
            column.pop()
    # A window that straddles the restart keeps its sums: at most one window out of many counts some steps twice.
    run.windows = [window for window in run.windows if window.first_step < step]
    run.vals = [val for val in run.vals if val.step < step]


def _add_window(run: Run, record: Record) -> None:
    num_layers = len(run.num_experts)
    load_X = np.zeros(sum(run.num_experts), dtype=np.int64)
    rows = record.get("load") or [None] * num_layers
    if len(rows) != num_layers:
        raise ValueError(f"load has {len(rows)} layers, the run has {num_layers}")
    for layer, (row, start, count) in enumerate(zip(rows, run.starts[:-1], run.num_experts, strict=True)):
        if row is not None:
            if len(row) != count:
                raise ValueError(f"MoE layer {layer} has {len(row)} loads, the run has {count} experts there")
            load_X[start : start + count] = [0 if value is None else value for value in row]
    value_ML = np.full((len(MONITORS), num_layers), np.nan)
    for index, name in enumerate(MONITORS):
        values = record.get(name) or [None] * num_layers
        if len(values) != num_layers:
            raise ValueError(f"{name} has {len(values)} entries, the run has {num_layers} MoE layers")
        value_ML[index] = [_number(value) for value in values]
    known = ~np.isnan(value_ML)
    step, total_ML = run.step[-1], np.where(known, value_ML, 0.0)
    ranks = read_ranks(record, run.layers)
    window = Window(run.tokens[-1], step, step, 1, load_X, total_ML, known.astype(np.int64), ranks)
    if run.windows and run.windows[-1].num_steps < run.window_steps:
        run.windows[-1] = run.windows[-1].merged(window)
        return
    run.windows.append(window)
    if len(run.windows) > run.max_windows:
        pairs = [run.windows[i].merged(run.windows[i + 1]) for i in range(0, run.max_windows, 2)]
        run.windows = pairs + run.windows[run.max_windows :]
        run.window_steps *= 2


def _take_val(run: Run, record: Record) -> None:
    time_s, loss = _number(record.get("time_s")), _number(record.get("loss"))
    step = int(record["step"])
    tokens = _number(record.get("tokens"))
    by_domain = {
        str(name): None if math.isnan(_number(value)) else float(value)
        for name, value in (record.get("by_domain") or {}).items()
    }
    load: dict[str, list[np.ndarray]] = {}
    for name, rows in (record.get("domain_load") or {}).items():
        counts = [np.array([value or 0 for value in row or []], dtype=np.int64) for row in rows or []]
        if [len(row) for row in counts] == run.num_experts:
            load[str(name)] = counts
        elif counts and run.num_experts:
            raise ValueError(f"domain_load of {str(name)[:40]!r} does not have the run's layers and experts")
    bits = [information(np.stack([rows[i] for rows in load.values()])) for i in range(len(run.num_experts)) if load]
    run.domain_load = load or run.domain_load
    run.vals = [val for val in run.vals if val.step < step]
    run.vals.append(
        Val(
            step,
            step if math.isnan(tokens) else tokens,
            None if math.isnan(time_s) else time_s + run.clock_offset,
            None if math.isnan(loss) else loss,
            by_domain,
            bits,
        )
    )
