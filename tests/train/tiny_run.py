"""A whole training run of a few milliseconds a step: an embedded text, a tiny model, and a process that can be killed."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from moesaic.config import from_dict, to_dict
from moesaic.data.corpus import Corpus
from moesaic.data.split import TokenView, split
from moesaic.models.config import ModelConfig, MoEConfig
from moesaic.tokenizer import encode, eos_id, train_bpe
from moesaic.train.config import TrainConfig
from moesaic.train.loop import TrainResult, fit_vocabulary, run_training
from moesaic.train.optim import OptimConfig
from moesaic.train.stop import StopRequest

_VERSES = (
    "the miller's wheel turns when the river runs high",
    "count one sheep and two sheep and three sheep more",
    "bread needs flour and water and salt and some time",
    "a ship leaves at dawn and comes home before night",
)
_SUMS = (
    "def add(a, b): return a + b",
    "for i in range(3): print(i * i)",
    "x = {1: 'one', 2: 'two'}",
    "assert add(1, 2) == 3",
)


@lru_cache
def texts() -> tuple[tuple[str, str], ...]:
    """(text, label) of every document: 40 of prose, 40 of code, no two alike."""
    documents = []
    for i in range(40):
        for label, lines in (("prose", _VERSES), ("code", _SUMS)):
            documents.append(("\n".join(lines[(i * j + j) % 4] + f" {i * j}" for j in range(1, 5)), label))
    return tuple(documents)


@lru_cache
def tiny_corpus(fingerprint: str = "tiny") -> Corpus:
    """About 6000 tokens of byte-level BPE, two domains."""
    tokenizer: Tokenizer = train_bpe((text for text, _ in texts()), 300)
    ids = [[*encode(tokenizer, text), eos_id(tokenizer)] for text, _ in texts()]
    size_D = np.array([len(document) for document in ids], dtype=np.int64)
    end_D = size_D.cumsum()
    label_D = np.array([("code", "prose").index(label) for _, label in texts()], dtype=np.int64)
    view = TokenView(np.concatenate(ids).astype(np.uint16), end_D - size_D, end_D, label_D, ("code", "prose"))
    train, val = split(view, 0.1, seed=0)
    return Corpus(tokenizer, train, val, fingerprint)


def tiny_config(model: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    """40 steps of a two-layer sparse model; ``moe={}`` keeps the defaults."""
    shape = ModelConfig(
        vocab_size=64,
        dim=16,
        num_layers=2,
        num_heads=2,
        max_seq_len=48,
        moe=MoEConfig(**({"num_experts": 4, "k": 2, "hidden": 12} | (moe or {}))),
    )
    values: dict[str, Any] = {
        "steps": 40,
        "batch_size": 4,
        "seq_len": 24,
        "eval_every": 10,
        "eval_rows": 4,
        "checkpoint_every": 7,
        "keep_last": 2,
        "dead_window": 5,
        "sample_tokens": 8,
        "tensorboard": False,
        "optim": OptimConfig(lr=3e-3, warmup=4),
    }
    config = TrainConfig(replace(shape, hidden=24, **(model or {})), **(values | changes))
    return fit_vocabulary(config, tiny_corpus())


class StopAfter(StopRequest):
    """Asks to stop after so many steps, as a signal would."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        super().__init__()

    @property
    def requested(self) -> bool:
        """Read once a step by the loop."""
        self.left -= 1
        return self.left <= 0

    @requested.setter
    def requested(self, value: bool) -> None:
        assert not value


def train(config: TrainConfig, folder: Path, **more: Any) -> TrainResult:
    """``run_training`` without a progress line."""
    return run_training(config, tiny_corpus(), folder, show_progress=False, **more)


def run_in_a_process(config: dict[str, Any], folder: str, resume: bool) -> None:
    """The target of a child process: trains on one thread and listens to signals as the command line does."""
    torch.set_num_threads(1)
    with StopRequest() as stop:
        train(from_dict(TrainConfig, config), Path(folder), resume=resume, stop=stop)


def as_data(config: TrainConfig) -> dict[str, Any]:
    """Plain data for a child process."""
    data: dict[str, Any] = to_dict(config)
    return data
