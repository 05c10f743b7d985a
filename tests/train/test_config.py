"""A run's settings: through JSON, and refused in words."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from moesaic.config import apply_overrides, from_dict, to_dict
from moesaic.data.config import DataConfig
from moesaic.errors import ConfigError
from moesaic.layout import ParallelConfig
from moesaic.train.config import TrainConfig
from moesaic.train.optim import OptimConfig
from tests.models.tiny import sparse
from tests.train.tiny_run import tiny_config

FULL = TrainConfig(
    model=sparse(),
    data=DataConfig(
        *(("a", "b/*.txt"), "body", "lang", "folder", "paragraphs", "skip", "tok.json", 300, 0.2, 5, "cache"),
        stream=True,
        labels=("x",),
        lanes=2,
        shuffle=3,
        val_tokens=9,
        prefetch=0,
        retries=1,
    ),
    optim=OptimConfig(0.1, 0.2, (0.5, 0.6), 1e-3, 0.0, 2.0, "wsd", 3, 0.5),
    steps=7,
    batch_size=3,
    accumulate=2,
    seq_len=33,
    seed=5,
    dtype="bf16",
    recompute=True,
    eval_every=0,
    eval_rows=1,
    checkpoint_every=0,
    keep_last=1,
    dead_window=4,
    sample_tokens=0,
    tensorboard=False,
    trace_every=2,
    parallel=ParallelConfig(ep=2),
)


def test_a_run_config_survives_json() -> None:
    again = from_dict(TrainConfig, json.loads(json.dumps(to_dict(FULL))))
    assert again == FULL
    plain = TrainConfig(replace(sparse(), max_seq_len=256))
    for one, other in ((FULL, plain), (FULL.data, plain.data), (FULL.optim, plain.optim)):
        # Every field was put to the test.
        assert [n for n in one.__dataclass_fields__ if getattr(one, n) == getattr(other, n)] == []


def test_overrides_reach_every_depth_and_unknown_keys_name_the_nearest() -> None:
    data = apply_overrides(to_dict(FULL), ["model.moe.k=3", "optim.lr=0.5", 'data.sources=["x"]'])
    config = from_dict(TrainConfig, data)
    assert config.model.moe is not None
    assert (config.model.moe.k, config.optim.lr, config.data.sources) == (3, 0.5, ("x",))
    with pytest.raises(ConfigError, match='Unknown key "num_expert" in model.moe. Did you mean "num_experts"?'):
        from_dict(TrainConfig, apply_overrides(to_dict(FULL), ["model.moe.num_expert=3"]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *[
            ({name: 0}, f"{name} must be at least 1, not 0.")
            for name in ("steps", "batch_size", "accumulate", "seq_len")
        ],
        *[({name: 0}, f"{name} must be at least 1, not 0.") for name in ("eval_rows", "keep_last", "dead_window")],
        *[({name: -1}, f"{name} must be at least 0, not -1.") for name in ("eval_every", "checkpoint_every")],
        *[({name: -1}, f"{name} must be at least 0, not -1.") for name in ("sample_tokens", "trace_every")],
        (
            {"seq_len": 65},
            "seq_len=65 is longer than the model's context; set model.max_seq_len to at least 65 (now 64).",
        ),
    ],
    ids=str,
)
def test_impossible_runs_are_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(FULL, **changes)
    assert str(caught.value) == words


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_an_impossible_share_of_validation_text_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=f"data.val_fraction must lie between 0 and 1, such as 0.05, not {fraction}"):
        DataConfig(val_fraction=fraction)


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="data.vocab_size must be at least 260"):
        DataConfig(vocab_size=259)
    assert DataConfig(vocab_size=260).vocab_size == 260


def test_the_tiny_run_has_the_vocabulary_of_its_text() -> None:
    assert tiny_config().model.vocab_size == 320  # 300 tokens, rounded up to a multiple of 64
