"""Truth: the MoE layer over every router, expert kind and back end equals the dumb loops, outputs and all gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.experts import MoE
from moesaic.nn.mlp import ACTIVATIONS
from moesaic.plan import CapacityRule, Gate, RoutingPlan, SoftPlan, force_balanced, from_rows, from_topk, mask_experts
from moesaic.routing import TokenContext
from tests.experts.dumb import Scripted, assert_truth
from tests.routing.cases import CASES, DIM, Case, some_input

BACKENDS = [
    ("loop", torch.float64, 1e-10),
    ("loop", torch.float32, 5e-5),
    ("grouped_mm", torch.float32, 5e-5),
    ("kernel", torch.float32, 5e-5),
    ("tiles", torch.float64, 1e-10),
    ("tiles", torch.float32, 5e-5),
]
ALL_LOSSES = {"switch": 0.3, "z": 0.1, "importance": 0.2, "logit_l2": 0.1}


def _layer(
    name: str | Scripted, k: int, options: dict[str, Any], backend: Any, dtype: torch.dtype, **kwargs: Any
) -> MoE:
    options = {**options, "init_std": 0.7} if isinstance(name, str) else {}
    experts = kwargs.pop("experts", 8)
    layer = MoE(8, 4, experts, k, name, options, backend=backend, **kwargs).to(dtype)
    if getattr(layer.router, "choice_bias_E", None) is not None:
        layer.router.get_buffer("choice_bias_E").copy_(torch.randn(layer.router.num_experts) * 0.3)
    return layer


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("case", [*CASES, Case("topk", k=8), Case("noisy_topk", k=8)], ids=lambda case: case.id)
def test_every_router(case: Case, backend: Any, dtype: Any, tolerance: float) -> None:
    layer = MoE(
        DIM, 4, case.experts - case.special, case.k, case.build(dtype), backend=backend, shared=1, zero=case.special
    ).to(dtype)
    facts, batch = layer.router.facts, some_input(2, 3, dtype=dtype)
    losses = ALL_LOSSES | ({"load": 0.2} if facts.has_load_estimate else {}) if facts.has_gate else {}
    x_TD = batch.x_BSD.flatten(0, 1)
    assert_truth(layer, x_TD, losses=losses, tolerance=tolerance, context=batch.context)
    layer.eval()
    assert_truth(layer, x_TD, tolerance=tolerance, context=batch.context)


EXPERT_KINDS: list[dict[str, Any]] = [
    {"shared": 0},
    {"shared": 2, "shared_gate": True},
    {"zero": 1},
    {"copy": 1, "zero": 1},
    {"constant": 2},
    {"zero": 2, "copy": 1, "constant": 2, "shared": 1, "shared_gate": True, "experts": 3},
]


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("kinds", EXPERT_KINDS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_kind_of_expert(kinds: dict[str, Any], gated: bool, backend: str, dtype: Any, tolerance: float) -> None:
    layer = _layer("topk", 3, {}, backend, dtype, gated=gated, **({"experts": 4} | kinds))
    if kinds.get("constant"):
        torch.nn.init.normal_(layer.get_parameter("experts.constant_v"))
        torch.nn.init.normal_(layer.get_parameter("experts.constant_mix"))
    assert_truth(layer, torch.randn(9, 8, dtype=dtype), losses=ALL_LOSSES, tolerance=tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_activation(activation: Any, gated: bool) -> None:
    layer = _layer("topk", 2, {}, "loop", torch.float64, activation=activation, gated=gated, shared=1)
    assert_truth(layer, torch.randn(6, 8, dtype=torch.float64))


# ---- hard loads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
class TestHardLoads:
    def test_one_expert(self, backend: str, dtype: Any, tolerance: float) -> None:
        layer = _layer("topk", 1, {}, backend, dtype, experts=1)
        assert_truth(layer, torch.randn(5, 8, dtype=dtype), losses=ALL_LOSSES, tolerance=tolerance)

    def test_zero_tokens(self, backend: str, dtype: Any, tolerance: float) -> None:
        layer = _layer("topk", 2, {}, backend, dtype, shared=1, zero=1, copy=1, constant=1)
        got = assert_truth(layer, torch.randn(0, 8, dtype=dtype), losses=ALL_LOSSES, tolerance=tolerance)
        assert not any(grad.any() for grad in got.values())

    def test_one_token(self, backend: str, dtype: Any, tolerance: float) -> None:
        assert_truth(_layer("topk", 2, {}, backend, dtype), torch.randn(1, 8, dtype=dtype), tolerance=tolerance)

    def test_all_rows_dropped(self, backend: str, dtype: Any, tolerance: float) -> None:
        layer = _layer("topk", 2, {}, backend, dtype, constant=1)
        layer.edits = (lambda plan: plan.send(torch.full_like(plan.expert_N, plan.num_experts)),)
        x_TD = torch.randn(5, 8, dtype=dtype)
        got = assert_truth(layer, x_TD, losses={"switch": 1.0}, tolerance=tolerance)
        assert int(layer(x_TD)[1].dropped) == 10
        assert not got["output"].any()
        assert not got["experts.stacked.w_in"].any()
        assert got["router.gate.weight"].any()  # the balancing loss counts choices, so it still teaches

    def test_skewed_load_leaves_experts_empty_with_zero_gradients(
        self, backend: str, dtype: Any, tolerance: float
    ) -> None:
        layer = _layer("topk", 1, {"normalize": "none", "gate_bias": True}, backend, dtype)
        with torch.no_grad():
            layer.router.get_parameter("gate.bias")[5] = 50.0
        x_TD = torch.randn(12, 8, dtype=dtype)
        got = assert_truth(layer, x_TD, losses={"z": 0.01}, tolerance=tolerance)
        assert layer(x_TD)[1].counts_E.tolist() == [0] * 5 + [12, 0, 0]
        for name in ("experts.w_in", "experts.w_out"):
            assert got[name][5].any()
            assert not got[name][[0, 1, 2, 3, 4, 6, 7]].any()

    @pytest.mark.parametrize("overflow", ["residual", "next_best", "reroute_to_free", "fallback_expert"])
    @pytest.mark.parametrize("renormalize", [False, True])
    def test_capacity(self, overflow: Any, renormalize: bool, backend: str, dtype: Any, tolerance: float) -> None:
        fallback = 2 if overflow == "fallback_expert" else None
        rule = CapacityRule(
            0.6, minimum=0, overflow=overflow, fallback_expert=fallback, groups=2, renormalize=renormalize
        )
        layer = _layer("topk", 2, {"normalize": "none"}, backend, dtype, capacity=rule, experts=4, shared=1)
        x_TD = torch.randn(8, 8, dtype=dtype)
        assert not torch.equal(layer(x_TD)[1].expert_N, layer(x_TD)[1].choice_N)
        assert_truth(layer, x_TD, losses={"switch": 1.0}, tolerance=tolerance)

    def test_edits(self, backend: str, dtype: Any, tolerance: float) -> None:
        layer = _layer("topk", 2, {}, backend, dtype, experts=4)
        layer.edits = (lambda plan: mask_experts(plan, [1], policy="next_best"), force_balanced)
        assert_truth(layer, torch.randn(7, 8, dtype=dtype), losses=ALL_LOSSES, tolerance=tolerance)

    @pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), -1e38])
    @pytest.mark.parametrize(("name", "k"), [("topk", 2), ("switch", 1), ("gshard", 2), ("noisy_topk", 2)])
    def test_padding_may_hold_anything(
        self, name: str, k: int, rubbish: float, backend: str, dtype: Any, tolerance: float
    ) -> None:
        layer = _layer(name, k, {}, backend, dtype, experts=3, zero=1, copy=1, constant=1, shared=1, shared_gate=True)
        valid = [1, 0, 1, 1, 0, 1, 1]
        x_TD = torch.randn(7, 8, dtype=dtype)
        x_TD[[1, 4]] = rubbish
        losses = ALL_LOSSES | ({"load": 0.2} if layer.router.facts.has_load_estimate else {})
        assert_truth(layer, x_TD, valid=valid, losses=losses, tolerance=tolerance)


def test_padding_is_as_if_it_were_not_there() -> None:
    layer = _layer("topk", 2, {}, "loop", torch.float64, shared=1, capacity=CapacityRule(0.7, minimum=0))
    x_TD = torch.randn(8, 8, dtype=torch.float64)
    valid_T = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    x_TD[~valid_T] = float("nan")
    padded, plan = layer(x_TD, TokenContext(valid_T=valid_T))
    alone, bare = layer(x_TD[valid_T])
    torch.testing.assert_close(padded[valid_T], alone, atol=1e-12, rtol=0)
    assert torch.equal(plan.expert_TK[valid_T], bare.expert_TK)
    assert torch.equal(plan.counts_E, bare.counts_E)
    assert int(plan.dropped) == int(bare.dropped) > 0


# ---- other kinds of plans ------------------------------------------------------------------------------------------


def _expert_choice(logits_TE: Tensor, ctx: TokenContext) -> RoutingPlan:
    """Every expert takes its 3 best tokens: rows are not per token, some tokens get none, some several."""
    probs_TE = logits_TE.softmax(dim=1)
    weight_EC, token_EC = probs_TE.T.topk(min(3, len(logits_TE)), dim=1)
    expert_EC = torch.arange(logits_TE.shape[1])[:, None].expand_as(token_EC)
    return from_rows(
        token_EC.flatten(), expert_EC.flatten(), weight_EC.flatten(), len(logits_TE), logits_TE.shape[1],
        valid_T=ctx.valid_T, gate=Gate(logits_TE, probs_TE),
    )  # fmt: skip


def _input_weighted(logits_TE: Tensor, ctx: TokenContext) -> RoutingPlan:
    """Llama-4: top-1, the sigmoid scales the expert's input."""
    expert_TK = logits_TE.topk(2, dim=1).indices
    score_TK = logits_TE.gather(1, expert_TK).sigmoid()
    return from_topk(
        expert_TK, torch.ones_like(score_TK), logits_TE.shape[1], valid_T=ctx.valid_T, input_weight_TK=score_TK
    )


