"""Capacity: how many rows an expert may take. Who goes first and what happens to the rest: ``plan/overflow.py``.

>>> rule = CapacityRule(factor=1.25)
>>> plan = drop_over_capacity(plan, rule.slots(num_tokens=1024, k=2, num_experts=16), priority="position")

``factor="exact"`` is Tutel's automatic capacity (0 in its notation; with ``max_factor=x``, -x): as many slots as the fullest
expert has rows, so that nothing is dropped up to that bound. Execution here needs no slots, so without a bound it is dropless;
``slots`` still says what padded execution elsewhere would need.

Legend: T tokens, N rows, E experts, K rows per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from moesaic.errors import ConfigError, one_of
from moesaic.plan.overflow import BatchScore, Overflow, Priority, fullest, renormalized, seat_rows
from moesaic.plan.peers import ALONE, Peers
from moesaic.plan.plan import RoutingPlan
from moesaic.plan.whole import PartSizes, part_sizes, whole_plan

Rounding = Literal["ceil", "floor", "round"]


@dataclass(frozen=True)
class AdaptiveFactor:
    """A factor that follows drops, one per layer: after each step ``factor * (1 + eta * (drop rate - target))``, within bounds.

    Attributes:
        target: drop rate aimed at.
        eta: how fast.
        memory: of the drop rate's moving average, 0 for the last step alone.
        lo, hi: bounds of the factor.
        step: the factor in use is rounded up to a multiple of this, so that shapes, and whatever was compiled for them, seldom
            change.
    """

    target: float = 0.01
    eta: float = 1.0
    memory: float = 0.9
    lo: float = 0.5
    hi: float = 4.0
    step: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.target < 1 or not 0 <= self.memory < 1:
            raise ConfigError(
                f"capacity.adapt.target and .memory must be at least 0 and below 1, not {self.target} and {self.memory}."
            )
        if not self.eta > 0 or not self.step >= 1e-6 or not 0 < self.lo <= self.hi:
            raise ConfigError(
                "capacity.adapt needs eta above 0, step of at least 1e-6 and 0 < lo <= hi; got "
                f"eta={self.eta}, step={self.step}, lo={self.lo}, hi={self.hi}."
            )

    def in_use(self, factor: float) -> float:
        """The factor rounded up to a multiple of ``step``, within bounds."""
        return min(max(math.ceil(factor / self.step - 1e-6) * self.step, self.lo), self.hi)


@dataclass(frozen=True)
class CapacityRule:
    """How many slots C an expert has for T tokens: ``clip(round(factor * k * T / E), minimum, T)``.

    The defaults follow most code bases (fieldguide 2.9); the other fields reproduce the ones that differ:
    mesh-tf ``rounding="floor", count_k=False``; Megatron ``minimum=0``; V-MoE ``multiple_of=4``; DeepSpeed the default.

    Attributes:
        factor, eval_factor: capacity factor in training and in evaluation; None in evaluation means dropless, the default,
            because drops there depend on batch mates (GShard and ST-MoE evaluate with 2.0). In training "exact" drops nothing.
        max_factor: bound of factor "exact"; None is none.
        adapt: let the factor of each layer follow its drop rate, starting from ``factor``.
        minimum: least slots in training (0 disables).
        multiple_of: round C up to a multiple, for kernels; T still bounds it.
        priority, batch_score: who goes first, see ``plan/overflow.py``.
        overflow: what happens to the others, see there.
        fallback_expert: the catch-all expert of ``overflow="fallback_expert"``.
        groups: routing groups of equal size (GShard) of the whole micro-batch; each group has its own slots. Processes that
            share the micro-batch hold equally many of them.
        renormalize: rescale a token's surviving weights to their sum before the drop.
        tau: slots of a feed-forward expert over those of a zero-computation one (MoE++: 0.75), see ``split_slots``; None
            gives all experts the same.
    """

    factor: float | Literal["exact"] = 1.25
    eval_factor: float | None = None
    rounding: Rounding = "ceil"
    count_k: bool = True
    minimum: int = 4
    multiple_of: int = 1
    priority: Priority = "position"
    overflow: Overflow = "residual"
    fallback_expert: int | None = None
    groups: int = 1
    renormalize: bool = False
    tau: float | None = None
    max_factor: float | None = None
    adapt: AdaptiveFactor | None = None
    batch_score: BatchScore = "max"

    def __post_init__(self) -> None:
        one_of("capacity.rounding", self.rounding, get_args(Rounding))
        one_of("capacity.priority", self.priority, get_args(Priority))
        one_of("capacity.overflow", self.overflow, get_args(Overflow))
        one_of("capacity.batch_score", self.batch_score, get_args(BatchScore))
        if isinstance(self.factor, str):
            one_of("capacity.factor", self.factor, ("exact",))
        for name in ("factor", "eval_factor", "max_factor"):
            value = getattr(self, name)
            if value is not None and value != "exact" and not value > 0:
                raise ConfigError(f"capacity.{name} must be above 0, not {value}; 1.25 is usual in training.")
        if self.multiple_of < 1 or self.groups < 1 or self.minimum < 0:
            raise ConfigError(
                "capacity.multiple_of and capacity.groups must be at least 1 and capacity.minimum at least 0."
            )
        if (self.overflow == "fallback_expert") != (self.fallback_expert is not None):
            raise ConfigError('capacity.fallback_expert goes with overflow="fallback_expert": set both or neither.')
        if self.tau is not None and not 0 < self.tau <= 1:
            raise ConfigError(f"capacity.tau must be above 0 and at most 1, not {self.tau}; 0.75 is MoE++'s.")
        if self.tau is not None and self.overflow not in ("residual", "shared"):
            raise ConfigError(
                f'capacity.tau gives kinds of experts unequal room, so overflow="{self.overflow}" cannot move rows between '
                'them; use overflow="residual".'
            )
        exact = self.factor == "exact"
        if self.max_factor is not None and not exact:
            raise ConfigError(f'capacity.max_factor bounds factor="exact", and factor is {self.factor}.')
        if exact and (self.tau is not None or self.adapt is not None):
            raise ConfigError('capacity.factor="exact" leaves nothing for tau or adapt to set; give a number.')
        if self.adapt is not None:
            if not self.adapt.lo <= self.factor <= self.adapt.hi:  # type: ignore[operator]
                raise ConfigError(
                    f"capacity.factor={self.factor} starts outside capacity.adapt's {self.adapt.lo} to {self.adapt.hi}."
                )
            if self.overflow not in ("residual", "shared"):
                raise ConfigError(
                    f'capacity.adapt follows dropped rows, and overflow="{self.overflow}" moves them; use "residual".'
                )

    def slots(
        self,
        num_tokens: int,
        k: int,
        num_experts: float,
        training: bool = True,
        *,
        factor: float | None = None,
        needed: int | None = None,
    ) -> int | None:
        """C for one routing group of ``num_tokens`` tokens; None means no limit.

        Args:
            factor: used instead of the rule's own in training (an adapted one).
            needed: rows of the fullest expert, which factor "exact" asks for.
        """
        own = self.factor if training else self.eval_factor
        if training and factor is not None:
            own = factor
        if own == "exact":
            if needed is None:
                raise ConfigError(
                    'Slots of capacity.factor="exact" depend on the plan: say what its fullest expert needs.'
                )
            slots = min(-(-max(needed, self.minimum) // self.multiple_of) * self.multiple_of, num_tokens)
            most = self._rounded(self.max_factor, num_tokens, k, num_experts, training)
            return slots if most is None else min(slots, most)
        return self._rounded(own, num_tokens, k, num_experts, training)

    def _rounded(self, factor: float | None, num_tokens: int, k: int, num_experts: float, training: bool) -> int | None:
        if factor is None:
            return None
        ideal = factor * num_tokens * (k if self.count_k else 1) / num_experts
        # 1e-9 absorbs binary fractions: 1.1 * 10 must not become 12 slots.
        rounded = {"ceil": math.ceil(ideal - 1e-9), "floor": math.floor(ideal + 1e-9)}
        rounded["round"] = math.floor(ideal + 0.5)
        slots = rounded[self.rounding]
        slots = max(slots, self.minimum if training else 0)
        slots = -(-slots // self.multiple_of) * self.multiple_of
        return min(slots, num_tokens)

    def split_slots(
        self,
        num_tokens: int,
        k: int,
        num_experts: int,
        num_special: int,
        training: bool = True,
        factor: float | None = None,
    ) -> tuple[int, int] | None:
        """C of a feed-forward and of a zero-computation expert (MoE++, Jin et al. 2025, eq. 8); None means no limit.

        With F and Z of them: ``factor k T tau / (tau F + Z)`` and ``factor k T / (tau F + Z)``, rounded like ``slots``. (The
        paper has no k: ``count_k=False``.)
        """
        tau = 1.0 if self.tau is None else self.tau
        as_many = tau * (num_experts - num_special) + num_special  # experts, counted in zero-computation ones
        true, special = (self.slots(num_tokens, k, e, training, factor=factor) for e in (as_many / tau, as_many))
        return None if true is None or special is None else (true, special)

    def apply(
        self,
        plan: RoutingPlan,
        training: bool,
        *,
        k: int | None = None,
        num_special: int = 0,
        factor: float | None = None,
        generator: torch.Generator | None = None,
        peers: Peers = ALONE,
    ) -> RoutingPlan:
        """Drop what this rule does not let through. Padding neither takes slots nor counts towards T.

        With padding (and with factor "exact", and with ``peers``) slots depend on a number that a GPU must be waited for.

        Args:
            k: experts a token uses on average; None is the rows it owns, of which adaptive routers leave many empty.
            num_special: the last so many experts are zero-computation ones, to which ``tau`` gives more room.
            factor: an adapted one, in training.
            generator: of priority "random".
            peers: who holds the other parts of the micro-batch, where the plan is that of a part. Slots are those of the whole;
                each part decides about its own groups or, where padding makes a group lie in two parts, about all rows of all
                parts. Only "random" priority then keeps other rows than one process would.

        Raises ``ConfigError`` for ``groups`` of which the parts cannot hold equally many.
        """
        own = self.factor if training else self.eval_factor
        if own is None or (own == "exact" and self.max_factor is None):
            return plan
        decide = partial(self._seats, training=training, k=k, num_special=num_special, factor=factor)
        if peers.count == 1:
            expert_N = decide(plan, generator=generator)
        elif self.groups % peers.count:
            raise ConfigError(
                f"capacity.groups={self.groups} cannot be shared equally by {peers.count} data-parallel ranks, so one would "
                f"lie on two of them; set capacity.groups to a multiple of {peers.count}."
            )
        else:
            expert_N = self._seats_of_part(plan, peers, decide, generator)
        return plan.send(expert_N, renormalized(plan, expert_N) if self.renormalize else None)

    def _seats_of_part(
        self, plan: RoutingPlan, peers: Peers, decide: Callable[..., Tensor], generator: torch.Generator | None
    ) -> Tensor:
        sizes = part_sizes(plan, peers)
        if len(set(sizes.valid)) == 1:
            return decide(plan, generator=generator, peers=peers, sizes=sizes)
        if self.priority == "random":  # all decide about all rows, so all must draw alike
            device = plan.token_N.device if generator is None else generator.device
            seed = peers.first(torch.randint(2**62, (), generator=generator, device=device).to(plan.token_N.device))
            generator = torch.Generator().manual_seed(int(seed))
        scores = self.priority == "batch" or self.overflow == "next_best"
        whole, mine = whole_plan(plan, sizes, peers, scores=scores)
        return decide(whole, generator=generator)[mine]

    def _seats(
        self,
        plan: RoutingPlan,
        *,
        training: bool,
        k: int | None,
        num_special: int,
        factor: float | None,
        generator: torch.Generator | None,
        peers: Peers = ALONE,
        sizes: PartSizes | None = None,
    ) -> Tensor:
        """int64 (N,): where each row finds a place. With ``sizes`` the plan is a part that has groups of its own."""
        if sizes is None:
            num_valid = plan.num_tokens if plan.valid_T is None else int(plan.valid_T.sum())
            rows, tokens = plan.num_rows, plan.num_tokens
        else:
            num_valid, rows, tokens = sum(sizes.valid), sum(sizes.rows), sum(sizes.tokens)
        if k is None:
            k = plan.per_token or max(1, round(rows / max(tokens, 1)))
        size, groups = math.ceil(num_valid / self.groups), self.groups // peers.count
        seat = partial(
            seat_rows, plan, priority=self.priority, groups=groups, batch_score=self.batch_score, generator=generator
        )
        if self.tau is not None and num_special:
            split = self.split_slots(size, k, plan.num_experts, num_special, training, factor)
            assert split is not None
            # Dropped rows go nowhere, so no expert's queue depends on another's: each kind can be read off seats of its own.
            true_N, special_N = (seat(slots=c) for c in split)
            return torch.where(plan.expert_N < plan.num_experts - num_special, true_N, special_N)
        # Of a part its own fullest: other parts may need more slots, but what "exact" drops is over ``max_factor`` alone.
        needed = fullest(plan, groups) if training and self.factor == "exact" else None
        slots = self.slots(size, k, plan.num_experts, training, factor=factor, needed=needed)
        assert slots is not None
        return seat(slots=slots, overflow=self.overflow, fallback_expert=self.fallback_expert)
