"""Run a function on N processes that start as torchrun's do, and see how each one ends: by itself, killed, with which words.

>>> ended = run_started(2, work, "an argument")      # work(here: Started, "an argument") -> plain JSON data or None
>>> ended[1].code, ended[1].said, ended[1].answer

Unlike ``tests/distributed.py``, which fails where a process does, this is about processes that fail.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.errors import MoesaicError
from moesaic.parallel.start import start_processes


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (minus the signal), all it printed, what it returned, after how many seconds."""

    code: int
    said: str
    answer: Any
    seconds: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_started(
    world: int,
    work: Callable[..., Any],
    *args: Any,
    timeout_s: float = 20.0,
    join_s: float = 30.0,
    patience: float = 60.0,
    mourning: float = 5.0,
    absent: tuple[int, ...] = (),
    environ: dict[str, str] | None = None,
) -> list[Ended]:
    """``work(here, *args)`` on every rank but those ``absent``.

    Those still running ``mourning`` seconds after the last failure, or ``patience`` seconds after the start, are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "moesaic.experts", "tests.parallel.processes"])
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    variables |= {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", **(environ or {})}
    with tempfile.TemporaryDirectory() as folder:
        children = {}
        for rank in range(world):
            if rank not in absent:
                mine = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                children[rank] = context.Process(target=_child, args=(folder, mine, (timeout_s, join_s), work, args))
                children[rank].start()
        started = time.monotonic()
        seconds: dict[int, float] = {}
        deadline = started + patience
        while len(seconds) < len(children) and time.monotonic() < deadline:
            time.sleep(0.02)
            for rank, child in children.items():
                if rank not in seconds and not child.is_alive():
                    seconds[rank] = time.monotonic() - started
                    if child.exitcode:
                        deadline = min(started + patience, time.monotonic() + mourning)
        ended = []
        for rank in range(world):
            if rank in absent:
                continue
            child = children[rank]
            if child.is_alive():
                child.kill()
            child.join()
            answer = Path(folder) / f"answer-{rank}"
            ended.append(
                Ended(
                    child.exitcode or 0,
                    (Path(folder) / f"said-{rank}").read_text(),
                    json.loads(answer.read_text()) if answer.exists() else None,
                    seconds.get(rank, patience),
                )
            )
        return ended


def _child(
    folder: str, environ: dict[str, str], limits: tuple[float, float], work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    rank = environ["RANK"]
    out = os.open(f"{folder}/said-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    os.environ.update(environ)
    if environ["OMP_NUM_THREADS"]:  # PyTorch was imported before, in the fork server
        torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 0
    try:
        with start_processes(limits[0], join_s=limits[1], device="cpu") as here:
            answer = work(here, *args)
            if answer is not None:
                Path(f"{folder}/answer-{rank}").write_text(json.dumps(answer))
    except MoesaicError as error:
        if not error.told:  # as the command line does
            print(f"moesaic: {error}", file=sys.stderr, flush=True)
        status = 2
    except Exception:  # noqa: BLE001 - whatever it was, the test sees it
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    sys.exit(status)
