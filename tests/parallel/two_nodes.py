"""Two network namespaces of this machine as two nodes: a cable between them, an address and a name each, and nothing else.

>>> with TwoNodes() as nodes:                      # or skip, where why_not() gives a reason
...     launch(module, 1, log, before=nodes.inside(0), options=nodes.meeting(0))
...     nodes.cut(); nodes.restore()

A namespace lives as long as a process in it: each node has one that sleeps. Root makes them directly, others inside a user
namespace of their own, where the system allows it. The names do not resolve, as in many containers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29477


class TwoNodes:
    """A context: the namespaces are gone after it, with everything that still runs in them."""

    def __init__(self) -> None:
        self._sleepers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> TwoNodes:
        try:
            self._sleepers.append(_sleeper(["unshare", *([] if os.geteuid() == 0 else ["-Ur"]), "-n", "-u"]))
            first = [] if os.geteuid() == 0 else ["nsenter", *_user(), "-t", str(self._sleepers[0].pid), "--"]
            self._sleepers.append(_sleeper([*first, "unshare", "-n", "-u"]))
            self._ip(
                0, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(self._sleepers[1].pid)
            )
            for node, address in enumerate(ADDRESSES):
                subprocess.run([*self.inside(node), "hostname", f"node-{node}"], check=True, capture_output=True)
                self._ip(node, "address", "add", f"{address}/24", "dev", "cable")
                self._ip(node, "link", "set", "lo", "up")
                self._ip(node, "link", "set", "cable", "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sleeper in self._sleepers:
            sleeper.kill()
            sleeper.communicate()
        self._sleepers.clear()

    def inside(self, node: int) -> list[str]:
        """The command that runs a command on a node."""
        return ["nsenter", *_user(), "-n", "-u", "-t", str(self._sleepers[node].pid), "--"]

    def meeting(self, node: int, conf: str = "") -> list[str]:
        """torchrun's options for the agent of a node. Names do not resolve, so the first has to be told that it is."""
        return [
            "--nnodes=2",
            f"--node-rank={node}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}",
            "--rdzv-id=two-nodes",
            f"--rdzv-conf=is_host={int(node == 0)}{conf}",
            f"--local-addr={ADDRESSES[node]}",
        ]

    def cut(self) -> None:
        """Nothing passes the cable."""
        self._ip(0, "link", "set", "cable", "down")

    def restore(self) -> None:
        """The cable is whole again."""
        self._ip(0, "link", "set", "cable", "up")

    def _ip(self, node: int, *words: str) -> None:
        subprocess.run([*self.inside(node), _ip_tool(), *words], check=True, capture_output=True)


def why_not() -> str | None:
    """Why this machine cannot have two nodes; None where it can."""
    for tool in ("unshare", "nsenter", "hostname", _ip_tool()):
        if shutil.which(tool) is None:
            return f"two network namespaces need the program {tool.rsplit('/', 1)[-1]} (Debian: util-linux, hostname, iproute2)"
    try:
        with TwoNodes():
            return None
    except (OSError, subprocess.SubprocessError, TimeoutError) as error:
        said = getattr(error, "stderr", None) or b""
        return f"this system makes no network namespaces: {said.decode().strip() or error}"


def _user() -> list[str]:
    return [] if os.geteuid() == 0 else ["-U", "--preserve-credentials"]


def _ip_tool() -> str:
    return shutil.which("ip") or shutil.which("ip", path="/usr/sbin:/sbin") or "ip"


def _sleeper(unshare: Sequence[str]) -> subprocess.Popen[bytes]:
    sleeper = subprocess.Popen([*unshare, "sleep", "100000"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if sleeper.poll() is not None:
            raise OSError(sleeper.communicate()[1].decode().strip())
        try:
            if os.readlink(f"/proc/{sleeper.pid}/ns/net") != os.readlink("/proc/self/ns/net") and _is_asleep(
                sleeper.pid
            ):
                return sleeper
        except OSError:
            pass
        time.sleep(0.01)
    sleeper.kill()
    sleeper.communicate()
    raise TimeoutError("the new namespace does not come up")


def _is_asleep(pid: int) -> bool:
    """Whether ``unshare`` has become ``sleep``, so that the namespaces are complete."""
    with open(f"/proc/{pid}/comm") as comm:
        return comm.read().strip() == "sleep"
