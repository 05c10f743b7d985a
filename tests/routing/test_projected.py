"""Low-rank and cosine scores: by the definition, at their start, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.routing import NO_CONTEXT
from moesaic.routing.projected import Cosine, LowRank, cosine_scores


def _set(parameter: torch.nn.Parameter, values: list[list[float]]) -> None:
    with torch.no_grad():
        parameter.copy_(torch.tensor(values))


def test_low_rank_by_hand() -> None:
    """x A: (1, 2) from x = (1, 1, 1, 2); times B: 3, -1, 1, 2, 0."""
    router = LowRank(4, 5, 2, rank=2).double()
    _set(router.down.weight, [[1, 0, 0, 0], [0, 0, 0, 1]])
    _set(router.up.weight, [[1, 1], [1, -1], [1, 0], [0, 1], [2, -1]])
    plan = router(torch.tensor([[1.0, 1.0, 1.0, 2.0]]))
    assert plan.gate is not None
    assert plan.gate.logits_TE.tolist() == [[3.0, -1.0, 1.0, 2.0, 0.0]]
    assert plan.expert_TK.tolist() == [[0, 3]]
    # Renormalised: e^3 : e^2 = e : 1.
    assert plan.weight_TK.tolist()[0] == pytest.approx([math.e / (math.e + 1), 1 / (math.e + 1)])


def test_low_rank_starts_with_the_logit_spread_of_the_plain_gate() -> None:
    """Unit-variance inputs of width 512 through N(0, 0.02): logits of standard deviation 0.02 sqrt(512) = 0.4525."""
    torch.manual_seed(0)
    stds = []
    for _ in range(20):
        router = LowRank(512, 64, 2, rank=16)
        stds.append(router.logits(torch.randn(64, 512), NO_CONTEXT)[0].std().item())
    mean = sum(stds) / 20
    error = (sum((s - mean) ** 2 for s in stds) / 19 / 20) ** 0.5
    assert mean == pytest.approx(0.02 * math.sqrt(512), abs=4 * error + 0.01)


def test_low_rank_that_saves_nothing_is_refused() -> None:
    """d = 16, E = 8: the plain gate has 128 weights; rank 5 has 120, rank 6 has 144."""
    LowRank(16, 8, 2, rank=5)
    with pytest.raises(ConfigError, match=r"rank=6 takes 144 weights.*has 128.*choose rank between 1 and 5"):
        LowRank(16, 8, 2, rank=6)
    with pytest.raises(ConfigError, match="rank=0"):
        LowRank(16, 8, 2, rank=0)
    with pytest.raises(ConfigError, match='use router "topk"'):
        LowRank(16, 1, 1, rank=1)  # 17 weights instead of 16


def test_cosines_by_hand() -> None:
    """(3, 4) with (4, 3): 24 / 25; with (0, -2): -0.8; perturbed by 1: 24 / 36 and -8 / 18."""
    h_TR = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    c_ER = torch.tensor([[4.0, 3.0], [0.0, -2.0]], dtype=torch.float64)
    assert cosine_scores(h_TR, c_ER).tolist()[0] == pytest.approx([0.96, -0.8], abs=1e-9)
    assert cosine_scores(h_TR, c_ER, perturb=1.0).tolist()[0] == pytest.approx([24 / 36, -8 / 18], abs=1e-9)


def test_cosine_of_a_zero_vector_is_zero_with_a_finite_gradient() -> None:
    h_TR = torch.zeros(1, 3, requires_grad=True)
    scores = cosine_scores(h_TR, torch.randn(2, 3))
    assert not scores.any()
    (grad,) = torch.autograd.grad(scores.sum(), h_TR)
    assert grad.isfinite().all()


def test_cosine_against_the_dense_formula() -> None:
    """Weights and every gradient equal those of the formula written out in fp64."""
    torch.manual_seed(1)
    router = Cosine(6, 5, 2, projection=3, normalize="none").double()
    x_TD, upstream_TK = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    plan = router(x_TD)
    got = torch.autograd.grad((plan.weight_TK * upstream_TK).sum(), list(router.parameters()))
    h_TR = x_TD @ router.project.weight.T
    cosine_TE = (h_TR @ router.prototype_ER.T) / (h_TR.norm(dim=1)[:, None] * router.prototype_ER.norm(dim=1))
    p_TE = (cosine_TE * router.log_scale.exp()).softmax(dim=1)
    want_TK = torch.stack([p_TE[t, e] for t in range(7) for e in plan.expert_TK[t].tolist()]).view(7, 2)
    torch.testing.assert_close(plan.weight_TK, want_TK, atol=1e-7, rtol=0)
    want = torch.autograd.grad((want_TK * upstream_TK).sum(), list(router.parameters()))
    # Prototypes start 0.01 long, where 1e-12 under the root is 1e-8 of the norm's square.
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_cosine_ignores_length_and_perturbed_cosine_does_not() -> None:
    torch.manual_seed(2)
    x_TD = torch.randn(5, 6, dtype=torch.float64)
    plain, perturbed = Cosine(6, 4, 2).double(), Cosine(6, 4, 2, perturb=0.5).double()
    torch.testing.assert_close(
        plain.logits(x_TD, NO_CONTEXT)[0], plain.logits(10 * x_TD, NO_CONTEXT)[0], atol=1e-8, rtol=0
    )
    assert (perturbed.logits(x_TD, NO_CONTEXT)[0] - perturbed.logits(10 * x_TD, NO_CONTEXT)[0]).abs().max() > 1e-3


def test_temperature_starts_at_a_half_and_is_capped_at_a_hundred() -> None:
    router = Cosine(6, 4, 2).double()
    x_TD = torch.randn(50, 6, dtype=torch.float64)
    assert router.log_scale.item() == pytest.approx(math.log(2))
    assert router.logits(x_TD, NO_CONTEXT)[0].abs().max() <= 2
    cosine_TE = router.logits(x_TD, NO_CONTEXT)[0] / 2
    with torch.no_grad():
        router.log_scale.fill_(9.0)  # e^9 = 8103
    torch.testing.assert_close(router.logits(x_TD, NO_CONTEXT)[0], 100 * cosine_TE)


def test_cosine_refusals() -> None:
    with pytest.raises(ConfigError, match="projection=1 leaves only the sign"):
        Cosine(6, 4, 2, projection=1)
    with pytest.raises(ConfigError, match=r"init_temperature must be at least 0\.01, not 0"):
        Cosine(6, 4, 2, init_temperature=0.0)
    with pytest.raises(ConfigError, match="perturb must be at least 0"):
        Cosine(6, 4, 2, perturb=-1.0)
    for cls in (Cosine, LowRank):
        with pytest.raises(ConfigError, match="every weight exactly 1"):
            cls(16, 8, 1, **({"rank": 2} if cls is LowRank else {}))


@pytest.mark.parametrize("E", [1, 4])
def test_all_experts(E: int) -> None:
    router = Cosine(6, E, E)
    plan = router(torch.randn(3, 6))
    assert plan.expert_TK.sort(dim=1).values.tolist() == [list(range(E))] * 3
    torch.testing.assert_close(plan.weight_TK.sum(dim=1), torch.ones(3))
