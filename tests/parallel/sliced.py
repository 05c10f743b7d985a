"""What every process does in the tests of tensor parallelism: a model whole and in slices, and how far they are apart."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.layout import Layout, ParallelConfig
from moesaic.models import Decoder, ModelConfig, build_model
from moesaic.models.config import DepthConfig, LatentConfig, RouterConfig
from moesaic.parallel.apply import hold
from moesaic.parallel.gradients import sum_gradients
from moesaic.parallel.held import Held
from moesaic.parallel.tensor import slice_dispatch, slice_model
from moesaic.parallel.world import World
from moesaic.plan.capacity import CapacityRule
from moesaic.train.optim import OptimConfig, make_optimizer
from tests.models.tiny import lively, some_ids, sparse, tiny
from tests.parallel.logical import cut_out, gather_logical

LATENT = LatentConfig(kv_rank=6, nope_dim=4, rope_dim=2, value_dim=6)

DENSE = {
    "gated, grouped queries": tiny(),
    "gated, biases": tiny(mlp_bias=True, attention_bias="qkv"),
    "plain, all biases": tiny(
        gated=False, activation="gelu", mlp_bias=True, attention_bias="all", tie_embeddings=False
    ),
    "norm per head, window": tiny(qk_norm="head", sliding_window=4, norm_placement="post", norm="layernorm"),
    "norm over projections, clipped": tiny(qk_norm="projection", clip_qkv=1.5),
    "sinks": tiny(attention_sinks=True, attention_bias="all"),
    "latent": tiny(num_kv_heads=None, latent=LATENT, attention_bias="all"),
    "latent queries": tiny(num_kv_heads=None, latent=replace(LATENT, q_rank=5), attention_bias="all"),
}


def leaky(name: str, **options: int) -> RouterConfig:
    """A router that looks at other tokens."""
    return RouterConfig(name, dict(options), allow_leak=True)


SPARSE = {
    "top k": sparse(),
    "rows": sparse(backend="reference"),
    "capacity": sparse(capacity=CapacityRule(0.75, minimum=0)),
    "expert choice": sparse(leaky("expert_choice")),
    "soft": sparse(leaky("soft_moe", slots_per_expert=3)),
    "soft, one slot": sparse(leaky("soft_moe", slots_per_expert=1)),
    "all experts": sparse("dense_soft", k=4),
    "hash": sparse("hash", k=1),
    "noise": sparse("noisy_topk"),
    "shared, gated": sparse(shared=2, shared_gate=True),
    "special": sparse(zero=1, copy=1, constant=2, k=4),
    "special, rows": sparse(zero=1, copy=1, constant=2, k=4, backend="loop"),
    "biases": sparse(expert_bias=True),
    "biases, rows": replace(sparse(expert_bias=True, backend="loop"), activation="clamped_swiglu"),
    "everything": sparse(expert_bias=True, shared=1, shared_gate=True, zero=1, constant=1, k=3, dense_first=1),
    "sub-tokens": sparse(heads=2, shared=1),
    "depth": replace(sparse(shared=1), num_layers=3, depth=DepthConfig(capacity=0.4, every=2, allow_leak=True)),
    "latent, sparse": replace(sparse(shared=1), num_kv_heads=None, latent=LATENT),
}
NEURONS = {"neurons": sparse(expert_kind="neuron", hidden=1)}
# Name -> config and etp: experts in slices, or whole and their rows shared out.
CASES: dict[str, tuple[ModelConfig, int]] = {
    **{name: (config, 2) for name, config in DENSE.items()},
    **{f"{name}, sliced": (config, 2) for name, config in SPARSE.items()},
    **{f"{name}, split": (config, 1) for name, config in (SPARSE | NEURONS).items()},
}


def world_of(rank: int, etp: int) -> World:
    """Two ranks of one tensor-parallel group."""
    return World(Layout.of(ParallelConfig(tp=2, etp=etp), 2), rank)


def whole_model(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """In training; biases, sinks, gains and constants say something. Loud weights where rounding is no concern."""
    model = (lively(config) if dtype == torch.float64 else build_model(config, seed=1)).to(dtype).train()
    rng = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any() or name.endswith("norm.weight"):
                parameter.add_(torch.randn(parameter.shape, generator=rng).to(dtype), alpha=0.3)
    return model


def sliced_model(
    whole: Decoder, world: World, between: Callable[[Decoder], None] | None = None
) -> tuple[Decoder, dict[str, Held]]:
    """This rank's slices of a copy; ``between`` is done to it before its dispatchers are sliced."""
    sliced = copy.deepcopy(whole)
    held = hold(sliced)
    slice_model(sliced, world["tp"], world["etp"], held)
    if between is not None:
        between(sliced)
    slice_dispatch(sliced, world["tp"], world["etp"])
    return sliced, held


