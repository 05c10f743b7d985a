"""What torchrun tells a process, and what a process tells torchrun: environment variables and one file.

Traps of torch 2.13 that this project steps around, each seen in ``tests/parallel``:

| trap | what is done |
|---|---|
| the store outlives a restart, and new processes read the addresses of dead ones | ``rollcall.py``: keys below a new number |
| each node counts restarts for itself, so the count is no such number | the same |
| after a node came back, agents may name two stores | on several nodes, set ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` |
| the machine's name resolves to a loopback address | ``interface_to``: gloo gets the interface towards the first node |
| it does not resolve: torchrun itself waits for ever | start torchrun with ``--local-addr``, as ``runs/`` do on one machine |
| the first node does not know that it is (the endpoint is not what its name resolves to) | ``--rdzv-conf=is_host=1`` there |
| ``OMP_NUM_THREADS=1``, whatever the machine | ``threads``: cores divided by processes, unless the user has set it |
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moesaic.errors import ConfigError

_PARENT_ENVIRON = "/proc/{}/environ"  # Linux: what a process was started with
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """A process's place in a run of several.

    Attributes:
        host, port: of the store. hosted: whether torchrun itself keeps the store; if not, rank 0 does.
        restarts: how often torchrun has restarted the processes of this node.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    host: str
    port: int
    hosted: bool
    restarts: int

    @property
    def one_node(self) -> bool:
        """Whether all processes are on this machine."""
        return self.local_world == self.world


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """What torchrun says; None where this process was started alone. Raises ``ConfigError`` where it contradicts itself."""
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return None
    absent = [name for name in _NEEDED if not environ.get(name)]
    if absent:
        raise ConfigError(
            f"This process is one of several, but the environment lacks {', '.join(absent)}; start it with torchrun, which "
            "sets them, or unset RANK and WORLD_SIZE to run alone."
        )
    numbers = {name: _number(environ, name) for name in _NEEDED if name != "MASTER_ADDR"}
    for rank, world in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if numbers[rank] >= numbers[world]:
            raise ConfigError(f"{rank}={numbers[rank]} must be below {world}={numbers[world]}.")
    if numbers["LOCAL_WORLD_SIZE"] > numbers["WORLD_SIZE"]:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE={numbers['LOCAL_WORLD_SIZE']} must be at most WORLD_SIZE={numbers['WORLD_SIZE']}."
        )
    return Launch(
        rank=numbers["RANK"],
        world=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        local_world=numbers["LOCAL_WORLD_SIZE"],
        host=environ["MASTER_ADDR"],
        port=numbers["MASTER_PORT"],
        hosted=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restarts=int(environ.get("TORCHELASTIC_RESTART_COUNT") or 0),
    )


def tell_torchrun(sentence: str, environ: Mapping[str, str] = os.environ) -> None:
    """Leave the reason of this process's end where torchrun looks for it, so that its summary shows it."""
    path = environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not os.path.exists(path):  # the first reason is the one
        message = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time())), "py_callstack": sentence}}
        try:
            Path(path).write_text(json.dumps({"message": message}))
        except OSError:
            return  # it is printed as well


def threads(local_world: int, environ: Mapping[str, str] = os.environ) -> int | None:
    """Threads for this process, so that those of a node share its cores; None where the user has decided."""
    if environ.get("OMP_NUM_THREADS") and not _set_by_torchrun(environ):
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // local_world, 1)


def interface_to(host: str, one_node: bool) -> str | None:
    """The network interface for gloo: the loopback within a node, else the one that leads to ``host``; None if unknown.

    By itself gloo takes what this machine's own name resolves to: often 127.0.1.1, which other nodes cannot reach.
    """
    if one_node:
        return "lo0" if sys.platform == "darwin" else "lo"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: the kernel picks the way
            own = probe.getsockname()[0]
    except OSError:
        return None
    return next((name for _, name in socket.if_nameindex() if _address(name) == own), None)


def loopback(host: str) -> bool:
    """Whether a name leads back to the machine that asks."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address).split("%")[0]).is_loopback for address in addresses)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not text.isdecimal():
        raise ConfigError(f"{name} must be a whole number, not {text!r}; torchrun sets it.")
    return int(text)


def _set_by_torchrun(environ: Mapping[str, str]) -> bool:
    """Whether OMP_NUM_THREADS is torchrun's own 1: then torchrun was started without it."""
    if environ["OMP_NUM_THREADS"] != "1" or "TORCHELASTIC_RUN_ID" not in environ:
        return False
    try:
        started_with = Path(_PARENT_ENVIRON.format(os.getppid())).read_bytes().split(b"\0")
    except OSError:
        return False
    return not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in started_with)


def _address(interface: str) -> str | None:
    """The IPv4 address of an interface, where the system tells (Linux)."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])
