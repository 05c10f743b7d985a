"""The files of a data set on the Hugging Face hub that ``hf://OWNER/NAME[@REVISION][/CONFIG][:SPLIT]`` means.

The hub's own rules are in each data set's card; these are the common ones (a folder per config, the split in the name of a
file or of a folder). Where they do not fit, name the files: ``hf://datasets/OWNER/NAME/any/pattern-*.parquet``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.data.readers import choose_files
from moesaic.errors import DataError

_SOURCE = re.compile(
    r"hf://(?P<repo>[^/:@]+/[^/:@]+)(?:@(?P<revision>[^/:]+))?(?:/(?P<config>[^:]+?))?/?(?::(?P<split>\w+))?"
)
_OTHERS = ("test", "validation", "valid", "val", "dev", "eval", "evaluation")


def find_hub_files(files: Any, source: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(path, what the hub says about it) of each file, sorted; ``files`` is a ``huggingface_hub.HfFileSystem``.

    The revision is pinned to its commit, so a push to the data set cannot change a run half-way. Raises ``DataError``.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise DataError(
            f"{source} is not a data set that can be streamed; write hf://OWNER/NAME, with @REVISION, /CONFIG and :SPLIT after "
            "it if need be, or hf://datasets/OWNER/NAME/FILE."
        )
    repo, revision = match["repo"], match["revision"]
    root = f"datasets/{repo}@{_commit(repo, revision)}/"
    listed = files.find(root.rstrip("/"), detail=True)
    names = [name.removeprefix(root) for name in sorted(listed)]
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if match["config"]:
        names = _below(names, match["config"], source)
    names = _of_split(choose_files(f"The data set {source}", names), match["split"], source)
    return [(root + name, listed[root + name]) for name in names]


def _commit(repo: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, constants, errors  # there: the file system is theirs

    if constants.HF_HUB_OFFLINE:
        raise DataError(f"hf://{repo} cannot be streamed while HF_HUB_OFFLINE is set; unset it, or give local files.")
    try:
        sha = HfApi().dataset_info(repo, revision=revision).sha
    except errors.RevisionNotFoundError as error:
        raise DataError(f'The data set {repo} has no revision "{revision}".') from error
    except errors.RepositoryNotFoundError as error:  # also what the hub says of private ones
        raise DataError(
            f"There is no data set {repo} on the hub, or it is private; check the name, or log in with: hf auth login."
        ) from error
    return str(sha)


def _below(names: Sequence[str], config: str, source: str) -> list[str]:
    chosen = [name for name in names if f"/{config}/" in f"/{name}"]
    if not chosen:
        folders = sorted({name.rpartition("/")[0] for name in names if "/" in name})[:12]
        raise DataError(f"The data set {source} has no folder {config} (it has: {', '.join(folders) or 'none'}).")
    return chosen


def _of_split(names: list[str], split: str | None, source: str) -> list[str]:
    def belongs(name: str, word: str) -> bool:
        return re.search(rf"(?:^|[/._-]){word}(?:[/._-]|$)", name) is not None

    chosen = [name for name in names if belongs(name, split or "train")]
    if not chosen and split is None:  # no file says what it is for, or only those that are for something else do
        chosen = [name for name in names if not any(belongs(name, word) for word in _OTHERS)]
    if not chosen:
        raise DataError(
            f'The data set {source} has no file of the split "{split or "train"}" (it has: {", ".join(names[:8])}).'
        )
    return chosen
