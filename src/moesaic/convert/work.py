"""A folder that is made over hours: in a hidden folder beside it that survives a kill, then put in its place at once.

>>> with work_for(Path("out"), plan=digest) as work:
...     work.done                                    # files that an earlier process finished, found unchanged
...     work.finish(work.out / "model-00001-of-00002.safetensors")

``.NAME.converting`` holds ``progress.json`` (what is being made, and the checksum of every finished file) and ``out``, which
becomes ``NAME``. Whether an earlier start is gone on with is decided by ``plan``, a digest of all that determines the result.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moesaic.checkpoint.atomic import atomic_file, publish, sha256_of, sweep
from moesaic.checkpoint.untrusted import read_json
from moesaic.convert.finished import refused, stands
from moesaic.errors import CheckpointError, MoesaicError, disk_errors

try:
    import fcntl
except ImportError:  # Windows has no advisory locks: two writers are then not noticed
    fcntl = None  # type: ignore[assignment]

_VERSION = 1


class Work:
    """The hidden folder of one target. ``out`` becomes the target, ``done`` maps its finished files to their sha256."""

    def __init__(self, folder: Path, plan: str) -> None:
        self.folder, self.plan = folder, plan
        self.out = folder / "out"
        self.done: dict[str, str] = {}

    def finish(self, path: Path) -> None:
        """Note that a file of ``out`` is whole and on the disk."""
        self.done[path.name] = sha256_of(path)
        self.note()

    def note(self) -> None:
        """Write what is known to the disk."""
        record = {"version": _VERSION, "plan": self.plan, "done": self.done}
        atomic_file(self.folder / "progress.json", json.dumps(record, indent=1))

    def begin(self, say: Callable[[str], None], resume: bool) -> None:
        """Take over what an earlier process finished of the same plan; else start from nothing."""
        kept = _progress(self.folder) if resume else None
        if kept is not None and kept.get("plan") == self.plan and isinstance(kept.get("done"), dict):
            for name, digest in kept["done"].items():
                path = self.out / Path(name).name
                if path.is_file() and sha256_of(path) == digest:
                    self.done[path.name] = digest
            for path in [p for p in self.out.rglob("*") if p.is_file()] if self.out.is_dir() else []:
                if path.relative_to(self.out).as_posix() not in self.done:
                    path.unlink()
            if self.done:
                say(f"Going on: {len(self.done)} files were finished before.")
        else:
            if self.folder.exists():
                why = "which differs" if resume and kept is not None else "which is not gone on with"
                say(f"Starting over: an earlier conversion left {self.folder}, {why}.")
            shutil.rmtree(self.folder, ignore_errors=True)
        self.out.mkdir(parents=True, exist_ok=True)
        self.note()


@contextmanager
def work_for(
    final: Path, plan: str, resume: bool = True, say: Callable[[str], None] = lambda sentence: None
) -> Iterator[Work]:
    """Where to make ``final``; leaving without an error puts it in its place with a manifest.

    What is finished stays after a kill, Ctrl-C or a disk that refuses (unless ``resume`` is false); after any other error
    nothing does. Raises ``MoesaicError`` where the disk refuses, ``final`` is there already, or another process makes it.
    """
    final = Path(os.path.realpath(final))
    work = Work(final.parent / f".{final.name}.converting", plan)
    with disk_errors(final):
        if stands(final):
            raise refused(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        with _lock(final):
            sweep(final.parent, final.name)
            keep = False
            try:
                work.begin(say, resume)
                yield work
                publish(work.out, final, work.done)
            except (OSError, KeyboardInterrupt) as error:
                keep = resume and bool(work.done)
                if keep and isinstance(error, OSError):
                    raise MoesaicError(
                        f"{_reason(error, final)} What is finished is kept in {work.folder.name} beside it; the same command "
                        "goes on there, or delete it."
                    ) from error
                raise
            finally:
                if not keep:
                    shutil.rmtree(work.folder, ignore_errors=True)


def forget(final: Path) -> None:
    """Remove what a process left that was killed once ``final`` was in its place."""
    final = Path(os.path.realpath(final))
    with disk_errors(final), _lock(final):
        sweep(final.parent, final.name)
        shutil.rmtree(final.parent / f".{final.name}.converting", ignore_errors=True)


def _reason(error: OSError, final: Path) -> str:
    try:
        with disk_errors(final):
            raise error
    except MoesaicError as said:
        return str(said)


def _progress(folder: Path) -> dict[str, Any] | None:
    if not folder.is_dir():
        return None
    try:
        found = read_json(folder / "progress.json")
    except CheckpointError:
        return {}
    return found if found.get("version") == _VERSION else {}


@contextmanager
def _lock(final: Path) -> Iterator[None]:
    """One process at a time per ``final``; the kernel lets go of the lock of a process that was killed."""
    path = final.parent / f".{final.name}.converting.lock"
    if fcntl is None:
        yield
        return
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise MoesaicError(
                f"{final} is being written by another process; wait for it, or choose another folder."
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        os.close(handle)  # its last holder removed it meanwhile
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)
