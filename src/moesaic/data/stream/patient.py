"""Reading that may fail and succeed a moment later: tried again after growing pauses, then given up in a sentence."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, BinaryIO, TypeVar

from moesaic.errors import DataError, MoesaicError

T = TypeVar("T")

FIRST_PAUSE = 1.0  # seconds; each further pause is twice as long
LONGEST_PAUSE = 60.0


def _silent(_: str) -> None:
    pass


@dataclass(frozen=True)
class Patience:
    """How often a failed reading is tried again (``retries``), and who is told of it."""

    retries: int = 5
    say: Callable[[str], None] = _silent

    def attempt(self, name: str, action: Callable[[], T]) -> T:
        """What ``action`` returns. Raises ``DataError`` about ``name`` when it fails for good; passes on our own errors."""
        for failures in count(1):
            try:
                return action()
            except MoesaicError:
                raise
            except Exception as error:
                hopeless = _hopeless(name, error)
                if hopeless is not None:
                    raise hopeless from error
                reason = _reason(error)
                if failures > self.retries:
                    raise DataError(
                        f"{name} could not be read in {failures} tries ({reason}). Check the network and the address, or raise "
                        "data.retries; the run can be resumed from its last checkpoint."
                    ) from error
                pause = min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE)
                self.say(
                    f"{name} could not be read ({reason}); trying again in {pause:g} s ({failures}/{self.retries})."
                )
                time.sleep(pause)
        raise AssertionError("count() does not end")


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    line = next(iter(str(strerror or error).strip().splitlines()), "")
    # Clients quote the whole address, with the keys that a query may hold.
    line = re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\")]*", r"\1", line)
    return line.rstrip(".") or type(error).__name__


def _hopeless(name: str, error: Exception) -> DataError | None:
    """The sentence for a failure that no pause will cure."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return DataError(f"{name} is not there; restore it, or correct the source.")
    if isinstance(error, PermissionError) or status in (401, 403):
        return DataError(f"{name} may not be read ({_reason(error)}); check the permissions or credentials.")
    if isinstance(error, ImportError):
        return DataError(f"Reading {name} needs another package; install it with: pip install 'moesaic[data]'.")
    if isinstance(error, IsADirectoryError | NotADirectoryError | NotImplementedError):
        return DataError(f"{name} cannot be read: {_reason(error)}.")
    return None


class PatientFile(io.RawIOBase):
    """A file of known ``size`` for reading, opened (again) by ``opened`` and read on from where it failed.

    Everything it raises is a ``DataError`` in words, so a reader of formats cannot mistake a lost connection for damaged data.
    """

    def __init__(self, name: str, opened: Callable[[], BinaryIO], size: int, patience: Patience) -> None:
        self._name, self._opened, self._size, self._patience = name, opened, size, patience
        self._inner: BinaryIO | None = None
        self._at = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The next byte that is read."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Nothing is moved before the next read."""
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        """As many bytes as come at once; 0 only at the end."""
        wanted = min(len(buffer), max(0, self._size - self._at))
        data = self._patience.attempt(self._name, lambda: self._read(wanted)) if wanted else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read(self, wanted: int) -> bytes:
        inner, self._inner = self._inner, None  # a file that failed is not used again
        try:
            if inner is None:
                inner = self._opened()
            if inner.tell() != self._at:
                inner.seek(self._at)
            data = inner.read(wanted)
            if not data:
                raise OSError(f"it ended at byte {self._at:,} of {self._size:,}")
        except BaseException:
            if inner is not None:
                with suppress(Exception):
                    inner.close()
            raise
        self._inner = inner
        return data

    def close(self) -> None:
        """Close what is open."""
        inner, self._inner = self._inner, None
        if inner is not None:
            with suppress(OSError):
                inner.close()
        super().close()
