"""Sources -> shards: files anywhere, each with what tells whether it is still the same file.

    for shard in list_shards(config, Patience()):       # local paths, "s3://bucket/pages", "https://host/a.jsonl.gz", "memory://x"
        with shard.open(Patience()) as file: ...        # DataError if it changed since

Everything but the listing of the hub (``hub_files.py``) goes through fsspec, local files included.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from moesaic.data.config import DataConfig
from moesaic.data.formats import JSON_LINES
from moesaic.data.hub import is_saved_dataset
from moesaic.data.readers import PLAIN_TEXT, choose_files, labels_of, resolve
from moesaic.data.stream.hub_files import find_hub_files
from moesaic.data.stream.patient import Patience, PatientFile
from moesaic.errors import DataError, nearest

Found = tuple[Any, str, Mapping[str, Any]]  # file system, path in it, what it says about the file

_BLOCK = 1 << 20  # bytes fetched at once over a network
_ENDS = 1 << 16  # bytes at either end of a file that stand for its content where the file system has no checksum
_SUMS = ("ETag", "etag", "blob_id", "xet_hash", "md5Hash", "md5", "content_md5", "checksum", "Content-MD5")
_KNOWN = (*JSON_LINES, ".parquet", *PLAIN_TEXT)


@dataclass(frozen=True)
class Shard:
    """A file. ``name`` is its path or address (without a query, which may hold secrets), ``stamp`` names its content."""

    name: str
    label: str
    size: int
    stamp: str
    files: Any
    path: str

    def open(self, patience: Patience) -> BinaryIO:
        """Seekable, unpacked nowhere. Raises ``DataError`` if it is gone or is not what was listed."""
        info = patience.attempt(self.name, lambda: self.files.info(self.path))
        size, stamp = identify(self.name, self.files, self.path, info, patience)
        if (size, stamp) != (self.size, self.stamp):
            raise DataError(
                f"{self.name} changed while the run was reading it (it had {self.size:,} bytes and now has {size:,}); restore "
                "it and resume, or start a new run."
            )
        opened = partial(_open, self.files, self.path)
        return cast(BinaryIO, io.BufferedReader(PatientFile(self.name, opened, self.size, patience), 1 << 16))


def _open(files: Any, path: str) -> BinaryIO:
    return cast(BinaryIO, files.open(path, "rb", block_size=_BLOCK))


def list_shards(config: DataConfig, patience: Patience) -> tuple[Shard, ...]:
    """The shards of ``config.sources``, in the order of the sources and of names within.

    Raises ``DataError`` for what is not there, cannot be listed, is empty (with ``on_error="raise"``) or of unknown size.
    """
    if not config.sources:
        raise DataError("There is no text to stream; name files, folders or addresses with --data.")
    found: dict[tuple[str, str], tuple[Found, str]] = {}
    for source in config.sources:
        for name, one, place in _listed(source, patience):
            found.setdefault((name, one[1]), (one, place))  # files on the web may differ in their queries alone
    labels = labels_of([place for _, place in found.values()], config.label_by, len(found) == len(config.sources))
    shards = []
    for ((name, _), ((files, path, info), _)), label in zip(found.items(), labels, strict=True):
        size, stamp = identify(name, files, path, info, patience)
        if size == 0 and not name.lower().endswith(PLAIN_TEXT):
            if config.on_error == "skip":
                continue
            raise DataError(
                f"{name} is empty (0 bytes); remove it, or leave such files out with --set data.on_error=skip."
            )
        shards.append(Shard(name, label, size, stamp, files, path))
    if not any(shard.size for shard in shards):
        raise DataError(f"{', '.join(map(_shown, config.sources))} holds no text: every file is empty.")
    return tuple(shards)


def _listed(source: str, patience: Patience) -> Iterator[tuple[str, Found, str]]:
    """(name, file, what its label is made from) of every file that ``source`` means."""
    if source.startswith("hf://") and not source.startswith(("hf://datasets/", "hf://buckets/")):
        files, _ = file_system(source)
        repo = "/".join(re.split("[@:]", source.removeprefix("hf://"))[0].split("/")[:2])
        for path, info in patience.attempt(source, partial(find_hub_files, files, source)):
            yield files.unstrip_protocol(path), (files, path, info), f"hf://{repo}"
    elif "://" in source:
        for one in patience.attempt(_shown(source), partial(_find, source)):
            name = _shown(one[0].unstrip_protocol(one[1]))
            yield name, one, name.partition("://")[2]
    else:
        for place in _local(source):
            files, path = file_system(os.path.abspath(place))
            yield place, (files, path, files.info(path)), place


def identify(name: str, files: Any, path: str, info: Mapping[str, Any], patience: Patience) -> tuple[int, str]:
    """(size, stamp) of a file: the stamp is its store's checksum, else a hash of both ends, so copying keeps it."""
    size = info.get("size")
    if not isinstance(size, int):
        raise DataError(f"{name} does not say how large it is, so it cannot be resumed; download it and give the file.")
    for key in _SUMS:
        if info.get(key):
            return size, f"{key}:{info[key]}"
    with io.BufferedReader(PatientFile(name, partial(_open, files, path), size, patience), _ENDS) as file:
        digest = hashlib.sha256(file.read(_ENDS))
        file.seek(max(0, size - _ENDS))
        digest.update(file.read(_ENDS))
    return size, f"ends:{digest.hexdigest()[:16]}"


