"""Run a comparison: every router with every seed, one process each, resumable; a run that fails costs nobody else.

>>> outcome = run_comparison(settings, "runs/compare", say=print)

    out/compare.json            what is compared; a resumed comparison must ask for the same
    out/tokenizer.json          one tokenizer for all
    out/ROUTER/seed-N/          trial.json, run/ (a run folder), result.json or error.txt, log.txt
    out/results.json, out/report.html
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from moesaic.checkpoint.atomic import atomic_file
from moesaic.compare.trial import DONE, FAILED, STOPPED
from moesaic.compare.variants import Variant, variant_model
from moesaic.config import apply_overrides, from_dict, to_dict
from moesaic.data.corpus import load_corpus
from moesaic.errors import ConfigError, MoesaicError, disk_errors
from moesaic.models.config import ModelConfig
from moesaic.settings import shape
from moesaic.train.config import TrainConfig
from moesaic.train.loop import fit_vocabulary
from moesaic.train.stop import StopRequest

Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """One router of a comparison: its name, what it is, and the model it trains."""

    name: str
    title: str
    model: ModelConfig


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Attributes:
        base: the run all entries share but for their model; ``base.seed`` is ignored.
        entries: the routers, the first being the one others are compared with.
        seeds: of initialisation, data order and noise; each router runs once with each.
        jobs: runs side by side. One is the default: speeds are then measured without company.
    """

    base: TrainConfig
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]
    jobs: int = 1


@dataclass
class Trial:
    """One router with one seed. ``state``: "waiting", "running", "done", "failed" or "stopped"."""

    entry: Entry
    seed: int
    folder: Path
    state: str = "waiting"
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None

    @property
    def name(self) -> str:
        """Shown in progress lines."""
        return f"{self.entry.name}, seed {self.seed}"

    def result(self) -> dict[str, Any] | None:
        """The figures of a finished trial."""
        path = self.folder / "result.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def error(self) -> str | None:
        """Why a trial failed, in words."""
        path = self.folder / "error.txt"
        return path.read_text("utf-8").strip() if path.exists() else None


def make_entries(
    base: TrainConfig, variants: dict[str, Variant], overrides: Mapping[str, Sequence[str]]
) -> tuple[tuple[Entry, ...], dict[str, str]]:
    """The routers that can be built, and for each that cannot the reason; ``overrides`` are entries given by settings.

    Raises ``ConfigError`` if an entry given by settings cannot be built: that one was written by hand.
    """
    T, B = base.batch_size * base.seq_len, base.batch_size
    entries, refused = [], dict[str, str]()
    for name, variant in variants.items():
        try:
            model = variant_model(base.model, variant, T, B)
            shape(model)
        except ConfigError as error:
            refused[name] = str(error)
            continue
        entries.append(Entry(name, variant.title, model))
    for name, changes in overrides.items():
        other = next((c for c in changes if not c.startswith("model.")), None)
        if other is not None:
            raise ConfigError(
                f"--variant {name} may change the model alone, and {other.split('=')[0]} is not of the model; all runs of a "
                "comparison share the rest. Use --set for it."
            )
        settings = apply_overrides(to_dict(base), changes)
        model = from_dict(TrainConfig, settings).model
        shape(model)
        entries.append(Entry(name, ", ".join(changes), model))
    return tuple(entries), refused


def prepare(settings: Settings, out: Path, *, resume: bool, say: Say) -> list[Trial]:
    """Write what every trial needs; returns them in the order they run: seed by seed, so that a stopped comparison is a fair
    one of fewer seeds. Raises ``ConfigError`` if ``out`` holds another comparison.
    """
    wanted = {
        "base": to_dict(settings.base),
        "entries": {e.name: to_dict(e.model) for e in settings.entries},
        "seeds": list(settings.seeds),
    }
    saved = out / "compare.json"
    if saved.exists() and not resume:
        raise ConfigError(f"{out} already holds a comparison; add --resume to go on with it, or choose another --out.")
    if out.exists() and not saved.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} holds other files; choose an empty folder or a new one for --out.")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    begun = _read(saved) if saved.exists() else None
    if begun is not None:
        _check_same(begun, wanted, out)
    base = settings.base
    corpus = load_corpus(base.data, settings.seeds[0], say)
    wanted["text"] = corpus.fingerprint
    if begun is not None and begun.get("text") != corpus.fingerprint:
        raise ConfigError(f"The text has changed since {out} was begun; restore it, or choose another --out.")
    tokenizer = out / "tokenizer.json"
    if not tokenizer.exists():
        atomic_file(tokenizer, corpus.tokenizer.to_str())
    atomic_file(saved, json.dumps(wanted, indent=1) + "\n")
    data = replace(base.data, tokenizer=str(tokenizer.resolve()))
    trials = []
    for seed in settings.seeds:
        for entry in settings.entries:
            run = fit_vocabulary(replace(base, model=entry.model, data=data, seed=seed), corpus)
            folder = out / entry.name / f"seed-{seed}"
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            atomic_file(folder / "trial.json", json.dumps(to_dict(run), indent=1) + "\n")
            trials.append(Trial(entry, seed, folder))
    return trials


