"""What travels with a model besides its tensors: the tokenizer, its settings, chat templates, generation settings.

They are copied byte for byte, by name: no other file of a folder is touched, whatever it holds.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from moesaic.checkpoint.untrusted import safe_member, show
from moesaic.errors import CheckpointError, DataError
from moesaic.tokenizer import eos_id, pad_id

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
TEMPLATES = "additional_chat_templates"
_MAX_BYTES = 256 * 2**20


def read_companions(folder: Path) -> dict[str, bytes]:
    """Name -> content of the companions that ``folder`` has. Raises ``CheckpointError`` for one that cannot be read."""
    names = [name for name in COMPANIONS if (folder / name).is_file()]
    if (folder / TEMPLATES).is_dir():
        names += sorted(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja"))
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


def tokenizer_settings(tokenizer: Tokenizer) -> dict[str, bytes]:
    """``tokenizer_config.json`` and ``generation_config.json`` for a tokenizer that came without them.

    They say which tokens end and pad a text. A ``tokenizer.json`` does not, and without it Hugging Face's tools neither pad nor
    stop. Empty for a tokenizer whose control tokens are not known by name.
    """
    try:
        end, padding = eos_id(tokenizer), pad_id(tokenizer)
    except DataError:
        return {}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.id_to_token(end),
        "pad_token": tokenizer.id_to_token(padding),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    generation = {"eos_token_id": end, "pad_token_id": padding}
    return {
        "tokenizer_config.json": json.dumps(settings, indent=1).encode(),
        "generation_config.json": json.dumps(generation, indent=1).encode(),
    }
