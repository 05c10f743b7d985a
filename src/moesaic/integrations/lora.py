"""LoRA with PEFT on a moesaic model's experts, and in numbers what carries an adapter and what does not.

>>> peft_model = add_lora(model, rank=8)              # on every matrix of every expert; everything else is frozen
>>> print(coverage(peft_model))                       # Adapters sit on 64 of 64 experts (100%) in 4 sparse layers: ...
>>> peft_model.save_pretrained("adapter"); load_lora(model, "adapter")
>>> merged = merge_lora(peft_model)                   # the same function without adapters, experts stacked again
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from moesaic.errors import ConfigError, MoesaicError
from moesaic.experts.layer import MoE
from moesaic.experts.special import WithSpecialExperts
from moesaic.experts.stacked import StackedExperts
from moesaic.integrations.expert_views import ExpertViews, expert_views, stack_experts
from moesaic.integrations.hf_model import MoesaicForCausalLM
from moesaic.models.decoder import Decoder

# Full names of the linear layers, as a regular expression PEFT matches against the whole name.
EXPERTS = r".*\.ffn\.experts(\.stacked)?\.\d+\.(gate|up|in|out)"
SHARED = r".*\.ffn\.shared\.mlp\.(w_in|w_out)"
DENSE = r".*\.ffn\.(w_in|w_out)"
ATTENTION = r".*\.attention\.(wq|wk|wv|wo|wq_a|wq_b|wkv_a|wkv_b)"


@dataclass(frozen=True)
class CoverageReport:
    """What of a model's experts carries adapters. ``str(report)`` says it in words.

    Attributes:
        layers: sparse layers. experts, adapted_experts: feed-forward experts, and those with an adapter on every matrix.
        matrices, adapted_matrices: of all experts. parameters, adapted_parameters: numbers in those matrices.
        trainable: numbers that train in the whole model. missing: names of matrices without an adapter.
    """

    layers: int
    experts: int
    adapted_experts: int
    matrices: int
    adapted_matrices: int
    parameters: int
    adapted_parameters: int
    trainable: int
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every matrix of every expert carries an adapter."""
        return self.matrices > 0 and self.adapted_matrices == self.matrices

    def __str__(self) -> str:
        if not self.experts:
            return "This model has no feed-forward experts."
        text = (
            f"Adapters sit on {_share(self.adapted_experts, self.experts)} experts in {self.layers} sparse layers: "
            f"{_share(self.adapted_matrices, self.matrices)} matrices, {_share(self.adapted_parameters, self.parameters)} "
            f"expert parameters; {self.trainable:,} parameters train."
        )
        if self.missing:
            more = f" and {len(self.missing) - 3} more" if len(self.missing) > 3 else ""
            text += f" Without: {', '.join(self.missing[:3])}{more}."
        return text


def add_lora(
    model: MoesaicForCausalLM | Decoder,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    *,
    experts: bool = True,
    shared: bool = False,
    dense: bool = False,
    attention: bool = False,
    **options: Any,
) -> PeftModel:
    """A PEFT model with LoRA on the experts, through views of each (``expert_views``); the model itself is frozen in place.

    Args:
        rank, alpha, dropout: of every adapter; ``alpha`` is ``2 * rank`` unless given.
        experts, shared, dense, attention: which linear layers get one.
        options: further arguments of ``peft.LoraConfig``, for example ``target_modules`` instead of the choice above.

    Raises ``ConfigError`` where nothing, or not every expert, would be adapted: some tools report success on none.
    """
    if rank < 1:
        raise ConfigError(f"The rank of an adapter must be at least 1, not {rank}.")
    hf = MoesaicForCausalLM.of(model) if isinstance(model, Decoder) else model
    wanted = {EXPERTS: experts, SHARED: shared, DENSE: dense, ATTENTION: attention}
    names = "|".join(pattern for pattern, on in wanted.items() if on)
    if not names and "target_modules" not in options:
        raise ConfigError("add_lora has nothing to adapt; set experts, shared, dense or attention to true.")
    if experts:
        expert_views(hf)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        **{"task_type": "CAUSAL_LM", "target_modules": names, **options},
    )
    peft_model = get_peft_model(hf, config)
    report = coverage(peft_model)
    if experts and "target_modules" not in options and not report.complete:
        raise ConfigError(f"Not every expert could be adapted. {report}")
    return peft_model


