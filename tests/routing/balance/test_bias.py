"""The selection bias: rules by hand; that each balances a drifting stream, freezes, lasts in checkpoints, skips evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan.read import max_violation
from moesaic.routing import Router, StepStats, TokenContext, TopK, build_router
from moesaic.routing.balance import BiasController, Gains, bias_step
from moesaic.routing.balance.bias import load_error, quantile_bias
from tests.routing.gates import identity_router, padded

RULES: dict[str, dict[str, Any]] = {
    "sign": {"bias_rate": 0.01},
    "proportional": {"bias_rate": 0.02},
    "pid": {"bias_rate": 0.02, "bias_p": 2.0, "bias_d": 0.5},
    "quantile": {},
}


def _sigmoid(E: int, k: int, rule: str, **options: Any) -> Router:
    return identity_router("topk", E, k, score="sigmoid", balance_bias=True, bias_rule=rule, **options)


def _step(router: Router, batches: list[Tensor]) -> Tensor:
    """One optimiser step over micro-batches, as ``train/step.py`` does it; returns its counts."""
    counts_E, sums = torch.zeros(router.num_experts, dtype=torch.int64), dict[str, Tensor]()
    for x_TD in batches:
        plan = router(x_TD)
        counts_E += plan.choice_counts_E
        for name, value in router.statistics(plan).items():
            sums[name] = sums.get(name, 0) + value
    router.after_step(StepStats(counts_E, sums=sums))
    return counts_E


# ---- by hand -------------------------------------------------------------------------------------------------------


def test_rules_without_memory() -> None:
    counts_E = torch.tensor([10, 0, 5, 5])
    zero_E = torch.zeros(4)
    assert bias_step(zero_E, counts_E, 0.125).tolist() == [-0.125, 0.125, 0.0, 0.0]
    assert bias_step(zero_E, counts_E, 0.125, "proportional").tolist() == [-0.125, 0.125, 0.0, 0.0]
    assert bias_step(zero_E, torch.tensor([8, 4, 4, 4]), 1.0, "proportional").tolist() == pytest.approx(
        [-0.6, 0.2, 0.2, 0.2]
    )
    assert bias_step(zero_E, torch.zeros(4, dtype=torch.int64), 1.0, "proportional").tolist() == [0.0] * 4
    assert bias_step(torch.ones(4), counts_E, 0.5).dtype == torch.float32
    assert zero_E.tolist() == [0.0] * 4  # the old bias is not changed in place


def test_pid_by_hand() -> None:
    controller = BiasController(2, 1, "pid", 0.1, gains=Gains(p=2.0, i=1.0, d=0.5))
    bias_E = torch.zeros(2)
    # Errors: (4 - 6) / 4 = -.5 and +.5. b = .1 * (2e + e + .5e) = .35e.
    bias_E = controller.step(bias_E, StepStats(torch.tensor([6, 2])))
    assert bias_E.tolist() == pytest.approx([-0.175, 0.175])
    # Errors 0: the sum -.5 stays, the change is +.5: .1 * (0 - .5 + .25).
    bias_E = controller.step(bias_E, StepStats(torch.tensor([4, 4])))
    assert bias_E.tolist() == pytest.approx([-0.025, 0.025])


def test_pid_with_the_sum_alone_is_the_proportional_rule() -> None:
    one = BiasController(4, 2, "pid", 0.05, gains=Gains(p=0.0, i=1.0, d=0.0))
    other = BiasController(4, 2, "proportional", 0.05)
    a_E, b_E = torch.zeros(4), torch.zeros(4)
    for seed in range(6):
        counts_E = torch.randint(1, 9, (4,), generator=torch.Generator().manual_seed(seed))
        a_E, b_E = one.step(a_E, StepStats(counts_E)), other.step(b_E, StepStats(counts_E))
        torch.testing.assert_close(a_E, b_E)


def test_the_sum_does_not_wind_up() -> None:
    """A hundred steps against a load that cannot be moved, then one free step: the bias comes back at once."""
    controller = BiasController(2, 1, "pid", 0.1, gains=Gains(p=0.0, i=1.0, d=0.0, limit=0.5))
    bias_E = torch.zeros(2)
    for _ in range(100):
        bias_E = controller.step(bias_E, StepStats(torch.tensor([8, 0])))
    assert bias_E.tolist() == pytest.approx([-0.5, 0.5])
    bias_E = controller.step(bias_E, StepStats(torch.tensor([0, 8])))
    assert bias_E.tolist() == pytest.approx([-0.4, 0.4])


def test_targets_are_shares_and_leave_special_experts_alone() -> None:
    # LongCat: k=4 with a budget of 3 rows at two feed-forward experts, 3/8 of the load each; expert 2 computes nothing.
    router = build_router("topk", 4, 3, 2, {"balance_bias": True, "bias_rule": "proportional", "ffn_rows": 1.5}, 1)
    assert isinstance(router, TopK)
    assert router.controller is not None
    target_E = router.controller.target_E
    assert target_E is not None
    assert target_E.tolist() == [0.375, 0.375, -1.0]
    # 16 rows: wanted 6, 6; mean 16 / 3.
    assert load_error(torch.tensor([4, 6, 6]), target_E).tolist() == pytest.approx([2 / (16 / 3), 0.0, 0.0])
    router.after_step(StepStats(torch.tensor([4, 6, 6])))
    assert router.choice_bias_E is not None
    # LongCat's own formula, mu * (K_e / K / N - T_i / (K T)), is this divided by E.
    longcat = 1.5 / 2 / 2 - 4 / 16
    assert router.choice_bias_E.tolist() == pytest.approx([1e-3 * 3 * longcat, 0.0, 0.0])


def test_quantile_by_hand() -> None:
    """Two experts, k=1: the cutoff is the other expert's score, so the bias is the median of the difference, halved."""
    scores = [[0.9, 0.1], [0.8, 0.3], [0.7, 0.5], [0.6, 0.7]]
    logits_TE = torch.tensor(scores).logit()
    router = _sigmoid(2, 1, "quantile", normalize="none", bias_bins=100_000)
    _step(router, [logits_TE])
    # Cutoffs without bias are the second best: .1 .3 .5 .6. Margins of expert 0: -.8 -.5 -.2 0; of expert 1: 0 0 0 -.1.
    # Two of four below: anywhere in [-.5, -.2] for expert 0, and 0 for expert 1.
    assert router.choice_bias_E is not None
    bias_E = router.choice_bias_E
    assert -0.5 <= float(bias_E[0] * 2) <= -0.2 + 1e-4
    assert float(bias_E.sum()) == pytest.approx(0.0, abs=1e-6)
    counts_E = router(logits_TE).choice_counts_E
    assert counts_E.tolist() == [2, 2]


