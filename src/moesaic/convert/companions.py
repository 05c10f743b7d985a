"""What travels with a model besides its tensors: the tokenizer, its settings, chat templates, generation settings.

They are copied byte for byte, by name: no other file of a folder is touched, whatever it holds.
"""

from __future__ import annotations

from pathlib import Path

from moesaic.checkpoint.untrusted import safe_member, show
from moesaic.errors import CheckpointError

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_TEMPLATES = "additional_chat_templates"
_MAX_BYTES = 256 * 2**20


def read_companions(folder: Path) -> dict[str, bytes]:
    """Name -> content of the companions that ``folder`` has. Raises ``CheckpointError`` for one that cannot be read."""
    names = [name for name in COMPANIONS if (folder / name).is_file()]
    if (folder / _TEMPLATES).is_dir():
        names += sorted(f"{_TEMPLATES}/{path.name}" for path in (folder / _TEMPLATES).glob("*.jinja"))
    found = {}
    for name in names:
        path = safe_member(folder, name)
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise CheckpointError(
                    f"{path} is larger than any tokenizer or template ({show(path.stat().st_size)} bytes)."
                )
            found[name] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    return found
