"""Expert choice: every expert takes its best tokens, instead of every token its best experts (Zhou et al. 2022).

``S = softmax(x W)`` over experts; within a group of n tokens expert e takes the C tokens of largest ``S[:, e]``, with weight S,
``C = round(n k / E)``, at least 1 and at most n. Loads are equal by construction, and a token has k experts on average: some
have many, and some none (they pass by the residual alone). No auxiliary loss is needed.

| group | n tokens compete | causal | independent of other sequences |
|---|---|---|---|
| "batch" | all of the batch (the paper) | no | no |
| "sequence" | those of one sequence (a row of packed documents is one) | no | yes |
| "position" | those at one place of all sequences | yes | no |

``max_experts`` (EC-CAP): experts take the largest of A instead of S, which solves ``max <A, S> + cap_temperature H(A)`` with
every expert's column summing to C, every token's row to at most max_experts, and 0 <= A <= 1. The paper iterates Dykstra's
projections; here ``A = min(1, exp((S + alpha_e - beta_t) / t))``, and the multipliers are solved for in turn, each exactly,
while t cools down: Dykstra's was still far from the cap after 100 rounds at 0.001. The paper stops there, with the cap nearly
kept; here a token over it turns experts down and they take their next best, so the cap holds, at the price of a few places
left empty (loads are nearly equal). The paper found that a cap of 2 costs accuracy and a cap of 3 does not.

Nothing of this can be repeated while generating, when later tokens and the rest of the batch are not there. So ``inference``:
"predictor" trains a linear head with a bias per expert, behind a stop-gradient, to foretell from a token's vector whether each
expert will take it (as in Mixture-of-Depths), and in evaluation a token goes to every expert whose head says yes; "topc" keeps
the rule of training, for encoders.

Ties go to the earlier token: in a shared batch that is a channel between its sequences (Hayes et al. 2024), which "sequence"
closes. Padding takes no place, and a group with padding takes C of its real tokens only.

Legend: T tokens, D model width, E experts, G groups, n tokens per group, C tokens per expert and group.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import ConfigError, one_of
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan, from_rows
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import LinearGate, Outcome, Router, check_k, choose, ruled

NEXT_BEST = 8  # rounds in which experts replace tokens that are over the cap


class ExpertChoice(Router):
    """Experts choose tokens.

    Args:
        k: experts per token on average (the paper's capacity factor c).
        group: who competes, see the table.
        max_experts: at most so many experts per token; None is no cap, and k leaves (nearly) every token with exactly k.
        cap_temperature: of the capped problem: the colder, the nearer A is to whole numbers (0.001 is the paper's, from memory,
            not checked).
        cap_iterations: rounds of its solver; each halves the temperature, from 1/2.
        inference: "predictor" or "topc", see above.
        predictor_loss: coefficient of the predictor's cross entropy, a mean over tokens, experts and layers. It teaches the
            predictor alone.
        threshold: probability above which a predictor says yes.
        init_std: of the gate's and the predictor's weights.

    ``gate.extra["predicted_TE"]`` are the predictor's logits. Rows: E * C per group, expert by expert, best token first; in
    evaluation by predictor T * E, or T * max_experts, those of experts that say no sent nowhere.
    """

    facts = Facts(
        causal=False,
        batch_invariant=False,
        balance="exact",
        experts="0..E",
        varies=True,
        can_drop=True,
        teaches="all",
        source="Zhou et al. 2022 (Expert Choice)",
    )

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        group: Literal["batch", "sequence", "position"] = "batch",
        max_experts: int | None = None,
        cap_temperature: float = 1e-3,
        cap_iterations: int = 12,
        inference: Literal["predictor", "topc"] = "predictor",
        predictor_loss: float = 0.1,
        threshold: float = 0.5,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        one_of("group", group, ("batch", "sequence", "position"))
        one_of("inference", inference, ("predictor", "topc"))
        if max_experts is not None and not k <= max_experts <= num_experts:
            raise ConfigError(
                f"max_experts={max_experts} must be between k={k}, the average that the experts' places come to, and "
                f"num_experts={num_experts}."
            )
        if not cap_temperature > 0 or cap_iterations < 1:
            raise ConfigError(
                f"cap_temperature={cap_temperature} must be above 0 and cap_iterations={cap_iterations} at least 1."
            )
        if inference == "predictor" and not predictor_loss > 0:
            raise ConfigError(
                f"predictor_loss={predictor_loss} would never teach the predictor, which alone decides in evaluation; it must "
                'be above 0, or inference="topc".'
            )
        if not 0 < threshold < 1:
            raise ConfigError(f"threshold must be between 0 and 1, not {threshold}.")
        self.num_experts, self.k, self.group, self.max_experts = num_experts, k, group, max_experts
        self.cap_temperature, self.cap_iterations = cap_temperature, cap_iterations
        self.predictor_loss, self.threshold = predictor_loss, threshold
        self.gate = LinearGate(dim, num_experts, init_std=init_std)
        self.predictor = None
        facts = replace(self.facts, causal=group == "position", batch_invariant=group == "sequence")
        if max_experts is not None:
            facts = replace(facts, balance="approximate", experts="0..max_experts")
        if inference == "predictor":
            self.predictor = LinearGate(dim, num_experts, bias=True, init_std=init_std)
            assert self.predictor.bias is not None
            share = min(k / num_experts, 0.99)
            nn.init.constant_(self.predictor.bias, math.log(share / (1 - share)))  # begins with the average answer
            rule = "a predictor per expert decides from the token's own vector"
            facts = replace(
                facts, inference="other rule", inference_rule=rule, infer_causal=True, infer_batch_invariant=True
            )
        self.facts = facts

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens."""
        logits_TE = ruled(self.gate(x_TD), ctx)
        gate = Gate(logits_TE, logits_TE.softmax(dim=-1))
        if self.predictor is None:
            return self._experts_choose(gate, ctx)
        predicted_TE = self.predictor(x_TD.detach())
        gate = replace(gate, extra={"predicted_TE": predicted_TE})
        return self._experts_choose(gate, ctx) if self.training else self._predictors_choose(gate, ctx)

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """Entries of the softmax."""
        return gate.probs_TE.gather(1, expert_TK)

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """The gate, and the predictor with its bias, which training runs too."""
        predictor = options.get("inference", "predictor") == "predictor"
        capped = options.get("max_experts") is not None
        other = "cap_iterations times two sorts of T * E" if capped else "sort of T * E"
        return Cost(2 * T * D * E * (1 + predictor), D * E + predictor * (D * E + E), other)

    def own_losses(self, plan: RoutingPlan | SoftPlan, outcome: Outcome) -> dict[str, Tensor]:
        """Cross entropy of the predictor against what the experts took, over real tokens and permitted pairs."""
        if self.predictor is None:
            return {}
        assert isinstance(plan, RoutingPlan)
        assert plan.gate is not None
        predicted_TE = plan.gate.extra["predicted_TE"]
        T, E = predicted_TE.shape
        taken_TE = predicted_TE.new_zeros(T, E + 1)
        taken_TE[plan.token_N, plan.choice_N] = 1.0
        asked_TE = torch.ones_like(predicted_TE, dtype=torch.bool) if plan.allowed_TE is None else plan.allowed_TE
        if plan.valid_T is not None:
            asked_TE = asked_TE & plan.valid_T[:, None]
        loss_TE = F.binary_cross_entropy_with_logits(predicted_TE, taken_TE[:, :E], reduction="none")
        total = outcome.peers.total
        mean = total(torch.where(asked_TE, loss_TE, 0.0).sum()) / total(asked_TE.sum()).clamp(min=1)
        return {"choice_predictor": self.predictor_loss * mean / outcome.num_layers}

    def _experts_choose(self, gate: Gate, ctx: TokenContext) -> RoutingPlan:
        """The C best tokens of every expert and group."""
        T, E = gate.probs_TE.shape
        token_Gn = self._groups(T, ctx, gate.probs_TE.device)
        G, n = token_Gn.shape
        score_TE = gate.probs_TE.detach()
        if ctx.allowed_TE is not None:
            score_TE = score_TE.masked_fill(~ctx.allowed_TE, float("-inf"))
        number_G = torch.full((G,), n, device=score_TE.device)
        if ctx.valid_T is not None:
            score_TE = score_TE.masked_fill(~ctx.valid_T[:, None], float("-inf"))
            number_G = ctx.valid_T[token_Gn].sum(dim=1)
        takes_G = places(number_G, self.k, E)
        score_GEn = score_TE[token_Gn].transpose(1, 2)
        most = int(places(torch.tensor(n), self.k, E))
        place_C = torch.arange(most, device=score_GEn.device)
        kept_GEC = (place_C < takes_G[:, None, None]).expand(G, E, most)
        if self.max_experts is not None:
            score_GEn = capped(score_GEn, takes_G, self.max_experts, self.cap_temperature, self.cap_iterations)
        best_GEC, kept_GEC = _pick(score_GEn, kept_GEC, self.max_experts)
        expert_GEC = torch.where(kept_GEC, torch.arange(E, device=best_GEC.device)[:, None], E)
        token_GEC = token_Gn[:, None].expand(G, E, n).gather(2, best_GEC)
        return self._plan(token_GEC.flatten(), expert_GEC.flatten(), gate, ctx)

    def _predictors_choose(self, gate: Gate, ctx: TokenContext) -> RoutingPlan:
        """Every expert whose predictor says yes, for each token by itself; under a cap the surest ones."""
        T, E = gate.probs_TE.shape
        predicted_TE = gate.extra["predicted_TE"]
        expert_TK = choose(predicted_TE, self.max_experts or E, ctx.allowed_TE)
        yes_TK = predicted_TE.gather(1, expert_TK) > math.log(self.threshold / (1 - self.threshold))
        token_N = torch.arange(T, device=expert_TK.device).repeat_interleave(expert_TK.shape[1])
        return self._plan(token_N, torch.where(yes_TK, expert_TK, E).flatten(), gate, ctx)

    def _plan(self, token_N: Tensor, expert_N: Tensor, gate: Gate, ctx: TokenContext) -> RoutingPlan:
        T, E = gate.probs_TE.shape
        weight_N = gate.probs_TE[token_N, expert_N.clamp(max=E - 1)]
        return from_rows(token_N, expert_N, weight_N, T, E, valid_T=ctx.valid_T, gate=gate, allowed_TE=ctx.allowed_TE)

    def _groups(self, T: int, ctx: TokenContext, device: torch.device) -> Tensor:
        """int64 (G, n): the tokens of each group, in order."""
        token_T = torch.arange(T, device=device)
        if self.group == "batch":
            return token_T.view(1, T)
        token_BS = token_T.view(ctx.shape(T))
        return token_BS if self.group == "sequence" else token_BS.T


def places(number: Tensor, k: int, num_experts: int) -> Tensor:
    """int64: the tokens each expert takes of so many, ``round(n k / E)``, at least 1 and at most n."""
    nearest = (2 * number * k + num_experts) // (2 * num_experts)
    return torch.minimum(nearest.clamp(min=1), number)


@torch.no_grad()
def capped(score_GEn: Tensor, takes_G: Tensor, most: int, temperature: float, iterations: int) -> Tensor:
    """(G, E, n) ``S + alpha - beta``, in order of A: block ascent on the dual of the capped problem, cooled.

    ``A = min(1, exp(result / temperature))``. Pairs that score -inf stay there.
    """
    if not score_GEn.numel():
        return score_GEn
    takes_G11 = takes_G[:, None, None].to(score_GEn.dtype)
    beta_G1n = score_GEn.new_zeros(())
    alpha_GE1 = beta_G1n
    for step in range(iterations):
        # Cold from the start, either multiplier could only follow the other by one temperature per round.
        t = max(0.5 ** (step + 1), temperature)
        alpha_GE1 = t * _shift((score_GEn - beta_G1n) / t, takes_G11, dim=2)
        beta_G1n = -t * _shift((score_GEn + alpha_GE1) / t, takes_G11.new_tensor(most), dim=1).clamp(max=0.0)
    alpha_GE1 = t * _shift((score_GEn - beta_G1n) / t, takes_G11, dim=2)
    return score_GEn + alpha_GE1 - beta_G1n


def _shift(y: Tensor, total: Tensor, dim: int) -> Tensor:
    """The s for which ``min(1, exp(y + s))`` sums to ``total`` along ``dim``.

    With the m largest entries at 1, ``exp(s) = (total - m) / sum of exp(y) of the rest``; the right m is the least one
    for which the next entry stays below 1.
    """
    y = y.sort(dim=dim, descending=True).values
    rest = y.flip(dim).logcumsumexp(dim).flip(dim)
    ahead = torch.arange(y.shape[dim], device=y.device, dtype=y.dtype).view([-1 if d == dim else 1 for d in range(3)])
    s = (total - ahead).clamp(min=1e-30).log() - rest
    fits = (y + s <= 1e-6) & (ahead < total)
    return s.gather(dim, fits.to(torch.uint8).argmax(dim=dim, keepdim=True)).nan_to_num(posinf=0.0)


@torch.no_grad()
def _pick(score_GEn: Tensor, kept_GEC: Tensor, cap: int | None) -> tuple[Tensor, Tensor]:
    """Every expert's best C tokens (G, E, C), and which of these places are used.

    Under a cap a token keeps its best experts of those that want it; the others take their next best, for a few rounds, after
    which places in question stay empty.
    """
    C = kept_GEC.shape[2]
    if cap is None:
        return torch.sort(score_GEn, dim=2, descending=True, stable=True).indices[:, :, :C], kept_GEC
    for _ in range(NEXT_BEST):
        best_GEn = torch.sort(score_GEn, dim=2, descending=True, stable=True)
        best_GEC = best_GEn.indices[:, :, :C]
        wants_GEC = kept_GEC & (best_GEn.values[:, :, :C] != float("-inf"))
        wants_GEn = torch.zeros_like(score_GEn, dtype=torch.bool).scatter_(2, best_GEC, wants_GEC)
        wanted_GEn = score_GEn.masked_fill(~wants_GEn, float("-inf"))
        rank_GEn = torch.sort(wanted_GEn, dim=1, descending=True, stable=True).indices.argsort(dim=1)
        score_GEn = score_GEn.masked_fill(wants_GEn & (rank_GEn >= cap), float("-inf"))
    return best_GEC, wants_GEC & (rank_GEn.gather(2, best_GEC) < cap)
