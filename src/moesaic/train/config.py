"""A training run as frozen data, JSON or TOML in, JSON out; saved with the run as ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moesaic.data.config import DataConfig
from moesaic.errors import ConfigError
from moesaic.layout import ParallelConfig
from moesaic.models.config import ModelConfig
from moesaic.train.optim import OptimConfig


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on.

    Attributes:
        model, data, optim: the parts.
        steps: optimiser steps.
        batch_size, accumulate: rows of one micro-batch, micro-batches of one step.
        seq_len: positions of a row.
        seed: of initialisation, data order and noise.
        dtype: of activations; parameters, router and optimiser stay fp32.
        recompute: recompute attention and expert activations in the backward pass (activation checkpointing); routing
            decisions are saved, never recomputed.
        eval_every, eval_rows: validation cadence in steps (0: only at the end) and rows used, spread over the validation text.
        checkpoint_every, keep_last: checkpoint cadence in steps (0: only at the end; each is validated first) and how many to
            keep besides the best.
        dead_window: an expert without a token for this many steps counts as dead.
        sample_tokens: length of the sample written at the end of the run (0: none).
        tensorboard: also write event files.
        trace_every: store the routing plans of every n-th step (0: never).
        parallel: how the run is spread over processes; it never changes what is trained.
    """

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    seq_len: int = 256
    seed: int = 0
    dtype: Literal["fp32", "bf16"] = "fp32"
    recompute: bool = False
    eval_every: int = 100
    eval_rows: int = 64
    checkpoint_every: int = 100
    keep_last: int = 3
    dead_window: int = 50
    sample_tokens: int = 100
    tensorboard: bool = True
    trace_every: int = 0
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "seq_len", "eval_rows", "keep_last", "dead_window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("eval_every", "checkpoint_every", "sample_tokens", "trace_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be a whole number from 0 to 2**63 - 1, not {self.seed}.")
        if self.seq_len > self.model.max_seq_len:
            raise ConfigError(
                f"seq_len={self.seq_len} is longer than the model's context; set model.max_seq_len to at least {self.seq_len} "
                f"(now {self.model.max_seq_len})."
            )
