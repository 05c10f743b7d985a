"""Soft MoE and the dense mixture against the definition, by hand and with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.experts import MoE
from moesaic.plan import SoftPlan
from moesaic.routing import TokenContext, build_router
from moesaic.routing.soft import SoftMoE
from tests.routing.gates import padded, route


def _soft(dim: int = 6, experts: int = 2, slots: int = 2) -> SoftMoE:
    router = SoftMoE(dim, experts, 1, slots_per_expert=slots).double()
    with torch.no_grad():
        router.scale.fill_(4.0)  # logits are cosines: at scale 1 all mixtures are nearly even
    return router


def test_three_tokens_four_slots_of_zero_scores() -> None:
    plan = _soft()(torch.zeros(3, 6, dtype=torch.float64))
    torch.testing.assert_close(plan.dispatch_GTS, torch.full((1, 3, 4), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(plan.combine_GTS, torch.full((1, 3, 4), 1 / 4, dtype=torch.float64))


def test_output_and_gradients_by_the_definition() -> None:
    layer = MoE(6, 8, 2, 1, _soft()).double()
    router = layer.router
    assert isinstance(router, SoftMoE)
    x_BSD = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    upstream_BSD = torch.randn_like(x_BSD)
    inputs = [x_BSD, router.phi, router.scale, *layer.experts.parameters()]
    y_BSD, _ = layer(x_BSD)
    got = torch.autograd.grad((y_BSD * upstream_BSD).sum(), inputs)
    sequences = []
    for x_TD in x_BSD:  # each sequence by itself
        unit_TD = x_TD / (x_TD.pow(2).sum(1, keepdim=True) + 1e-6).sqrt()
        unit_DS = router.phi / (router.phi.pow(2).sum(0, keepdim=True) + 1e-6).sqrt()
        e_TS = (router.scale * unit_TD @ unit_DS).exp()
        slots_SD = (e_TS / e_TS.sum(0)).T @ x_TD
        done_SD = torch.stack([layer.experts.compute_one(s // 2, slot) for s, slot in enumerate(slots_SD)])
        sequences.append((e_TS / e_TS.sum(1, keepdim=True)) @ done_SD)
    dense_BSD = torch.stack(sequences)
    want = torch.autograd.grad((dense_BSD * upstream_BSD).sum(), inputs)
    torch.testing.assert_close(y_BSD, dense_BSD, atol=1e-12, rtol=0)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_lengths_of_vectors_do_not_matter() -> None:
    router, x_TD = _soft(), torch.randn(5, 6, dtype=torch.float64)
    before = router(x_TD)
    with torch.no_grad():
        router.phi.mul_(torch.tensor([0.1, 1.0, 10.0, 100.0]))
    after = router(1000 * x_TD)
    torch.testing.assert_close(
        after.dispatch_GTS, before.dispatch_GTS, atol=1e-4, rtol=0
    )  # up to the 1e-6 in the norms
    torch.testing.assert_close(after.combine_GTS, before.combine_GTS, atol=1e-4, rtol=0)


def test_permuted_tokens_permute_the_plan() -> None:
    router, x_TD, order_T = _soft(), torch.randn(7, 6, dtype=torch.float64), torch.randperm(7)
    plan, permuted = router(x_TD), router(x_TD[order_T])
    torch.testing.assert_close(permuted.dispatch_GTS, plan.dispatch_GTS[:, order_T])
    torch.testing.assert_close(permuted.combine_GTS, plan.combine_GTS[:, order_T])


def test_padding_is_as_if_it_were_not_there() -> None:
    router, x_TD = _soft(), torch.randn(5, 6, dtype=torch.float64)
    plan, alone = router(x_TD, padded([1, 0, 1, 1, 0])), router(x_TD[[0, 2, 3]])
    for name in ("dispatch_GTS", "combine_GTS"):
        torch.testing.assert_close(getattr(plan, name)[:, [0, 2, 3]], getattr(alone, name))
        assert not getattr(plan, name)[:, [1, 4]].any()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_sequence_of_padding_alone_is_finite() -> None:
    router, x_TD = _soft(), torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    ctx = TokenContext(num_sequences=2, valid_T=torch.tensor([True] * 3 + [False] * 3))
    plan = router(x_TD, ctx)
    assert not plan.dispatch_GTS[1].any()
    loss = plan.dispatch_GTS.square().sum() + plan.combine_GTS.square().sum()
    with torch.autograd.detect_anomaly(check_nan=True):  # nor may a NaN appear on the way and be masked afterwards
        grads = torch.autograd.grad(loss, [x_TD, router.phi, router.scale])
    assert all(grad.isfinite().all() for grad in grads)


def test_at_decoding_every_slot_reads_the_one_token() -> None:
    layer = MoE(6, 8, 2, 1, _soft()).double().eval()
    x_1D = torch.randn(1, 6, dtype=torch.float64)
    y_1D, plan = layer(x_1D)
    assert isinstance(plan, SoftPlan)
    assert torch.equal(plan.dispatch_GTS, torch.ones(1, 1, 4, dtype=torch.float64))
    share_E = plan.combine_GTS.view(2, 2).sum(1)
    expected = sum(share_E[e] * layer.experts.compute_one(e, x_1D) for e in range(2))
    torch.testing.assert_close(y_1D, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "slots", "rows"),
    [
        ({}, 64, 2.0),  # 256 * 2 / 8
        ({"tokens": 12}, 3, 2.0),
        ({"tokens": 13}, 3, 24 / 13),  # 3.25 rounded
        ({"tokens": 1}, 1, 8.0),  # never none
        ({"slots_per_expert": 1, "tokens": 64}, 1, 0.125),
    ],
)
def test_slots_cost_what_k_rows_per_token_cost(options: dict[str, Any], slots: int, rows: float) -> None:
    router = build_router("soft_moe", 16, 8, 2, options)
    assert router.get_parameter("phi").shape == (16, 8 * slots)
    assert router.rows_per_token == pytest.approx(rows)


def test_rules_bias_and_forbid_all_slots_of_an_expert() -> None:
    router, x_TD = _soft(), torch.zeros(2, 6, dtype=torch.float64)
    bias_TE = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    plan = router(x_TD, TokenContext(rule_bias_TE=bias_TE))
    # In token 0, slots of expert 1 weigh e against 1: e / (2 + 2e) = .3655 each. In a slot of expert 1, token 0 weighs
    # e / (e + 1) = .7311.
    assert plan.combine_GTS[0, 0].tolist() == pytest.approx([0.1345, 0.1345, 0.3655, 0.3655], abs=1e-4)
    assert plan.dispatch_GTS[0, 0].tolist() == pytest.approx([0.5, 0.5, 0.7311, 0.7311], abs=1e-4)
    only_0 = router(x_TD, TokenContext(allowed_TE=torch.tensor([[True, False], [True, True]])))
    assert only_0.combine_GTS[0, 0].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert only_0.dispatch_GTS[0].tolist() == [[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 1.0, 1.0]]


def test_dense_soft_is_the_dense_mixture() -> None:
    layer = MoE(6, 8, 4, 4, "dense_soft", {"init_std": 0.5}).double()
    x_TD = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    gate = layer.router.get_parameter("gate.weight")
    inputs = [x_TD, gate, *layer.experts.parameters()]
    y_TD, plan = layer(x_TD)
    assert plan.per_token == 4
    assert plan.counts_E.tolist() == [5] * 4
    assert layer.router.rows_per_token == 4.0
    p_TE = (x_TD @ gate.T).softmax(dim=1)
    dense_TD: Tensor = sum(p_TE[:, e, None] * layer.experts.compute_one(e, x_TD) for e in range(4))  # type: ignore[assignment]
    torch.testing.assert_close(y_TD, dense_TD, atol=1e-12, rtol=0)
    upstream_TD = torch.randn_like(dense_TD)
    got, want = (torch.autograd.grad((y * upstream_TD).sum(), inputs) for y in (y_TD, dense_TD))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_dense_soft_by_hand() -> None:
    plan = route([[2.0, 1.0, 0.0, -1.0]], 4, "dense_soft")
    assert plan.expert_TK.tolist() == [[0, 1, 2, 3]]
    assert plan.weight_N.tolist() == pytest.approx([0.6439, 0.2369, 0.0871, 0.0321], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("soft_moe", {"tokens": 0}, "tokens must be at least 1, not 0"),
        ("soft_moe", {"slots_per_expert": 0}, "slots_per_expert must be at least 1, not 0"),
        ("dense_soft", {}, "k must be num_experts=4, not 2"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_router(name, 8, 4, 2, options)
