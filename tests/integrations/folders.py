"""Model directories shared by the tests of integrations: loud tiny models with a tokenizer of their own vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moesaic as mo
from moesaic.models.config import ModelConfig, MoEConfig, RouterConfig
from moesaic.models.decoder import Decoder
from moesaic.tokenizer import MIN_VOCAB, train_bpe
from tests.models.tiny import lively, tiny

TEXTS = ["a cat sat on the mat and saw another cat", "the dog ran", "one two three four five six seven", "on"]
VOCAB = MIN_VOCAB + 22


def sparse_config(router: str = "topk", options: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """Three layers, the last two sparse with five experts and a shared one."""
    moe: dict[str, Any] = {"num_experts": 5, "k": 2, "hidden": 12, "dense_first": 1, "shared": 1}
    values = {name: changes.pop(name) for name in list(changes) if name in MoEConfig.__dataclass_fields__}
    choice = RouterConfig(router, options or {})
    return tiny(MoEConfig(**(moe | values), router=choice), vocab_size=VOCAB, num_layers=3, **changes)


def loud_model(config: ModelConfig | None = None, seed: int = 1) -> Decoder:
    """A model whose text depends on all of its context, with a tokenizer."""
    model = lively(config or sparse_config(), seed)
    model.tokenizer = train_bpe([text + " " for text in TEXTS] * 20, VOCAB)
    assert model.tokenizer.get_vocab_size() <= VOCAB
    return model


def saved_folder(folder: Path, config: ModelConfig | None = None) -> tuple[Decoder, Path]:
    """A model and the folder it was saved in."""
    model = loud_model(config)
    mo.save(model, folder)
    return model, folder
