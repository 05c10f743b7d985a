"""Activation checkpointing: the same gradients, a routing decision that is never made twice, and less memory."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.models import Decoder, ModelConfig, RouterConfig, build_model
from moesaic.models.config import MoEConfig
from moesaic.plan import read
from moesaic.plan.capacity import CapacityRule
from moesaic.plan.plan import Gate, RoutingPlan, from_topk
from moesaic.routing import NO_CONTEXT, ROUTERS, LinearGate, Router, TokenContext
from moesaic.train.recompute import RecomputedDispatch, RecomputedForward, recompute_activations
from moesaic.train.step import train_step
from tests.models.tiny import lively, some_ids, sparse, tiny
from tests.train.test_step import batch_of, rows_of

CONFIGS = {
    "dense": tiny(),
    "sparse": sparse(losses={"switch": 0.1, "z": 0.1}),
    "shared": sparse(shared=1, shared_gate=True, losses={"switch": 0.1}),
    "special": sparse(zero=1, copy=1, constant=1, k=3),
    "capacity": sparse(capacity=CapacityRule(0.75, minimum=0), losses={"importance": 0.1}),
    "noise": sparse("noisy_topk", losses={"load": 0.1}),
    "sampled second": sparse("gshard"),
    "dense first, windows": tiny(MoEConfig(num_experts=3, hidden=8, dense_first=1), sliding_window=4, qk_norm="head"),
}


def gradients(model: Decoder, micro_batches: int = 1) -> tuple[dict[str, Tensor], Any]:
    """What one step without an update leaves behind."""
    kept: dict[str, Tensor] = {}

    class Keep(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            kept.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    torch.manual_seed(5)  # router noise
    whole = batch_of(4)
    cut = 4 // micro_batches
    batches = [rows_of(whole, i, i + cut) for i in range(0, 4, cut)]
    reading, plans = train_step(model, Keep(model.parameters(), lr=1.0), batches, lr=1.0, clip=0.0, step=1)
    return kept, (reading, plans)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_readings_and_plans_are_bit_for_bit_those_without(name: str, dtype: torch.dtype | None) -> None:
    torch.set_num_threads(1)
    plain, again = lively(CONFIGS[name]), lively(CONFIGS[name])
    plain.compute_dtype = again.compute_dtype = dtype
    recompute_activations(again)
    expected, (reading, plans) = gradients(plain, micro_batches=2)
    found, (reading_2, plans_2) = gradients(again, micro_batches=2)
    assert set(found) == set(expected) == {n for n, _ in plain.named_parameters()}
    for key, gradient in expected.items():
        assert torch.equal(found[key], gradient), key
    assert reading_2.record() == reading.record()
    assert (reading_2.loss, reading_2.grad_norm, reading_2.losses) == (reading.loss, reading.grad_norm, reading.losses)
    assert reading.grad_norm > 0
    for layer, plan in plans.items():
        assert torch.equal(plans_2[layer].expert_N, plan.expert_N)


class Fickle(Router):
    """Every call sees a tie and breaks it another way: call c sends a token to expert c, then c + 1, ... modulo E."""

    calls = 0

    def __init__(self, dim: int, num_experts: int, k: int) -> None:
        super().__init__()
        self.num_experts, self.k = num_experts, k
        self.gate = LinearGate(dim, num_experts, init_std=0.0)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """All logits within rounding of each other; the choice depends on how often the router was asked."""
        logits_TE = self.gate(x_TD) + torch.rand(x_TD.shape[0], self.num_experts) * 1e-7
        expert_TK = (torch.arange(self.k) + Fickle.calls).expand(x_TD.shape[0], -1) % self.num_experts
        Fickle.calls += 1
        probs_TE = logits_TE.softmax(-1)
        weight_TK = probs_TE.gather(1, expert_TK)
        return from_topk(expert_TK, weight_TK, self.num_experts, valid_T=ctx.valid_T, gate=Gate(logits_TE, probs_TE))


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_executes_the_saved_choice_of_a_router_that_changes_its_mind(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROUTERS, "fickle", Fickle)
    monkeypatch.setattr(Fickle, "calls", 0)
    config = sparse("fickle", num_experts=8, k=2, losses={"switch": 0.1})
    model = build_model(config, seed=0)
    if recompute:
        recompute_activations(model)
    executed: list[list[int]] = []
    for layer in model.moe_layers().values():
        layer.experts.register_forward_pre_hook(lambda _m, args: executed.append(args[1].tolist()))
    found, (reading, plans) = gradients(model)
    tokens = int(reading.layers[0].tokens)
    assert Fickle.calls == 2  # one decision a layer, none in the backward pass
    assert len(executed) == (4 if recompute else 2)  # the experts did run again
    if recompute:
        assert executed[2:] == executed[1::-1]  # on the very same counts, deeper layer first
    for layer, plan in plans.items():
        chosen = {layer, layer + 1}
        assert set(plan.expert_N[plan.expert_N < 8].tolist()) == chosen
        for part in ("w_in", "w_out"):
            gradient = found[f"blocks.{layer}.ffn.experts.{part}"]
            touched = {e for e in range(8) if bool(gradient[e].any())}
            assert touched == chosen, "gradient landed on experts that the forward pass did not use"
        load = [tokens if e in chosen else 0 for e in range(8)]
        assert reading.layers[layer].load_E.tolist() == load  # counted once
        assert read.load(plan).tolist() == load


def test_the_router_is_called_once_per_layer_and_micro_batch() -> None:
    model = lively(sparse(losses={"switch": 0.1}))
    recompute_activations(model)
    calls: list[int] = []
    attention: list[int] = []
    for i, block in enumerate(model.blocks):
        block.ffn.router.register_forward_hook(lambda *_, i=i: calls.append(i))
        block.attention.wq.register_forward_hook(lambda *_, i=i: attention.append(i))
    gradients(model, micro_batches=2)
    assert calls == [0, 1, 0, 1]
    assert sorted(attention) == [0] * 4 + [1] * 4  # attention, in contrast, runs twice


@pytest.mark.parametrize("name", CONFIGS)
def test_names_of_parameters_do_not_change_and_applying_twice_is_harmless(name: str) -> None:
    plain, model = lively(CONFIGS[name]), lively(CONFIGS[name])
    recompute_activations(model)
    recompute_activations(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    for layer in model.moe_layers().values():
        assert isinstance(layer.dispatcher, RecomputedDispatch)
        assert not isinstance(layer.dispatcher.inner, RecomputedDispatch)
    for block in model.blocks:
        assert isinstance(block.attention.forward, RecomputedForward)
        assert not isinstance(block.attention.forward.inner, RecomputedForward)
    ids = some_ids(2, 7)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_a_forward_bound_with_partial_is_recomputed_too() -> None:
    """Someone else's ``functools.partial`` is no sign of being wrapped already."""
    model = lively(CONFIGS["dense"])
    attention = model.blocks[0].attention
    calls: list[int] = []

    def counted(inner: Any, *args: Any) -> Tensor:
        calls.append(1)
        result: Tensor = inner(*args)
        return result

    attention.forward = partial(counted, attention.forward)  # type: ignore[method-assign]
    recompute_activations(model)
    assert isinstance(attention.forward, RecomputedForward)
    model(some_ids(1, 6)).logits.sum().backward()
    assert len(calls) == 2


def test_a_copy_of_the_model_recomputes_its_own_weights() -> None:
    model = lively(CONFIGS["dense"])
    recompute_activations(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    plain = lively(CONFIGS["dense"])
    plain.load_state_dict(twin.state_dict())
    ids = some_ids(1, 6)
    assert torch.equal(twin(ids).logits, plain(ids).logits)


def saved_bytes(model: Decoder, ids: Tensor) -> int:
    """Bytes of distinct tensors, parameters left out, that a forward pass keeps for its backward pass."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.train()(ids).logits.sum().backward()
    return sum(seen.values())


@pytest.mark.parametrize("shared", [0, 2])
def test_far_fewer_bytes_are_kept_for_the_backward_pass(shared: int) -> None:
    wide = ModelConfig(
        vocab_size=64,
        dim=32,
        num_layers=4,
        num_heads=4,
        max_seq_len=64,
        moe=MoEConfig(num_experts=4, k=2, hidden=128, shared=shared, router=RouterConfig("topk")),
    )
    plain, model = build_model(wide, seed=0), build_model(wide, seed=0)
    recompute_activations(model)
    ids = some_ids(4, 64)
    before, after = saved_bytes(plain, ids), saved_bytes(model, ids)
    assert after < before / 2, (before, after)
