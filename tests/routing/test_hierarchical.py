"""Two-level routing: products of two gates by hand, the same plan with and without joint scores, only chosen gates read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moesaic.errors import ConfigError
from moesaic.plan import RoutingPlan
from moesaic.routing import Router, TokenContext, build_router
from moesaic.routing.balance import balance_loss


def written(groups: int, experts: int, k: int, **options: Any) -> Router:
    """A router of width groups + experts whose input is its logits: those of the groups, then those within groups."""
    router = build_router("hierarchical", groups + experts, experts, k, {"groups": groups, **options}).double()
    eye = torch.eye(groups + experts, dtype=torch.float64)
    with torch.no_grad():
        router.get_parameter("primary.weight").copy_(eye[:groups])
        router.get_parameter("secondary.weight").copy_(eye[groups:])
    return router


def ln(*numbers: float) -> list[float]:
    return [math.log(x) for x in numbers]


# Groups 1/4, 3/4; within group 0 (experts 0, 1) 1/5, 4/5; within group 1 (experts 2, 3) 2/3, 1/3.
# Products: 0.05, 0.2, 0.5, 0.25. A second token of zeros: every product 1/4, ties to the lowest.
X_TD = torch.tensor([ln(1, 3, 1, 4, 2, 1), [0.0] * 6], dtype=torch.float64)


@pytest.mark.parametrize("joint_scores", [False, True])
@pytest.mark.parametrize(
    ("k", "options", "experts", "weights"),
    [
        # One of each group, the better group first; flat top-2 would have taken 2 and 3.
        (2, {"normalize": "none"}, [[2, 1], [0, 2]], [[0.5, 0.2], [0.25, 0.25]]),
        (2, {"normalize": "joint"}, [[2, 1], [0, 2]], [[5 / 7, 2 / 7], [0.5, 0.5]]),
        # Both of the best group.
        (2, {"normalize": "none", "k_groups": 1}, [[2, 3], [0, 1]], [[0.5, 0.25], [0.25, 0.25]]),
        (1, {"normalize": "none"}, [[2], [0]], [[0.5], [0.25]]),
        # k = E: the products themselves, whichever way they are normalised.
        (4, {"normalize": "level"}, [[2, 3, 1, 0], [0, 1, 2, 3]], [[0.5, 0.25, 0.2, 0.05], [0.25] * 4]),
        (4, {"normalize": "joint"}, [[2, 3, 1, 0], [0, 1, 2, 3]], [[0.5, 0.25, 0.2, 0.05], [0.25] * 4]),
    ],
)
def test_by_hand(
    k: int, options: dict[str, Any], experts: list[list[int]], weights: list[list[float]], joint_scores: bool
) -> None:
    plan = written(2, 4, k, joint_scores=joint_scores, **options)(X_TD)
    assert plan.expert_TK.tolist() == experts
    torch.testing.assert_close(plan.weight_TK, torch.tensor(weights, dtype=torch.float64))


def test_level_normalises_over_the_chosen_of_each_gate() -> None:
    # 3 groups of 3, two of each. Groups 1, 2, 3 of 6: chosen 2 and 1, weights 3/5, 2/5. Within: 5, 3, 2 -> 5/8, 3/8.
    x_TD = torch.tensor([ln(1, 2, 3) + 3 * ln(2, 5, 3)], dtype=torch.float64)
    plan = written(3, 9, 4, normalize="level")(x_TD)
    assert plan.expert_TK.tolist() == [[7, 8, 4, 5]]
    assert plan.weight_TK[0].tolist() == pytest.approx([3 / 8, 9 / 40, 1 / 4, 3 / 20])


def test_joint_scores_are_the_product_distribution_and_keep_the_primary_scale() -> None:
    plan = written(2, 4, 2, joint_scores=True)(X_TD)
    assert plan.gate is not None
    expected = torch.tensor([[0.05, 0.2, 0.5, 0.25], [0.25] * 4], dtype=torch.float64)
    torch.testing.assert_close(plan.gate.probs_TE, expected)
    torch.testing.assert_close(plan.gate.logits_TE.softmax(1), expected)
    # The z-loss sees the primary gate: ln(1 + 3) and ln(1 + 1).
    assert plan.gate.logits_TE.logsumexp(1).tolist() == pytest.approx(ln(4, 2))


def test_importance_is_the_sum_of_the_products() -> None:
    plan = written(2, 4, 2, normalize="none")(X_TD)
    # Expert sums: 0.25, 0.2, 0.5 + 0.25, 0: mean 0.3, variance ((0.05^2 + 0.1^2 + 0.45^2 + 0.3^2) / 4).
    value, _ = balance_loss(plan, {"importance": 1.0})
    assert value.item() == pytest.approx((0.0025 + 0.01 + 0.2025 + 0.09) / 4 / 0.09)


def random_router(k: int, **options: Any) -> tuple[Router, Tensor]:
    router = build_router("hierarchical", 6, 12, k, {"groups": 4, "init_std": 0.8, **options}).double()
    return router, torch.randn(9, 6, dtype=torch.float64)


def dense_weights(router: Router, plan: RoutingPlan, x_TD: Tensor, normalize: str) -> Tensor:
    """The definition, with every gate written out and the choice masked in."""
    z1_Ta = x_TD @ router.get_parameter("primary.weight").T
    z2_Tab = (x_TD @ router.get_parameter("secondary.weight").T).view(-1, 4, 3)
    product_TE = (z1_Ta.softmax(1)[:, :, None] * z2_Tab.softmax(2)).flatten(1)
    chosen_TE = torch.zeros(9, 12, dtype=torch.bool).scatter(1, plan.expert_TK, True)
    if normalize == "joint":
        product_TE = product_TE / (product_TE * chosen_TE).sum(1, keepdim=True)
    if normalize == "level":
        chosen_Tab = chosen_TE.view(9, 4, 3)
        group_Ta = z1_Ta.exp() * chosen_Tab.any(2)
        within_Tab = z2_Tab.exp() * chosen_Tab
        within_Tab = within_Tab / within_Tab.sum(2, keepdim=True).clamp(min=1e-300)
        product_TE = ((group_Ta / group_Ta.sum(1, keepdim=True))[:, :, None] * within_Tab).flatten(1)
    return product_TE.gather(1, plan.expert_TK)


@pytest.mark.parametrize("joint_scores", [False, True])
@pytest.mark.parametrize(("k", "normalize"), [(2, "none"), (2, "joint"), (4, "joint"), (4, "level"), (6, "level")])
def test_weights_and_gradients_against_the_definition(k: int, normalize: str, joint_scores: bool) -> None:
    router, x_TD = random_router(k, normalize=normalize, joint_scores=joint_scores)
    x_TD.requires_grad_()
    plan = router(x_TD)
    want_TK = dense_weights(router, plan, x_TD, normalize)
    torch.testing.assert_close(plan.weight_TK, want_TK)
    upstream_TK = torch.randn_like(want_TK)
    inputs = [x_TD, *router.parameters()]
    got = torch.autograd.grad((plan.weight_TK * upstream_TK).sum(), inputs)
    want = torch.autograd.grad((want_TK * upstream_TK).sum(), inputs)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.any()


@pytest.mark.parametrize("rules", ["none", "hard", "soft", "both"])
@pytest.mark.parametrize(("k", "normalize"), [(2, "none"), (4, "joint"), (4, "level")])
def test_joint_scores_change_no_plan(k: int, normalize: str, rules: str) -> None:
    router, x_TD = random_router(k, normalize=normalize)
    joint, _ = random_router(k, normalize=normalize, joint_scores=True)
    joint.load_state_dict(router.state_dict())
    allowed_TE = torch.rand(9, 12) < 0.5
    allowed_TE[0], allowed_TE[1, 1:], allowed_TE[2, :6] = False, False, False
    bias_TE = torch.randn(9, 12, dtype=torch.float64)
    ctx = TokenContext(
        valid_T=torch.arange(9) != 4,
        allowed_TE=allowed_TE if rules in ("hard", "both") else None,
        rule_bias_TE=bias_TE if rules in ("soft", "both") else None,
    )
    a, b = router(x_TD, ctx), joint(x_TD, ctx)
    assert torch.equal(a.expert_TK, b.expert_TK)
    torch.testing.assert_close(a.weight_TK, b.weight_TK)
    for plan in (a, b):
        inputs = list((router if plan is a else joint).parameters())
        for grad in torch.autograd.grad(plan.weight_N.square().sum(), inputs):
            assert grad.isfinite().all()


def test_a_soft_rule_on_uniform_gates_gives_the_share_of_its_bias() -> None:
    bias_TE = torch.randn(2, 4, dtype=torch.float64)
    gate = written(2, 4, 2, joint_scores=True)(X_TD * 0, TokenContext(rule_bias_TE=bias_TE)).gate
    assert gate is not None
    torch.testing.assert_close(gate.probs_TE, bias_TE.softmax(1))


def test_live_weights_of_the_own_choice() -> None:
    for k, normalize in [(2, "none"), (4, "joint"), (4, "level")]:
        router, x_TD = random_router(k, normalize=normalize, joint_scores=True)
        plan = router(x_TD)
        torch.testing.assert_close(router.weigh(plan.gate, plan.expert_TK), plan.weight_TK)


def test_gates_of_groups_nobody_chose_are_not_read() -> None:
    router, x_TD = random_router(2)
    x_TD = x_TD[:1].expand(3, 6)
    before = router(x_TD)
    unread = sorted(set(range(4)) - set((before.expert_N // 3).tolist()))
    assert len(unread) == 2
    with torch.no_grad():
        for group in unread:
            router.get_parameter("secondary.weight")[3 * group : 3 * group + 3] = float("nan")
    after = router(x_TD)
    assert torch.equal(after.expert_N, before.expert_N)
    assert torch.equal(after.weight_N, before.weight_N)
    (grad,) = torch.autograd.grad(after.weight_N[0], [router.get_parameter("secondary.weight")])
    assert not grad[3 * unread[0]].any()  # zero, neither None nor NaN


def test_cost_grows_as_the_square_root_of_the_number_of_experts() -> None:
    flops = []
    for experts in (64, 256, 1024):
        router, x_TD = build_router("hierarchical", 8, experts, 2), torch.randn(10, 8)
        with FlopCounterMode(display=False) as counter:
            router(x_TD)
        flops.append(counter.get_total_flops())
    side = 3 * 2 * 10 * 8  # a + 2 b = 3 sqrt(E)
    assert flops == [side * 8, side * 16, side * 32]


@pytest.mark.parametrize(("experts", "groups"), [(1, 1), (7, 1), (12, 3), (16, 4), (128, 8)])
def test_groups_by_default(experts: int, groups: int) -> None:
    router = build_router("hierarchical", 4, experts, min(2, experts))
    assert router.groups == groups
    assert router(torch.randn(5, 4)).num_rows == 5 * min(2, experts)


@pytest.mark.parametrize(
    ("k", "options", "words"),
    [
        (2, {"groups": 3}, "groups=3 must divide num_experts=8"),
        (3, {"groups": 4, "k_groups": 2}, "k_groups must divide k"),
        (6, {"groups": 4, "k_groups": 2}, "at most 2 experts to each"),
        (4, {"groups": 2, "k_groups": 4}, "be at most 2"),
        (2, {"groups": 4, "k_groups": 1}, 'use normalize="none"'),
        (1, {"groups": 4}, 'use normalize="none"'),
        (2, {"groups": 4, "normalize": "level"}, "every secondary weight exactly 1"),
        (9, {}, "k=9 experts per token are impossible"),
    ],
)
def test_refusals(k: int, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_router("hierarchical", 4, 8, k, options)
