"""A dense sub-network for one task, cut out of a model routed by task (Task-MoE, Kudugunta et al. 2021; DEMix).

>>> small = extract_task_model(model, task=3)        # the k experts task 3 uses in every layer, and all the rest of the model
>>> mo.save(small, "task-3")

Task-level routers send all tokens of a task to the same k experts with the same weights, so those experts and weights are all
a server of that task needs: per sparse layer k experts under a ``constant`` router, every one computed for every token.
Logits equal the full model's with that task, to rounding.

Legend: E experts, K experts kept.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.experts.layer import MoE
from moesaic.experts.stacked import StackedExperts
from moesaic.models.build import build_model
from moesaic.models.config import RouterConfig
from moesaic.models.decoder import Decoder
from moesaic.routing import TokenContext
from moesaic.routing.task import Demix, Task


def extract_task_model(model: Decoder, task: int) -> Decoder:
    """The sub-network of ``task``, a copy in evaluation mode that shares no tensor with ``model``.

    Raises ``ConfigError`` for a model that is not routed by task alone, an unknown task, and layers with what a fixed set of
    experts cannot reproduce (zero-computation experts, rules, edits, capacity drops in evaluation).
    """
    moe, layers = model.config.moe, model.moe_layers()
    if moe is None or not layers:
        raise ConfigError("This model is dense; there is no expert to leave out.")
    kept = {layer: _kept(sparse, layer, task) for layer, sparse in layers.items()}
    sizes = tuple(len(expert_K) for expert_K, _ in kept.values())
    small = replace(
        model.config,
        moe=replace(moe, num_experts=sizes, k=sizes, router=RouterConfig("constant"), capacity=None, losses={}),
    )
    extracted = build_model(small, seed=0, device=model.embedding.weight.device)
    ours, theirs = extracted.state_dict(keep_vars=True), model.state_dict()
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.data = _part(name, theirs, kept)  # indexing copies; dtypes are the full model's
    extracted.compute_dtype, extracted.tokenizer = model.compute_dtype, model.tokenizer
    return extracted.eval()


def _kept(sparse: MoE, layer: int, task: int) -> tuple[Tensor, Tensor]:
    """int64 (K,) experts the task uses in this layer, and their fp32 weights."""
    router = sparse.router
    if not isinstance(router, Task | Demix):
        raise ConfigError(
            f"Layer {layer} is routed by {type(router).__name__}, not by task alone, so no fixed set of experts serves a task; "
            'train with the router "task" or "demix".'
        )
    if not 0 <= task < router.num_tasks:
        raise ConfigError(f"There is no task {task}: layer {layer} knows tasks 0 to {router.num_tasks - 1}.")
    obstacles = {
        "zero-computation experts": not isinstance(sparse.experts, StackedExperts),
        "routing rules": sparse.rules is not None,
        "plan edits": bool(sparse.edits),
        "a capacity in evaluation": sparse.capacity is not None and sparse.capacity.eval_factor is not None,
    }
    for what, there in obstacles.items():
        if there:
            raise ConfigError(f"Layer {layer} has {what}, which a fixed set of experts cannot reproduce; remove them.")
    weight = next(sparse.experts.parameters())
    was_training = router.training
    router.eval()
    with torch.no_grad():  # the vector is not read, only the task
        plan = router(weight.new_zeros(1, sparse.dim), TokenContext(task_T=torch.tensor([task], device=weight.device)))
    router.train(was_training)
    return plan.expert_N[plan.kept_N], plan.weight_N[plan.kept_N]


def _part(name: str, theirs: dict[str, Tensor], kept: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """The value of one tensor of the extracted model."""
    for layer, (expert_K, weight_K) in kept.items():
        if name == f"blocks.{layer}.ffn.router.weight_E":
            return weight_K
        if name.startswith(f"blocks.{layer}.ffn.experts."):
            return theirs[name][expert_K]
    return theirs[name].clone()
