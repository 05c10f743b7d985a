"""Tree routing: path products by hand, soft mixture and hard path, hardening, and that only the path is read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moesaic.errors import ConfigError
from moesaic.routing import Outcome, Router, TokenContext, build_router


def written(experts: int, **options: Any) -> Router:
    """A tree of width E - 1 whose input is the scores of its nodes, level by level."""
    router = build_router("tree", experts - 1, experts, 1, options).double()
    with torch.no_grad():
        router.get_parameter("nodes.weight").copy_(torch.eye(experts - 1))
    return router


# Root right 3/4; its left child right 1/2; its right child right 1/5.
# Leaves: 1/4 * 1/2, 1/4 * 1/2, 3/4 * 4/5, 3/4 * 1/5.
# Second token: all even, ties to the first branch. Third: 0.45 * 0.9 is the best leaf, but the path goes right (0.55, even).
X_TD = torch.tensor(
    [
        [math.log(3), 0.0, -math.log(4)],
        [0.0, 0.0, 0.0],
        [math.log(0.55 / 0.45), -math.log(9), 0.0],
    ],
    dtype=torch.float64,
)
LEAVES = [[0.125, 0.125, 0.6, 0.15], [0.25] * 4, [0.405, 0.045, 0.275, 0.275]]


def test_soft_training_by_hand() -> None:
    plan = written(4)(X_TD)
    assert plan.expert_TK.tolist() == [[0, 1, 2, 3]] * 3
    torch.testing.assert_close(plan.weight_TK, torch.tensor(LEAVES, dtype=torch.float64))
    assert plan.gate is not None
    assert torch.equal(plan.gate.probs_TE, plan.weight_TK)


def test_the_hard_path_by_hand() -> None:
    plan = written(4, train="hard")(X_TD)
    assert plan.expert_TK.tolist() == [[2], [0], [2]]
    assert plan.weight_N.tolist() == pytest.approx([0.6, 0.25, 0.275])
    after_soft = written(4).eval()(X_TD)
    assert after_soft.expert_TK.tolist() == [[2], [0], [2]]
    assert after_soft.weight_N.tolist() == [1, 1, 1]
    assert after_soft.gate is None


def test_three_branches_by_hand() -> None:
    # Nine leaves, two scores per node. Root softmax(0, ln 2, ln 3): 1/6, 2/6, 3/6. Child 2's scores are the last two:
    # softmax(0, ln 1, ln 8): 1/10, 1/10, 8/10.
    x_TD = torch.zeros(1, 8, dtype=torch.float64)
    x_TD[0, :2] = torch.tensor([2.0, 3.0]).log()
    x_TD[0, 7] = math.log(8)
    soft, hard = written(9, branch=3)(x_TD), written(9, branch=3, train="hard")(x_TD)
    expected = [1 / 18] * 3 + [2 / 18] * 3 + [0.05, 0.05, 0.4]
    assert soft.weight_N.tolist() == pytest.approx(expected)
    assert hard.expert_N.tolist() == [8]
    assert hard.weight_N.tolist() == pytest.approx([0.4])


def test_hardening_by_hand() -> None:
    def entropy(p: float) -> float:
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    router = written(4, hardening=0.5)
    plan = router(X_TD)
    nodes = [entropy(0.75) + entropy(0.5) + entropy(0.2), 3 * math.log(2), entropy(0.55) + entropy(0.1) + math.log(2)]
    loss = router.own_losses(plan, Outcome(torch.zeros(3), num_layers=2))
    assert set(loss) == {"hardening"}
    assert loss["hardening"].item() == pytest.approx(0.5 * sum(nodes) / 3 / 3 / 2)
    padded = router(X_TD, TokenContext(valid_T=torch.tensor([True, False, True])))
    loss = router.own_losses(padded, Outcome(torch.zeros(3)))
    assert loss["hardening"].item() == pytest.approx(0.5 * (nodes[0] + nodes[2]) / 2 / 3)
    assert written(4, hardening=0.0).own_losses(plan, Outcome(torch.zeros(3))) == {}
    assert router.own_losses(router.eval()(X_TD), Outcome(torch.zeros(3))) == {}


def test_hardening_pulls_decisions_to_a_side() -> None:
    router, x_TD = build_router("tree", 6, 8, 1, {"init_std": 0.5, "hardening": 1.0}), torch.randn(32, 6)
    optimizer, sure = torch.optim.SGD(router.parameters(), lr=5.0), []
    for _ in range(80):
        plan = router(x_TD)
        sure.append(plan.gate.probs_TE.amax(dim=1).mean().item())
        router.own_losses(plan, Outcome(torch.zeros(32)))["hardening"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sure[0] < 0.5 < 0.8 < sure[-1]


def random_tree(train: str, experts: int = 8) -> tuple[Router, Tensor]:
    router = build_router("tree", 6, experts, 1, {"train": train, "init_std": 0.8}).double()
    torch.nn.init.normal_(router.get_parameter("nodes.bias"))
    return router, torch.randn(9, 6, dtype=torch.float64).requires_grad_()


def sigmoid_leaves(router: Router, x_TD: Tensor) -> Tensor:
    """The paper's definition, leaf by leaf: a product of sigmoids and their complements along the path from the root."""
    right_TM = (x_TD @ router.get_parameter("nodes.weight").T + router.get_parameter("nodes.bias")).sigmoid()
    leaves = []
    for leaf in range(8):
        node, p_T = 0, torch.ones(9, dtype=torch.float64)
        for bit in (leaf >> 2 & 1, leaf >> 1 & 1, leaf & 1):
            p_T = p_T * (right_TM[:, node] if bit else 1 - right_TM[:, node])
            node = 2 * node + 1 + bit
        leaves.append(p_T)
    return torch.stack(leaves, dim=1)


