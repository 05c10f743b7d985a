"""The one idea of moesaic: a routing decision is a value. A router returns one; everything else takes one.

``RoutingPlan`` is a flat list of assignment rows "token t goes to expert e with weight w"; it covers top-k, hash, expert
choice, capacity and zero experts alike. ``SoftPlan`` (dense dispatch and combine weights) is its one sibling. Both offer the
two verbs ``gather`` (tokens to rows) and ``combine`` (rows back to tokens), written here in the plainest way; the dispatcher
in ``experts/dispatch.py`` does the same with rows grouped by expert.

Legend: T tokens, N assignment rows, E experts, K rows per token, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils import _pytree


@dataclass(frozen=True, eq=False)
class Gate:
    """The evidence behind a choice: what losses and monitors need, absent where only the choice matters.

    Attributes:
        logits_TE: fp32 router scores before the score function, differentiable.
        probs_TE: fp32 scores after it (softmax, sigmoid, ...), differentiable, without selection bias.
        noisy_TE: for noisy gates, the perturbed logits that choice and weights were made from; else None.
        extra: what else the router's own losses (``Router.own_losses``) or the next sparse layer's router read, by name; each
            router documents its own.
        load_probs_TE: for noisy gates, the differentiable probability that each expert is among the chosen
            (Shazeer et al. 2017, appendix A); else None.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    load_probs_TE: Tensor | None = None
    noisy_TE: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def detach(self) -> Gate:
        """The same evidence without a graph."""
        load, noisy = self.load_probs_TE, self.noisy_TE
        return Gate(
            self.logits_TE.detach(),
            self.probs_TE.detach(),
            None if load is None else load.detach(),
            None if noisy is None else noisy.detach(),
            {name: tensor.detach() for name, tensor in self.extra.items()},
        )


@dataclass(frozen=True, eq=False)
class RoutingPlan:
    """Which token goes to which expert, with which weight. Immutable; edits return a new plan.

    Attributes:
        token_N: int64, the token of each row, in the router's natural order.
        expert_N: int64 in [0, E]; E means nowhere (dropped, padding) and is never counted.
        weight_N: fp32, differentiable weight on the expert's output; 0 on rows that go nowhere.
        choice_N: int64, what the router itself chose before any edit; a row with ``choice < E`` and ``expert == E`` was
            dropped. Auxiliary losses count choices (before drops), execution follows experts.
        num_tokens, num_experts: T and E.
        per_token: K where every token owns K consecutive rows, else None.
        input_weight_N: fp32 weight on the expert's input, for models that scale before the expert; or None.
        valid_T: bool, False on padding; None when every token is real.
        gate: the evidence, or None.
        allowed_TE: bool, the experts that rules permit each token; None permits all. A row sent anywhere else goes nowhere,
            whoever sends it: ``send`` is the only way to change experts, and it enforces this.
    """

    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    choice_N: Tensor
    num_tokens: int
    num_experts: int
    per_token: int | None
    input_weight_N: Tensor | None = None
    valid_T: Tensor | None = None
    gate: Gate | None = None
    allowed_TE: Tensor | None = None

    # ---- views -------------------------------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        """N, static for a given router and input shape."""
        return self.token_N.shape[0]

    @property
    def kept_N(self) -> Tensor:
        """bool (N,): rows that reach an expert."""
        return self.expert_N < self.num_experts

    @property
    def counts_E(self) -> Tensor:
        """int64 (E,): rows each expert computes, after edits."""
        return count_experts(self.expert_N, self.num_experts)

    @property
    def choice_counts_E(self) -> Tensor:
        """int64 (E,): rows the router chose for each expert, before edits such as capacity."""
        return count_experts(self.choice_N, self.num_experts)

    @property
    def expert_TK(self) -> Tensor:
        """int64 (T, K) view of ``expert_N``; only for per-token plans."""
        return self.expert_N.view(self.num_tokens, self._k())

    @property
    def choice_TK(self) -> Tensor:
        """int64 (T, K) view of ``choice_N``; only for per-token plans."""
        return self.choice_N.view(self.num_tokens, self._k())

    @property
    def weight_TK(self) -> Tensor:
        """fp32 (T, K) view of ``weight_N``; only for per-token plans."""
        return self.weight_N.view(self.num_tokens, self._k())

    @property
    def num_valid(self) -> Tensor:
        """int64 scalar: tokens that are not padding."""
        if self.valid_T is None:
            return torch.tensor(self.num_tokens, device=self.token_N.device)
        return self.valid_T.sum()

    @property
    def dropped(self) -> Tensor:
        """int64 scalar: rows the router chose that no expert computes."""
        return ((self.choice_N < self.num_experts) & ~self.kept_N).sum()

    def _k(self) -> int:
        if self.per_token is None:
            raise ValueError("this plan has a varying number of rows per token, so it has no (T, K) view")
        return self.per_token

    # ---- the two verbs -----------------------------------------------------------------------------------------

    def gather(self, x_TD: Tensor) -> Tensor:
        """Rows for the experts, (N, D): each row's token, times ``input_weight_N`` where there is one."""
        x_ND = x_TD[self.token_N]
        if self.input_weight_N is not None:
            x_ND = (x_ND * self.input_weight_N[:, None]).to(x_TD.dtype)
        return x_ND

    def combine(self, y_ND: Tensor) -> Tensor:
        """Weighted sum of expert outputs per token, (T, D), accumulated in at least fp32."""
        kept_N1 = self.kept_N[:, None]
        rows_ND = torch.where(kept_N1, y_ND * self.weight_N[:, None], 0.0)
        y_TD = rows_ND.new_zeros(self.num_tokens, y_ND.shape[1])
        return y_TD.index_add(0, self.token_N, rows_ND).to(y_ND.dtype)

    # ---- small changes used everywhere -------------------------------------------------------------------------

    def send(self, expert_N: Tensor, weight_N: Tensor | None = None) -> RoutingPlan:
        """The same plan with other experts; rows sent to E get weight 0. ``choice_N`` keeps the router's own choice.

        Rows sent to an expert that ``allowed_TE`` forbids go nowhere.
        """
        weight_N = self.weight_N if weight_N is None else weight_N
        if self.allowed_TE is not None:
            allowed_N = self.allowed_TE[self.token_N, expert_N.clamp(max=self.num_experts - 1)]
            expert_N = torch.where(allowed_N, expert_N, self.num_experts)
        return replace(self, expert_N=expert_N, weight_N=torch.where(expert_N < self.num_experts, weight_N, 0.0))

    def detach(self) -> RoutingPlan:
        """A plan that holds no graph (for traces and statistics)."""
        scale = self.input_weight_N
        scale = None if scale is None else scale.detach()
        return replace(
            self, weight_N=self.weight_N.detach(), input_weight_N=scale, gate=self.gate and self.gate.detach()
        )


