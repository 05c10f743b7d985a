"""Run as ``python killer.py SOURCE TARGET DTYPE STRIDE``: converts again and again, each time killed STRIDE steps later.

Prints how many steps there were. A step is a call of one of the functions below; a kill comes before it.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from moesaic.checkpoint import stream
from moesaic.convert.convert import convert
from tests.convert.tiny_checkpoint import tree

STEPS: list[tuple[Any, str]] = [
    (os, "fsync"),
    (os, "replace"),
    (os, "rename"),
    (os, "unlink"),
    (os, "close"),
    (shutil, "rmtree"),
    (Path, "write_text"),
    (Path, "write_bytes"),
    (Path, "mkdir"),
    (stream.ShardWriter, "write"),
]
MAX_SHARD_BYTES = 600


def main() -> None:
    source, target, dtype, stride = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    in_child(lambda: run(source, target, dtype))
    expected = tree(target)
    step = 1 - stride
    while True:
        step += stride
        shutil.rmtree(target, ignore_errors=True)
        status = in_child(partial(killed_at, step, source, target, dtype))
        if status == 0:
            break
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            raise SystemExit(f"step {step}: ended with {status}")
        if target.exists() and tree(target) != expected:
            raise SystemExit(f"step {step}: the target is there and not whole")
        if in_child(lambda: run(source, target, dtype)):
            raise SystemExit(f"step {step}: could not be gone on with")
        if tree(target) != expected:
            raise SystemExit(f"step {step}: another result than undisturbed")
        if left := sorted({p.name for p in target.parent.iterdir()} - {source.name, target.name}):
            raise SystemExit(f"step {step}: {left} are left over")
    print(step - stride)


def run(source: Path, target: Path, dtype: str) -> None:
    convert(source, target, dtype=dtype, max_shard_bytes=MAX_SHARD_BYTES)


def killed_at(step: int, source: Path, target: Path, dtype: str) -> None:
    left = step

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **more)

        return call

    for place, name in STEPS:
        setattr(place, name, counting(getattr(place, name)))
    run(source, target, dtype)


def in_child(function: Callable[[], Any]) -> int:
    """The wait status of a fork that runs ``function``; forks spare a start of the interpreter each."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException as error:  # noqa: BLE001  # the parent must hear of it whatever it is
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


if __name__ == "__main__":
    main()
