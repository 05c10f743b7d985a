"""The selection bias that balances without a loss: added to scores when experts are chosen, never to weights.

Once per optimiser step, with c the choices of the whole step (all micro-batches and ranks) and u the rate:

| rule | the bias after the step | source |
|---|---|---|
| sign | ``b + u * sign(mean(c) - c)``, sign(0) = 0 | Wang et al. 2024; DeepSeek-V3, u = 1e-3, later 0 |
| proportional | ``b + u * e``, ``e = (mean(c) - c) / mean(c)`` | LongCat-Flash, whose rate is E * u |
| pid | ``u * (p * e + i * sum(e) + d * (e - e_before))`` | textbook; LongCat's text says PID, its formula is the i part |
| quantile | ``b + u * (b* - b)``, see below | Megatron-LM ``quantile_balancing``; Kimi K3 report 2.3.3 |

"pid" with gains (0, 1, 0) is "proportional". Its sum is kept within ``limit / (u * i)`` (anti-windup): scores lie in [0, 1],
so a bias beyond 1 decides alone, and a sum that ran on while it cannot help would take as long to come back.

"quantile" solves for the bias instead of following load. A token's cutoff a is its (k+1)-th best biased score; expert e gets
it if ``s_e + b_e > a``. So ``b*_e`` is where the margins ``a - s_e`` of all the step's tokens have T k / E below, their k/E
quantile; then the mean over experts is taken off, which changes no choice. Margins are counted in bins over [min b - 1,
max b + 1], where they must lie, and the quantile is interpolated within its bin: counts add up over micro-batches and ranks
where quantiles do not (Megatron-LM averages quantiles of micro-batches; torchtitan counts, as here). A bin is at least
2 / bins wide, so a softmax over very many experts, all near 0, needs more bins; sigmoid scores do not. All experts move at
once, so one step does not end at balance. Megatron-LM's EMA m is ``u = 1 - m``.

Rate 0 freezes the bias under every rule. Legend: T tokens, E experts, R bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from moesaic.errors import ConfigError, one_of
from moesaic.plan.plan import RoutingPlan, SoftPlan
from moesaic.routing.gate import KeepsFp32, StepStats, router_dtype

BiasRule = Literal["sign", "proportional", "pid", "quantile"]
_MARGINS = "bias_margins_ER"


@dataclass(frozen=True)
class Gains:
    """Of the "pid" rule: on the error, on its sum, on its change; ``limit`` bounds what the sum may contribute."""

    p: float = 1.0
    i: float = 1.0
    d: float = 0.0
    limit: float = 1.0

    def __post_init__(self) -> None:
        if min(self.p, self.i, self.d) < 0 or not self.limit > 0 or not self.p + self.i + self.d > 0:
            raise ConfigError(
                f"bias gains must be at least 0, not all 0, and their limit above 0; got p={self.p}, i={self.i}, d={self.d}, "
                f"limit={self.limit}."
            )


class BiasController(KeepsFp32):
    """Moves a selection bias once per step.

    Args:
        rate: u; None is the rule's own: 1e-3, and 1 for "quantile".
        target_E: the share of load each expert should get, 1/E if None; experts at a negative share are left alone (LongCat
            does not steer its zero-computation experts).
        gains: of "pid". bins: of "quantile".
    """

    def __init__(
        self,
        num_experts: int,
        k: int,
        rule: BiasRule = "sign",
        rate: float | None = None,
        *,
        target_E: Tensor | None = None,
        gains: Gains = Gains(),
        bins: int = 1000,
    ) -> None:
        super().__init__()
        one_of("bias_rule", rule, get_args(BiasRule))
        if rate is None:
            rate = 1.0 if rule == "quantile" else 1e-3
        if not rate >= 0:
            raise ConfigError(f"bias_rate must be at least 0, not {rate}: a negative one would unbalance the load.")
        if rule == "quantile" and rate > 1:
            raise ConfigError(f'bias_rate is the share of the way that "quantile" goes, so at most 1, not {rate}.')
        if bins < 2:
            raise ConfigError(f"bias_bins must be at least 2, not {bins}; 1000 is usual.")
        if rule == "quantile" and target_E is not None:
            raise ConfigError('bias_rule="quantile" gives every expert the same load; choose another rule for targets.')
        self.num_experts, self.k, self.rule, self.rate = num_experts, k, rule, rate
        self.gains, self.bins = gains, bins
        self.target_E = None if target_E is None else target_E.double()
        state_E = torch.zeros(num_experts, dtype=router_dtype()) if rule == "pid" else None
        self.sum_E: Tensor | None
        self.error_E: Tensor | None
        self.register_buffer("sum_E", state_E)
        self.register_buffer("error_E", None if state_E is None else state_E.clone())

    def statistics(self, plan: RoutingPlan | SoftPlan, bias_E: Tensor) -> dict[str, Tensor]:
        """What ``step`` needs of every micro-batch besides counts: for "quantile", int64 (E, R) margins per bin."""
        if self.rule != "quantile" or not self.rate or plan.gate is None or self.k == self.num_experts:
            return {}
        scores_TE = plan.gate.probs_TE.detach()
        biased_TE = scores_TE + bias_E
        counted_TE = torch.ones_like(scores_TE, dtype=torch.bool)
        if isinstance(plan, RoutingPlan) and plan.allowed_TE is not None:
            counted_TE = plan.allowed_TE
            biased_TE = biased_TE.masked_fill(~counted_TE, float("-inf"))
        if plan.valid_T is not None:
            counted_TE = counted_TE & plan.valid_T[:, None]
        cutoff_T1 = biased_TE.topk(self.k + 1, dim=1).values[:, -1:]
        # Where rules leave a token k experts or fewer there is no contest to learn from.
        counted_TE = counted_TE & cutoff_T1.isfinite()
        low, width = _bins(bias_E, self.bins)
        margin_TE = torch.where(counted_TE, cutoff_T1 - scores_TE, low)
        bin_TE = ((margin_TE - low) / width).long().clamp(0, self.bins - 1)
        cell_TE = torch.arange(self.num_experts, device=bin_TE.device) * self.bins + bin_TE
        outside = self.num_experts * self.bins
        cell_N = torch.where(counted_TE, cell_TE, outside).flatten()
        counts = torch.zeros(outside + 1, dtype=torch.int64, device=cell_N.device)
        counts = counts.scatter_add(0, cell_N, torch.ones_like(cell_N))
        return {_MARGINS: counts[:-1].view(self.num_experts, self.bins)}

    def step(self, bias_E: Tensor, stats: StepStats) -> Tensor:
        """The bias after one optimiser step; ``bias_E`` itself stays. Updates the sums of "pid"."""
        if not self.rate:
            return bias_E
        if self.rule == "quantile":
            if _MARGINS not in stats.sums:
                return bias_E  # k = E: there is no choice to bias
            solved_E = quantile_bias(stats.sums[_MARGINS], bias_E, self.k)
            return bias_E + self.rate * (solved_E - bias_E)
        if self.rule == "pid":
            assert self.sum_E is not None and self.error_E is not None
            error_E = load_error(stats.counts_E, self.target_E).to(self.sum_E.dtype)
            most = self.gains.limit / (self.rate * self.gains.i) if self.gains.i else float("inf")
            sum_E = (self.sum_E + error_E).clamp(-most, most)
            moved_E = self.gains.p * error_E + self.gains.i * sum_E + self.gains.d * (error_E - self.error_E)
            self.sum_E.copy_(sum_E)
            self.error_E.copy_(error_E)
            return (self.rate * moved_E).to(bias_E.dtype)
        return bias_step(bias_E, stats.counts_E, self.rate, self.rule, self.target_E)


def load_error(counts_E: Tensor, target_E: Tensor | None = None) -> Tensor:
    """fp64 (E,): how far each expert is below its target load, as a share of the mean load; 0 without any load."""
    counts_E = counts_E.double()
    mean = counts_E.mean()
    wanted_E = mean if target_E is None else counts_E.sum() * target_E.to(counts_E.device)
    error_E = (wanted_E - counts_E) / mean.clamp(min=1e-20)
    return error_E if target_E is None else torch.where(target_E.to(counts_E.device) < 0, 0.0, error_E)


def bias_step(
    bias_E: Tensor,
    counts_E: Tensor,
    rate: float,
    rule: Literal["sign", "proportional"] = "sign",
    target_E: Tensor | None = None,
) -> Tensor:
    """The bias after one step of a rule without memory: up for experts below their load, down for those above."""
    error_E = load_error(counts_E, target_E)
    step_E = error_E.sign() if rule == "sign" else error_E
    return bias_E + (rate * step_E).to(bias_E.dtype)


def quantile_bias(margins_ER: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """(E,) the bias under which every expert would get tokens * k / E, of mean 0, from margins counted under ``bias_E``."""
    E, R = margins_ER.shape
    low, width = _bins(bias_E, R)
    below_ER = margins_ER.double().cumsum(dim=1)
    total_E1 = below_ER[:, -1:]
    # Tokens that rules keep from an expert are no margins of it, but their share of load still has to go somewhere.
    wanted_E1 = torch.minimum(total_E1.amax() * k / E, total_E1).contiguous()
    bin_E1 = torch.searchsorted(below_ER, wanted_E1).clamp(max=R - 1)
    inside_E1 = margins_ER.double().gather(1, bin_E1)
    before_E1 = below_ER.gather(1, bin_E1) - inside_E1
    part_E1 = (wanted_E1 - before_E1) / inside_E1.clamp(min=1)
    solved_E = (low + width * (bin_E1 + part_E1))[:, 0]
    solved_E = torch.where(total_E1[:, 0] > 0, solved_E, bias_E.double())
    return (solved_E - solved_E.mean()).to(bias_E.dtype)


def _bins(bias_E: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Lower end and width of the bins: cutoffs lie between min b and 1 + max b, scores between 0 and 1."""
    low, high = bias_E.min() - 1, bias_E.max() + 1
    return low, (high - low) / bins
