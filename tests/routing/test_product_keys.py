"""Product keys: exact against brute force over all n^2 sums, ties included; heads, normalisation of queries, rules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.experts import MoE
from moesaic.models import RouterConfig, build_model
from moesaic.routing import TokenContext, build_router
from moesaic.routing.product_keys import ProductKeys
from tests.models.tiny import sparse


def make(experts: int, k: int, dim: int = 8, **options: Any) -> ProductKeys:
    router = build_router("product_keys", dim, experts, k, {"key_dim": 8, "init_std": 0.5, **options}).double()
    assert isinstance(router, ProductKeys)
    return router


def written(experts: int, k: int, **options: Any) -> ProductKeys:
    """One head whose query is the input and whose keys are unit vectors: the input is the half-scores, left then right."""
    n = math.isqrt(experts)
    router = make(experts, k, 2 * n, key_dim=2 * n, query_norm="none", **options)
    with torch.no_grad():
        router.queries.weight.copy_(torch.eye(2 * n))
        router.keys.copy_(torch.eye(n).expand(2, n, n))
    return router


def all_sums(router: ProductKeys, x_TD: Tensor) -> Tensor:
    """(T, H, E) scores by the definition: a query per head, a dot product with each pair of half-keys."""
    H, half = router.heads, router.keys.shape[2]
    query_THC = (x_TD @ router.queries.weight.T).view(len(x_TD), H, 2 * half)
    if router.query_norm == "layer":
        mean, var = query_THC.mean(-1, keepdim=True), query_THC.var(-1, keepdim=True, correction=0)
        query_THC = (query_THC - mean) / (var + 1e-5).sqrt() * router.norm.weight + router.norm.bias
    keys = router.keys.expand(2, *router.keys.shape[1:]) if router.keys.shape[0] == 2 else router.keys
    out = []
    for h in range(H):
        left, right = (keys[0], keys[1]) if router.keys.shape[0] == 2 else (keys[h], keys[H + h])
        sums = (query_THC[:, h, :half] @ left.T)[:, :, None] + (query_THC[:, h, half:] @ right.T)[:, None, :]
        out.append(sums.flatten(1))
    return torch.stack(out, dim=1)


def best(sum_THE: Tensor, k: int) -> Tensor:
    """(T, H * k) by sorting all sums; a stable sort leaves ties in order of expert."""
    return sum_THE.sort(dim=2, descending=True, stable=True).indices[:, :, :k].flatten(1)


def test_by_hand() -> None:
    # Left 0, 1, 3; right 2, 0, 1.5. Sums by expert 3 i + j: 2 0 1.5 | 3 1 2.5 | 5 3 4.5.
    # Best four: 6 (5), 8 (4.5), then 3 and 7, both 3: the lower expert first.
    x_TD = torch.tensor([[0.0, 1, 3, 2, 0, 1.5]], dtype=torch.float64)
    plan = written(9, 4)(x_TD)
    assert plan.expert_TK.tolist() == [[6, 8, 3, 7]]
    exps = [math.exp(s) for s in (5, 4.5, 3, 3)]
    assert plan.weight_N.tolist() == pytest.approx([e / sum(exps) for e in exps])
    assert plan.gate is None


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("shared_keys", [True, False])
def test_equals_brute_force(heads: int, shared_keys: bool) -> None:
    router = make(32 * 32, 8 * heads, heads=heads, shared_keys=shared_keys)
    x_TD = torch.randn(1000, 8, dtype=torch.float64)
    sum_THE = all_sums(router, x_TD)
    plan = router(x_TD)
    assert torch.equal(plan.expert_TK, best(sum_THE, 8))
    weights = sum_THE.sort(dim=2, descending=True).values[:, :, :8].softmax(2).flatten(1)
    torch.testing.assert_close(plan.weight_TK, weights)


@pytest.mark.parametrize("k", [2, 8, 40, 144])
def test_ties_go_to_the_lowest_expert(k: int) -> None:
    router = written(144, k)
    x_TD = torch.randint(3, (1000, 24)).double()  # small whole numbers: exact sums, many equal
    sum_TE = (x_TD[:, :12, None] + x_TD[:, None, 12:]).flatten(1)
    assert torch.equal(router(x_TD).expert_TK, best(sum_TE[:, None], k))


def test_two_heads_may_hit_one_expert_and_both_count() -> None:
    router = make(16, 4, heads=2)
    with torch.no_grad():
        router.queries.weight[8:] = router.queries.weight[:8]  # both heads ask the same
    layer = MoE(8, 1, 16, 4, router, expert_kind="neuron").double()
    x_TD = torch.randn(5, 8, dtype=torch.float64)
    y_TD, plan = layer(x_TD)
    assert torch.equal(plan.expert_TK[:, :2], plan.expert_TK[:, 2:])
    assert int(plan.counts_E.sum()) == 20
    one_head = torch.zeros_like(y_TD)
    for t in range(5):
        for slot in range(2):
            expert = int(plan.expert_TK[t, slot])
            one_head[t] += plan.weight_TK[t, slot] * layer.experts.compute_one(expert, x_TD[t])
    torch.testing.assert_close(y_TD, 2 * one_head)


@pytest.mark.parametrize("query_norm", ["layer", "none"])
@pytest.mark.parametrize("shared_keys", [True, False])
def test_gradients_against_the_definition(query_norm: str, shared_keys: bool) -> None:
    router = make(25, 6, heads=2, shared_keys=shared_keys, query_norm=query_norm)
    x_TD = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    plan = router(x_TD)
    want_TK = all_sums(router, x_TD).gather(2, plan.expert_TK.view(7, 2, 3)).softmax(2).flatten(1)
    torch.testing.assert_close(plan.weight_TK, want_TK)
    upstream_TK, inputs = torch.randn_like(want_TK), [x_TD, *router.parameters()]
    got = torch.autograd.grad((plan.weight_TK * upstream_TK).sum(), inputs)
    want = torch.autograd.grad((want_TK * upstream_TK).sum(), inputs)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.any()


def test_rules_find_permitted_experts_outside_the_candidates() -> None:
    router, x_TD = make(64, 3), torch.randn(20, 8, dtype=torch.float64)
    ctx = TokenContext(allowed_TE=torch.rand(20, 64) < 0.1, rule_bias_TE=torch.randn(20, 64, dtype=torch.float64))
    allowed_TE = ctx.allowed_TE
    assert allowed_TE is not None
    assert allowed_TE.sum(1).min() >= 3
    plan = router(x_TD, ctx)
    sum_TE = all_sums(router, x_TD)[:, 0] + ctx.rule_bias_TE
    assert torch.equal(plan.expert_TK, best(sum_TE.masked_fill(~allowed_TE, -math.inf)[:, None], 3))
    torch.testing.assert_close(plan.weight_TK, sum_TE.gather(1, plan.expert_TK).softmax(1))
    # Nothing but permission for everybody: the same plan as without rules.
    free = router(x_TD, TokenContext(allowed_TE=torch.ones(20, 64, dtype=torch.bool)))
    assert torch.equal(free.expert_N, router(x_TD).expert_N)


def test_batch_normalised_queries_are_those_of_torch() -> None:
    router, theirs = make(16, 4, heads=2, query_norm="batch"), nn.BatchNorm1d(16).double()
    norm = router.norm
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        theirs.weight.copy_(norm.weight)
        theirs.bias.copy_(norm.bias)
    for _ in range(3):
        x_TD = torch.randn(10, 8, dtype=torch.float64) + 2
        # Two rows of padding: neither in the statistics nor in what is compared.
        query_TQ = x_TD @ router.queries.weight.T
        valid_T = torch.arange(10) < 8
        got = norm(query_TQ, valid_T)[:8]
        torch.testing.assert_close(got, theirs(query_TQ[:8]))
    torch.testing.assert_close(norm.running_mean_Q, theirs.running_mean)
    torch.testing.assert_close(norm.running_var_Q, theirs.running_var)
    torch.testing.assert_close(norm.eval()(query_TQ, None), theirs.eval()(query_TQ))


def test_running_statistics_move_in_training_only_and_survive_empty_batches() -> None:
    router = make(16, 4, query_norm="batch")
    before = router.norm.running_mean_Q.clone()
    router(torch.zeros(0, 8, dtype=torch.float64))
    router.eval()(torch.randn(6, 8, dtype=torch.float64))
    assert torch.equal(router.norm.running_mean_Q, before)
    router.train()(torch.randn(6, 8, dtype=torch.float64))
    assert not torch.equal(router.norm.running_mean_Q, before)


def test_batch_norm_in_a_decoder_must_be_asked_for() -> None:
    facts = make(16, 4, query_norm="batch").facts
    assert (facts.causal, facts.batch_invariant) == (False, False)
    assert (facts.causal_in_evaluation, facts.batch_invariant_in_evaluation) == (True, True)
    with pytest.raises(ConfigError, match="allow_leak"):
        build_model(sparse("product_keys", {"query_norm": "batch"}))
    allowed = RouterConfig("product_keys", {"query_norm": "batch"}, allow_leak=True)
    build_model(sparse(allowed))


def test_one_expert() -> None:
    plan = make(1, 1)(torch.randn(3, 8))
    assert plan.expert_N.tolist() == [0, 0, 0]
    assert plan.weight_N.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("experts", "k", "options", "words"),
    [
        (8, 2, {}, "the nearest are 4 and 9"),
        (16, 3, {"heads": 2}, "heads=2 must divide k=3"),
        (16, 2, {"heads": 2}, "choose k of at least 4"),
        (16, 1, {}, "choose k of at least 2"),
        (16, 2, {"key_dim": 7}, "choose an even number"),
        (16, 17, {}, "k=17 experts per token are impossible"),
        (16, 2, {"query_norm": "bach"}, 'Did you mean "batch"'),
    ],
)
def test_refusals(experts: int, k: int, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_router("product_keys", 8, experts, k, options)