def load_lora(model: MoesaicForCausalLM | Decoder, adapter: str | os.PathLike[str], **options: Any) -> PeftModel:
    """The model with a saved adapter on it; ``options`` go to ``PeftModel.from_pretrained`` (``is_trainable=True``).

    Raises ``MoesaicError`` where the adapter does not fit: PEFT itself would only warn, and leave the rest at random.
    """
    hf = MoesaicForCausalLM.of(model) if isinstance(model, Decoder) else model
    if any(isinstance(module, MoE) for module in hf.modules()):
        expert_views(hf)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        try:
            return PeftModel.from_pretrained(hf, os.fspath(adapter), **options)
        except (UserWarning, RuntimeError, ValueError) as error:
            raise MoesaicError(f"The adapter {os.fspath(adapter)} does not fit this model: {error}") from error


def merge_lora(peft_model: PeftModel) -> MoesaicForCausalLM:
    """The model with its adapters added into its matrices, experts stacked again. The PEFT model is used up."""
    tuner: Any = peft_model
    merged: MoesaicForCausalLM = tuner.merge_and_unload()
    stack_experts(merged)
    return merged


def coverage(model: nn.Module) -> CoverageReport:
    """Count which expert matrices of ``model`` carry an adapter: on views, or on stacks (PEFT's ``target_parameters``)."""
    layers, trainable = 0, sum(p.numel() for p in model.parameters() if p.requires_grad)
    found: list[tuple[str, str, int, bool]] = []
    for name, layer in model.named_modules():
        if isinstance(layer, MoE):
            layers += 1
            found += [(f"{name}.experts.{e}", matrix, size, on) for e, matrix, size, on in _matrices(layer)]
    experts = {expert for expert, _, _, _ in found}
    missing = [(expert, matrix) for expert, matrix, _, on in found if not on]
    return CoverageReport(
        layers=layers,
        experts=len(experts),
        adapted_experts=len(experts - {expert for expert, _ in missing}),
        matrices=len(found),
        adapted_matrices=len(found) - len(missing),
        parameters=sum(size for _, _, size, _ in found),
        adapted_parameters=sum(size for _, _, size, on in found if on),
        trainable=trainable,
        missing=tuple(f"{expert}.{matrix}" for expert, matrix in missing),
    )


def _matrices(layer: MoE) -> Iterator[tuple[int, str, int, bool]]:
    """(expert, matrix, its size, whether it carries an adapter) of every feed-forward expert."""
    inside: Any = layer.experts.stacked if isinstance(layer.experts, WithSpecialExperts) else layer.experts
    wrapped = set()
    while hasattr(inside, "base_layer"):  # PEFT's wrappers of whole parameters, one inside the other
        wrapped.add(getattr(inside, "parameter_name", ""))
        inside = inside.base_layer
    if isinstance(inside, ExpertViews):
        for expert, linears in enumerate(inside):
            assert isinstance(linears, nn.ModuleDict)
            for name, module in linears.items():
                linear: Any = getattr(module, "base_layer", module)
                yield expert, name, linear.weight.numel(), len(getattr(module, "lora_A", ())) > 0
    elif isinstance(inside, StackedExperts):
        for expert in range(inside.num_experts):
            for name, view in inside.expert(expert).items():
                if not name.endswith("_bias"):
                    yield expert, name, view.numel(), ("w_out" if name == "out" else "w_in") in wrapped
    else:  # single neurons
        for expert in range(inside.num_experts):
            for name, parameter in inside.named_parameters(recurse=False):
                yield expert, name, parameter.numel() // inside.num_experts, name in wrapped


def _share(part: int, whole: int) -> str:
    percent = 100 * part / whole if whole else 0.0
    # Not rounded up to all: one expert left out of ten thousand must show.
    shown = "100" if part == whole else f"{min(percent, 99.9):.1f}"
    return f"{part:,} of {whole:,} ({shown}%)"
