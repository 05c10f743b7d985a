"""What a run writes down: metrics.jsonl (the record of truth), TensorBoard beside it, and a progress line.

>>> log = MetricsLog(folder, resume_step=None)      # resume_step=200: lines after step 200 are forgotten
>>> log.write({"kind": "step", "step": 1, "loss": 2.3, ...})
>>> progress = Progress(total_steps=500)
>>> progress.update({"step": 1, "loss": 2.3, ...})
>>> records = read_metrics(folder / "metrics.jsonl")

Every line of metrics.jsonl is one JSON object with a "kind": run, step, val, sample or end. It is flushed at once, so a
killed run keeps all but perhaps its last line, which the readers here forgive. NaN and infinity are written as null.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from moesaic.errors import DataError, disk_errors
from moesaic.train.board import Board
from moesaic.train.ranks import in_short

FILE_NAME = "metrics.jsonl"
Record = Mapping[str, Any]


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl (or of the run folder that holds one).

    A last line cut short by a kill is left out. Raises ``DataError`` naming file and line for any other broken line,
    and when there is no such file.
    """
    return [record for record, _ in _read_lines(_metrics_file(path))]


def _metrics_file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def _read_lines(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """Each record with the bytes it was read from (newline included)."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        raise DataError(f"There is no {path}; give the folder of a training run.") from None
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # JSON and UTF-8 errors both
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise DataError(f"{path}:{number}: not a line of JSON; restore the file or delete that line.") from None
        if not isinstance(record, dict) or "kind" not in record:
            raise DataError(f'{path}:{number}: not a metrics record; each line is an object with a "kind".')
        records.append((record, line if line.endswith(b"\n") else line + b"\n"))
    return records


class NoLog:
    """The log of a process whose figures another one writes down."""

    def __init__(self, config: dict[str, Any] | None, sampled_at: int | None) -> None:
        self.config, self.sampled_at = config, sampled_at

    def write(self, record: Record) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class MetricsLog:
    """Appends records to ``folder``/metrics.jsonl, and to TensorBoard under ``folder``/tb where it is installed.

    folder: the run folder; made if missing.
    resume_step: None starts the file anew. A step continues it: records of later steps, "end" records and a line cut
        short are dropped first, in one atomic replacement, so a resumed run leaves the file an unbroken one would have.
        "run" records stay; the caller writes another only if its config is not ``config``, that of the last one.
        ``sampled_at`` is the step of the last "sample" record; both are None in a new file.
    tensorboard: write event files too. Without the package one line says so through ``say`` and nothing else changes.
    histogram_every: steps between load histograms in TensorBoard; scalars go there every step.

    Raises ``MoesaicError`` if the folder cannot be written, ``DataError`` if the file to resume is broken.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        resume_step: int | None = None,
        *,
        tensorboard: bool = True,
        histogram_every: int = 50,
        say: Callable[[str], None] = print,
    ) -> None:
        self.path = Path(folder) / FILE_NAME
        self.config: dict[str, Any] | None = None
        self.sampled_at: int | None = None
        self._layers: Sequence[int] = ()
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is not None and self.path.exists():
                self._forget_after(resume_step)
            mode = "w" if resume_step is None else "a"
            self._file: IO[str] = open(self.path, mode, encoding="utf-8", newline="\n")  # noqa: SIM115, closed in close()
        self._board = None
        if tensorboard:
            self._board = Board.open(self.path.parent / "tb", resume_step, histogram_every, say)

    def _forget_after(self, resume_step: int) -> None:
        """Rewrite the file with what an unbroken run would hold at ``resume_step``."""
        kept = []
        for record, line in _read_lines(self.path):
            if record["kind"] == "end" or record.get("step", 0) > resume_step:
                continue
            if record["kind"] == "run":
                self._layers, self.config = record.get("layers", ()), record.get("config")
            if record["kind"] == "sample":
                self.sampled_at = record.get("step")
            kept.append(line)
        scratch = self.path.with_name(f"{FILE_NAME}.incomplete-{os.getpid()}")
        try:
            with open(scratch, "wb") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, self.path)
        finally:
            scratch.unlink(missing_ok=True)

    def write(self, record: Record) -> None:
        """Append one record and flush it. Non-finite floats become null. Raises ``MoesaicError`` on a full disk."""
        if record["kind"] == "run":
            self._layers = record.get("layers", ())
        line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        with disk_errors(self.path):
            self._file.write(line + "\n")
            self._file.flush()
            if self._board is not None:
                self._board.write(record, self._layers)

    def close(self) -> None:
        """Close the file and the TensorBoard writer. Safe to call twice."""
        with disk_errors(self.path):
            self._file.close()
            if self._board is not None:
                self._board.close()
                self._board = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def finite(value: Any) -> Any:
    """A copy of plain JSON data in which every NaN or infinite float is None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


class Progress:
    """One live line on a terminal; elsewhere a plain line every ``every_s`` seconds, and always the first and the last.

    total_steps: the step the run ends at.  first_step: the step a resumed run starts after; time left counts from it.
    clock and stream are for tests: seconds, and where to write (standard error by default, so ``--json`` stays clean).
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        *,
        label: str = "",
        every_s: float = 10.0,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._first, self._label, self._every, self._clock = total_steps, first_step, label, every_s, clock
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._start = clock()
        self._last_line = -math.inf

    def update(self, record: Record) -> None:
        """Show a "step" record (the format of metrics.jsonl; missing numbers are left out)."""
        now = self._clock()
        line = self.line(record, now)
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False)
                self._live.start()
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif now - self._last_line >= self._every or record["step"] >= self._total:
            self._console.print(Text(line))
            self._last_line = now

    def line(self, record: Record, now: float) -> str:
        """The words for a step record at clock time ``now``."""
        step = record["step"]
        parts = [f"{self._label + ' ' if self._label else ''}step {step}/{self._total}"]
        if (loss := record.get("loss")) is not None:
            parts.append(f"loss {loss:.4f}")
        if (rate := record.get("tokens_per_s")) is not None:
            parts.append(f"{rate:,.0f} tokens/s")
        done = step - self._first
        if done > 0 and step < self._total:
            parts.append(f"{duration((now - self._start) / done * (self._total - step))} left")
        if violations := _numbers(record.get("max_vio")):
            parts.append(f"MaxVio {max(violations):.2f}")
        if (dead := _numbers(record.get("dead"))) and sum(dead):
            parts.append(f"{sum(dead):.0f} dead")
        if (drops := _numbers(record.get("drop_rate"))) and max(drops) > 0:
            parts.append(f"{max(drops):.1%} dropped")
        if ranks := record.get("ranks"):
            parts += in_short(ranks)
        return "  ".join(parts)

    def say(self, sentence: str) -> None:
        """Print a line above the live one."""
        self._console.print(Text(sentence))

    def close(self) -> None:
        """Leave the last line standing and give the terminal back. Safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _numbers(values: Sequence[float | None] | None) -> list[float]:
    return [v for v in values or () if v is not None]


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42s, 3m05s, 2h07m, 3d04h."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"
