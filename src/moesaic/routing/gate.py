"""What all routers share: the contract, the fp32 gate, score functions, and the stable top-k choice.

A router is an ``nn.Module`` with ``forward(x_TD, ctx) -> RoutingPlan``. Its class states ``facts`` and its
``cost``, its parameters and buffers stay fp32 whatever the model is cast to, and ``forward`` stores nothing.

Legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import ConfigError, one_of
from moesaic.ops.top import top_k
from moesaic.plan.peers import ALONE, Peers
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan, at_least_fp32, from_topk
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts, linear_cost

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]


class KeepsFp32(nn.Module):
    """A module whose parameters and buffers never fall below fp32: a router rounds to ties in 8 bits of mantissa."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsFp32:
        """Keep fp32 through ``.to(bfloat16)``, ``.half()`` and the like."""

        def keep_fp32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(moved.device)
            return moved

        applied: KeepsFp32 = super()._apply(keep_fp32, recurse)
        return applied

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint holding these tensors in half precision is read into fp32."""
        for name, tensor in state_dict.items():
            if name.startswith(prefix) and tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                state_dict[name] = tensor.float()
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the model's forward led to, for a router's own losses.

    Attributes:
        token_loss_T: fp32 language-model loss of each position, detached; 0 where there is no target.
        num_layers: sparse layers of the model, for means over layers.
        peers: who holds the other parts of the micro-batch, where plan and positions are those of a part.
    """

    token_loss_T: Tensor
    num_layers: int = 1
    peers: Peers = ALONE


@dataclass(frozen=True, eq=False)
class StepStats:
    """One optimiser step seen by one sparse layer, over all micro-batches and all parts of each.

    Attributes:
        counts_E: int64, rows the router chose for each expert.
        num_tokens: valid tokens.
        active_share: rows chosen / (tokens * E), averaged over all sparse layers of the model.
        dropped: rows lost to capacity.
        mean_token_loss: mean language-model loss of the step.
        sums: what ``Router.statistics`` said of each part of each micro-batch, added up by name.
    """

    counts_E: Tensor
    num_tokens: int = 0
    active_share: float = 0.0
    dropped: int = 0
    mean_token_loss: float = 0.0
    sums: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def drop_rate(self) -> float:
        """Share of the chosen rows that capacity turned away."""
        return self.dropped / max(int(self.counts_E.sum()), 1)