def test_quantile_of_counted_margins_is_the_quantile_of_the_margins() -> None:
    """Counting loses at most a bin: E solved biases against sorting, over three micro-batches at once."""
    torch.manual_seed(0)
    E, k, bins = 6, 2, 4000
    logits = [torch.randn(40, E) + torch.linspace(-1, 1, E) for _ in range(3)]
    router = _sigmoid(E, k, "quantile", bias_bins=bins)
    assert router.choice_bias_E is not None
    bias_E = 0.1 * torch.randn(E)
    router.choice_bias_E.copy_(bias_E)
    s_TE = torch.cat(logits).sigmoid()
    cutoff_T1 = (s_TE + bias_E).sort(dim=1, descending=True).values[:, k, None]
    wanted = 120 * k // E
    sorted_TE = (cutoff_T1 - s_TE).sort(dim=0).values
    low_E, high_E = sorted_TE[wanted - 1], sorted_TE[wanted]  # exactly `wanted` margins below anything between them
    _step(router, logits)
    width = float(bias_E.max() - bias_E.min() + 2) / bins
    # The mean has been taken off, the same for all experts: shift it back by expert 0 and compare all.
    solved_E = router.choice_bias_E
    shift_low, shift_high = (low_E - solved_E).max(), (high_E - solved_E).min()
    assert float(shift_low) <= float(shift_high) + 2 * width


def test_quantile_leaves_out_padding_and_forbidden_experts() -> None:
    logits_TE = torch.randn(12, 4)
    router = _sigmoid(4, 1, "quantile", normalize="none")
    assert router.choice_bias_E is not None
    valid = [1] * 8 + [0] * 4
    with_padding = router.statistics(router(logits_TE, padded(valid)))
    alone = router.statistics(router(logits_TE[:8]))
    assert {name: value.tolist() for name, value in with_padding.items()} == {
        name: value.tolist() for name, value in alone.items()
    }
    allowed_TE = torch.ones(12, 4, dtype=torch.bool)
    allowed_TE[:, 2] = False
    allowed_TE[0] = torch.tensor([True, False, False, False])  # k or fewer permitted: no contest
    (margins_ER,) = router.statistics(router(logits_TE, TokenContext(allowed_TE=allowed_TE))).values()
    assert margins_ER.sum(1).tolist() == [11, 11, 0, 11]
    solved_E = quantile_bias(margins_ER, router.choice_bias_E, 1)
    assert solved_E.isfinite().all()


