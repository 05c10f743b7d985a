"""What a sparse layer's config will make go wrong: gates that cannot learn, loads that will not balance, idle settings.

Building a model refuses errors and passes warnings on (``LintWarning``); ``train/lint.py`` collects all findings about a run.
Each says what, why, and what to write instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from moesaic.experts.layer import MoE
from moesaic.models.config import MoEConfig
from moesaic.plan.capacity import CapacityRule
from moesaic.routing import Facts

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing to change.

    Attributes:
        severity: "error": refused when built. "warning": runs, and will likely disappoint. "note": worth knowing.
        where: the setting, by dotted name.
        what: the finding and its reason, one or two sentences. instead: what to write.
    """

    severity: Severity
    where: str
    what: str
    instead: str = ""

    def __str__(self) -> str:
        instead = f" {self.instead}" if self.instead else ""
        return f"{self.severity}: {self.where}: {self.what}{instead}"


def lint_layer(moe: MoEConfig, layer: MoE, num_experts: int) -> list[Finding]:
    """Findings about one built sparse layer (on the meta device will do); ``num_experts`` counts its feed-forward experts."""
    facts, k, experts = layer.router.facts, layer.router.k, layer.router.num_experts
    return [
        *_gate(moe, facts, k, experts),
        *_losses(moe, facts, k, experts),
        *_balance(moe, facts, num_experts),
        *_capacity(moe, moe.capacity, facts, k, experts),
        *_idle(moe, facts, layer),
    ]


def by_severity(found: Iterable[Finding]) -> list[Finding]:
    """Errors first; what several layers say is said once."""
    order = ("error", "warning", "note")
    return sorted(dict.fromkeys(found), key=lambda finding: order.index(finding.severity))


def _gate(moe: MoEConfig, facts: Facts, k: int, experts: int) -> Iterator[Finding]:
    options, where = moe.router.options, "model.moe.router"
    if options.get("init_std") == 0 and facts.has_gate and not facts.has_load_estimate:
        yield Finding(
            "warning",
            f"{where}.options.init_std",
            f"a gate that starts at zero scores all experts alike, and ties go to the lowest: all start at the first {k}.",
            "Leave init_std at its default, or use a noisy router.",
        )
    if facts.teaches == "none" and facts.has_gate:
        yield Finding(
            "warning", where, "the task loss gives this gate no gradient.", "Add a balancing loss or another router."
        )
    if not facts.causal:
        yield Finding(
            "warning",
            f"{where}.allow_leak",
            f'router "{moe.router.name}" looks at later tokens while training, so the training loss flatters'
            + ("" if facts.causal_in_evaluation else ", and so does the validation loss")
            + ".",
            "Trust only text generated token by token, or choose a causal router.",
        )
    elif not facts.batch_invariant:
        yield Finding(
            "note",
            where,
            f'router "{moe.router.name}" reads a text differently in other company (other sequences of the batch).',
        )
    if facts.inference == "other rule":
        yield Finding("note", where, f"evaluation and generation route by another rule: {facts.inference_rule}.")
    if k == experts and facts.experts == "k" and experts > 1:
        yield Finding(
            "note",
            "model.moe.k",
            f"k={k} uses every expert for every token: a dense mixture at the price of {k} networks.",
        )


def _losses(moe: MoEConfig, facts: Facts, k: int, experts: int) -> Iterator[Finding]:
    for name, coefficient in moe.losses.items():
        where = f"model.moe.losses.{name}"
        if coefficient == 0:
            yield Finding(
                "warning", where, "the coefficient is 0, so the loss is computed and never acts.", "Remove it."
            )
        elif name in ("switch", "sequence") and k == experts and facts.experts == "k":
            yield Finding(
                "warning",
                where,
                f"every token uses all {experts} experts, so the loss is a constant without gradient.",
                "Remove it, or choose k below the number of experts.",
            )
        elif name == "importance" and k == 1 and facts.teaches == "none":
            yield Finding(
                "warning", where, "this router's weights carry no gradient, so the summed weights are mere counts.",
                'Use "switch".',
            )  # fmt: skip
        elif name in ("switch", "importance", "sequence") and coefficient > 1:
            yield Finding(
                "warning",
                where,
                f"a coefficient of {coefficient:g} outweighs the language model.",
                "0.001 to 0.1 is usual.",
            )
    scoped = {"switch", "sequence", "v2_expert"}
    if moe.loss_scope != "micro_batch" and not scoped & set(moe.losses):
        yield Finding(
            "warning",
            "model.moe.loss_scope",
            f'"{moe.loss_scope}" says over what the Switch loss counts, and that loss is not used.',
            "Remove the setting, or add the loss.",
        )


def _balance(moe: MoEConfig, facts: Facts, experts: int) -> Iterator[Finding]:
    # No gate, no learnt collapse; tables and controllers balance themselves.
    balanced = facts.balance != "no" or not facts.has_gate
    active = [
        name for name, coefficient in moe.losses.items() if coefficient > 0 and name not in ("z", "logit_l2", "entropy")
    ]
    if not balanced and not active and experts > 1 and facts.losses and set(facts.losses) - {"z", "entropy"}:
        recommended = ", ".join(f"model.moe.losses.{name}={value:g}" for name, value in facts.losses.items())
        yield Finding(
            "warning",
            "model.moe.losses",
            f'nothing balances the load of router "{moe.router.name}", so a few experts will likely take it all.',
            f"Recommended: {recommended}.",
        )
    strong = [n for n in active if n in ("switch", "importance", "load") and moe.losses[n] >= 1e-3]
    if moe.router.options.get("balance_bias") and strong:
        yield Finding(
            "note",
            f"model.moe.losses.{strong[0]}",
            "the selection bias balances already; a loss of this strength hinders the specialisation it is meant to spare.",
            "DeepSeek-V3 adds only a sequence-wise loss of 1e-4.",
        )