def _local(source: str) -> list[str]:
    if is_saved_dataset(Path(source)):
        raise DataError(
            f"{source} was written by save_to_disk, which cannot be streamed; leave data.stream out, or write it as parquet."
        )
    return resolve([source])


def _find(address: str) -> list[Found]:
    """The files an address means: itself, those it matches as a pattern, or those below it as a folder."""
    files, path = file_system(address)
    web = address.startswith(("http://", "https://"))  # whose files may have a "?" in their address, and no folders
    if "*" in path or "[" in path or ("?" in path and not web):
        found = files.glob(path, detail=True)
        matches = [name for name in sorted(found) if found[name].get("type") != "directory" and "/." not in f"/{name}"]
        if not matches:
            raise DataError(f'The pattern "{address}" matches no file; check the folder and the suffix.')
        return [(files, name, found[name]) for name in matches]
    if path.lower().split("?")[0].endswith(_KNOWN) or (web and not path.endswith("/")) or not files.isdir(path):
        return [(files, path, files.info(path))]
    below = files.find(path, detail=True)
    root = path.rstrip("/") + "/"
    names = [name for name in sorted(below) if not any(part.startswith(".") for part in name[len(root) :].split("/"))]
    return [(files, name, below[name]) for name in choose_files(f"The folder {address}", names)]


def file_system(address: str) -> tuple[Any, str]:
    """The fsspec file system of an address and the path in it. Raises ``DataError`` naming what to install."""
    protocol = address.partition("://")[0] if "://" in address else "file"
    try:
        import fsspec
    except ImportError as error:
        raise DataError(f"Streaming {address} needs fsspec; install it with: pip install 'moesaic[data]'.") from error
    try:
        fsspec.get_filesystem_class(protocol)
        found: tuple[Any, str] = fsspec.core.url_to_fs(address)
    except ImportError as error:
        extra = "pip install 'moesaic[data]'" if protocol in ("hf", "http", "https") else _package(error)
        raise DataError(f"Reading {protocol}:// needs another package; install it with: {extra}.") from error
    except ValueError as error:
        hint = nearest(protocol, fsspec.available_protocols())
        raise DataError(
            f'{_shown(address)} begins with "{protocol}://", which no file system answers to.{hint}'
        ) from error
    return found


def _package(error: ImportError) -> str:
    # fsspec says such as "Install s3fs to access S3".
    words = str(error).split()
    return f"pip install {words[words.index('Install') + 1]}" if "Install" in words[:-1] else str(error).rstrip(".")


def _shown(address: str) -> str:
    return address.split("?")[0].split("#")[0] if "://" in address else address
