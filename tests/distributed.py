"""Run a function on N gloo processes of this machine and get each one's answer.

>>> answers = run_distributed(2, work, "an argument")      # work(rank, "an argument") -> dict of tensors

``work`` must be a function of a module (it is pickled by name). Each process runs one thread in the default group. Children
come from a fork server that has imported torch but never computed anything: forking the test process itself would copy its
thread pools and autograd locks in an unknown state, and spawning would import torch N times. Answers come back as files:
tensors sent through a multiprocessing queue are shared memory that dies with the sender.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Work = Callable[..., dict[str, Tensor]]


def run_distributed(world: int, work: Work, *args: Any, timeout: float = 90.0) -> list[dict[str, Tensor]]:
    """``work(rank, *args)`` on ``world`` processes; their answers by rank.

    Raises ``RuntimeError`` with the traceback of every rank that failed, or naming those that did not end within ``timeout``
    seconds. A rank that fails leaves its peers waiting, so they are stopped as soon as one has failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "moesaic.experts"])
    with tempfile.TemporaryDirectory() as folder:
        children = [context.Process(target=_child, args=(rank, world, folder, work, args)) for rank in range(world)]
        for child in children:
            child.start()
        deadline = time.monotonic() + timeout
        while any(child.is_alive() for child in children) and time.monotonic() < deadline:
            if any(child.exitcode not in (None, 0) for child in children):
                time.sleep(0.5)  # a peer may be about to say why, too
                break
            time.sleep(0.02)
        late = [rank for rank, child in enumerate(children) if child.is_alive()]
        for rank in late:
            children[rank].kill()
        for child in children:
            child.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        failed = [rank for rank, child in enumerate(children) if child.exitcode != 0]
        if failed:
            said = "\n".join(errors) or f"exit codes {[child.exitcode for child in children]}, no traceback"
            raise RuntimeError(f"of {world} ranks, {failed} failed ({late} were stopped):\n{said}")
        return [torch.load(Path(folder) / f"answer-{rank}", weights_only=True) for rank in range(world)]


def _child(rank: int, world: int, folder: str, work: Work, args: tuple[Any, ...]) -> None:
    # A host name that does not resolve, or resolves to a network interface, would hang gloo; the loopback always works.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        answer = work(rank, *args)
        torch.save(answer, f"{folder}/answer-{rank}")
        dist.barrier()
        dist.destroy_process_group()
    finally:
        if sys.exception() is not None:
            Path(f"{folder}/error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
            os._exit(1)  # without waiting for peers that wait for us
