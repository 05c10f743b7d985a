"""A process joins the others of its run, or finds itself alone; at the end it leaves them in order.

>>> with start_processes(timeout_s=600) as here:                  # started by torchrun, or not
...     world = World(Layout.of(config, here.world), here.rank, here.watch)

Alone, ``torch.distributed`` is not touched. Whatever is wrong is said in words: a variable that is missing, a port that is
taken, ranks that never come.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from moesaic.errors import ConfigError, MoesaicError
from moesaic.parallel.board import Board
from moesaic.parallel.limit import Limit
from moesaic.parallel.rollcall import roll_call
from moesaic.parallel.torchrun import Launch, interface_to, loopback, read_launch, tell_torchrun, threads
from moesaic.parallel.watch import CollectiveError, Watch, about_connection

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

Device = Literal["auto", "cpu", "cuda"]


@dataclass
class Started:
    """A process among the others. A context: leaving it leaves the run, and an error on the way out is told to the others.

    Attributes:
        rank, world: of all processes. local_rank, local_world: of those of this node. device: this process's own.
        watch: for all collectives. store: the run's, empty when it begins; None alone.
        restarts: as torchrun counts them on this node.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    watch: Watch = field(default_factory=Watch)
    store: Store | None = None
    restarts: int = 0
    _limit: Limit | None = None

    def __enter__(self) -> Started:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.store is None:
            return
        well = False
        try:
            if error is None:
                self._leave(self.store)
            elif about_connection(error):  # in a collective that is not ours
                failure = self.watch.failure(str(error))
                self._fail(failure)
                raise failure from error
            else:
                self._fail(error)
            well = error is None
        finally:
            if self._limit is not None:
                self._limit.stop() if well else self._limit.leave()
            # gloo's threads drop their last tensors when they get round to it. Where that falls into the interpreter's own end
            # it aborts the process, so groups, which sit in reference cycles, go before: they wait for their threads.
            atexit.register(gc.collect)

    def _leave(self, store: Store) -> None:
        with self.watch.collective("end of the run", "all", tuple(range(self.world)), 0):
            dist.barrier()
        if self.watch.board is not None:
            self.watch.board.end("the run is over")
        dist.destroy_process_group()
        # The process that keeps the store must be the last to go.
        with suppress(RuntimeError):
            store.set(f"left/{self.rank}", "")
            late = time.monotonic() + 10
            while (
                self.rank == 0 and not store.check([f"left/{r}" for r in range(self.world)]) and time.monotonic() < late
            ):
                time.sleep(0.02)

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, MoesaicError):
            # One that another process prints must not come first, or nobody would.
            if not error.told and not isinstance(error, CollectiveError):
                error.told = not self._first_to_say(str(error))
            if self.world > 1 and not str(error).startswith("Rank "):
                error.args = (f"Rank {self.rank}: {error}", *error.args[1:])
            sentence = str(error)
        else:
            sentence = f"Rank {self.rank}: {type(error).__name__}: {error}"
        if self.watch.failed_at is None:
            self.watch.failed_at, self.watch.failed = time.perf_counter(), sentence
        tell_torchrun(sentence)
        if self.watch.board is not None:
            self.watch.board.end(sentence)
        if self.device.type == "cpu":  # NCCL's would wait for what the device has queued
            with suppress(RuntimeError):
                dist.destroy_process_group()

    def _first_to_say(self, sentence: str) -> bool:
        """Whether no other process has raised this sentence: what is wrong for all is read once."""
        if self.store is None:
            return True
        bare = re.sub(r"^Rank \d+: ", "", sentence)
        with suppress(RuntimeError):  # a store that is gone
            return self.store.add(f"said/{hashlib.sha256(bare.encode()).hexdigest()}", 1) == 1
        return True


