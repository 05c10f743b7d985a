"""What a balancing loss may know besides the plan, and the arithmetic that all of them share.

Legend: T tokens, B sequences of S, N rows, E experts, L labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan.peers import ALONE, Peers
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan, count_experts

Scope = Literal["micro_batch", "sequence", "global_batch"]
AnyPlan = RoutingPlan | SoftPlan


@dataclass(frozen=True, eq=False)
class LossContext:
    """What a balancing loss may need besides the plan.

    Attributes:
        num_sequences: B of the plan; tokens are laid out sequence by sequence (scope "sequence").
        scope: over what ``f`` of the Switch loss is counted.
        step_counts_E: with scope "global_batch", the choices counted so far in this optimiser step (earlier micro-batches and
            other ranks, this micro-batch included).
        step: number of the optimiser step, from 1, for losses that fade in; None is long after the start.
        label_T: int64 domain, task or modality of each token, for losses that keep them apart; negative means unknown.
        peers: who holds the other parts of the micro-batch, where plan, labels and B are those of a part: the loss is then that
            of the whole micro-batch, its gradient that of the part's own tokens.
    """

    num_sequences: int = 1
    scope: Scope = "micro_batch"
    step_counts_E: Tensor | None = None
    label_T: Tensor | None = None
    step: int | None = None
    peers: Peers = ALONE

    @property
    def sequences(self) -> int:
        """B; no tokens are one empty sequence."""
        return self.num_sequences or 1

    def labels(self, plan: AnyPlan) -> Tensor | None:
        """int64 (T,) labels of the plan's tokens; multi-head layers route several sub-tokens of each."""
        if self.label_T is None:
            return None
        return self.label_T.flatten().repeat_interleave(plan.num_tokens // max(self.label_T.numel(), 1))


PLAIN = LossContext()


def gate_of(plan: AnyPlan) -> Gate:
    """The plan's scores; ``check_losses`` has refused routers without."""
    if plan.gate is None:
        raise ConfigError("This plan carries no scores, so a balancing loss cannot teach from it.")
    return plan.gate


def evidence(plan: AnyPlan, name: str, loss: str) -> Tensor:
    """``gate.extra[name]``, or ``ConfigError`` naming the loss that misses it."""
    extra = gate_of(plan).extra
    if name not in extra:
        raise ConfigError(
            f'Loss "{loss}" needs {name} in the plan, which the sparse layer keeps in training if its attribute "evidence" '
            "asks for it; models built with this loss do."
        )
    return extra[name]


def distribution(plan: AnyPlan) -> Tensor:
    """(T, E) scores that sum to 1 per token, 0 on padding. Sigmoid scores do not (DeepSeek-V3 normalises them like this)."""
    probs_TE = gate_of(plan).probs_TE
    return masked(probs_TE / probs_TE.sum(dim=1, keepdim=True).clamp(min=1e-20), plan.valid_T)


def entropy(share_XE: Tensor) -> Tensor:
    """(X,) entropies in nats. An expert at exactly 0 (rules, masking) has no gradient instead of 0 * inf = NaN."""
    return -(share_XE * torch.where(share_XE > 0, share_XE, 1.0).log()).sum(dim=-1)


def counts_by_sequence(plan: RoutingPlan, num_sequences: int) -> Tensor:
    """int64 (B, E): rows chosen for each expert by each sequence."""
    E, size = plan.num_experts, max(plan.num_tokens // num_sequences, 1)
    cell_N = plan.token_N // size * (E + 1) + plan.choice_N  # the marker E has a column of its own, which is cut off
    return count_experts(cell_N, num_sequences * (E + 1)).view(num_sequences, E + 1)[:, :E]


def valid_by_sequence(plan: AnyPlan, num_sequences: int) -> Tensor:
    """int64 (B,): tokens of each sequence that are not padding."""
    if plan.valid_T is not None:
        return plan.valid_T.view(num_sequences, -1).sum(dim=1)
    device = gate_of(plan).probs_TE.device
    return torch.full((num_sequences,), plan.num_tokens // num_sequences, device=device)


def masked(values_TX: Tensor, valid_T: Tensor | None) -> Tensor:
    """The values, 0 on padding. Where, not multiplication: padding may hold NaN, and NaN * 0 is NaN."""
    return values_TX if valid_T is None else torch.where(valid_T[:, None], values_TX, 0.0)


def mean_over(values_T: Tensor, counted_T: Tensor | None, peers: Peers = ALONE) -> Tensor:
    """Mean over the counted tokens (all if None) of all parts; 0 if there are none."""
    if counted_T is None:
        if peers.count == 1:
            return values_T.sum() / max(len(values_T), 1)
        counted_T = torch.ones_like(values_T, dtype=torch.bool)
    number = peers.total(counted_T.sum())
    return peers.total(torch.where(counted_T, values_T, 0.0).sum()) / number.clamp(min=1)


def mean_over_sequences(values_B: Tensor, valid_B: Tensor, peers: Peers) -> Tensor:
    """Mean over the sequences of all parts that are not all padding; ``values_B`` is 0 for those that are."""
    number = peers.total((valid_B > 0).sum())
    return peers.total(values_B.sum()) / number.clamp(min=1)
