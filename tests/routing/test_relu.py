"""ReLU routing: rows, penalty and controller by hand; gradients against a dense mixture; the controller finds its target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.data.packing import Batch
from moesaic.errors import ConfigError
from moesaic.experts import MoE
from moesaic.models import build_model
from moesaic.routing import Outcome, StepStats, build_router
from moesaic.routing.relu import ReLURouter
from moesaic.train.step import train_step
from tests.models.tiny import VOCAB, sparse
from tests.routing.gates import identity_router, padded, route


def _relu(k: int = 1, experts: int = 3, **options: Any) -> ReLURouter:
    router = identity_router("relu", experts, k, **options).double()
    assert isinstance(router, ReLURouter)
    return router


def _share(active: float) -> StepStats:
    return StepStats(torch.zeros(8, dtype=torch.int64), active_share=active)


def test_an_expert_runs_where_its_score_is_positive() -> None:
    plan = route([[1.0, -2.0, 0.5], [-1.0, 0.0, -3.0]], 1, "relu")  # 0 is not above 0: the second token has nobody
    assert plan.num_rows == 6
    assert plan.token_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert plan.expert_N.tolist() == [0, 3, 2, 3, 3, 3]
    assert plan.weight_N.tolist() == [1.0, 0.0, 0.5, 0.0, 0.0, 0.0]
    assert plan.counts_E.tolist() == [1, 0, 1]
    assert int(plan.dropped) == 0


def test_output_and_gradients_equal_the_dense_mixture() -> None:
    layer = MoE(6, 8, 5, 2, "relu", {"init_std": 0.5}).double()
    x_TD = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    upstream_TD = torch.randn(9, 6, dtype=torch.float64)
    gate = layer.router.get_parameter("gate.weight")
    inputs = [x_TD, gate, *layer.experts.parameters()]
    y_TD, _ = layer(x_TD)
    got = torch.autograd.grad((y_TD * upstream_TD).sum(), inputs)
    scores_TE = (x_TD @ gate.T).clamp(min=0)
    dense_TD = sum(scores_TE[:, e, None] * layer.experts.compute_one(e, x_TD) for e in range(5))
    want = torch.autograd.grad((dense_TD * upstream_TD).sum(), inputs)  # type: ignore[union-attr]
    torch.testing.assert_close(y_TD, dense_TD, atol=1e-12, rtol=0)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def _penalty(router: ReLURouter, logits: list[list[float]], valid: list[int], layers: int) -> tuple[float, Tensor]:
    z_TE = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    loss = router.own_losses(router(z_TE, padded(valid)), Outcome(torch.zeros(len(logits)), num_layers=layers))["l1"]
    (grad_TE,) = torch.autograd.grad(loss, z_TE)
    return loss.item(), grad_TE


def test_the_penalty_by_hand() -> None:
    # R = [[1, 0, .5], [2, 0, 0]], k = 1: uses 2, 0, 1; f = 3/(1 * 2) * (2, 0, 1) = (3, 0, 1.5).
    # L_reg = 1/(L T) (3 * 3 + 1.5 * .5) = 9.75 / (2 * 2); times lambda = 0.1. The third token is padding.
    logits = [[1.0, -2.0, 0.5], [2.0, -1.0, -1.0], [9.0, 9.0, 9.0]]
    loss, grad_TE = _penalty(_relu(lambda_start=0.1), logits, [1, 1, 0], layers=2)
    assert loss == pytest.approx(0.1 * 9.75 / 4)
    per_pair = 0.1 / (2 * 2)  # f is not differentiated, and silent experts are not pushed further down
    expected = torch.tensor([[3.0, 0, 1.5], [3.0, 0, 0], [0, 0, 0]], dtype=torch.float64) * per_pair
    torch.testing.assert_close(grad_TE, expected)
    # Plain L1: (1 + .5 + 2) / (L T), every active pair alike. Three layers.
    loss, grad_TE = _penalty(_relu(lambda_start=0.1, balance=False), logits, [1, 1, 0], layers=3)
    assert loss == pytest.approx(0.1 * 3.5 / 6)
    assert grad_TE.unique().tolist() == pytest.approx([0.0, 0.1 / 6])


def test_balancing_leaves_the_penalty_as_it_is_where_loads_are_equal_to_the_target() -> None:
    logits = [[2.0, -1.0], [-1.0, 3.0]]  # k = 1 of 2 experts, each used once: f = 2/(1 * 2) * 1 = 1
    plain, balanced = (_penalty(_relu(1, 2, balance=balance), logits, [1, 1], 1)[0] for balance in (False, True))
    assert plain == pytest.approx(balanced) == pytest.approx(1e-8 * 2.5)


def test_the_controller_by_hand() -> None:
    router = _relu(k=2, experts=8)  # aims at 2/8 of all pairs
    seen = []
    for active in (0.5, 0.26, 0.2, 0.25, 0.0):  # too many, too many, too few, just right, far too few
        router.after_step(_share(active))
        seen.append(float(router.penalty))
    assert seen == pytest.approx([1.2e-8, 1.44e-8, 1.2e-8, 1.2e-8, 1e-8])


def test_the_controller_stays_finite_where_the_target_cannot_be_met() -> None:
    router = build_router("relu", 4, 4, 1, {"alpha": 10.0})
    for _ in range(80):
        router.after_step(_share(1.0))
    assert router.get_buffer("penalty").isfinite()
    for _ in range(160):
        router.after_step(_share(0.0))
    assert router.get_buffer("penalty") > 0  # zero would never grow again


def test_the_controller_finds_the_target_in_training() -> None:
    """A small decoder with two sparse layers of 4 experts, k = 1: from half of the pairs to a quarter, and there it stays."""
    options = {"lambda_start": 1e-4, "init_std": 0.2}
    model = build_model(sparse("relu", options, k=1), seed=0)
    ids = torch.randint(VOCAB, (4, 33), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(4, 32, dtype=torch.bool)
    batch = Batch(ids[:, :-1], ids[:, 1:], ones, torch.zeros(4, 32, dtype=torch.int64), torch.zeros(4, 32).long())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    shares = []
    for step in range(240):
        reading, _ = train_step(model, optimizer, [batch], lr=3e-3, clip=1.0, step=step)
        used = sum(int(layer.load_E.sum()) for layer in reading.layers.values())
        shares.append(used / (2 * 4 * 128))
        assert reading.losses["l1"] >= 0
    assert shares[0] > 0.4
    late = torch.tensor(shares[-60:])
    assert abs(float(late.mean()) - 0.25) < 0.04
    penalties = {float(sparse.router.get_buffer("penalty")) for sparse in model.moe_layers().values()}
    assert len(penalties) == 1  # one measure over all layers, one strength


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lambda_start": 0.0}, "lambda_start must be above 0, not 0.0"),
        ({"alpha": 1.0}, "alpha must be above 1, not 1.0"),
        ({"init_std": 0.0}, "init_std must be above 0, not 0.0"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_router("relu", 8, 4, 2, options)
