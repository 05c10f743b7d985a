"""Progress of a comparison: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from moesaic.compare.runner import Trial
from moesaic.train.log import duration


class Watch:
    """``watch(trials, seconds)`` shows how far a comparison is; ``close`` gives the terminal back.

    Args:
        steps: steps of one trial. every_s: seconds between plain lines where there is no terminal.
    """

    def __init__(self, steps: int, console: Console, every_s: float = 15.0) -> None:
        self._steps, self._console, self._every = steps, console, every_s
        self._live: Live | None = None
        self._last_line = -math.inf
        self._first_share: float | None = None  # done before this sitting
        self._said: set[str] = set()

    def __call__(self, trials: Sequence[Trial], seconds: float) -> None:
        line = self.line(trials, seconds)
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False)
                self._live.start()
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
            return
        ended = {t.name for t in trials if t.state in ("done", "failed")}
        if seconds - self._last_line >= self._every or ended - self._said:
            self._console.print(Text(line), soft_wrap=True)
            self._last_line, self._said = seconds, ended

    def line(self, trials: Sequence[Trial], seconds: float) -> str:
        """The words for this moment."""
        ended = sum(t.state in ("done", "failed") for t in trials)
        parts = [f"{ended}/{len(trials)} runs"]
        work = float(ended)
        for trial in trials:
            if trial.state in ("running", "stopping"):
                step, loss = _last_step(trial.folder / "run" / "metrics.jsonl")
                work += min(step / self._steps, 1.0)
                shown = "" if loss is None else f", loss {loss:.3f}"
                parts.append(f"{trial.name}: step {step}/{self._steps}{shown}")
        if self._first_share is None:
            self._first_share = work
        made = work - self._first_share
        if made > 0.05 and ended < len(trials):
            parts.append(f"{duration(seconds / made * (len(trials) - work))} left")
        failed = sum(t.state == "failed" for t in trials)
        if failed:
            parts.append(f"{failed} failed")
        return "  ".join(parts)

    def close(self) -> None:
        """Leave the last line standing. Safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _last_step(path: Path) -> tuple[int, float | None]:
    """Step and loss of the last whole "step" record, read from the end of the file; 0 if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            size = file.tell()
            file.seek(max(0, size - 200_000))
            lines = file.read().splitlines()
    except OSError:
        return 0, None
    for line in reversed(lines):
        if b'"step"' not in line[:40]:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("kind") == "step":
            return int(record["step"]), record.get("lm_loss")
    return 0, None