@pytest.mark.parametrize("train", ["soft", "hard"])
def test_weights_and_gradients_against_the_definition(train: str) -> None:
    router, x_TD = random_tree(train)
    plan = router(x_TD)
    want_TK = sigmoid_leaves(router, x_TD).gather(1, plan.expert_TK)
    torch.testing.assert_close(plan.weight_TK, want_TK)
    upstream_TK, inputs = torch.randn_like(want_TK), [x_TD, *router.parameters()]
    got = torch.autograd.grad((plan.weight_TK * upstream_TK).sum(), inputs)
    want = torch.autograd.grad((want_TK * upstream_TK).sum(), inputs)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("train", ["soft", "hard"])
def test_inference_reads_the_nodes_on_the_path_alone(train: str) -> None:
    router, x_TD = random_tree(train)
    router.eval()
    before = router(x_TD[:1])
    leaf = int(before.expert_N)
    path = {0, 1 + (leaf >> 2), 3 + (leaf >> 1)}
    with torch.no_grad():
        for node in set(range(7)) - path:
            router.get_parameter("nodes.weight")[node] = float("nan")
            router.get_parameter("nodes.bias")[node] = float("nan")
    after = router(x_TD[:1])
    assert torch.equal(after.expert_N, before.expert_N)
    assert torch.equal(after.weight_N, before.weight_N)


@pytest.mark.parametrize("branch", [2, 4])
def test_the_hard_path_costs_the_logarithm(branch: int) -> None:
    for experts in (16, 256, 4096):
        router = build_router("tree", 8, experts, 1, {"branch": branch, "train": "hard"})
        with FlopCounterMode(display=False) as counter:
            router.eval()(torch.randn(10, 8))
        assert counter.get_total_flops() == 2 * 10 * 8 * (branch - 1) * round(math.log(experts, branch))
        assert router.rows_per_token == 1


def test_soft_training_has_a_row_per_leaf() -> None:
    router, x_TD = random_tree("soft")
    assert router.rows_per_token == 8
    assert router(x_TD).counts_E.tolist() == [9] * 8
    assert router.eval()(x_TD).num_rows == 9


def test_rules_close_branches() -> None:
    allowed_TE = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [0, 1, 1, 1]], dtype=torch.bool)
    ctx = TokenContext(allowed_TE=allowed_TE)
    # Token 0 must go left although right is 3/4; token 2's path is unchanged.
    hard = written(4, train="hard")(X_TD, ctx)
    assert hard.expert_N.tolist() == [0, 3, 2]
    assert hard.weight_N.tolist() == pytest.approx([0.5, 1.0, 0.275])
    router = written(4, hardening=1.0)
    soft = router(X_TD, ctx)
    expected = [[0.5, 0.5, 0, 0], [0, 0, 0, 1], [0, 0.45, 0.275, 0.275]]
    torch.testing.assert_close(soft.weight_TK, torch.tensor(expected, dtype=torch.float64))
    loss = soft.weight_N.square().sum() + router.own_losses(soft, Outcome(torch.zeros(3)))["hardening"]
    for grad in torch.autograd.grad(loss, list(router.parameters())):
        assert grad.isfinite().all()


def test_a_soft_rule_on_an_even_tree_gives_the_share_of_its_bias() -> None:
    bias_TE = torch.randn(3, 4, dtype=torch.float64)
    plan = written(4)(X_TD * 0, TokenContext(rule_bias_TE=bias_TE))
    torch.testing.assert_close(plan.weight_TK, bias_TE.softmax(1))


@pytest.mark.parametrize("train", ["soft", "hard"])
def test_a_single_leaf(train: str) -> None:
    plan = build_router("tree", 4, 1, 1, {"train": train})(torch.randn(5, 4))
    assert plan.expert_N.tolist() == [0] * 5
    assert plan.weight_N.tolist() == [1] * 5


@pytest.mark.parametrize(
    ("experts", "k", "options", "words"),
    [
        (8, 2, {}, "k must be 1, not 2"),
        (12, 1, {}, "the nearest are 8 and 16"),
        (8, 1, {"branch": 4}, "the nearest are 4 and 16"),
        (8, 1, {"branch": 1}, "branch must be at least 2"),
        (8, 1, {"train": "hard", "hardening": 0.1}, "has no effect"),
        (8, 1, {"hardening": -0.1}, "at least 0"),
    ],
)
def test_refusals(experts: int, k: int, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_router("tree", 4, experts, k, options)
