"""Top-any: who is active by hand, the straight-through gradient, the own loss, and experts that come and go."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.plan import RoutingPlan
from moesaic.routing import Outcome, StepStats, TokenContext
from moesaic.routing.dynmoe import TopAny

ONE_LAYER = Outcome(torch.zeros(1))
# In the plane: right, up, left. A token's cosine with them is (cos, sin, -cos) of its angle.
DIRECTIONS = [[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]


def _router(threshold: float = 0.5, **options: object) -> TopAny:
    router = TopAny(2, 3, 1, threshold=threshold, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        router.direction_ED.copy_(torch.tensor(DIRECTIONS))
    return router


def _tokens(*degrees: float) -> torch.Tensor:
    angle_T = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return 3 * torch.stack([angle_T.cos(), angle_T.sin()], dim=1)  # length does not count


def _used(plan: RoutingPlan) -> list[list[int]]:
    return [[e for e in row if e < 3] for row in plan.expert_TK.tolist()]


def test_by_hand() -> None:
    """Threshold 0.5 is 60 degrees: 10 degrees is right's, 45 both right's and up's (a tie), 70 up's, -90 nobody's."""
    router = _router()
    x_TD = _tokens(10, 45, 70, -90)
    plan = router(x_TD)
    assert [sorted(row) for row in _used(plan)] == [[0], [0, 1], [1], []]
    assert plan.weight_TK.tolist() == [pytest.approx(row) for row in ([1, 0, 0], [0.5, 0.5, 0], [1, 0, 0], [0, 0, 0])]
    assert plan.per_token == 3
    quiet = router.eval()(x_TD)
    # At -90 degrees right and left tie at cosine 0 up to rounding; up is at -1.
    assert [sorted(row) for row in _used(quiet)][:3] == [[0], [0, 1], [1]]
    assert _used(quiet)[3] in ([0], [2])
    assert quiet.weight_TK[3].tolist() == [1.0, 0.0, 0.0]


def test_fallback_always_serves_everybody_and_k_max_cuts() -> None:
    plan = _router(fallback="always")(_tokens(-80, -100))
    assert _used(plan) == [[0], [2]]
    cut = _router(threshold=0.1, k_max=1)(_tokens(30, 60))
    assert _used(cut) == [[0], [1]]
    assert cut.weight_TK.tolist() == [[1.0], [1.0]]


def test_straight_through_gradient() -> None:
    """Active experts get the gradient of (sigmoid(s) - sigmoid(G)) / number active; the others none."""
    torch.manual_seed(0)
    router = TopAny(6, 5, 2, threshold=-0.1).double()
    x_TD, upstream_TE = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    plan = router(x_TD)
    active_TE = torch.zeros(9, 6, dtype=torch.bool)
    active_TE[plan.token_N, plan.expert_N] = True
    loss = (plan.weight_N * upstream_TE[plan.token_N, plan.expert_N.clamp(max=4)]).sum()
    got = torch.autograd.grad(loss, [router.direction_ED, router.threshold_E])
    unit_ED = router.direction_ED / router.direction_ED.norm(dim=1, keepdim=True)
    over_TE = ((x_TD / x_TD.norm(dim=1, keepdim=True)) @ unit_ED.T).sigmoid() - router.threshold_E.sigmoid()
    assert torch.equal(active_TE[:, :5], over_TE > 0)
    assert 0 < active_TE.sum() < 45
    share_TE = torch.where(over_TE > 0, over_TE, 0.0) / (over_TE > 0).sum(dim=1, keepdim=True).clamp(min=1)
    want = torch.autograd.grad((share_TE * upstream_TE).sum(), [router.direction_ED, router.threshold_E])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_starts_with_half_of_the_experts_active() -> None:
    """Orthogonal directions, threshold 0: each cosine of a normal vector is positive with probability 1/2, independently."""
    torch.manual_seed(0)
    plan = TopAny(16, 8, 2)(torch.randn(4000, 16))
    share = plan.choice_counts_E.sum().item() / (4000 * 8)
    assert share == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / (4000 * 8)))


