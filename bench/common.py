"""What the speed benchmarks share: shapes, interleaved rounds, medians and ratios, progress, the JSON of the last line.

Contenders are timed in turns. In each of R rounds every one runs once, in an order that rotates, so that a slow minute of the
machine falls on all of them; a ratio is taken within a round and the median of those is reported. A fast contender is repeated
inside its turn until about 50 ms have passed, a slow one (over ``limit_s`` for all rounds) takes part in fewer rounds.

Legend: D model width, H expert width, E experts, k experts per token.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moesaic.cost.machine import cpu, read_text, version_of
from moesaic.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class BenchError(Exception):
    """A benchmark that cannot run, or must not be believed, in one sentence."""


@dataclass(frozen=True)
class Shape:
    """A sparse layer: D, H, E, k."""

    D: int
    H: int
    E: int
    k: int

    @property
    def label(self) -> str:
        """``1024,512,64,8``, as the command line reads it."""
        return f"{self.D},{self.H},{self.E},{self.k}"

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts (gate, up and out), router aside."""
        return 3 * self.D * self.H * self.E

    @property
    def active_parameters(self) -> int:
        """Parameters of the k experts of one token, which are those of the dense twin."""
        return 3 * self.D * self.H * self.k

    def flops(self, tokens: int, *, backward: bool) -> int:
        """Floating-point operations of the expert products (the router's left out): 2 per parameter, 6 with backward."""
        return (6 if backward else 2) * self.active_parameters * tokens


def shape(text: str) -> Shape:
    """``D,H,E,k`` as a shape; for argparse."""
    try:
        D, H, E, k = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write four whole numbers D,H,E,k") from None
    if min(D, H, E, k) < 1 or k > E:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; D, H, E, k must be positive and k at most E")
    return Shape(D, H, E, k)


def positive(text: str) -> int:
    """A whole number above 0; for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


# ---- time ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """Seconds of a call on a device; on CUDA between two events, so that the launch queue is not timed instead."""

    device: torch.device

    def seconds(self, run: Callable[[], object]) -> float:
        """Wall-clock seconds of one call, until the device has finished it."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        run()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3


class Contender(Protocol):
    """One of those who are compared. Only ``run`` is timed; ``prepare`` comes before each, ``rest`` ends a turn."""

    def prepare(self) -> None:
        """Get ready: clear gradients, take the next input."""

    def run(self) -> object:
        """What is timed."""

    def rest(self) -> None:
        """Let go of what the last call left in memory."""


Seconds = list[float | None]  # one per round, None where a slow contender sat out


def interleave(
    contenders: Mapping[str, Contender],
    rounds: int,
    clock: Clock,
    *,
    block_s: float = 0.05,
    limit_s: float = 60.0,
    warm_calls: int = 2,
    say: Callable[[str], None] = lambda name: None,
) -> dict[str, Seconds]:
    """Seconds per call of each contender in each round.

    Args:
        block_s: a turn repeats its call until about this much time has passed (at most 2000 times).
        limit_s: a contender whose rounds would take longer gets fewer of them, at least one.
        warm_calls: calls before the first round, fewer where they would take more than a second.
    """
    calls, turns = {}, {}
    for name, contender in contenders.items():
        say(f"warming up {name}")
        typical = _warm_up(contender, clock, warm_calls)
        calls[name] = max(1, min(2000, round(block_s / max(typical, 1e-7))))
        turns[name] = max(1, min(rounds, int(limit_s / max(typical, 1e-7))))
    seconds: dict[str, Seconds] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            if turn >= turns[name]:
                seconds[name].append(None)
                continue
            say(f"round {turn + 1} of {rounds}: {name}")
            contender, total = contenders[name], 0.0
            for _ in range(calls[name]):
                contender.prepare()
                total += clock.seconds(contender.run)
            contender.rest()
            seconds[name].append(total / calls[name])
    return seconds


def _warm_up(contender: Contender, clock: Clock, calls: int) -> float:
    """Seconds of a typical call after the first ones, which pay for loading, compiling and page faults."""
    spent: list[float] = []
    while len(spent) < calls and sum(spent) < 1.0:
        contender.prepare()
        spent.append(clock.seconds(contender.run))
    contender.rest()
    return statistics.median(spent[len(spent) // 2 :])


# ---- numbers -------------------------------------------------------------------------------------------------------


def known(values: Sequence[float | None]) -> list[float]:
    """The values that are there."""
    return [value for value in values if value is not None]


def spread(values: Sequence[float | None]) -> dict[str, float]:
    """Median, smallest and largest of the rounds, and how many there were."""
    there = known(values)
    return {"median": statistics.median(there), "min": min(there), "max": max(there), "rounds": len(there)}


def ratio(over: Sequence[float | None], under: Sequence[float | None]) -> dict[str, float]:
    """``over / under`` within each round that both took part in: median, smallest, largest."""
    return spread([a / b for a, b in zip(over, under, strict=True) if a is not None and b is not None])


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


# ---- words ---------------------------------------------------------------------------------------------------------


@contextmanager
def progress(total: int, what: str) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A progress line on standard error: ``say(what happens now)`` and ``advance()``. Off the terminal, one line per step."""
    console = Console(stderr=True)
    if not console.is_terminal:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            print(f"{what} {done}/{total}", file=sys.stderr, flush=True)

        yield lambda text: None, advance
        return
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, now="")
        yield lambda text: bar.update(task, now=text), lambda: bar.advance(task)


def milliseconds(seconds: float | None) -> str:
    """Three or four significant digits; a dash for what was not measured."""
    if seconds is None:
        return "-"
    ms = seconds * 1e3
    return f"{ms:.4f}" if ms < 1 else f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache: a GPU's L2, on Linux what the kernel says of the first processor, else 32 MiB."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [read_text(f"/sys/devices/system/cpu/cpu0/cache/index{i}/size").strip() for i in range(5)]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = [int(size[:-1]) * units[size[-1]] for size in sizes if size[:-1].isdigit() and size[-1] in units]
    return max(found, default=32 * 2**20)


def about(device: torch.device) -> dict[str, Any]:
    """Machine and versions, for the JSON."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu().model
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "last_level_cache": last_level_cache(device),
    }


# ---- the command line ----------------------------------------------------------------------------------------------


def common_arguments(parser: argparse.ArgumentParser, rounds: int = 5) -> None:
    """Options that all of these benchmarks have."""
    parser.add_argument("--rounds", type=positive, default=rounds, help="interleaved rounds; medians are of these")
    parser.add_argument("--threads", type=positive, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here as well")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, to see that it runs; its figures mean nothing"
    )


def prepare_device(args: argparse.Namespace) -> torch.device:
    """Set the threads and give the device. Raises ``BenchError`` where it is missing or a file cannot be written."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda was asked for, but this PyTorch sees no CUDA device.")
    for path in (args.out, getattr(args, "plot", None)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise BenchError(f"{path} cannot be written: it is a folder, or its folder does not exist.")
    return torch.device(args.device)


def finish(result: dict[str, Any], out: Path | None) -> None:
    """Print the JSON as the last line of standard output, and write it to ``--out``."""
    line = json.dumps(result, allow_nan=False)
    if out is not None:
        out.write_text(line + "\n", encoding="utf-8")
    print(line, flush=True)


def run_main(main: Callable[[], None]) -> None:
    """``main()``, with what the user can mend as one sentence on standard error: exit status 2, 130 after Ctrl-C."""
    try:
        main()
    except (BenchError, ConfigError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