def _loose_input_weighted(logits_TE: Tensor, ctx: TokenContext) -> RoutingPlan:
    plan = _expert_choice(logits_TE, ctx)
    return replace(plan, input_weight_N=plan.weight_N.sqrt())


def _soft(logits_TE: Tensor, ctx: TokenContext) -> SoftPlan:
    """Two slots per expert."""
    logits_TS = torch.cat([logits_TE, 0.5 * logits_TE.flip(1)], dim=1)
    if ctx.valid_T is not None:
        masked_TS = logits_TS.masked_fill(~ctx.valid_T[:, None], float("-inf"))
        return SoftPlan(masked_TS.softmax(0)[None], logits_TS.softmax(1)[None], logits_TE.shape[1], ctx.valid_T)
    return SoftPlan(logits_TS.softmax(0)[None], logits_TS.softmax(1)[None], logits_TE.shape[1])


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("make", [_expert_choice, _input_weighted, _loose_input_weighted, _soft])
@pytest.mark.parametrize("padding", [False, True])
def test_other_plans(make: Any, padding: bool, backend: str, dtype: Any, tolerance: float) -> None:
    layer = _layer(Scripted(8, 5, make), 1, {}, backend, dtype, experts=4, copy=1)
    x_TD = torch.randn(6, 8, dtype=dtype)
    if padding:
        x_TD[2] = float("nan")
    assert_truth(layer, x_TD, valid=[1, 1, 0, 1, 1, 1] if padding else None, tolerance=tolerance)


def test_loose_rows_of_a_top_k_plan_give_the_same_output() -> None:
    layer = _layer("topk", 3, {}, "loop", torch.float64, zero=1)
    x_TD = torch.randn(7, 8, dtype=torch.float64)
    y_TD, plan = layer(x_TD)
    mixed_N = torch.randperm(plan.num_rows)
    loose = from_rows(plan.token_N[mixed_N], plan.expert_N[mixed_N], plan.weight_N[mixed_N], 7, 9)
    torch.testing.assert_close(layer.dispatcher(x_TD, loose, layer.experts), y_TD, atol=1e-12, rtol=0)


def test_k_equal_to_the_number_of_experts_is_the_dense_mixture() -> None:
    layer = _layer("topk", 4, {"normalize": "none"}, "loop", torch.float64, experts=4)
    x_TD = torch.randn(5, 8, dtype=torch.float64)
    probs_TE = (x_TD @ layer.router.get_parameter("gate.weight").T).softmax(dim=1)
    dense_TD = sum(probs_TE[:, e, None] * layer.experts.compute_one(e, x_TD) for e in range(4))
    torch.testing.assert_close(layer(x_TD)[0], dense_TD, atol=1e-12, rtol=0)