@dataclass(frozen=True, eq=False)
class SoftPlan:
    """Dense routing (Soft MoE, Puigcerver et al. 2023): every slot reads a mixture of tokens, every token a mixture of slots.

    Tokens are split into G consecutive groups of equal size that never mix (one per sequence, or one for all).

    Attributes:
        dispatch_GTS: fp32 (G, T/G, S) weights, S = E * slots per expert; slot s of a group sums to 1 over its tokens.
        combine_GTS: fp32 (G, T/G, S) weights; each token sums to 1 over slots.
        num_experts: E; slots of one expert are consecutive.
        valid_T, gate: as in ``RoutingPlan``.
    """

    dispatch_GTS: Tensor
    combine_GTS: Tensor
    num_experts: int
    valid_T: Tensor | None = None
    gate: Gate | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.dispatch_GTS.shape[0] * self.dispatch_GTS.shape[1]

    @property
    def slots_per_expert(self) -> int:
        """Slots each expert computes for one group."""
        return self.dispatch_GTS.shape[2] // self.num_experts

    @property
    def counts_E(self) -> Tensor:
        """int64 (E,): slots per expert over all groups, equal by construction."""
        rows = self.slots_per_expert * self.dispatch_GTS.shape[0]
        return torch.full((self.num_experts,), rows, device=self.dispatch_GTS.device)

    def gather(self, x_TD: Tensor) -> Tensor:
        """Slot inputs (E * G * slots, D), grouped by expert."""
        G, S = self.dispatch_GTS.shape[0], self.dispatch_GTS.shape[2]
        x_GTD = x_TD.view(G, self.dispatch_GTS.shape[1], x_TD.shape[1])
        slots_GSD = self.dispatch_GTS.mT @ x_GTD.to(self.dispatch_GTS.dtype)
        slots_EGPD = slots_GSD.view(G, self.num_experts, S // self.num_experts, x_TD.shape[1]).transpose(0, 1)
        return slots_EGPD.reshape(-1, x_TD.shape[1]).to(x_TD.dtype)

    def combine(self, y_ND: Tensor) -> Tensor:
        """Token outputs (T, D) from slot outputs grouped by expert."""
        G, S = self.dispatch_GTS.shape[0], self.dispatch_GTS.shape[2]
        y_EGPD = y_ND.view(self.num_experts, G, S // self.num_experts, y_ND.shape[1])
        y_GSD = y_EGPD.transpose(0, 1).reshape(G, S, y_ND.shape[1])
        return (
            (self.combine_GTS @ y_GSD.to(self.combine_GTS.dtype)).to(y_ND.dtype).reshape(self.num_tokens, y_ND.shape[1])
        )

    def detach(self) -> SoftPlan:
        """A plan that holds no graph."""
        gate = self.gate and self.gate.detach()
        return replace(self, dispatch_GTS=self.dispatch_GTS.detach(), combine_GTS=self.combine_GTS.detach(), gate=gate)


for _cls in (Gate, RoutingPlan, SoftPlan):
    # So that a plan returned by a layer passes through checkpointing, FSDP2's hooks and torch.compile with its gradients.
    _pytree.register_dataclass(_cls)


# ---- constructors ----------------------------------------------------------------------------------------------


def from_topk(
    expert_TK: Tensor,
    weight_TK: Tensor,
    num_experts: int,
    *,
    valid_T: Tensor | None = None,
    gate: Gate | None = None,
    input_weight_TK: Tensor | None = None,
    allowed_TE: Tensor | None = None,
    full: bool = False,
) -> RoutingPlan:
    """A plan in which every token owns K rows.

    Args:
        expert_TK: int64 in [0, E]; E marks a slot the router left empty.
        weight_TK: output weights, any float dtype; kept in at least fp32.
        valid_T: bool, False on padding tokens: their rows go nowhere.
        input_weight_TK: optional weights on the expert's input.
        allowed_TE: bool, experts that rules permit; a slot on any other is left empty.
        full: the caller promises that no slot is empty; nothing is then looked at where padding and rules empty none either.
    """
    num_tokens, k = expert_TK.shape
    if valid_T is not None:
        expert_TK = torch.where(valid_T[:, None], expert_TK, num_experts)
    if allowed_TE is not None:
        allowed_TK = allowed_TE.gather(1, expert_TK.clamp(max=num_experts - 1))
        expert_TK = torch.where(allowed_TK, expert_TK, num_experts)
    expert_N = expert_TK.reshape(-1)
    weight_N = at_least_fp32(weight_TK.reshape(-1))
    if not full or valid_T is not None or allowed_TE is not None:
        weight_N = torch.where(expert_N < num_experts, weight_N, 0.0)
    if num_tokens == 1:  # a decoded token, where every operation counts
        token_N = torch.zeros_like(expert_N)
    else:
        token_N = torch.arange(num_tokens, device=expert_TK.device).repeat_interleave(k)
    scale_N = None if input_weight_TK is None else at_least_fp32(input_weight_TK.reshape(-1))
    return RoutingPlan(
        token_N, expert_N, weight_N, expert_N, num_tokens, num_experts, k, scale_N, valid_T, gate, allowed_TE
    )


def from_rows(
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor,
    num_tokens: int,
    num_experts: int,
    *,
    valid_T: Tensor | None = None,
    gate: Gate | None = None,
    allowed_TE: Tensor | None = None,
) -> RoutingPlan:
    """A plan from loose rows, for routers with a varying number of experts per token (expert choice, ReLU routing)."""
    if valid_T is not None:
        expert_N = torch.where(valid_T[token_N], expert_N, num_experts)
    if allowed_TE is not None:
        expert_N = torch.where(allowed_TE[token_N, expert_N.clamp(max=num_experts - 1)], expert_N, num_experts)
    weight_N = torch.where(expert_N < num_experts, at_least_fp32(weight_N), 0.0)
    return RoutingPlan(
        token_N, expert_N, weight_N, expert_N, num_tokens, num_experts, None, None, valid_T, gate, allowed_TE
    )


def count_experts(expert_N: Tensor, num_experts: int) -> Tensor:
    """int64 (E,): occurrences of 0..E-1; the marker E is not counted. No host synchronisation on a GPU."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_N.device)
    # Integer adds commute, so this is deterministic on every device, unlike a float scatter.
    return counts.scatter_add(0, expert_N, torch.ones_like(expert_N))[:num_experts]


def at_least_fp32(x: Tensor) -> Tensor:
    """fp32, or fp64 where the input already is."""
    return x if x.dtype == torch.float64 else x.float()
