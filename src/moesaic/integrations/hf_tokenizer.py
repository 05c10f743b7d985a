"""``AutoTokenizer`` on a moesaic folder: its ``tokenizer.json``, with the control tokens moesaic knows by name.

A ``tokenizer_config.json`` beside it (special tokens, chat template) has the last word.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from moesaic.errors import DataError
from moesaic.tokenizer import eos_id, pad_id


class MoesaicTokenizerFast(PreTrainedTokenizerFast):  # type: ignore[misc]
    """Loads a plain ``PreTrainedTokenizerFast`` whose end-of-text and padding tokens are found where no file names them.

    Unlike ``moesaic.tokenizer.encode`` it reads "<|endoftext|>" in a text as the control token, as Hugging Face's do; pass
    ``split_special_tokens=True`` for ours. It pads on the left, as generation needs, unless a file says otherwise.
    """

    # No __init__ and no instances of this class: transformers rebuilds the tokenizer of a class with an own __init__ from its
    # parts, and what such a tokenizer saves would need moesaic to load.
    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PreTrainedTokenizerFast:
        """The tokenizer of a folder or hub id; arguments as ``PreTrainedTokenizerFast.from_pretrained``."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(*args, **kwargs)
        if "padding_side" not in tokenizer.init_kwargs:
            tokenizer.padding_side = "left"
        backend = tokenizer.backend_tokenizer
        try:
            end, padding = eos_id(backend), pad_id(backend)
        except DataError:  # a tokenizer without control tokens known to us stays as it is
            return tokenizer
        if tokenizer.eos_token is None:
            tokenizer.eos_token = backend.id_to_token(end)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = backend.id_to_token(padding)
        return tokenizer