def _capacity(moe: MoEConfig, rule: CapacityRule | None, facts: Facts, k: int, experts: int) -> Iterator[Finding]:
    if rule is None:
        return
    where = "model.moe.capacity"
    factor = rule.factor
    if factor == "exact" and rule.max_factor is not None and rule.max_factor < 1:
        yield Finding(
            "warning",
            f"{where}.max_factor",
            f"{rule.max_factor:g} is below 1, so the exact minimum is never reached.",
            "Raise it.",
        )
    if isinstance(factor, int | float):
        if factor * k < 0.1:
            yield Finding(
                "warning",
                f"{where}.factor",
                f"{factor:g} leaves room for hardly any token; most pass by the residual.",
                "Raise it.",
            )
        if factor < 1 and rule.priority != "batch":
            yield Finding(
                "warning",
                f"{where}.factor",
                f"{factor:g} gives all experts together fewer places than tokens choose: at least {1 - factor:.0%} of rows are "
                "dropped, in the best balance there is.",
                'Use at least 1, or priority="batch", which drops the least sure tokens.',
            )
        if not rule.count_k and factor < k:
            yield Finding(
                "warning",
                f"{where}.count_k",
                f"k is not in the formula, so factor={factor:g} has places for {factor:g} of the k={k} choices of a token.",
                f"Set factor to at least {k}, or count_k=true.",
            )
        if factor >= experts / k:
            yield Finding(
                "note",
                f"{where}.factor",
                f"{factor:g} is at least E/k, so nothing is ever dropped.",
                "Leave capacity out.",
            )
    if rule.priority in ("batch", "probability"):
        yield Finding(
            "warning",
            f"{where}.priority",
            f'"{rule.priority}" lets a later token displace an earlier one, so the training loss of a decoder sees the future.',
            'Use priority="position" or no capacity in decoders.',
        )
    elif rule.priority == "position" and k > 1:
        yield Finding(
            "note",
            f"{where}.priority",
            "with k above 1 a later token's first choice goes before an earlier token's second, so drops in training depend on "
            "later tokens (as in GShard). Evaluation is dropless unless eval_factor says otherwise.",
        )
    if rule.overflow == "shared" and not moe.shared:
        yield Finding(
            "warning",
            f"{where}.overflow",
            '"shared" leaves overflow to shared experts, and there are none.',
            "Set model.moe.shared=1.",
        )


# Option -> the option (and value) without which it does nothing, of routers that have both.
_NEEDS: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("bias_rate", "bias_rule", "ffn_rows"), ("balance_bias", True)),
    **dict.fromkeys(("bias_p", "bias_i", "bias_d", "bias_limit"), ("bias_rule", "pid")),
    "bias_bins": ("bias_rule", "quantile"),
    "epsilon": ("solver", "auction"),
    "cap_temperature": ("max_experts", None),
    "group_score": ("groups", None),
    "groups_kept": ("groups", None),
    "threshold": ("second", None),
}


def _said(option: str, value: Any) -> str:
    return f'{option}="{value}"' if isinstance(value, str) else option


def _idle(moe: MoEConfig, facts: Facts, layer: MoE) -> Iterator[Finding]:
    """Coefficients and options on a path that never runs."""
    options = moe.router.options
    for option, (other, value) in _NEEDS.items():
        if option not in options or (other == "second" and moe.router.name != "gshard"):
            continue
        if other == "second":
            used = any("threshold" in str(options.get(name, "")) for name in ("second", "eval_second"))
        else:
            used = options.get(other) == value if value is not None else options.get(other, 1) != 1
        if not used:
            yield Finding(
                "warning",
                f"model.moe.router.options.{option}",
                f"it acts only together with {_said(other, value)}, which is not set.",
                f"Set {_said(other, value)}, or remove {option}.",
            )
    if moe.gating_groups > 1 and not moe.gating_dropout:
        yield Finding(
            "warning",
            "model.moe.gating_groups",
            "groups matter to gating dropout alone, which is off.",
            "Set gating_dropout.",
        )
    rule = moe.capacity
    if rule is not None and facts.experts == "all, mixed":
        yield Finding(
            "warning", "model.moe.capacity", "this router has no rows to drop, so capacity never acts.", "Remove it."
        )
    if rule is not None and rule.batch_score != CapacityRule().batch_score and rule.priority != "batch":
        yield Finding(
            "warning",
            "model.moe.capacity.batch_score",
            'it orders tokens under priority="batch" alone.',
            "Set that, or remove it.",
        )
    for option in ("predictor_loss", "threshold"):
        if options.get("inference") == "topc" and option in options:
            where = f"model.moe.router.options.{option}"
            yield Finding("warning", where, 'there is no predictor with inference="topc".', f"Remove {option}.")
    if "switch" in moe.losses and moe.router.name in ("moepp", "null_experts"):
        yield Finding("note", "model.moe.losses.switch", "this router has a balancing loss of its own.", "Remove one.")
    if moe.router.allow_leak and facts.causal and facts.batch_invariant and moe.capacity is None:
        yield Finding(
            "note", "model.moe.router.allow_leak", "nothing leaks here, so the permission has no use.", "Remove it."
        )
