"""Rules on routing, as data: which experts a token may use, by its id, task, tenant, position or any fact about it.

>>> rules = RuleSet((
...     Rule(when={"tenant": [3, [10, 19]]}, allow=[0, 1]),            # hard: these tenants use experts 0 and 1 only
...     Rule(when={"token": [[256, None]], "task": [2]}, forbid=[5]),  # all conditions of a rule must hold
...     Rule(when={"metadata.minor": [1]}, allow=[4], weight=2.0),     # soft: +2 on a logit
... ))
>>> layer.rules = rules                                                # or MoEConfig(rules=rules), or JSON of the same form

A condition lists whole numbers and pairs ``[first, last]`` (both included, ``null`` is open); one of them must hold. A rule
applies to a token that meets all its conditions; a rule without conditions applies to every token.

- Hard rules (no weight): a token may use the experts that *all* rules applying to it permit (``allow`` permits those named,
  ``forbid`` all others). Whatever chooses experts chooses among these; ``RoutingPlan.allowed_TE`` holds every later edit to it.
- Soft rules add their weight to the logits of ``allow``, or subtract it from those of ``forbid``; several add up.
- A token left without any expert follows ``on_none``: "nowhere" (only the residual stream and shared experts carry it),
  "fallback" (its one permitted expert is ``fallback_expert``, which no rule may forbid) or "refuse" (``ConfigError``; this
  asks the device every forward). Permissions passed in ``TokenContext.allowed_TE`` are intersected afterwards.
- A rule about something the caller did not say is refused, never skipped. What a caller says it does not know (task -1) is a
  number as any other: ``{"task": [[null, -1]]}`` is a rule about it.

Rules are evaluated outside the router, in integers, without gradient. In training "enforce" applies them and "teach" leaves
the choice free (soft rules stay); in both the loss "semantic" (``balance/scores.py``) can teach the gate to obey by itself.

Legend: T tokens, E experts, R rules or spans of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moesaic.errors import ConfigError, nearest, one_of
from moesaic.routing.context import TokenContext

OnNone = Literal["nowhere", "fallback", "refuse"]
InTraining = Literal["enforce", "teach"]
Values = tuple[int | tuple[int | None, ...], ...]

FIELDS = {"token": "ids_T", "task": "task_T", "tenant": "tenant_T", "position": "position_T"}
_METADATA = "metadata."
_LEAST, _MOST = -(2**63), 2**63 - 1


@dataclass(frozen=True)
class Rule:
    """One rule. Lists are kept as tuples, so that it equals itself read back from JSON.

    Attributes:
        when: field -> numbers and ``[first, last]`` pairs; fields are "token", "task", "tenant", "position" (within the
            document) and "metadata.<name>".
        allow, forbid: experts; exactly one of the two.
        weight: None is a hard rule; a number above 0 a soft one.
        name: shown in errors and counts.
    """

    when: dict[str, Values] = field(default_factory=dict)
    allow: tuple[int, ...] | None = None
    forbid: tuple[int, ...] | None = None
    weight: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        label = f'Rule "{self.name}"' if self.name else f"The rule on {', '.join(self.when) or 'every token'}"
        if (self.allow is None) == (self.forbid is None):
            raise ConfigError(f"{label} must name experts to allow or to forbid, one of the two.")
        for kind in ("allow", "forbid"):
            experts = getattr(self, kind)
            if experts is None:
                continue
            if not isinstance(experts, list | tuple) or not experts:
                raise ConfigError(f"{label}: {kind} must list at least one expert, not {experts!r}.")
            for expert in experts:
                if not _whole(expert) or expert < 0:
                    raise ConfigError(f"{label}: {kind} must list expert numbers from 0, not {expert!r}.")
            object.__setattr__(self, kind, tuple(experts))
        when = {name: _values(label, name, values) for name, values in self.when.items()}
        object.__setattr__(self, "when", when)
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(
                f"{label}: weight must be a finite number above 0, not {self.weight}; swap allow and forbid for the opposite, "
                "leave it out for a hard rule."
            )

    @property
    def hard(self) -> bool:
        """Whether it permits and forbids rather than prefers."""
        return self.weight is None

    def permitted(self, num_experts: int) -> set[int]:
        """The experts a hard rule leaves."""
        return set(self.allow) if self.allow is not None else set(range(num_experts)) - set(self.forbid or ())

    def bias(self, num_experts: int) -> list[float]:
        """What a soft rule adds to the logits, by expert."""
        sign, experts = (1.0, self.allow) if self.allow is not None else (-1.0, self.forbid)
        return [sign * (self.weight or 0.0) if e in (experts or ()) else 0.0 for e in range(num_experts)]


@dataclass(frozen=True)
class RuleCounts:
    """How far the rules reached in one context; padding is not counted.

    Attributes:
        tokens: all of them.
        matched: rule -> tokens it applies to.
        without: tokens to which hard rules together leave no expert (before ``on_none``).
    """

    tokens: int
    matched: dict[str, int]
    without: int


@dataclass(frozen=True)
class RuleSet:
    """Rules that hold together.

    Attributes:
        rules: in any order.
        on_none: what happens to a token they leave without any expert.
        fallback_expert: with ``on_none="fallback"``.
        in_training: whether training obeys the hard ones or is only taught by the loss "semantic".
    """

    rules: tuple[Rule, ...] = ()
    on_none: OnNone = "nowhere"
    fallback_expert: int | None = None
    in_training: InTraining = "enforce"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        one_of("rules.on_none", self.on_none, get_args(OnNone))
        one_of("rules.in_training", self.in_training, get_args(InTraining))
        if (self.on_none == "fallback") != (self.fallback_expert is not None):
            raise ConfigError('rules.fallback_expert goes with on_none="fallback": set both or neither.')
        for i, rule in enumerate(self.rules):
            if rule.hard and self.fallback_expert in (rule.forbid or ()):
                raise ConfigError(
                    f"{self.label(i)} forbids expert {self.fallback_expert}, the fallback of tokens without any expert; choose "
                    'another fallback_expert or on_none="nowhere".'
                )

    @property
    def hard(self) -> bool:
        """Whether any rule permits and forbids."""
        return any(rule.hard for rule in self.rules)

    @property
    def fields(self) -> set[str]:
        """What the rules ask about every token."""
        return {name for rule in self.rules for name in rule.when}

    def label(self, index: int) -> str:
        """What messages and counts call a rule: its place, from 1, and its name."""
        name = self.rules[index].name
        return f'Rule {index + 1} "{name}"' if name else f"Rule {index + 1}"

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` for experts a layer of E lacks, and for rules that leave nothing whatever the token."""
        named = [(self.label(i), e) for i, rule in enumerate(self.rules) for e in rule.allow or rule.forbid or ()]
        if self.fallback_expert is not None:
            named.append(("rules.fallback_expert", self.fallback_expert))
        for label, expert in named:
            if not 0 <= expert < num_experts:
                raise ConfigError(
                    f"{label} names expert {expert}, but the layer has experts 0 to {num_experts - 1} (zero-computation "
                    "ones included, shared ones not)."
                )
        always = set(range(num_experts))
        for i, rule in enumerate(self.rules):
            if not rule.hard:
                continue
            permitted = rule.permitted(num_experts)
            if not permitted and self.on_none != "nowhere":
                raise ConfigError(
                    f'{self.label(i)} forbids every expert; leave one, or set on_none="nowhere" if such tokens shall have none.'
                )
            always = always if rule.when else always & permitted
        if not always:
            raise ConfigError("The rules without conditions together leave no expert to any token; drop one of them.")

    def evaluate(
        self, ctx: TokenContext, num_tokens: int, num_experts: int, device: torch.device | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """``(allowed_TE, rule_bias_TE)``: permitted experts (bool) and what soft rules add (fp32); None where there are none.

        Raises ``ConfigError`` if a rule asks for something the context lacks, and with ``on_none="refuse"``.
        """
        matched = self._matches(ctx, num_tokens, device)
        allowed_TE, bias_TE = self._permitted(matched, num_experts), None
        for rule, match_T in zip(self.rules, matched, strict=True):
            if not rule.hard:
                bias_E = _constant(rule.bias(num_experts), torch.float32, match_T.device)
                added_TE = torch.where(match_T[:, None], bias_E, 0.0)
                bias_TE = added_TE if bias_TE is None else bias_TE + added_TE
        if allowed_TE is None or self.on_none == "nowhere":
            return allowed_TE, bias_TE
        none_T = ~allowed_TE.any(dim=1)
        if self.on_none == "refuse":
            self._refuse(none_T if ctx.valid_T is None else none_T & ctx.valid_T, matched)
        else:
            fallback_E = [e == self.fallback_expert for e in range(num_experts)]
            allowed_TE = allowed_TE | (none_T[:, None] & _constant(fallback_E, torch.bool, none_T.device))
        return allowed_TE, bias_TE

    def apply(
        self, ctx: TokenContext, num_tokens: int, num_experts: int, device: torch.device, training: bool
    ) -> TokenContext:
        """The context with these rules in it. In training it also collects what the loss "semantic" needs (``evidence``)."""
        allowed_TE, bias_TE = self.evaluate(ctx, num_tokens, num_experts, device)
        if bias_TE is not None and ctx.rule_bias_TE is not None:
            bias_TE = ctx.rule_bias_TE + bias_TE
        if bias_TE is not None:
            ctx = replace(ctx, rule_bias_TE=bias_TE)
        if allowed_TE is None:
            return ctx
        if training:
            ctx = replace(ctx, evidence={**(ctx.evidence or {}), "rules_TE": allowed_TE})
            if self.in_training == "teach":
                return ctx
        return replace(ctx, allowed_TE=allowed_TE if ctx.allowed_TE is None else allowed_TE & ctx.allowed_TE)

    def explain(self, ctx: TokenContext, num_tokens: int, num_experts: int) -> RuleCounts:
        """How many tokens each rule applies to, for audits; ``lens.rule_log`` keeps such counts over whole runs."""
        valid_T = torch.ones(num_tokens, dtype=torch.bool) if ctx.valid_T is None else ctx.valid_T.cpu()
        matched = [match_T.cpu() & valid_T for match_T in self._matches(ctx, num_tokens, None)]
        allowed_TE = self._permitted(matched, num_experts)
        without = 0 if allowed_TE is None else int((~allowed_TE.any(dim=1) & valid_T).sum())
        return RuleCounts(
            int(valid_T.sum()), {self.label(i): int(match_T.sum()) for i, match_T in enumerate(matched)}, without
        )

    def _permitted(self, matched: Sequence[Tensor], num_experts: int) -> Tensor | None:
        allowed_TE = None
        for rule, match_T in zip(self.rules, matched, strict=True):
            if rule.hard:
                permitted = rule.permitted(num_experts)
                permitted_E = _constant([e in permitted for e in range(num_experts)], torch.bool, match_T.device)
                mine_TE = ~match_T[:, None] | permitted_E
                allowed_TE = mine_TE if allowed_TE is None else allowed_TE & mine_TE
        return allowed_TE

    def _matches(self, ctx: TokenContext, num_tokens: int, device: torch.device | None) -> list[Tensor]:
        """bool (T,) for each rule: the tokens it applies to."""
        matched = []
        for i, rule in enumerate(self.rules):
            match_T = torch.ones(num_tokens, dtype=torch.bool, device=device)
            for name, values in rule.when.items():
                fact_T = _fact(ctx, name, num_tokens, self.label(i))
                match_T = match_T.to(fact_T.device) & _inside(fact_T, _spans(values))
            matched.append(match_T)
        return matched

    def _refuse(self, none_T: Tensor, matched: Sequence[Tensor]) -> None:
        if not bool(none_T.any()):
            return
        token = int(none_T.int().argmax())
        rules = zip(self.rules, matched, strict=True)
        culprits = [self.label(i) for i, (rule, match_T) in enumerate(rules) if rule.hard and bool(match_T[token])]
        raise ConfigError(
            f'The rules leave {int(none_T.sum())} tokens without any expert, and on_none="refuse"; to the first of them, token '
            f"{token}, these apply: {', '.join(culprits)}."
        )


def _fact(ctx: TokenContext, name: str, num_tokens: int, label: str) -> Tensor:
    """int64 (T,) what a condition is about. Raises ``ConfigError`` if the context lacks it: no rule is ever skipped."""
    fact_T = getattr(ctx, FIELDS[name]) if name in FIELDS else ctx.metadata.get(name.removeprefix(_METADATA))
    if name == "position" and ctx.own_position_T is not None:
        fact_T = ctx.own_position_T
    if fact_T is None:
        hint = "" if name in FIELDS else nearest(name, [_METADATA + key for key in ctx.metadata])
        raise ConfigError(
            f"{label} asks for the {name} of every token, and the caller gave none, so it could not be applied; pass it with "
            f"the input, or remove the rule.{hint}"
        )
    if fact_T.shape != (num_tokens,) or fact_T.is_floating_point():
        raise ConfigError(
            f"{label} needs one whole number per token as {name}, {num_tokens} in all; it got {tuple(fact_T.shape)} numbers of "
            f"{str(fact_T.dtype).removeprefix('torch.')}."
        )
    return fact_T.long()


def _inside(fact_T: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """bool (T,): which numbers lie in one of these disjoint ascending spans."""
    first_R, last_R = (_constant(list(ends), torch.int64, fact_T.device) for ends in zip(*spans, strict=True))
    span_T = torch.searchsorted(first_R, fact_T.contiguous(), right=True) - 1  # the last that begins at or before it
    return (span_T >= 0) & (fact_T <= last_R[span_T.clamp(min=0)])


def _spans(values: Values) -> list[tuple[int, int]]:
    """The numbers as disjoint ascending spans, both ends included."""
    spans: list[tuple[int, int]] = []
    for value in values:
        first, last = (value, value) if isinstance(value, int) else value
        spans.append((_LEAST if first is None else first, _MOST if last is None else last))
    merged: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _constant(values: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return tensor.pin_memory().to(
            device, non_blocking=True
        )  # from pageable memory the copy would make the host wait
    return tensor.to(device)


def _values(label: str, name: str, values: Any) -> Values:
    if name not in FIELDS and not (name.startswith(_METADATA) and len(name) > len(_METADATA)):
        known = [*FIELDS, "metadata.<name>"]
        raise ConfigError(
            f'{label}: there is no field "{name}".{nearest(name, known)} Fields of a condition: {", ".join(known)}.'
        )
    if not isinstance(values, list | tuple) or not values:
        raise ConfigError(f"{label}: {name} must list at least one number or [first, last] pair, not {values!r}.")
    kept: list[int | tuple[int | None, ...]] = []
    for value in values:
        if _whole(value):
            kept.append(value)
            continue
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(v is None or _whole(v) for v in value):
            raise ConfigError(
                f"{label}: {name} lists {value!r}; write a whole number or a pair such as [10, 19], where null is an open end."
            )
        first, last = value
        if first is not None and last is not None and first > last:
            raise ConfigError(f"{label}: {name} lists the empty range {list(value)}; the smaller number comes first.")
        kept.append((first, last))
    return tuple(kept)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and _LEAST <= value <= _MOST