def start_processes(
    timeout_s: float,
    *,
    join_s: float | None = None,
    device: Device = "auto",
    environ: Mapping[str, str] = os.environ,
) -> Started:
    """Join the run that torchrun describes in the environment, or begin one alone.

    Args:
        timeout_s: what a collective may take.
        join_s: within which all ranks must come; None is ``timeout_s``, and two minutes at least.
        device: "auto" is one GPU per process where there are any, else the processor.

    Raises ``ConfigError`` where environment and machine do not fit, ``MoesaicError`` where the others cannot be reached or do
    not come; both in words.
    """
    launch = read_launch(environ)
    if launch is None:
        return Started(device=_device(device, 0, 1), watch=Watch(0, timeout_s))
    mine = _device(device, launch.local_rank, launch.local_world)
    if (number := threads(launch.local_world, environ)) is not None:
        torch.set_num_threads(number)
    if "GLOO_SOCKET_IFNAME" not in environ and (interface := interface_to(launch.host, launch.one_node)):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    join_s = max(timeout_s, 120.0) if join_s is None else join_s
    store = roll_call(_connect(launch, join_s), launch.rank, launch.world, join_s)
    queues = mine.type == "cuda"
    watch = Watch(launch.rank, timeout_s, _cuda_mark if queues else None)
    watch.board = Board(store, launch.rank, launch.world, watch.record)
    watch.board.start()  # before the groups: they need all ranks, so every later look finds every record
    _init(launch, store, mine, watch.library_timeout)
    parent = os.getppid() if "TORCHELASTIC_RUN_ID" in environ else None
    limit = Limit(watch, timeout_s if queues else timeout_s * 1.1 + 5, 4 * timeout_s, parent)
    limit.start()
    places = (launch.rank, launch.world, launch.local_rank, launch.local_world)
    return Started(*places, mine, watch, store, launch.restarts, limit)


def _device(wanted: Device, local_rank: int, local_world: int) -> torch.device:
    found = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted == "cuda" and not found:
        raise ConfigError('device="cuda" needs a GPU, and PyTorch sees none here; use device="cpu".')
    if not found:
        return torch.device("cpu")
    if found < local_world:
        raise ConfigError(
            f"{local_world} processes were started on this node, which has {found} GPU{'s' * (found > 1)}: each needs "
            f"its own. Start --nproc-per-node={found}, or hide the GPUs with CUDA_VISIBLE_DEVICES= to use the processor."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _connect(launch: Launch, timeout_s: float) -> Store:
    """The store that torchrun names; rank 0 opens it unless torchrun keeps it itself."""
    host, port = launch.host, launch.port
    try:
        return TCPStore(
            host,
            port,
            is_master=launch.rank == 0 and not launch.hosted,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise MoesaicError(
                f"Rank {launch.rank}: port {port} of this machine is taken by another program; choose another with torchrun's "
                "--master-port or --rdzv-endpoint."
            ) from error
        hint = ""
        if not launch.one_node and loopback(host):
            hint = (
                f" On this machine {host} is its own loopback address: give the first node's torchrun an address that the "
                "others can reach, with --local-addr or --master-addr."
            )
        raise MoesaicError(
            f"Rank {launch.rank}: no answer within {timeout_s:g} s from {host}:{port}, where the run's store should be; its "
            f"node did not start, has ended, or cannot be reached from here.{hint}"
        ) from error


def _init(launch: Launch, store: Store, device: torch.device, timeout: timedelta) -> None:
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("groups", store),
            rank=launch.rank,
            world_size=launch.world,
            timeout=timeout,
        )
    except RuntimeError as error:
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "one of gloo's own choice")
        why = "one of them has ended since"
        if not launch.one_node:
            why += ", or their nodes do not see each other on it: then set GLOO_SOCKET_IFNAME to one on which they do"
        raise MoesaicError(
            f"Rank {launch.rank}: all ranks came, but were not connected over the network interface {interface} "
            f"({str(error).splitlines()[0]}): {why}."
        ) from error


def _cuda_mark() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
