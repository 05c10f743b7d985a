"""Names and JSON that came with a folder somebody else may have written: checked here before anything trusts them.

>>> path = safe_member(folder, index["weight_map"][name], ".safetensors")
>>> data = read_json(path)
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from moesaic.errors import CheckpointError

_MAX_JSON_BYTES = 256 * 2**20


def safe_member(folder: Path, name: Any, suffix: str = "") -> Path:
    """The path of the file ``name`` inside ``folder``; the one place where a name read from a file becomes a path.

    Raises ``CheckpointError`` on anything but a plain relative name: absolute, ``..``, backslash or control
    character, a symbolic link that leaves the folder, or an ending other than ``suffix``.
    """
    if not isinstance(name, str) or not name or not name.isprintable() or "\\" in name or ":" in name:
        raise CheckpointError(f"{folder} names a file {show(name)}, which is not a plain file name; refused.")
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "/".join(parts) != name:
        raise CheckpointError(f"{folder} names the file {show(name)}, which could lie outside the folder; refused.")
    if not name.endswith(suffix):
        raise CheckpointError(f"{folder} names the file {show(name)} where only {suffix} files are read; refused.")
    root, place = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / name))
    if not any(place.is_relative_to(allowed) for allowed in (root, *_blobs_of(root))):
        raise CheckpointError(f"{folder / name} is a link to a file outside the folder; refused. Copy it instead.")
    return folder / name


def _blobs_of(root: Path) -> list[Path]:
    """Of a snapshot in the cache of huggingface_hub, the folder beside it that its links lead to; of others, nothing.

    It belongs to the same download: ``models--OWNER--NAME/{blobs,snapshots/COMMIT}``.
    """
    repository = root.parent.parent
    if root.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return []
    blobs = repository / "blobs"
    return [blobs] if blobs.is_dir() and not blobs.is_symlink() else []


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; ``CheckpointError`` where it is missing, unreadable, broken or not an object."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block the read for ever
            raise CheckpointError(f"{path} is not a plain file; refused.")
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than any moesaic JSON file; refused.")
        data = parse_json(path.read_bytes(), path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # broken JSON, or bytes that are not UTF-8
        raise CheckpointError(f"{path} is damaged: not valid JSON ({str(error)[:100]}).") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: it should hold a JSON object.")
    return data


def parse_json(text: bytes, path: Path) -> Any:
    """The JSON value in ``text``; ``CheckpointError`` naming ``path`` where a table has a key twice.

    Readers differ in which of the two counts, so a file could show one model to a check and another to a loader.
    Raises ``ValueError`` or ``RecursionError`` for what is not JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(
                f"{path} has the key {show(twice)} twice in one table, so which counts is unclear; refused."
            )
        return found

    return json.loads(text, object_pairs_hook=unique)


def show(value: Any) -> str:
    """``value`` for an error message: quoted, control characters escaped, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
