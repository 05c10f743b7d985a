"""From what a user names to a folder on this disk: a path, or ``OWNER/NAME`` (``OWNER/NAME@REVISION``) on the Hugging Face hub.

>>> resolve("my-model"), resolve(Path("owner/name"))        # paths stay as they are
>>> resolve("mistralai/Mixtral-8x7B-v0.1@main")              # its snapshot in the cache, downloaded where needed
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from moesaic.checkpoint.parts import is_sharded
from moesaic.convert.companions import COMPANIONS, TEMPLATES
from moesaic.errors import CheckpointError, MoesaicError

# What is fetched: weights, settings, tokenizer, templates. Pickles and code never are; "consolidated" and "original" copies of
# the weights, which some repositories hold as well, would only double the download.
WANTED = [
    *("config.json", "manifest.json", "sharded.json", "model*.safetensors", "aside*.safetensors", "*.index.json"),
    *COMPANIONS,
    f"{TEMPLATES}/*.jinja",
]
UNWANTED = ["*/*.safetensors", "*/*.json", "*.bin", "*.pt", "*.pth", "*.py", "original/*"]
_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)


def resolve(source: str | os.PathLike[str], download: bool = True) -> Path:
    """The folder that ``source`` means. Without ``download`` only what is in the cache already.

    What exists here is meant, a ``Path`` is always one, and so is a name below a folder that exists.

    Raises ``MoesaicError`` (a sentence) where the hub has no such repository, does not let us in, or cannot be reached.
    ``HF_HUB_OFFLINE=1`` uses what was downloaded before.
    """
    if not os.fspath(source):
        raise MoesaicError("The name of the model is empty; give a folder, or OWNER/NAME on the Hugging Face hub.")
    path = Path(source)
    found = _ID.fullmatch(source) if isinstance(source, str) else None
    if found is None or os.path.lexists(path) or (found["revision"] is None and path.parent.is_dir()):
        return path
    return _snapshot(found["repo"], found["revision"], download)


def _snapshot(repo: str, revision: str | None, download: bool) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise MoesaicError(
            f"There is no folder {repo}; to fetch a model of that name from the Hugging Face hub, run: "
            'pip install "moesaic[hf]"'
        ) from None
    name = repo + (f"@{revision}" if revision else "")
    offline = not download or _is_true(os.environ.get("HF_HUB_OFFLINE")) or constants.HF_HUB_OFFLINE
    try:
        folder: Any = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
            local_files_only=offline,
        )
    except errors.GatedRepoError as error:  # before the next, of which it is a kind
        raise MoesaicError(
            f"The hub lets only accounts that accepted its terms read {name}; accept them on its page and run: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise MoesaicError(
            f"There is neither a folder {repo} here nor a public repository of that name on the Hugging Face hub."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MoesaicError(f"The repository {repo} has no revision {revision}.") from error
    except errors.HFValidationError as error:
        raise MoesaicError(f"{name} is neither a folder here nor a name the Hugging Face hub allows.") from error
    except errors.LocalEntryNotFoundError as error:
        why = (
            "this reads only what is here (moesaic convert fetches it)"
            if not download
            else "HF_HUB_OFFLINE is set"
            if offline
            else "the Hugging Face hub cannot be reached"
        )
        raise MoesaicError(
            f"There is no folder {repo}, {name} was not downloaded before (or not all of it), and {why}."
        ) from error
    except (OSError, getattr(errors, "HTTPError", OSError)) as error:  # connections, time-outs, a full disk
        raise MoesaicError(f"Fetching {name} from the Hugging Face hub failed: {_first_line(error)}.") from error
    found = Path(folder)
    if is_sharded(found):
        raise CheckpointError(
            f"{name} lies in parts, as several processes trained it; ask its owner to make it one with `moesaic convert` and "
            "to upload that."
        )
    if not any(os.path.lexists(found / file) for file in ("model.safetensors", "model.safetensors.index.json")):
        raise CheckpointError(
            f"{name} has no safetensors files ({found}); moesaic opens no other, since pickles can run any code."
        )
    return found


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
