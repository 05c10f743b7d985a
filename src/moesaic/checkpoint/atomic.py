"""Files and folders that are either whole or absent, whatever moment the process or the disk dies at.

>>> with atomic_folder(Path("runs/a/model")) as partial:      # fill it; an exception leaves the old folder untouched
...     (partial / "config.json").write_text("{}")
>>> verify_folder(Path("runs/a/model"))                        # CheckpointError names the first damaged file

How: everything is written to the hidden sibling ``.model.incomplete-PID``, hashed into ``manifest.json``, flushed to
the disk and renamed. An older folder of that name is first renamed to ``.model.replaced-PID`` (always a whole folder)
and deleted after the new one is in place; ``settle``, which every reader calls, repairs a kill between the two renames.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard

from moesaic.checkpoint.untrusted import read_json, safe_member, show
from moesaic.errors import CheckpointError, MoesaicError, disk_errors

MANIFEST = "manifest.json"
VERSION = 1
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>incomplete|replaced|removed|writing)-(?P<pid>\d+)", re.DOTALL)


def atomic_file(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write ``data`` to ``path`` so that a reader, or a crash, sees the old content or the new, never a part.

    Raises ``MoesaicError`` (a sentence) where the disk refuses.
    """
    path = Path(path)
    temporary = _leftover(path, "writing")
    with disk_errors(path):
        sweep(path.parent, path.name)
        try:
            with open(temporary, "wb") as f:
                f.write(data.encode() if isinstance(data, str) else data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
            _fsync(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def atomic_folder(final: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it appears as ``final`` with a manifest, on failure it vanishes.

    An existing ``final`` is replaced only if everything in it is listed in its own manifest: a folder holding anything
    that was not saved by us is refused, since replacing would delete it (``overwrite`` lifts that; for folders that are
    nobody else's business). One writer at a time per ``final``.
    Raises ``MoesaicError`` (a sentence) where the disk refuses; whatever else the body raises passes through.
    """
    with hidden_folder(final, overwrite) as partial:
        yield partial
        publish(partial, Path(os.path.realpath(final)))


@contextmanager
def hidden_folder(final: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """As ``atomic_folder``, but it is the body that calls ``publish``; what it has not published vanishes."""
    final = Path(os.path.realpath(final))  # through a link, the folder it names is the one to replace
    partial = _leftover(final, "incomplete")
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        sweep(final.parent, final.name)
        if not overwrite:
            refuse_foreign(final)
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # published, it has another name


def publish(partial: Path, final: Path, known: Mapping[str, str] | None = None) -> None:
    """Give ``partial``, a folder beside ``final``, its manifest and put it in the place of ``final``.

    ``known``: file name -> sha256 of files that were hashed after they were flushed. Raises ``OSError``.
    """
    aside = _leftover(final, "replaced")
    _seal(partial, known or {})
    if final.exists():
        os.rename(final, aside)
        try:
            os.rename(partial, final)
        except OSError:
            os.rename(aside, final)
            raise
        _fsync(final.parent)
        remove_folder(aside)
    else:
        os.rename(partial, final)
        _fsync(final.parent)


def settle(final: str | os.PathLike[str]) -> Path:
    """Where the folder ``final`` is now: repairs the moment between the two renames of a replacement that was killed.

    Returns ``final`` (which may not exist), or on a file system we may not write to, the whole older folder beside it.
    """
    final = Path(final)
    for _ in range(100):
        if final.exists():
            break
        asides = [p for p, kind in _leftovers(final.parent, final.name) if kind == "replaced" and _is_whole(p)]
        if not asides:
            break
        if _alive(asides[0]):
            time.sleep(0.01)  # its writer is between two renames
            continue
        try:
            os.rename(asides[0], final)
        except FileNotFoundError:
            continue  # another reader settled it first
        except OSError:
            return asides[0]
    return final


def sweep(parent: Path, name: str | None = None) -> None:
    """Delete what dead writers of ``parent/name`` left behind (``None``: of every name), repairing before deleting."""
    for path, kind in _leftovers(parent, name):
        if _alive(path):
            continue
        if kind == "replaced":
            match = _LEFTOVER.fullmatch(path.name)
            assert match
            settle(parent / match["name"])
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a crash on the way leaves no half-deleted folder under its own name. Never raises."""
    match = _LEFTOVER.fullmatch(folder.name)  # what is left over of NAME is swept with it under that name
    gone = folder.parent / f".{match['name'] if match else folder.name.lstrip('.')}.removed-{os.getpid()}"
    with suppress(OSError):  # what cannot be deleted now is swept by a later save
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def verify_folder(
    folder: str | os.PathLike[str],
    quick: bool = False,
    share: tuple[int, int] = (0, 1),
    only: Collection[str] | None = None,
) -> frozenset[str]:
    """Check every file of ``folder`` against its manifest and return the names it lists.

    ``quick`` compares sizes only; otherwise every byte is hashed (about a second per GB, once more from disk).
    ``share``: (i, n) hashes every n-th file from the i-th on, so that n processes check them all together.
    ``only``: hash these files alone.
    Raises ``CheckpointError`` naming the file that is missing, truncated, changed, unlisted or outside the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}.")
    if not os.path.lexists(folder / MANIFEST):
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is incomplete, or was not saved by moesaic.")
    manifest = read_json(safe_member(folder, MANIFEST))
    files = manifest.get("files")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged or newer than this moesaic: its version is not {VERSION}."
        )
    if not _is_table(files) or manifest.get("sha256") != _digest_of_table(files):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: its own checksum does not match.")
    for i, (name, entry) in enumerate(files.items()):
        path = safe_member(folder, name)
        size, digest = entry["bytes"], entry["sha256"]
        try:
            found = path.stat().st_size
            if not path.is_file():  # a pipe would block the read for ever
                raise CheckpointError(f"{path} is not a plain file; it was saved as one with {size} bytes.")
            if found != size:
                raise CheckpointError(
                    f"{path} is damaged: it has {found} bytes and was saved with {size}. Use an older or another copy."
                )
            hashed = not quick and i % share[1] == share[0] and (only is None or name in only)
            if hashed and sha256_of(path) != digest:
                raise CheckpointError(
                    f"{path} is damaged: its bytes changed since it was saved (sha256 differs). "
                    "Use an older or another copy."
                )
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; it was saved with {size} bytes.") from None
        except OSError as error:
            raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    for path in folder.rglob("*.safetensors"):
        inner = path.relative_to(folder).parents
        if any((folder / part / MANIFEST).exists() for part in inner if part.name):
            continue  # of another checkpoint, a Trainer's below the model it led to, with a manifest of its own
        if path.relative_to(folder).as_posix() not in files:
            raise CheckpointError(f"{path} does not belong to this checkpoint (it is not in {MANIFEST}); move it away.")
    return frozenset(files)


def _seal(folder: Path, known: Mapping[str, str]) -> None:
    """Hash everything in ``folder`` that is not ``known`` into its manifest and flush it all to the disk."""
    table = {}
    # safetensors creates files that only their owner may read; a checkpoint is as readable as its folder.
    mode = folder.stat().st_mode & 0o666
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        path.chmod(mode)
        _fsync(path)
        name = path.relative_to(folder).as_posix()
        table[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or sha256_of(path)}
    text = json.dumps({"version": VERSION, "files": table, "sha256": _digest_of_table(table)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    _fsync(folder / MANIFEST)
    for path in folder.rglob("*"):
        if path.is_dir():
            _fsync(path)
    _fsync(folder)


def refuse_foreign(final: Path) -> None:
    """Raise ``MoesaicError`` if ``final`` is there and holds anything that its own manifest does not list."""
    if not os.path.lexists(final):
        return
    if not final.is_dir():
        raise MoesaicError(f"Cannot write the folder {final}: a file of that name exists; choose another path.")
    there = {p.relative_to(final).as_posix() for p in final.rglob("*") if not p.is_dir()}
    ours: set[str] = set()
    if MANIFEST in there:
        with suppress(CheckpointError):
            files = read_json(final / MANIFEST).get("files")
            ours = {MANIFEST, *files} if isinstance(files, dict) else set()
    if there - ours:
        raise MoesaicError(
            f"Cannot replace {final}: it holds {show(sorted(there - ours)[0])}, which was not saved with it and would "
            "be deleted. Choose another folder or move that file away."
        )


def _is_table(files: Any) -> TypeGuard[dict[str, dict[str, Any]]]:
    return isinstance(files, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )


def _digest_of_table(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Of the content of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder to flush it
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(handle)


def _leftover(final: Path, kind: str) -> Path:
    return final.parent / f".{final.name}.{kind}-{os.getpid()}"


def _leftovers(parent: Path, name: str | None) -> list[tuple[Path, str]]:
    try:
        children = sorted(parent.iterdir())
    except OSError:
        return []
    found = [(path, _LEFTOVER.fullmatch(path.name)) for path in children]
    return [(path, match["kind"]) for path, match in found if match and name in (None, match["name"])]


def _alive(leftover: Path) -> bool:
    """Whether another process that could have made ``leftover`` runs (our own number can only be a dead namesake's)."""
    match = _LEFTOVER.fullmatch(leftover.name)
    assert match
    pid = int(match["pid"])
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_whole(folder: Path) -> bool:
    try:
        verify_folder(folder, quick=True)
    except CheckpointError:
        return False
    return True
