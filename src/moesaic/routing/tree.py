"""Tree routing: experts are the leaves of a tree of gates, E = branch^depth (fast feedforward, Belcak & Wattenhofer 2023).

A node scores its branches, ``softmax([0, x W_n + b_n])``; the first branch's score is fixed at 0, so that two branches are the
paper's ``sigmoid(x w_n + b_n)`` and no parameter is redundant. A leaf's probability is the product along its path.

- training "soft" (the paper): every leaf computes every token, weighted by its probability. E rows per token: as dear as a
  dense layer of all leaves. A hardening loss pulls every decision towards 0 or 1, or the hard path would be another function.
- training "hard": only the likeliest path is walked and its leaf is weighted by the path's probability (as in Switch), so
  that nodes on the path learn. One row per token, no gate over all leaves.
- inference (both): the likeliest branch at each node, whose gate alone is read: O(log E) work per token. The leaf's weight is
  1 after soft training, where the mixture has hardened; the path's probability after hard training, as trained.

Hardening: ``mean over tokens and nodes of -sum_c p_c ln p_c``. The paper sums over tokens and nodes where this takes means, so
that the coefficient does not depend on batch and depth; 0 switches it off.

Legend: T tokens, D model width, E leaves (experts), B branches of a node, M = (E - 1) / (B - 1) nodes, level by level.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import ConfigError, one_of
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import LinearGate, Outcome, Router, check_k, choose, ruled
from moesaic.routing.hierarchical import rules_of_groups, rules_within


class Tree(Router):
    """Routing down a tree to one leaf.

    Args:
        branch: B, children of every node; E must be a power of it.
        train: see above.
        hardening: coefficient of the hardening loss of soft training.
        init_std: of the node gates; biases start at 0, every decision near even.

    ``gate.extra["node_entropy_T"]`` (soft training): mean entropy of a token's node decisions, in nats.

    Rules: a branch without a permitted leaf is closed; soft rules act at every level (``rules_of_groups``). Raises
    ``ConfigError`` unless k = 1 and E is a power of ``branch``.
    """

    facts = Facts(
        balance="exact",  # in soft training every leaf computes every token; hard paths are not balanced
        experts="all",
        teaches="all",
        inference="other rule",
        inference_rule="one leaf, the likeliest branch at every node",
        losses={"switch": 1e-2},
        source="Belcak & Wattenhofer 2023",
    )

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        branch: int = 2,
        train: Literal["soft", "hard"] = "soft",
        hardening: float | None = None,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        one_of("train", train, ("soft", "hard"))
        if k != 1:
            raise ConfigError(f'Router "tree" ends at one leaf, so k must be 1, not {k}.')
        if branch < 2:
            raise ConfigError(f"branch must be at least 2, not {branch}.")
        depth = _depth(num_experts, branch)
        if branch**depth != num_experts:
            raise ConfigError(
                f"A tree with branch={branch} has a power of {branch} leaves, not num_experts={num_experts}; the nearest are "
                f"{branch ** (depth - 1)} and {branch**depth}."
            )
        if train == "hard" and hardening:
            raise ConfigError(
                f'hardening={hardening} has no effect with train="hard", whose decisions are hard already; leave it out.'
            )
        hardening = 0.1 if hardening is None else hardening
        if not hardening >= 0:
            raise ConfigError(
                f"hardening must be at least 0, not {hardening}: a negative one would blur every decision."
            )
        self.num_experts, self.k = num_experts, k
        self.branch, self.depth, self.train_as, self.hardening = branch, depth, train, hardening
        if train == "hard":
            self.facts = Facts(has_gate=False, experts="1", source=self.facts.source)
        self.nodes = LinearGate(dim, num_experts - 1, bias=True, init_std=init_std)  # M (B - 1) = E - 1 scores

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens: E rows each in soft training, else one."""
        if self.training and self.train_as == "soft":
            return self._mixture(x_TD, ctx)
        return self._path(x_TD, ctx)

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """Soft: all nodes, 2 T D (E - 1) FLOPs. Hard (and inference): 2 T D (B - 1) log_B E."""
        branch = options.get("branch", 2)
        scores = (branch - 1) * _depth(E, branch) if options.get("train", "soft") == "hard" else E - 1
        return Cost(2 * T * D * scores, (D + 1) * (E - 1))

    @property
    def rows_per_token(self) -> float:
        """E in soft training, 1 in hard."""
        return float(self.num_experts if self.train_as == "soft" else 1)

    def own_losses(self, plan: RoutingPlan | SoftPlan, outcome: Outcome) -> dict[str, Tensor]:
        """ "hardening", from the node entropies of a soft plan."""
        assert isinstance(plan, RoutingPlan)
        if plan.gate is None or not self.hardening:
            return {}
        entropy_T = plan.gate.extra["node_entropy_T"]
        if plan.valid_T is not None:
            entropy_T = torch.where(plan.valid_T, entropy_T, 0.0)
        total = outcome.peers.total
        tokens = total(plan.num_valid).clamp(min=1)
        return {"hardening": self.hardening * total(entropy_T.sum()) / tokens / outcome.num_layers}

    def _mixture(self, x_TD: Tensor, ctx: TokenContext) -> RoutingPlan:
        """All leaves, by the products of the decisions above them."""
        score_TS = self.nodes(x_TD)
        log_TE, entropy_T = self._leaves(score_TS, ctx)
        if ctx.evidence is not None:
            ctx.evidence["free_logits_TE"] = self._leaves(score_TS, NO_CONTEXT)[0]
        gate = Gate(log_TE, log_TE.softmax(dim=1), extra={"node_entropy_T": entropy_T})
        expert_TE = torch.arange(self.num_experts, device=x_TD.device).expand(log_TE.shape)
        return self.plan(expert_TE, gate.probs_TE, ctx, gate)

    def _leaves(self, score_TS: Tensor, ctx: TokenContext) -> tuple[Tensor, Tensor]:
        """Log probability of every leaf (T, E), and the mean entropy of the decisions (T,)."""
        T, B = score_TS.shape[0], self.branch
        log_TL, entropy_T = score_TS.new_zeros(T, 1), score_TS.new_zeros(T)
        levels = score_TS.split([B**level * (B - 1) for level in range(self.depth)], dim=1)
        for score_TLC in levels:
            L = log_TL.shape[1]  # nodes of this level
            score_RB = F.pad(score_TLC.reshape(T * L, B - 1), (1, 0))
            every_TL = torch.arange(L, device=score_TS.device).expand(T, L)
            rules = rules_within(rules_of_groups(ctx, L * B), every_TL, B)
            decision_TLB = ruled(score_RB, rules).log_softmax(dim=1).view(T, L, B)
            entropy_T = entropy_T + _entropy(decision_TLB).sum(dim=1)
            log_TL = (log_TL[:, :, None] + decision_TLB).flatten(1)
        return log_TL, entropy_T * (B - 1) / max(self.num_experts - 1, 1)

    def _path(self, x_TD: Tensor, ctx: TokenContext) -> RoutingPlan:
        """The likeliest child of each node passed; the other nodes' gates are not read."""
        T, B = x_TD.shape[0], self.branch
        bias_S = self.nodes.bias
        assert bias_S is not None
        weight_MCD, bias_MC = self.nodes.weight.unflatten(0, (-1, B - 1)), bias_S.unflatten(0, (-1, B - 1))
        x_TD = x_TD.to(weight_MCD.dtype)
        place_T1 = torch.zeros(T, 1, dtype=torch.int64, device=x_TD.device)  # within the level
        log_T1 = x_TD.new_zeros(T, 1)
        first = 0
        for level in range(self.depth):
            node_T = first + place_T1[:, 0]
            first += B**level
            with torch.autocast(x_TD.device.type, enabled=False):
                score_TC = torch.bmm(weight_MCD[node_T], x_TD[:, :, None])[:, :, 0] + bias_MC[node_T]
            rules = rules_within(rules_of_groups(ctx, B ** (level + 1)), place_T1, B)
            decision_TB = ruled(F.pad(score_TC, (1, 0)), rules).log_softmax(dim=1)
            child_T1 = choose(decision_TB, 1, rules.allowed_TE)
            log_T1 = log_T1 + decision_TB.gather(1, child_T1)
            place_T1 = place_T1 * B + child_T1
        return self.plan(place_T1, torch.ones_like(log_T1) if self.train_as == "soft" else log_T1.exp(), ctx)


def _depth(num_experts: int, branch: int) -> int:
    """Levels of the smallest tree with at least E leaves, in integers."""
    depth = 0
    while branch**depth < num_experts:
        depth += 1
    return depth


def _entropy(log_p: Tensor) -> Tensor:
    """Entropy over the last dimension. A closed branch (-inf) adds 0, and no NaN to the gradient."""
    return -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)).sum(dim=-1)
