"""Findings about a whole run: the model's, and what batches and losses do to its experts.

>>> for finding in lint_run(config): print(finding)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moesaic.errors import ConfigError
from moesaic.experts.layer import MoE
from moesaic.models.build import build_depth_router, build_ffn
from moesaic.models.config import ModelConfig, MoEConfig, pick
from moesaic.models.lint import Finding, by_severity, lint_layer
from moesaic.train.config import TrainConfig

_FEW_ROWS = 8  # rows per expert and step, below which a step often leaves an expert without any


def lint_model(config: ModelConfig) -> list[Finding]:
    """All findings about a model, errors first. Nothing is allocated."""
    moe, found = config.moe, list(_depth(config))
    for i, layer in enumerate(config.moe_layers):
        assert moe is not None
        try:
            with torch.device("meta"):
                sparse = build_ffn(config, layer)
        except ConfigError as error:
            found.append(Finding("error", "model.moe", str(error)))
            continue
        assert isinstance(sparse, MoE)
        found += lint_layer(moe, sparse, pick(moe.num_experts, i))
    return by_severity(found)


def _depth(config: ModelConfig) -> Iterator[Finding]:
    """Findings about Mixture-of-Depths blocks."""
    depth = config.depth
    if depth is None:
        return
    try:
        with torch.device("meta"):
            facts = build_depth_router(config.dim, depth).facts
    except ConfigError as error:
        yield Finding("error", "model.depth", str(error))
        return
    if not facts.causal:
        yield Finding(
            "warning",
            "model.depth.allow_leak",
            "blocks choose tokens against later ones while training, so the training loss flatters.",
            "Trust the validation loss, which a predictor's choices give.",
        )
    yield Finding("note", "model.depth", f"evaluation and generation decide by another rule: {facts.inference_rule}.")
    if depth.capacity == 1:
        yield Finding(
            "note", "model.depth.capacity", "every token is taken, so no block is ever skipped.", "Leave depth out."
        )


def lint_run(config: TrainConfig) -> list[Finding]:
    """All findings about a run, errors first. Nothing is allocated."""
    found = lint_model(config.model)
    if config.model.moe is not None:
        found += _batches(config, config.model.moe)
    return by_severity(found)


def _batches(config: TrainConfig, moe: MoEConfig) -> list[Finding]:
    found = []
    tokens = config.batch_size * config.accumulate * config.seq_len
    for i, _ in enumerate(config.model.moe_layers):
        experts, k = pick(moe.num_experts, i), pick(moe.k, i)
        rows = tokens * k / experts
        if rows < _FEW_ROWS and moe.expert_kind == "ffn":
            idle = (1 - k / experts) ** tokens
            found.append(
                Finding(
                    "warning",
                    "batch_size",
                    f"a step has {tokens:,} tokens for {experts:,} experts, {rows:.1f} rows each: even in perfect balance an "
                    f"expert sits out {idle:.0%} of the steps, and its gradient is noise.",
                    f"Use at least {-(-_FEW_ROWS * experts // (k * config.seq_len))} rows per step, or fewer experts.",
                )
            )
            break
    capacity, experts = moe.capacity, pick(moe.num_experts, 0)
    group = tokens // config.accumulate // (1 if capacity is None else capacity.groups)
    if capacity is not None and capacity.groups > 1 and group < experts:
        found.append(
            Finding(
                "warning",
                "model.moe.capacity.groups",
                f"a routing group has {group} tokens for {experts} experts, so capacity, rounded up, hardly limits anything.",
                "Use fewer groups.",
            )
        )
    if moe.loss_scope == "global_batch" and config.accumulate == 1:
        found.append(
            Finding(
                "note",
                "model.moe.loss_scope",
                'with accumulate=1 on one process "global_batch" is the same as "micro_batch".',
            )
        )
    if config.dead_window > config.steps:
        found.append(
            Finding(
                "note",
                "dead_window",
                f"{config.dead_window} steps is longer than the run, so no expert ever counts as dead.",
            )
        )
    return found
