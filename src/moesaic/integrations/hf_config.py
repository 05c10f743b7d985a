"""The Hugging Face config of a moesaic model: its ``ModelConfig`` as a table, under the keys of our ``config.json``."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from moesaic.checkpoint.atomic import atomic_file
from moesaic.checkpoint.native import FORMAT, VERSION, config_record
from moesaic.config import from_dict, to_dict
from moesaic.errors import CheckpointError, ConfigError
from moesaic.models.config import ModelConfig


class MoesaicConfig(PreTrainedConfig):  # type: ignore[misc]
    """``config.json`` of a model directory, read by ``AutoConfig``.

    Args:
        model: the ``ModelConfig`` as a table (or one itself); the only thing that shapes the model. What Hugging Face calls
            ``hidden_size``, ``num_hidden_layers`` and so on is read off it and cannot be set.
        format, version: of the directory; other values than this version's are refused.
        source: what a converter noted; passed through.

    Raises ``CheckpointError`` and ``ConfigError`` saying what is wrong, as ``moesaic.load`` does.
    """

    model_type = "moesaic"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values", "plans", "depth", "lm_loss", "balance_loss", "token_losses"
    ]  # fmt: skip

    def __init__(
        self,
        model: ModelConfig | dict[str, Any] | None = None,
        format: str = FORMAT,
        version: int = VERSION,
        source: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if format != FORMAT or version != VERSION:
            raise CheckpointError(
                f"This config is of format {format!r}, version {version!r}; this moesaic reads {FORMAT!r}, version {VERSION}."
            )
        shape = model if isinstance(model, ModelConfig) or model is None else from_dict(ModelConfig, model, "model")
        self.model = None if shape is None else to_dict(shape)
        self.format, self.version, self.source = format, version, source
        kwargs.setdefault("architectures", ["MoesaicForCausalLM"])
        super().__init__(**kwargs)

    @property
    def shape(self) -> ModelConfig:
        """The ``ModelConfig``."""
        if self.model is None:
            raise ConfigError("This MoesaicConfig has no model; give it one: MoesaicConfig(model=ModelConfig(...)).")
        return from_dict(ModelConfig, copy.deepcopy(self.model), "model")

    def _read(self, name: str, default: Any = None) -> Any:
        return default if self.model is None else getattr(self.shape, name)

    vocab_size = property(lambda self: self._read("vocab_size"))
    hidden_size = property(lambda self: self._read("dim"))
    num_hidden_layers = property(lambda self: self._read("num_layers"))
    num_attention_heads = property(lambda self: self._read("num_heads"))
    num_key_value_heads = property(lambda self: self._read("kv_heads"))
    head_dim = property(lambda self: self._read("heads_dim"))
    max_position_embeddings = property(lambda self: self._read("max_seq_len"))
    tie_word_embeddings = property(lambda self: self._read("tie_embeddings", True))

    def to_record(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        return config_record(to_dict(self.shape), self.source)

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write our ``config.json``, which knows no further keys."""
        import json

        atomic_file(Path(json_file_path), json.dumps(self.to_record(), indent=1, allow_nan=False))
