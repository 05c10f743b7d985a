"""Top-k in its four orders: values worked by hand, gradients, ties, groups, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing import StepStats, TopK, build_router, router_options
from tests.routing.gates import identity_router, padded, route

Z = [[2.0, 1.0, 0.0, -1.0]]
C = {"score": "sigmoid", "normalize": "chosen", "balance_bias": True}


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"normalize": "none"}, [0.6439, 0.2369]),
        ({"normalize": "none", "scale": 16.0}, [10.30263, 3.79013]),
        ({"normalize": "chosen"}, [0.7311, 0.2689]),
        ({"normalize": "softmax_chosen"}, [0.7311, 0.2689]),
        (C, [0.5464, 0.4536]),
        (C | {"scale": 2.5}, [1.36612, 1.13388]),
        ({"score": "sigmoid", "normalize": "none"}, [0.8808, 0.7311]),
        ({"score": "sqrt_softplus", "normalize": "none"}, [1.45840, 1.14598]),
    ],
)
def test_weights_of_every_order(options: dict[str, Any], weights: list[float]) -> None:
    plan = route(Z, 2, **options)
    assert plan.expert_TK.tolist() == [[0, 1]]
    torch.testing.assert_close(plan.weight_TK, torch.tensor([weights]), atol=6e-5, rtol=0)


def test_scores_are_kept_without_the_selection_bias() -> None:
    router = identity_router("topk", 4, 2, **C)
    router.get_buffer("choice_bias_E").copy_(torch.tensor([-1.0, 0.0, 0.0, 0.5]))
    plan = router(torch.tensor(Z))
    # Chosen by s + b = [-.119, .731, .5, .769]; weighted by s alone.
    assert plan.expert_TK.tolist() == [[3, 1]]
    torch.testing.assert_close(plan.weight_TK, torch.tensor([[0.2689, 0.7311]]), atol=6e-5, rtol=0)
    assert plan.gate is not None
    torch.testing.assert_close(plan.gate.probs_TE, torch.tensor([[0.8808, 0.7311, 0.5, 0.2689]]), atol=6e-5, rtol=0)


def test_orders_b_and_b_prime_are_one_function() -> None:
    logits_TE = torch.randn(200, 16) * 4
    b, b_prime = (route(logits_TE, 4, normalize=n) for n in ("chosen", "softmax_chosen"))
    assert torch.equal(b.expert_N, b_prime.expert_N)
    assert (b.weight_N - b_prime.weight_N).abs().max() < 1e-6


def _by_definition(logits_E: Tensor, k: int, score: str, normalize: str, scale: float) -> Tensor:
    """Dense (E,) combine weights of one token, written out expert by expert."""
    if score == "softmax":
        scores = [z.exp() / logits_E.exp().sum() for z in logits_E]
    elif score == "sigmoid":
        scores = [1 / (1 + (-z).exp()) for z in logits_E]
    else:
        scores = [(1 + z.exp()).log() ** 0.5 for z in logits_E]
    best = sorted(range(len(scores)), key=lambda e: (-scores[e].item(), e))[:k]
    if normalize == "softmax_chosen":
        scores = [z.exp() for z in logits_E]
    total = sum((scores[e] for e in best), start=torch.zeros((), dtype=torch.float64))
    return torch.stack([
        scale * (scores[e] / total if normalize != "none" else scores[e]) if e in best else 0 * logits_E[e]
        for e in range(len(scores))
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("score", "normalize"),
    [("softmax", "softmax_chosen")]
    + [(score, normalize) for score in ("softmax", "sigmoid", "sqrt_softplus") for normalize in ("none", "chosen")],
)
def test_weights_and_gradient_are_those_of_the_definition(score: str, normalize: str) -> None:
    logits_TE = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    upstream_TE = torch.randn(6, 5, dtype=torch.float64)
    router = identity_router("topk", 5, 3, score=score, normalize=normalize, scale=1.7).double()
    plan = router(logits_TE)
    dense_TE = torch.zeros(6, 5, dtype=torch.float64).scatter(1, plan.expert_TK, plan.weight_TK)
    (got,) = torch.autograd.grad((dense_TE * upstream_TE).sum(), logits_TE)
    expected_TE = torch.stack([_by_definition(z, 3, score, normalize, 1.7) for z in logits_TE])
    (expected,) = torch.autograd.grad((expected_TE * upstream_TE).sum(), logits_TE)
    torch.testing.assert_close(dense_TE, expected_TE, atol=1e-12, rtol=0)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    if normalize != "none" or score != "softmax":  # only order A reaches experts that were not chosen
        assert got[dense_TE == 0].abs().max() < 1e-15
    else:
        assert got.abs().min() > 1e-8


@pytest.mark.parametrize(("score", "z"), [("sigmoid", -200.0), ("softmax", 0.0)])
def test_scores_that_vanish_give_weights_of_zero_and_no_nan(score: str, z: float) -> None:
    """Sigmoid underflows to 0 for every expert; a softmax does only for experts that were not chosen (live replay)."""
    router = identity_router("topk", 4, 2, score=score)
    plan = router(torch.tensor([[z, z, -300.0, -300.0]]))
    weight_TK = router.weigh(plan.gate, torch.tensor([[2, 3]]))
    assert weight_TK.tolist() == [[0.0, 0.0]]
    assert plan.weight_N.tolist() == ([0.0, 0.0] if score == "sigmoid" else [0.5, 0.5])


def test_one_renormalised_expert_is_refused_because_it_gets_no_gradient() -> None:
    for normalize in ("chosen", "softmax_chosen"):
        with pytest.raises(ConfigError, match="no gradient"):
            TopK(4, 4, 1, normalize=normalize)
    router = identity_router("topk", 4, 1, normalize="none")
    router.normalize = "chosen"  # past the refusal, to see what it guards against
    logits_TE = torch.randn(3, 4, requires_grad=True)
    plan = router(logits_TE)
    assert plan.weight_N.tolist() == [1.0, 1.0, 1.0]
    (grad,) = torch.autograd.grad(plan.weight_N.sum(), logits_TE)
    assert grad.abs().max() < 1e-7
    TopK(4, 1, 1)  # a single expert has nothing to learn and is no mistake


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ties_go_to_the_lowest_expert(dtype: torch.dtype) -> None:
    router = identity_router("topk", 40, 3)
    flat = router(torch.zeros(2, 40, dtype=dtype))
    assert flat.expert_TK.tolist() == [[0, 1, 2]] * 2
    # 1.001 and 1.002 are one number in bf16: distinct in fp32, a tie after rounding.
    close_TE = torch.zeros(1, 40)
    close_TE[0, 7], close_TE[0, 21], close_TE[0, 33] = 1.001, 1.002, 1.003
    assert router(close_TE).expert_TK.tolist() == [[33, 21, 7]]
    assert router(close_TE.bfloat16()).expert_TK.tolist() == [[7, 21, 33]]


def test_switch_breaks_ties_the_same_way() -> None:
    assert route([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0]], 1, "switch").expert_N.tolist() == [0, 1]


def test_groups_of_v2_take_the_best_expert_of_each_group() -> None:
    logits = [[3.0, 0.0, 2.0, 2.0, 1.0, 1.9, -1.0, -2.0]]  # group maxima 3, 2, 1.9, -1
    kept2 = route(logits, 3, groups=4, groups_kept=2, group_score="max")
    assert kept2.expert_TK.tolist() == [[0, 2, 3]]
    assert route(logits, 3, groups=4, groups_kept=1 + 2).expert_TK.tolist() == [[0, 2, 3]]
    # By the sum of their two best, group 1 (.88 + .88) beats group 0 (.95 + .5), and group 2 (.73 + .87) is second.
    v3 = route(logits, 3, groups=4, groups_kept=2, group_score="top2_sum", score="sigmoid")
    assert v3.expert_TK.tolist() == [[2, 3, 5]]


def test_negative_biases_never_select_an_expert_outside_the_kept_groups() -> None:
    router = identity_router("topk", 4, 2, groups=2, groups_kept=1, group_score="top2_sum", **C)
    router.get_buffer("choice_bias_E").copy_(torch.tensor([-5.0, -5.0, -9.0, -9.0]))
    # Every biased score is negative, so filling masked experts with 0 would let group 1 win.
    assert router(torch.tensor([[0.0, 1.0, 5.0, 5.0]])).expert_TK.tolist() == [[1, 0]]
    # Group scores are of the biased scores: without bias group 1 would be kept.
    router.get_buffer("choice_bias_E").zero_()
    assert router(torch.tensor([[0.0, 1.0, 5.0, 5.0]])).expert_TK.tolist() == [[2, 3]]


def test_padding_goes_nowhere_and_weighs_nothing() -> None:
    plan = identity_router("topk", 4, 2)(torch.randn(3, 4), padded([1, 0, 1]))
    assert plan.expert_TK[1].tolist() == [4, 4]
    assert plan.weight_TK[1].tolist() == [0.0, 0.0]
    assert int(plan.counts_E.sum()) == int(plan.choice_counts_E.sum()) == 4
    assert int(plan.num_valid) == 2
    assert int(plan.dropped) == 0  # padding is not a drop


def test_after_step_moves_only_a_bias_that_exists() -> None:
    with_bias = TopK(4, 4, 2, balance_bias=True, bias_rate=0.5)
    with_bias.after_step(StepStats(torch.tensor([10, 0, 5, 5])))
    assert with_bias.choice_bias_E is not None
    assert with_bias.choice_bias_E.tolist() == [-0.5, 0.5, 0.0, 0.0]
    without = TopK(4, 4, 2)
    without.after_step(StepStats(torch.tensor([10, 0, 5, 5])))
    assert without.choice_bias_E is None
    frozen = TopK(4, 4, 2, balance_bias=True, bias_rate=0.0)
    frozen.after_step(StepStats(torch.tensor([10, 0, 5, 5])))
    assert frozen.get_buffer("choice_bias_E").tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("name", "num_experts", "k", "options", "words"),
    [
        ("topk", 4, 5, {}, "k=5 experts per token are impossible with num_experts=4"),
        ("topk", 4, 0, {}, "k=0"),
        ("topk", 0, 1, {}, "at least 1 expert"),
        ("topk", 6, 2, {"groups": 4}, "groups=4 must divide num_experts=6"),
        ("topk", 6, 2, {"groups": 0}, "groups=0"),
        ("topk", 6, 2, {"groups": 3, "groups_kept": 4}, "groups_kept=4 must be between 1 and groups=3"),
        ("topk", 6, 3, {"groups": 3, "groups_kept": 1}, "k=3 experts do not fit into groups_kept=1 groups of 2"),
        ("topk", 4, 2, {"score": "sigmoid", "normalize": "softmax_chosen"}, "does not go with"),
        ("topk", 4, 2, {"score": "sigmod"}, 'Did you mean "sigmoid"'),
        ("topk", 4, 2, {"normalise": "none"}, 'no option "normalise". Did you mean "normalize"'),
        ("topk", 4, 2, {"scale": "big"}, "scale of router \"topk\" must be float, not 'big'"),
        ("topk", 4, 2, {"gate_bias": 1}, "must be bool, not 1"),
        ("topk", 4, 2, {"groups": True}, "must be int, not True"),
        ("topkk", 4, 2, {}, 'no router "topkk". Did you mean "topk"'),
        ("switch", 4, 2, {}, "k must be 1, not 2"),
        ("switch", 4, 1, {"jitter": 1.0}, "jitter must be at least 0 and below 1"),
        ("gshard", 4, 1, {}, "k must be 2, not 1"),
        ("gshard", 4, 2, {"threshold": 0.0}, "threshold must be between 0 and 1"),
        ("noisy_topk", 4, 1, {}, "no task gradient"),
        ("noisy_topk", 4, 2, {"noise_floor": 0.0}, "noise_floor must be above 0"),
    ],
)
def test_impossible_routers_are_refused_in_words(
    name: str, num_experts: int, k: int, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        build_router(name, 8, num_experts, k, options)
    assert words in str(error.value)


def test_options_are_read_off_the_constructor() -> None:
    assert set(router_options("switch")) == {"jitter", "init_std"}
    router = build_router("topk", 8, 4, 2, {"scale": 2, "groups": 2, "groups_kept": None})
    assert isinstance(router, TopK)
    assert math.isclose(router.scale, 2.0)
