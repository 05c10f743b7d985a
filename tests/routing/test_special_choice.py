"""Null experts and MoE++: weights and losses by hand, gating residuals, and layers whose special experts do nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.experts import MoE
from moesaic.plan import CapacityRule, Gate
from moesaic.routing import Outcome, TokenContext, build_router
from moesaic.routing.special_choice import MoEPlusPlus, NullExperts

# Two true experts, two special ones.
PROBS = [
    [0.40, 0.10, 0.30, 0.20],
    [0.10, 0.20, 0.30, 0.40],
    [0.35, 0.45, 0.15, 0.05],
]


def _inputs(router: NullExperts | MoEPlusPlus, probs_TE: list[list[float]] = PROBS) -> Tensor:
    """Inputs for which the softmax of the router (its gate becomes the identity) is exactly this."""
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(4))
    return torch.tensor(probs_TE, dtype=torch.float64).log()


def test_null_experts_by_hand() -> None:
    """k = 2: {0, null 2}, {null 3, null 2}, {1, 0}; weights over the true ones: 1; none; 0.45 : 0.35."""
    router = NullExperts(4, 4, 2, num_special=2).double()
    plan = router(_inputs(router))
    assert plan.expert_TK.tolist() == [[0, 2], [3, 2], [1, 0]]
    assert plan.weight_TK.tolist() == [pytest.approx(row) for row in ([1.0, 0.0], [0.0, 0.0], [0.5625, 0.4375])]
    assert router.rows_per_token == 1.0  # half of the experts are true ones


def test_null_balance_loss_by_hand() -> None:
    """Counts 2 1 2 1: f = (2, 1, 1.5, 1.5) / 6; P = (0.85, 0.75, 0.75, 0.65) / 3. E sum f P = 4 * 4.55 / 18."""
    router = NullExperts(4, 4, 2, num_special=2, balance=0.1).double()
    plan = router(_inputs(router))
    (loss,) = router.own_losses(plan, Outcome(torch.zeros(3), num_layers=2)).values()
    assert loss.item() == pytest.approx(0.1 * 4 * (2 * 0.85 + 0.75 + 1.5 * 0.75 + 1.5 * 0.65) / 18 / 2)


def test_null_balance_leaves_it_open_which_null_expert_is_taken() -> None:
    """Same true loads, same probabilities: all null rows on one null expert cost as much as spread ones."""
    router = NullExperts(4, 4, 2, num_special=2).double()
    plan = router(_inputs(router))
    one_sided = replace(plan, choice_N=torch.where(plan.choice_N == 3, 2, plan.choice_N))
    outcome = Outcome(torch.zeros(3))
    (a,), (b,) = (router.own_losses(p, outcome).values() for p in (plan, one_sided))
    assert a.item() == pytest.approx(b.item())


def test_null_balance_is_one_at_balance_and_ignores_padding() -> None:
    router = NullExperts(4, 4, 2, num_special=2, balance=1.0).double()
    quarter = [[0.3, 0.2, 0.3, 0.2], [0.2, 0.3, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]]
    valid_T = torch.tensor([True, True, False])
    (loss,) = router.own_losses(
        router(_inputs(router, quarter), TokenContext(valid_T=valid_T)), Outcome(valid_T)
    ).values()
    assert loss.item() == pytest.approx(1.0)


def test_null_weights_against_the_dense_formula() -> None:
    torch.manual_seed(0)
    router = NullExperts(6, 8, 3, num_special=3, init_std=0.5).double()
    x_TD, upstream_TK = torch.randn(11, 6, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64)
    plan = router(x_TD)
    (got,) = torch.autograd.grad((plan.weight_TK * upstream_TK).sum(), router.gate.weight)
    p_TE = (x_TD @ router.gate.weight.T).softmax(dim=1)
    loss = torch.zeros((), dtype=torch.float64)
    for t in range(11):
        true = [(j, e) for j, e in enumerate(plan.expert_TK[t].tolist()) if e < 5]
        for j, e in true:
            loss = loss + upstream_TK[t, j] * p_TE[t, e] / sum(p_TE[t, other] for _, other in true)
    (want,) = torch.autograd.grad(loss, router.gate.weight)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kinds", [{"zero": 2}, {"copy": 1, "zero": 1}])
def test_a_token_with_only_null_experts_gets_no_output(kinds: dict[str, int]) -> None:
    layer = MoE(4, 6, 2, 2, "null_experts", **kinds).double()  # type: ignore[arg-type]
    assert isinstance(layer.router, NullExperts)
    y_TD, plan = layer(_inputs(layer.router))
    assert not y_TD[1].any()
    assert y_TD[0].any()
    assert plan.counts_E.tolist() == [2, 1, 2, 1]  # null rows are counted


def test_null_experts_need_null_experts() -> None:
    for name in ("null_experts", "moepp"):
        with pytest.raises(ConfigError, match=r"but 0 of the 4 experts are zero-computation ones; set moe\.zero"):
            build_router(name, 4, 4, 2)
        with pytest.raises(ConfigError, match="4 of the 4"):
            build_router(name, 4, 4, 2, num_special=4)
    with pytest.raises(ConfigError, match="null experts need k of at least 2"):
        NullExperts(4, 4, 1, num_special=2)
    with pytest.raises(ConfigError, match="balance must be at least 0"):
        NullExperts(4, 4, 2, num_special=2, balance=-1.0)


# ---- MoE++ ---------------------------------------------------------------------------------------------------------


def _previous(logits_TE: Tensor) -> TokenContext:
    return TokenContext(previous=Gate(logits_TE, logits_TE.softmax(dim=1)))


def test_moepp_by_hand() -> None:
    """Without a previous layer the plain top-k with unscaled probabilities; with one, z + z_prev W_g."""
    router = MoEPlusPlus(4, 4, 2, num_special=2).double()
    x_TD = _inputs(router)
    plan = router(x_TD)
    assert plan.expert_TK.tolist() == [[0, 2], [3, 2], [1, 0]]
    assert plan.weight_TK[0].tolist() == pytest.approx([0.4, 0.3])
    with torch.no_grad():
        router.residual.weight.zero_()
        router.residual.weight[1, 0] = 2.0  # the previous layer's expert 0 speaks for this one's expert 1
    z_prev = torch.zeros(3, 4, dtype=torch.float64)
    z_prev[0, 0] = 3.0
    moved = router(x_TD, _previous(z_prev))
    assert moved.expert_TK.tolist() == [[1, 0], [3, 2], [1, 0]]
    torch.testing.assert_close(moved.gate.logits_TE, x_TD + torch.tensor([[0, 6.0, 0, 0], [0] * 4, [0] * 4]))


def test_gating_residual_has_a_gradient_in_both_layers() -> None:
    router = MoEPlusPlus(4, 4, 2, num_special=2).double()
    z_prev = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    router(_inputs(router), _previous(z_prev)).weight_N.square().sum().backward()
    assert router.residual.weight.grad is not None
    assert router.residual.weight.grad.any()
    assert z_prev.grad is not None
    assert z_prev.grad.any()
    first = MoEPlusPlus(4, 4, 2, num_special=2).double()
    first(_inputs(first)).weight_N.sum().backward()
    assert first.residual.weight.grad is not None
    assert not first.residual.weight.grad.any()


def test_rules_of_the_previous_layer_do_not_poison_this_one() -> None:
    router = MoEPlusPlus(4, 4, 2, num_special=2).double()
    plan = router(_inputs(router), _previous(torch.full((3, 4), float("-inf"), dtype=torch.float64)))
    assert plan.gate.logits_TE.isfinite().all()


def test_layers_of_different_sizes_are_refused() -> None:
    router = MoEPlusPlus(4, 4, 2, num_special=2).double()
    with pytest.raises(ConfigError, match=r"those are \(3, 5\) and its own \(3, 4\)"):
        router(_inputs(router), _previous(torch.zeros(3, 5)))


def test_heterogeneous_loss_by_hand() -> None:
    """Counts 2 1 2 1 over 3 tokens, P = (0.85, 0.75, 0.75, 0.65) / 3, eta = (1, 1, 0.5, 0.5)."""
    router = MoEPlusPlus(4, 4, 2, num_special=2, tau=0.5, balance=0.1).double()
    (loss,) = router.own_losses(router(_inputs(router)), Outcome(torch.zeros(3), num_layers=2)).values()
    assert loss.item() == pytest.approx(0.1 * (2 * 0.85 + 0.75 + 0.5 * (2 * 0.75 + 0.65)) / 9 / 2)


def test_heterogeneous_loss_is_least_where_special_experts_get_one_over_tau_times_as_much() -> None:
    """With f = k P, sum eta k P^2 over the simplex: P ~ 1 / eta, value k tau / (tau F + Z). Checked by descent on P."""
    F, Z, k, tau = 5, 3, 2, 0.6
    eta_E = torch.tensor([1.0] * F + [tau] * Z, dtype=torch.float64)
    z_E = torch.randn(F + Z, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.LBFGS([z_E], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (eta_E * k * z_E.softmax(0).square()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    p_E = z_E.detach().softmax(0)
    assert (eta_E * k * p_E.square()).sum().item() == pytest.approx(k * tau / (tau * F + Z), rel=1e-6)
    assert (p_E[-1] / p_E[0]).item() == pytest.approx(1 / tau, rel=1e-3)
    router = MoEPlusPlus(4, F + Z, k, num_special=Z, tau=tau)
    assert router.rows_per_token == pytest.approx(k * p_E[:F].sum().item(), rel=1e-3)


def test_capacity_is_split_in_the_layer() -> None:
    """12 tokens, k = 1, all of them sure of expert 0 or of special expert 2: 2 and 4 slots (tau 1/2 of 2 + 2 experts)."""
    layer = MoE(4, 6, 2, 1, "moepp", zero=1, copy=1, capacity=CapacityRule(1.0, minimum=0, tau=0.5)).double()
    assert isinstance(layer.router, MoEPlusPlus)
    x_TD = _inputs(layer.router, [[0.7, 0.1, 0.1, 0.1]] * 6 + [[0.1, 0.1, 0.7, 0.1]] * 6)
    assert layer(x_TD)[1].counts_E.tolist() == [2, 0, 4, 0]
    assert layer.eval()(x_TD)[1].counts_E.tolist() == [6, 0, 6, 0]
    with pytest.raises(ConfigError, match=r"capacity\.tau needs zero-computation experts"):
        MoE(4, 6, 4, 1, "switch", capacity=CapacityRule(tau=0.5))


def test_moepp_refusals() -> None:
    for tau in (0.0, 1.5):
        with pytest.raises(ConfigError, match="tau must be above 0 and at most 1"):
            MoEPlusPlus(4, 4, 2, num_special=1, tau=tau)
    with pytest.raises(ConfigError, match="every weight exactly 1"):
        MoEPlusPlus(4, 4, 1, num_special=1, normalize="chosen")