@dataclass(frozen=True, eq=False)
class TextStatistics:
    """What routers with tables may learn from the training text before the first step; functions, so that only what is used is
    computed.

    Attributes:
        counts_V: ``() -> int64 (V,)`` occurrences of each token.
        pairs_VV: ``() -> sparse int64 (V, V)`` COO: how often token j follows token i.
        labels: the domains; their numbers are the ``task_T`` of training.
    """

    vocab_size: int
    counts_V: Callable[[], Tensor]
    pairs_VV: Callable[[], Tensor]
    labels: tuple[str, ...] = ()
    _made: dict[object, Tensor] = field(default_factory=dict)

    def once(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """``make()``, computed for the first layer that asks for ``key`` and shared by the others."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class Router(KeepsFp32, ABC):
    """The contract. Subclasses are final: variations are options or other routers.

    Attributes:
        facts: what the router promises (``routing/facts.py``): of the class, or of the instance where options change it.
        num_experts, k: E, K.
    """

    facts: Facts = Facts()
    num_experts: int
    k: int

    @abstractmethod
    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan | SoftPlan:
        """Decide. ``x_TD`` is the normalised input of the layer, any float dtype."""

    def plan(
        self, expert_TK: Tensor, weight_TK: Tensor, ctx: TokenContext, gate: Gate | None = None, *, full: bool = False
    ) -> RoutingPlan:
        """The plan of these choices: padding and rules of the context applied. The usual last line of ``forward``.

        ``full`` promises that the router left no slot empty (no E in ``expert_TK``), which saves looking for one.
        """
        return from_topk(
            expert_TK, weight_TK, self.num_experts, valid_T=ctx.valid_T, gate=gate, allowed_TE=ctx.allowed_TE, full=full
        )

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """FLOPs for T tokens and parameters of a router of these sizes and options; the plain gate unless overridden."""
        return linear_cost(T, D, E)

    @property
    def rows_per_token(self) -> float:
        """Rows experts compute per token in training, on average; what "equal active compute" counts."""
        return float(self.k)

    def fit(self, text: TextStatistics) -> None:
        """Called once before the first step of a new run, for tables made from the training text."""

    def own_losses(self, plan: RoutingPlan | SoftPlan, outcome: Outcome) -> dict[str, Tensor]:
        """Losses only this router has, by name, already weighted; a function of the plan (and of buffers), nothing stored.

        They are added to the model's loss as they are, summed over layers: divide by ``outcome.num_layers`` for a mean. Each is
        about the whole micro-batch: sums and counts of tokens pass through ``outcome.peers.total``, and what does not depend
        on tokens is divided by ``outcome.peers.count`` before, for every part has it and gradients are summed.
        """
        return {}

    def statistics(self, plan: RoutingPlan | SoftPlan) -> dict[str, Tensor]:
        """What ``after_step`` must know of a forward besides counts, as tensors that add up over micro-batches and their parts.

        A pure function of the plan and of buffers, called once per micro-batch in training.
        """
        return {}

    def after_step(self, stats: StepStats) -> None:
        """Called once per optimiser step. For state that follows load; ``forward`` never changes state."""

    def observe(self, plan: RoutingPlan | SoftPlan, outcome: Outcome) -> None:
        """Called once per optimiser step, after the update, with the detached plan of the step's last micro-batch.

        For state that follows single tokens rather than load (memories); what it reads of the plan, ``forward`` put into
        ``gate.extra``. Where ``outcome.peers`` hold other parts, each sees its own tokens, and all must end in the same state.
        """

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """fp32 (T, K) weights this router would give to these experts; routers that support live replay define it."""
        raise ConfigError(
            f'Router "{type(self).__name__}" cannot weigh experts it did not choose; replay recorded weights.'
        )


class LinearGate(KeepsFp32):
    """Scores ``x W`` (+ bias), computed in fp32 whatever the dtype of ``x``. Weight (E, D) as in ``nn.Linear``."""

    def __init__(self, dim: int, num_experts: int, *, bias: bool = False, init_std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim, dtype=router_dtype()))
        self.bias = nn.Parameter(torch.zeros(num_experts, dtype=router_dtype())) if bias else None
        if not init_std >= 0:
            raise ConfigError(f"init_std must be at least 0, not {init_std}.")
        self.init_std = init_std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, init_std), the DeepSeek/Hugging Face habit; 0 gives Shazeer's zero start."""
        if self.init_std:
            nn.init.normal_(self.weight, std=self.init_std)
        else:
            nn.init.zeros_(self.weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        """fp32 logits (T, E)."""
        with no_autocast(x_TD.device.type):  # autocast would round logits to bf16 ties
            return F.linear(x_TD.to(self.weight.dtype), self.weight, self.bias)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off inside; costs nothing where it is off already (entering it takes as long as a product of one token)."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def router_dtype() -> torch.dtype:
    """What router parameters and buffers are made in: the default dtype, but never less than fp32."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def score(logits_TE: Tensor, how: Score) -> Tensor:
    """fp32 scores (T, E): softmax over experts, or independent sigmoid, or sqrt(softplus) (Megatron-LM)."""
    logits_TE = at_least_fp32(logits_TE)
    if how == "softmax":
        return logits_TE.softmax(dim=-1)
    if how == "sigmoid":
        return logits_TE.sigmoid()
    one_of("score", how, get_args(Score))
    # softplus underflows to 0 below about -104, where the root's gradient would be 0 * inf = NaN.
    return F.softplus(logits_TE).clamp(min=1e-30).sqrt()


def choose(scores_TE: Tensor, k: int, allowed_TE: Tensor | None = None) -> Tensor:
    """int64 (T, K): the k best experts, best first; ties go to the lowest expert on every device. Carries no gradient.

    With rules (``allowed_TE``) permitted experts come first whatever their score; where fewer than k are permitted, forbidden
    ones fill the last places, and the plan (``allowed_TE`` of ``from_topk``) sends those nowhere.
    """
    scores_TE = scores_TE.detach()
    if allowed_TE is not None:
        scores_TE = scores_TE.masked_fill(~allowed_TE, float("-inf"))
    return top_k(scores_TE, k)


def ruled(logits_TE: Tensor, ctx: TokenContext) -> Tensor:
    """Logits under the rules of the context: soft rules add, hard ones put -inf, so that no probability falls on a forbidden
    expert. A token without any permitted expert keeps its logits (finite scores); its rows go nowhere all the same.
    """
    if ctx.evidence is not None:
        ctx.evidence["free_logits_TE"] = (
            logits_TE  # to be taught from: over masked ones, permitted experts always sum to 1
        )
    if ctx.rule_bias_TE is not None:
        logits_TE = logits_TE + ctx.rule_bias_TE.to(logits_TE.dtype)
    if ctx.allowed_TE is not None:
        forbidden_TE = ~ctx.allowed_TE & ctx.allowed_TE.any(dim=1, keepdim=True)
        logits_TE = logits_TE.masked_fill(forbidden_TE, float("-inf"))
    return logits_TE


def mask_groups(
    scores_TE: Tensor, num_groups: int, groups_kept: int, group_score: Literal["max", "top2_sum"]
) -> Tensor:
    """Scores with every expert outside a token's best groups at -inf (DeepSeek-V2: "max"; V3: "top2_sum").

    -inf and not 0: with negative selection biases a masked expert at 0 could still win.
    """
    T, E = scores_TE.shape
    grouped_TGM = scores_TE.detach().view(T, num_groups, E // num_groups)
    if group_score == "max":
        best_TG = grouped_TGM.amax(dim=-1)
    else:
        best_TG = grouped_TGM.topk(min(2, E // num_groups), dim=-1).values.sum(dim=-1)
    keep_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(1, choose(best_TG, groups_kept), True)
    return scores_TE.masked_fill(~keep_TG.repeat_interleave(E // num_groups, dim=1), float("-inf"))


def check_k(k: int, num_experts: int) -> None:
    """Raises ``ConfigError`` unless 1 <= k <= E."""
    if num_experts < 1:
        raise ConfigError(f"A MoE layer needs at least 1 expert, not num_experts={num_experts}.")
    if not 1 <= k <= num_experts:
        raise ConfigError(
            f"k={k} experts per token are impossible with num_experts={num_experts}; choose k between 1 and {num_experts}."
        )
