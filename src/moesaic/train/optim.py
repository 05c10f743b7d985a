"""AdamW with honest parameter groups, and learning-rate schedules as plain functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from moesaic.errors import ConfigError
from moesaic.experts import StackedExperts
from moesaic.routing import Router


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
        lr, min_lr_ratio: peak learning rate, and the share of it left at the end.
        betas, eps, weight_decay: AdamW's; decay applies to matrices only, see ``parameter_groups``.
        clip: largest global gradient norm; 0 disables.
        schedule: "cosine"; "wsd" (warm-up, stable, linear decay over the last ``decay_fraction``); "constant".
        warmup: steps of linear warm-up; None is 5% of the run.
    """

    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int | None = None
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optim.lr must be above 0, not {self.lr}.")
        if not 0 <= self.min_lr_ratio <= 1 or not 0 < self.decay_fraction <= 1:
            raise ConfigError("optim.min_lr_ratio must lie in [0, 1] and optim.decay_fraction in (0, 1].")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"optim.betas must be two numbers in [0, 1), not {list(self.betas)}.")
        if self.weight_decay < 0 or self.clip < 0 or self.eps <= 0 or (self.warmup is not None and self.warmup < 0):
            raise ConfigError(
                "optim.weight_decay, optim.clip and optim.warmup must be at least 0, and optim.eps above 0."
            )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Every trained parameter in exactly one group of one of two kinds, by what it is and not by its name or shape alone.

    "decay": matrices of attention, feed-forward networks, experts and an untied head. "no_decay": embeddings (a tied head
    with them), norm gains, biases, and everything in a router (its scale is governed by the z-loss; fieldguide 2.15).
    """
    plain: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            plain.add(id(module.weight))
        if isinstance(module, StackedExperts):  # stacked over experts, their biases look like matrices
            plain.update(id(bias) for bias in (module.b_in, module.b_out) if bias is not None)
        if isinstance(module, Router):
            plain.update(id(p) for p in module.parameters())
    # One operation updates a group, and knows one kind of tensor: whole ones, or those that FSDP sharded over one mesh.
    groups: dict[tuple[bool, object], list[nn.Parameter]] = {(True, None): [], (False, None): []}
    for name, parameter in model.named_parameters():  # shared parameters come once
        if parameter.requires_grad:
            matrix = parameter.dim() >= 2 and id(parameter) not in plain and not name.endswith("constant_v")
            groups.setdefault((matrix, getattr(parameter, "device_mesh", None)), []).append(parameter)
    return [
        {"name": "decay", "params": held, "weight_decay": weight_decay}
        if matrix
        else {"name": "no_decay", "params": held, "weight_decay": 0.0}
        for (matrix, _), held in groups.items()
    ]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``; the fused kernel where every parameter's device has one.

    Raises ``ConfigError`` for single-neuron experts built with sparse gradients, which AdamW cannot take.
    """
    for name, module in model.named_modules():
        if getattr(module, "sparse_grad", False):
            raise ConfigError(
                f"{name or 'The model'} gives sparse gradients (sparse_grad=True), which AdamW and clipping cannot take; train "
                "it in your own loop with torch.optim.SparseAdam, or set sparse_grad=False."
            )
    groups = [group for group in parameter_groups(model, config.weight_decay) if group["params"]]
    betas = (config.betas[0], config.betas[1])
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of step ``step`` (0-based) of ``steps``."""
    warmup = min(config.warmup if config.warmup is not None else math.ceil(steps * 0.05), steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    floor = config.min_lr_ratio
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        decay = max(1, round(steps * config.decay_fraction))
        left = (steps - step) / decay
        return config.lr * (1.0 if left > 1 else floor + (1 - floor) * left)
    progress = (step - warmup) / max(1, steps - warmup)
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
