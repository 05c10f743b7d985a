"""The profile of a model: training steps, reading a prompt, decoding tokens, each beside the dense twin and the limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moesaic.config import to_dict
from moesaic.cost.count import count_parameters
from moesaic.cost.flops import part_flops
from moesaic.cost.machine import memory
from moesaic.cost.traffic import cache_bytes, decode_bytes
from moesaic.errors import ConfigError
from moesaic.models.build import build_model
from moesaic.models.decoder import Decoder
from moesaic.models.twin import dense_twin
from moesaic.ops.kernel import status as kernel_status
from moesaic.profile.measure import DTYPES, Machine, Say, Times, Work, measure_decoding, measure_training
from moesaic.profile.result import Side, Tax, side, tax
from moesaic.train.recompute import recompute_activations

MODEL, TWIN = "this model", "dense twin"
_BACKWARD = 2  # products of the backward over those of the forward: one for each factor's gradient
_TRAINED_BYTES = 16  # of a parameter in training: itself, its gradient, AdamW's two moments, all fp32


@dataclass(frozen=True)
class Pair:
    """The model, and its dense twin and the tax where it has one."""

    model: Side
    twin: Side | None
    tax: Tax | None


@dataclass(frozen=True)
class Profile:
    """Everything ``moesaic profile`` knows. Seconds are seconds, work is FLOPs (training, prompt) or bytes (token).

    Attributes:
        name: what was profiled. parameters, active: of it.
        kernel: the C kernel of the experts, or why there is none; empty on a GPU.
        gflops, read_gb_per_s: measured beside the runs: 10^9 operations and 10^9 bytes a second.
        training: whole steps. prompt: reading one. token: one decoded token.
        rows_per_token: by sparse layer, what experts computed in the training steps.
        cache_bytes: keys and values a token reads besides weights, in the middle of the continuation.
    """

    name: str
    parameters: int
    active: int
    work: Work
    threads: int
    kernel: str
    gflops: float
    read_gb_per_s: float
    training: Pair | None
    prompt: Pair | None
    token: Pair | None
    rows_per_token: tuple[float, ...]
    cache_bytes: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**dataclasses.asdict(self), "work": to_dict(self.work)}


def profile(
    model: Decoder, work: Work, *, name: str = "model", train: bool = True, decode: bool = True,
    recompute: bool = False, say: Say = lambda _: None,
) -> Profile:  # fmt: skip
    """Measure ``model``, which keeps its weights; when it decodes in bf16 it is converted in place, for good.

    Args:
        train, decode: what to measure. recompute: activation checkpointing in training, as the run would have it.
        say: receives progress.

    Raises ``ConfigError`` where the context is too short or the memory too small.
    """
    _check(model, work, train=train, decode=decode)
    counts = count_parameters(model)
    models = {MODEL: model}
    if model.config.moe is not None:
        models[TWIN] = build_model(dense_twin(model.config), seed=work.seed)
    for one in models.values():
        one.to(work.device)
        if recompute and train:
            recompute_activations(one)
    machine = Machine(work)
    training = prompt = token = None
    rows: list[float] = []
    if train:
        for one in models.values():
            one.float()
            one.compute_dtype = DTYPES[work.dtype] if work.dtype != "fp32" else None
        steps = measure_training(models, work, machine, say)
        rows = [sum(column) / len(column) for column in zip(*steps[MODEL].rows, strict=True)]
        training = _pair(models, steps, _training_flops(models, work, rows), machine.gflops * 1e9)
    if decode:
        for one in models.values():
            one.to(DTYPES[work.dtype]).eval()
            one.compute_dtype = None
        times = measure_decoding(models, work, machine, say)
        reads = {key: one.prefill for key, one in times.items()}
        prompt = _pair(models, reads, _prompt_flops(models, work), machine.gflops * 1e9)
        tokens = {key: one.decode for key, one in times.items()}
        needed = {key: {part: float(n) for part, n in decode_bytes(one).items()} for key, one in models.items()}
        token = _pair(models, tokens, needed, machine.read_gb_per_s * 1e9)
    return Profile(
        name=name,
        parameters=counts.total,
        active=counts.active,
        work=work,
        threads=torch.get_num_threads(),
        kernel=kernel_status().reason if work.device == "cpu" else "",
        gflops=machine.gflops,
        read_gb_per_s=machine.read_gb_per_s,
        training=training,
        prompt=prompt,
        token=token,
        rows_per_token=tuple(rows),
        cache_bytes=cache_bytes(model, work.prompt + work.new_tokens / 2) if decode else 0.0,
    )


def _pair(
    models: Mapping[str, Decoder],
    times: Mapping[str, Times],
    work: Mapping[str, Mapping[str, float]],
    per_second: float,
) -> Pair:
    model = side(times[MODEL], work[MODEL], per_second)
    if TWIN not in models:
        return Pair(model, None, None)
    twin = side(times[TWIN], work[TWIN], per_second)
    return Pair(model, twin, tax(times[MODEL], times[TWIN], models[MODEL].config.moe_layers, model.work / twin.work))


def _training_flops(models: Mapping[str, Decoder], work: Work, rows: list[float]) -> dict[str, dict[str, float]]:
    """FLOPs of a step by part: forward and backward of what must be computed, nothing that is computed again."""
    tokens = work.batch * work.seq
    flops = {}
    for name, model in models.items():
        parts = part_flops(model.config, tokens, work.batch, rows if name == MODEL else None)
        flops[name] = {part: n * tokens * work.accumulate * (1 + _BACKWARD) for part, n in parts.items()}
    return flops


def _prompt_flops(models: Mapping[str, Decoder], work: Work) -> dict[str, dict[str, float]]:
    """FLOPs of reading a prompt, of whose logits only the last ones are needed."""
    flops = {}
    for name, model in models.items():
        parts = part_flops(model.config, work.prompt, 1)
        flops[name] = {part: n * (1 if part == "head" else work.prompt) for part, n in parts.items()}
    return flops


def _check(model: Decoder, work: Work, *, train: bool, decode: bool) -> None:
    context = model.config.max_seq_len
    if train and work.seq > context:
        raise ConfigError(f"--seq={work.seq} is longer than the model's context of {context}; lower it.")
    if decode and work.prompt + work.new_tokens > context:
        raise ConfigError(
            f"--prompt={work.prompt} and --new-tokens={work.new_tokens} do not fit in the model's context of {context}; "
            "lower one of them."
        )
    if not train or work.device != "cpu":
        return
    counts, free = count_parameters(model), memory()[1]
    needed = _TRAINED_BYTES * (counts.total + (counts.active if model.config.moe is not None else 0))
    if free is not None and needed > free:
        raise ConfigError(
            f"Training this model and its dense twin side by side takes {needed / 1e9:.1f} GB for weights, gradients and "
            f"AdamW alone, and {free / 1e9:.1f} GB are free; use --only decode."
        )
