"""Names and JSON that came with a folder somebody else may have written: checked here before anything trusts them.

>>> path = safe_member(folder, index["weight_map"][name], ".safetensors")
>>> data = read_json(path)
"""

from __future__ import annotations

import json
import os
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
    root = os.path.realpath(folder)
    if os.path.commonpath([root, os.path.realpath(folder / name)]) != root:
        raise CheckpointError(f"{folder / name} is a link to a file outside the folder; refused. Copy it instead.")
    return folder / name


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; ``CheckpointError`` where it is missing, unreadable, broken or not an object."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than any moesaic JSON file; refused.")
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # broken JSON, or bytes that are not UTF-8
        raise CheckpointError(f"{path} is damaged: not valid JSON ({str(error)[:100]}).") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: it should hold a JSON object.")
    return data


def show(value: Any) -> str:
    """``value`` for an error message: quoted, control characters escaped, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
