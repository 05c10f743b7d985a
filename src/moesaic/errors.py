"""The one family of errors a user can cause: each message is a sentence with the offending value and the fix.

The command line prints the sentence alone (no traceback) and exits with status 2; library users catch ``MoesaicError``.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class MoesaicError(Exception):
    """A mistake in what the user gave us. ``str(error)`` is one clear sentence."""


class ConfigError(MoesaicError):
    """A setting that cannot be: unknown key, wrong type, impossible combination."""


class DataError(MoesaicError):
    """Text that is missing, empty, or not what its file name promises."""


class CheckpointError(MoesaicError):
    """A saved model or run that is missing, damaged, or of another architecture."""


class NonFiniteError(MoesaicError):
    """A NaN or infinity appeared in training; the message names the layer."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint naming the closest of ``choices`` (leading space included), or the empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""


def one_of(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ``ConfigError`` naming the closest unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        hint = nearest(str(value), map(str, choices))
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}.{hint}")


_WRITE_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file would be larger than this system allows; choose another folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "the operation is not permitted there; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EEXIST: "a file stands where a folder is needed; choose another path",
    errno.EISDIR: "a folder stands where a file is needed; choose another path",
    errno.ENOENT: "no folder can be made there; choose another path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EIO: "the disk reported an input/output error; choose another disk",
}


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an ``OSError`` raised while writing under ``path`` into a ``MoesaicError`` that says what to do."""
    try:
        yield
    except OSError as error:
        reason = _WRITE_ERRORS.get(error.errno or 0, f"{error.strerror or error}")
        raise MoesaicError(f"Cannot write to {os.fspath(path)}: {reason}.") from error