def run_trials(trials: Sequence[Trial], jobs: int, *, say: Say, show: Callable[[Sequence[Trial], float], None]) -> bool:
    """Run what is not done yet, ``jobs`` at a time; returns whether all were given their chance (False: stopped).

    Failed trials of an earlier sitting are tried again. ``show(trials, seconds)`` is called about once a second.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    for trial in trials:
        (trial.folder / "error.txt").unlink(missing_ok=True)
        if trial.result() is not None:
            trial.state = "done"
    waiting = [trial for trial in trials if trial.state == "waiting"]
    running: list[Trial] = []
    started = shown = time.monotonic()
    with StopRequest(say, resume_with="the same command with --resume") as stop:
        try:
            while running or (waiting and not stop.requested):
                while waiting and len(running) < jobs and not stop.requested:
                    trial = waiting.pop(0)
                    _start(trial, threads)
                    running.append(trial)
                time.sleep(0.2)
                for trial in [t for t in running if t.process is not None and t.process.poll() is not None]:
                    running.remove(trial)
                    _finish(trial, say)
                if stop.requested:
                    for trial in running:
                        _interrupt(trial)
                if time.monotonic() - shown >= 1 or not (running or waiting):
                    shown = time.monotonic()
                    show(trials, shown - started)
        finally:
            for trial in running:
                assert trial.process is not None
                trial.process.kill()
                trial.process.wait()
                _close(trial)
    return not waiting and all(trial.state in ("done", "failed") for trial in trials)


def _start(trial: Trial, threads: int) -> None:
    environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} | os.environ  # the user's own win
    with disk_errors(trial.folder):
        trial.log = open(trial.folder / "log.txt", "wb")  # noqa: SIM115, closed in _finish
    trial.process = subprocess.Popen(
        [sys.executable, "-m", "moesaic.compare.trial", str(trial.folder)],
        stdin=subprocess.DEVNULL,
        stdout=trial.log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # a Ctrl-C reaches the trial once, from here
    )
    trial.state = "running"


def _interrupt(trial: Trial) -> None:
    if trial.state == "running" and trial.process is not None:
        trial.process.send_signal(signal.SIGTERM)
        trial.state = "stopping"


def _close(trial: Trial) -> None:
    if trial.log is not None:
        trial.log.close()


def _finish(trial: Trial, say: Say) -> None:
    assert trial.process is not None
    _close(trial)
    status = trial.process.returncode
    if status == DONE and trial.result() is not None:
        trial.state = "done"
        return
    if status == STOPPED or trial.state == "stopping":
        trial.state = "stopped"
        return
    trial.state = "failed"
    if status != FAILED or trial.error() is None:
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        tail = (trial.folder / "log.txt").read_text("utf-8", "replace").strip().splitlines()[-1:]
        atomic_file(trial.folder / "error.txt", f"The run {how}. {' '.join(tail)}".strip() + "\n")
    say(f"{trial.name} failed: {trial.error()} The others go on.")


def _read(path: Path) -> Any:
    """The JSON of ``path``. Raises ``MoesaicError`` if it is none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise MoesaicError(f"Cannot read {path} ({error}); restore it, or choose another --out.") from None


def _check_same(saved: Any, wanted: dict[str, Any], out: Path) -> None:
    if not isinstance(saved, dict) or saved.keys() - {"text"} != wanted.keys():
        raise MoesaicError(f"{out / 'compare.json'} was not written by moesaic compare; choose another --out.")
    # Read and written again, so that a setting added since then has its default on both sides.
    before = to_dict(from_dict(TrainConfig, saved["base"], where="compare.json"))
    models = {n: to_dict(from_dict(ModelConfig, m, where="compare.json")) for n, m in saved["entries"].items()}
    differs = "the base run" if before != wanted["base"] else ""
    for name, model in models.items():  # more routers and more seeds may join
        if name in wanted["entries"] and model != wanted["entries"][name]:
            differs = f'router "{name}"'
    if differs:
        raise ConfigError(
            f"{out} holds a comparison with other settings ({differs} differs); repeat its command with --resume, or choose "
            "another --out."
        )