def test_quantile_with_every_expert_chosen_has_nothing_to_bias() -> None:
    router = _sigmoid(3, 3, "quantile")
    _step(router, [torch.randn(8, 3)])
    assert router.choice_bias_E is not None
    assert not router.choice_bias_E.any()


# ---- behaviour -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_balances_a_drifting_stream(rule: str) -> None:
    """Fresh tokens every step from a distribution whose favourites wander; MaxVio of the last steps against no bias."""
    E, k, steps = 8, 2, 150
    generator = torch.Generator().manual_seed(1)
    router, free = _sigmoid(E, k, rule, **RULES[rule]), _sigmoid(E, k, rule, bias_rate=0.0)
    skew_E = torch.linspace(-1.5, 1.5, E)
    with_bias, without = [], []
    for _ in range(steps):
        skew_E = skew_E + 0.02 * torch.randn(E, generator=generator)
        batches = [torch.randn(128, E, generator=generator) + skew_E for _ in range(2)]
        with_bias.append(float(max_violation(_step(router, batches))))
        without.append(float(max_violation(_step(free, batches))))
    late, late_free = sum(with_bias[-30:]) / 30, sum(without[-30:]) / 30
    assert late_free > 1.0
    assert late < 0.35
    assert not free.choice_bias_E.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("rule", RULES)
def test_rate_zero_freezes(rule: str) -> None:
    router = _sigmoid(4, 2, rule, bias_rate=0.0)
    assert router.choice_bias_E is not None
    router.choice_bias_E.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    _step(router, [torch.randn(16, 4) + torch.arange(4.0)])
    assert router.choice_bias_E.tolist() == pytest.approx([0.1, -0.2, 0.3, 0.0])


@pytest.mark.parametrize("rule", RULES)
def test_a_forward_changes_nothing_and_the_state_lasts(rule: str) -> None:
    def make() -> Router:
        return _sigmoid(4, 2, rule, **RULES[rule])

    stream = [torch.randn(32, 4, generator=torch.Generator().manual_seed(s)) + torch.arange(4.0) for s in range(6)]
    router = make()
    for x_TD in stream[:3]:
        _step(router, [x_TD])
    saved = {name: value.clone() for name, value in router.state_dict().items()}
    router(stream[0])
    router.eval()(stream[0])
    router.train()
    assert all(torch.equal(value, saved[name]) for name, value in router.state_dict().items())
    resumed = make()
    resumed.load_state_dict(saved)
    for x_TD in stream[3:]:
        _step(router, [x_TD])
        _step(resumed, [x_TD])
    assert router.choice_bias_E is not None
    assert resumed.choice_bias_E is not None
    assert router.choice_bias_E.any()
    assert torch.equal(router.choice_bias_E, resumed.choice_bias_E)


def test_biases_and_sums_stay_fp32() -> None:
    router = _sigmoid(4, 2, "pid").to(torch.bfloat16)
    assert {tensor.dtype for tensor in router.buffers()} == {torch.float32}
    assert len(list(router.buffers())) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias_rule": "quantil"}, 'Did you mean "quantile"?'),
        ({"bias_rule": "quantile", "bias_rate": 1.5}, "at most 1, not 1.5"),
        ({"bias_rule": "quantile", "bias_bins": 1}, "bias_bins must be at least 2, not 1"),
        ({"bias_rule": "quantile", "score": "sqrt_softplus"}, "solves for scores between 0 and 1"),
        ({"bias_rule": "quantile", "groups": 2, "groups_kept": 1}, "free choice of experts"),
        ({"bias_rule": "pid", "bias_p": -1.0}, "gains must be at least 0"),
        ({"bias_rule": "pid", "bias_limit": 0.0}, "limit above 0"),
        ({"ffn_rows": 1.0}, "this layer has none"),
    ],
)
def test_impossible_rules_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TopK(8, 4, 2, balance_bias=True, **options)


def test_a_budget_must_leave_something() -> None:
    with pytest.raises(ConfigError, match="ffn_rows must be above 0 and below k=2, not 2.0"):
        TopK(8, 5, 2, balance_bias=True, ffn_rows=2.0, num_special=1)
    with pytest.raises(ConfigError, match="same load; choose another rule"):
        TopK(8, 5, 2, balance_bias=True, ffn_rows=1.0, num_special=1, bias_rule="quantile")