def run(model: Decoder, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Logits of some rows of three, with padding and two documents each; and a loss in which the routers' scores take part.

    The loss is a sum over tokens, so that parts of the batch add up.
    """
    rows, length = 3, 10
    valid_BS = torch.ones(rows, length, dtype=torch.bool)
    valid_BS[-1, 7:] = False
    valid_BS = valid_BS[part]
    document_BS = (torch.arange(length) >= 6).long().expand(rows, length)[part]
    torch.manual_seed(5)  # noise of routers, the same on every rank
    out = model(some_ids(rows, length)[part], valid_BS=valid_BS, document_BS=document_BS)
    targets_BS = torch.where(valid_BS, some_ids(rows, length, seed=4)[part], -100)
    loss = F.cross_entropy(out.logits.flatten(0, 1), targets_BS.flatten(), reduction="sum") / 27
    for plan in out.plans.values():
        if plan.gate is not None:
            valid_T = valid_BS.flatten().repeat_interleave(plan.num_tokens // valid_BS.numel())
            loss = loss + 0.01 * plan.gate.probs_TE[valid_T].square().sum()
    return out.logits.detach(), loss


def gradients(model: Decoder) -> dict[str, Tensor]:
    """By name, zeros where there are none."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def apart(mine: Tensor, whole: Tensor) -> float:
    """The largest difference over the largest number."""
    difference, size = (float(t.double().abs().max()) for t in (mine - whole, whole))
    return difference / size if size else difference


def all_apart(mine: dict[str, Tensor], whole: dict[str, Tensor]) -> tuple[float, float]:
    """The worst tensor's, and that of all tensors as one vector, in norms."""
    difference, size = (sum(float(t.double().square().sum()) for t in ts) for ts in (
        [mine[n] - whole[n] for n in whole], whole.values()
    ))  # fmt: skip
    return max(apart(mine[n], whole[n]) for n in whole), math.sqrt(difference / size)


def compare(whole: Decoder, sliced: Decoder, held: dict[str, Held], world: World) -> dict[str, float]:
    """How far logits, loss, gradients and the weights after a step of AdamW are apart.

    Fails where ranks that hold the same numbers hold other bits, and where a slice is not what ``held`` says.
    """
    (logits, loss), (my_logits, my_loss) = run(whole), run(sliced)
    loss.backward()  # type: ignore[no-untyped-call]
    my_loss.backward()  # type: ignore[no-untyped-call]
    sum_gradients(dict(sliced.named_parameters()), held, world, {})
    found = {"logits": apart(my_logits, logits), "loss": apart(my_loss.detach(), loss.detach())}
    mine, wanted = gradients(sliced), gradients(whole)
    for name, parameter in sliced.named_parameters():
        assert parameter.is_contiguous()
        assert mine[name].shape == parameter.shape
        assert torch.equal(parameter.data, cut_out(held[name], whole.get_parameter(name).data))
    both = gather_logical(held, mine, world)
    found["each gradient"], found["gradients"] = all_apart(both, wanted)
    for model in (whole, sliced):
        make_optimizer(model, OptimConfig(lr=1e-3)).step()
    both = gather_logical(held, {n: p.data for n, p in sliced.named_parameters()}, world)
    found["each weight"], found["weights"] = all_apart(both, {n: p.data for n, p in whole.named_parameters()})
    return found