def test_own_loss_by_hand() -> None:
    """Cosines of the directions: right-left -1, others 0, so the norm of W W^T - I is sqrt(2); lengths 1, 2, 1: mean 4/3."""
    router = _router(diversity=0.1)
    (loss,) = router.own_losses(router(_tokens(0)), Outcome(torch.zeros(1), num_layers=2)).values()
    assert loss.item() == pytest.approx(0.1 * (math.sqrt(2) + 4 / 3) / 2)
    router.alive_E[2] = False  # asleep, left no longer counts as a twin of right
    (loss,) = router.own_losses(router(_tokens(0)), ONE_LAYER).values()
    assert loss.item() == pytest.approx(0.1 * 4 / 3, abs=1e-6)
    assert _router(diversity=0.0).own_losses(router(_tokens(0)), ONE_LAYER) == {}
    assert router.own_losses(router.eval()(_tokens(0)), ONE_LAYER) == {}


def _step(router: TopAny, plan: RoutingPlan) -> None:
    router.after_step(StepStats(plan.choice_counts_E, int(plan.num_valid), sums=router.statistics(plan)))


def test_records_say_who_should_go_and_come() -> None:
    """Ten tokens right and up, two down: left is never active, and a new expert should look down."""
    router = _router()
    assert router.suggest_experts().remove == ()
    for _ in range(2):
        _step(router, router(_tokens(0, 0, 0, 90, 90, -90)))
    suggestion = router.suggest_experts()
    assert suggestion.remove == (2,)
    assert suggestion.add_D is not None
    assert suggestion.add_D.tolist() == pytest.approx([0.0, -1.0], abs=1e-9)
    assert (suggestion.tokens, suggestion.unserved) == (12, 2)
    assert router.active_E.tolist() == [6, 4, 0]
    router.reset_records()
    assert router.suggest_experts().tokens == 0


def test_padding_and_tokens_without_permission_call_for_nobody() -> None:
    router = _router()
    allowed_TE = torch.tensor([[True] * 3, [False] * 3, [True, True, False]])
    ctx = TokenContext(valid_T=torch.tensor([False, True, True]), allowed_TE=allowed_TE)
    plan = router(_tokens(-90, -90, 180), ctx)  # the last one's expert is forbidden: it goes without, and calls for one
    _step(router, plan)
    suggestion = router.suggest_experts()
    assert (suggestion.tokens, suggestion.unserved) == (2, 1)
    assert suggestion.add_D is not None
    assert suggestion.add_D.tolist() == pytest.approx([-1.0, 0.0], abs=1e-9)


def test_adapting_puts_idle_experts_to_sleep_and_wakes_one() -> None:
    router = _router(adapt_every=2)
    batch = _tokens(0, 0, 90, -90)
    _step(router, router(batch))
    assert router.alive_E.tolist() == [True, True, True]
    _step(router, router(batch))  # left went to sleep, and woke looking down
    assert router.alive_E.tolist() == [True, True, True]
    assert router.direction_ED[2].tolist() == pytest.approx([0.0, -1.0], abs=1e-9)
    assert router.threshold_E[2].item() == 0.0
    assert router.counts.tolist() == [0, 0, 0]
    assert _used(router(_tokens(-90))) == [[2]]
    for _ in range(2):
        _step(router, router(_tokens(0, 90)))  # nobody looks down any more, and everybody is served
    assert router.alive_E.tolist() == [True, True, False]
    assert _used(router(_tokens(-90))) == [[]]
    assert _used(router.eval()(_tokens(-90)))[0] != [2]


def test_somebody_stays() -> None:
    """Even if no expert was active for any token, the last one is kept."""
    router = _router(threshold=0.9)
    _step(router, router(_tokens(45)))
    assert router.suggest_experts().remove == (1, 2)


def test_records_travel_with_the_weights() -> None:
    router, other = _router(), _router()
    _step(router, router(_tokens(0, -90)))
    other.load_state_dict(router.state_dict())
    assert other.suggest_experts().remove == (1, 2)
    assert other.suggest_experts().unserved == 1


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"threshold must lie between -1 and 1, not 1\.5"):
        TopAny(4, 4, 2, threshold=1.5)
    with pytest.raises(ConfigError, match="adapt_every=-1"):
        TopAny(4, 4, 2, adapt_every=-1)
    with pytest.raises(ConfigError, match='Did you mean "always"'):
        TopAny(4, 4, 2, fallback="alway")  # type: ignore[arg-type]
