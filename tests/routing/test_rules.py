"""Rules: what they say, what they refuse, and that nothing that routes, drops, reroutes or edits ever breaks one.

The proof routes thousands of random tokens of every router under random rules, noise, capacity and edits, and holds each
executed row against rules read by a second, plain implementation. Its own test removes the guard and sees violations.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from moesaic.config import from_dict, to_dict
from moesaic.data.packing import Batch
from moesaic.errors import ConfigError
from moesaic.experts import MoE, MultiHeadMoE
from moesaic.experts import layer as layer_module
from moesaic.models import MoEConfig, RouterConfig, build_model
from moesaic.models.config import DepthConfig
from moesaic.plan import CapacityRule, RoutingPlan, SoftPlan, force_balanced, from_topk, mask_experts, replay
from moesaic.plan.capacity import Overflow, Priority
from moesaic.routing import NO_CONTEXT, Router, Rule, RuleCounts, RuleSet, TokenContext, TopK, balance_loss
from moesaic.train.step import train_step
from tests.models.tiny import some_ids, tiny
from tests.routing.cases import CASES, DIM, VOCAB, Case, Input, some_input

# ---- what rules say --------------------------------------------------------------------------------------------


def context(**facts: list[int]) -> TokenContext:
    """One fact a token; names as in rules, ``__`` for a dot."""
    tensors = {name.replace("__", "."): torch.tensor(values) for name, values in facts.items()}
    metadata = {name.removeprefix("metadata."): t for name, t in tensors.items() if name.startswith("metadata.")}
    return TokenContext(
        ids_T=tensors.get("token"),
        task_T=tensors.get("task"),
        tenant_T=tensors.get("tenant"),
        position_T=tensors.get("position"),
        metadata=metadata,
    )


def allowed(rules: RuleSet, ctx: TokenContext, num_tokens: int, num_experts: int = 4) -> list[list[int]]:
    """The permitted experts of every token."""
    allowed_TE, _ = rules.evaluate(ctx, num_tokens, num_experts)
    assert allowed_TE is not None
    return [row.nonzero()[:, 0].tolist() for row in allowed_TE]


def test_conditions_are_numbers_ranges_and_open_ends() -> None:
    # tokens                     0   9  10  15  19  20
    ctx = context(token=[0, 9, 10, 15, 19, 20], metadata__age=[-5, 17, 18, 30, -1, 99])
    for values, matching in [
        ((9,), [1]),
        (((10, 19),), [2, 3, 4]),
        (((None, 9), 20), [0, 1, 5]),
        (((15, None), 0), [0, 3, 4, 5]),
        ((20, (9, 10), (10, 15)), [1, 2, 3, 5]),  # overlapping, out of order
        ((7,), []),
    ]:
        found = allowed(RuleSet((Rule({"token": values}, allow=(2,)),)), ctx, 6)
        assert [t for t, experts in enumerate(found) if experts == [2]] == matching
        assert all(experts in ([2], [0, 1, 2, 3]) for experts in found)
    minors = allowed(RuleSet((Rule({"metadata.age": ((0, 17),)}, forbid=(0, 3)),)), ctx, 6)
    assert minors == [[0, 1, 2, 3], [1, 2], *[[0, 1, 2, 3]] * 4]  # an age of -5 or -1 lies outside of 0..17


def test_all_conditions_of_a_rule_must_hold_and_all_rules_together() -> None:
    # token 0: task 1 only; token 1: tenant 7 only; token 2: both; token 3: neither
    ctx = context(task=[1, 0, 1, 0], tenant=[0, 7, 7, 0])
    both = Rule({"task": (1,), "tenant": (7,)}, allow=(0,))
    assert allowed(RuleSet((both,)), ctx, 4) == [[0, 1, 2, 3], [0, 1, 2, 3], [0], [0, 1, 2, 3]]
    task, tenant = Rule({"task": (1,)}, allow=(0, 1)), Rule({"tenant": (7,)}, forbid=(0,))
    assert allowed(RuleSet((task, tenant)), ctx, 4) == [[0, 1], [1, 2, 3], [1], [0, 1, 2, 3]]
    assert allowed(RuleSet((tenant, task)), ctx, 4) == allowed(RuleSet((task, tenant)), ctx, 4)
    everyone = Rule(allow=(1, 2))
    assert allowed(RuleSet((task, tenant, everyone)), ctx, 4) == [[1], [1, 2], [1], [1, 2]]


def test_soft_rules_add_up() -> None:
    ctx = context(task=[1, 0], position=[0, 5])
    rules = RuleSet(
        (
            Rule({"task": (1,)}, allow=(0, 1), weight=2.0),
            Rule({"position": ((0, 3),)}, forbid=(1, 2), weight=0.5),
            Rule(allow=(3,), weight=0.25),
        )
    )
    allowed_TE, bias_TE = rules.evaluate(ctx, 2, 4)
    assert allowed_TE is None
    assert bias_TE is not None
    assert bias_TE.tolist() == [[2.0, 1.5, -0.5, 0.25], [0.0, 0.0, 0.0, 0.25]]
    # The layer adds it to the logits, and to what the caller asked for already.
    layer = MoE(8, 4, 4, 2, rules=rules)
    x_TD, theirs_TE = torch.randn(2, 8), torch.randn(2, 4)
    plan = layer.route(x_TD, replace(ctx, rule_bias_TE=theirs_TE))
    assert isinstance(plan, RoutingPlan)
    assert plan.gate is not None
    torch.testing.assert_close(plan.gate.logits_TE, layer.router.gate(x_TD) + theirs_TE + bias_TE)
    assert RuleSet().evaluate(ctx, 2, 4) == (None, None)


CLASH = (Rule({"task": (1,)}, allow=(0,), name="one"), Rule({"tenant": (7,)}, allow=(1,), name="seven"))


def test_a_token_without_any_expert_follows_the_policy() -> None:
    ctx = context(task=[1, 0, 1], tenant=[7, 7, 0])
    assert allowed(RuleSet(CLASH), ctx, 3) == [[], [1], [0]]
    assert allowed(RuleSet(CLASH, "fallback", 3), ctx, 3) == [[3], [1], [0]]
    with pytest.raises(
        ConfigError, match='leave 1 tokens without any expert.* token 0, these apply: Rule 1 "one", Rule 2'
    ):
        RuleSet(CLASH, "refuse").evaluate(ctx, 3, 4)
    padded = replace(ctx, valid_T=torch.tensor([False, True, True]))
    assert allowed(RuleSet(CLASH, "refuse"), padded, 3) == [[], [1], [0]]  # padding may clash
    # In the layer: nowhere is nothing but the shared experts; the fallback serves with the router's weight.
    x_TD = torch.randn(3, 8)
    for rules, served in [(RuleSet(CLASH), 0), (RuleSet(CLASH, "fallback", 3), 1)]:
        layer = MoE(8, 4, 4, 2, shared=1, rules=rules)
        y_TD, plan = layer(x_TD, ctx)
        assert layer.shared is not None
        assert plan.kept_N.view(3, 2).sum(dim=1).tolist() == [served, 1, 1]
        assert torch.equal(y_TD[0], layer.shared(x_TD)[0]) == (served == 0)
        assert plan.weight_TK[1:, 0].tolist() == [1.0, 1.0]  # renormalised over what is permitted


def test_fewer_permitted_than_k_leaves_the_rest_empty() -> None:
    layer = MoE(8, 4, 6, 4, rules=RuleSet((Rule(allow=(2, 5)),)))
    plan = layer.route(torch.randn(7, 8))
    assert isinstance(plan, RoutingPlan)
    assert plan.expert_TK.sort(dim=1).values.tolist() == [[2, 5, 6, 6]] * 7
    torch.testing.assert_close(plan.weight_TK.sum(dim=1), torch.ones(7))


def test_permissions_of_the_caller_are_intersected() -> None:
    layer = MoE(8, 4, 4, 2, rules=RuleSet((Rule(allow=(0, 1)),)))
    theirs_TE = torch.tensor([[True, False, True, True], [False, False, True, True]])
    plan = layer.route(torch.randn(2, 8), TokenContext(allowed_TE=theirs_TE))
    assert isinstance(plan, RoutingPlan)
    assert plan.expert_TK.tolist() == [[0, 4], [4, 4]]


def test_rules_may_be_set_and_lifted_on_a_built_layer() -> None:
    layer = MoE(8, 4, 3, 1, router="switch", zero=1)
    x_TD = torch.randn(20, 8)
    free = layer.eval().route(x_TD)
    layer.rules = RuleSet((Rule(allow=(3,)),))  # the zero-computation expert
    assert layer.route(x_TD).counts_E.tolist() == [0, 0, 0, 20]
    with pytest.raises(ConfigError, match="Rule 1 names expert 4, but the layer has experts 0 to 3"):
        layer.rules = RuleSet((Rule(allow=(4,)),))
    assert layer.rules == RuleSet((Rule(allow=(3,)),))
    layer.rules = None
    assert torch.equal(layer.route(x_TD).counts_E, free.counts_E)


# ---- data ------------------------------------------------------------------------------------------------------

FORM = """
{"rules": [
   {"when": {"tenant": [3, [10, 19]], "metadata.minor": [1]}, "allow": [0, 1], "name": "children"},
   {"when": {"token": [[256, null]]}, "forbid": [5], "weight": 1.5},
   {"forbid": [2]}],
 "on_none": "fallback", "fallback_expert": 0, "in_training": "teach"}
"""


def test_json_in_and_out() -> None:
    rules = from_dict(RuleSet, json.loads(FORM), "rules")
    assert rules == RuleSet(
        (
            Rule({"tenant": (3, (10, 19)), "metadata.minor": (1,)}, allow=(0, 1), name="children"),
            Rule({"token": ((256, None),)}, forbid=(5,), weight=1.5),
            Rule(forbid=(2,)),
        ),
        on_none="fallback",
        fallback_expert=0,
        in_training="teach",
    )
    assert from_dict(RuleSet, json.loads(json.dumps(to_dict(rules)))) == rules
    lists: Any = {"tenant": [3, [10, 19]], "metadata.minor": [1]}
    assert Rule(lists, allow=[0, 1], name="children") == rules.rules[0]  # type: ignore[arg-type]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "The rule on every token must name experts to allow or to forbid, one of the two."),
    ({"allow": [0], "forbid": [1], "name": "x"}, 'Rule "x" must name experts to allow or to forbid, one of the two.'),
    ({"allow": []}, "allow must list at least one expert, not ()."),
    ({"forbid": [-1]}, "forbid must list expert numbers from 0, not -1."),
    ({"allow": [0], "when": {"tokn": [1]}}, 'there is no field "tokn". Did you mean "token"?'),
    ({"allow": [0], "when": {"metadata": [1]}}, 'no field "metadata". Did you mean "metadata.<name>"?'),
    (
        {"allow": [0], "when": {"metadata.": [1]}},
        "Fields of a condition: token, task, tenant, position, metadata.<name>.",
    ),
    ({"allow": [0], "when": {"task": []}}, "task must list at least one number or [first, last] pair, not ()."),
    ({"allow": [0], "when": {"task": [[3, 1]]}}, "task lists the empty range [3, 1]; the smaller number comes first."),
    ({"allow": [0], "when": {"task": [[1, 2, 3]]}}, "task lists (1, 2, 3); write a whole number or a pair"),
    ({"allow": [0], "when": {"task": ["a"]}}, "when.task[0] must be"),
    ({"allow": [0], "when": {"task": [2**63]}}, "write a whole number or a pair"),
    ({"allow": [0], "weight": 0}, "weight must be a finite number above 0, not 0.0; swap allow and forbid"),
    ({"allow": [0], "weight": -1.0}, "weight must be a finite number above 0, not -1.0"),
    ({"allow": [0], "wieght": 1.0}, 'Did you mean "weight"?'),
]


@pytest.mark.parametrize(("data", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_senseless_rules_are_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(RuleSet, {"rules": [data]})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RuleSet(on_none="fallback"), "set both or neither"),
        (lambda: RuleSet(fallback_expert=1), "set both or neither"),
        (lambda: RuleSet(on_none="nowher"), 'Did you mean "nowhere"?'),  # type: ignore[arg-type]
        (lambda: RuleSet(in_training="teech"), 'Did you mean "teach"?'),  # type: ignore[arg-type]
        (lambda: RuleSet((Rule(forbid=(0, 1)),), "fallback", 1), "Rule 1 forbids expert 1, the fallback"),
        (lambda: RuleSet(on_none="fallback", fallback_expert=4).check(4), "rules.fallback_expert names expert 4"),
        (lambda: RuleSet((Rule(), Rule(allow=(0,)))), "must name experts"),
        (lambda: RuleSet((Rule(allow=(9,), weight=1.0),)).check(4), "Rule 1 names expert 9"),
        (lambda: RuleSet((Rule({"task": (1,)}, forbid=(0, 1)),), "refuse").check(2), "Rule 1 forbids every expert"),
        (lambda: RuleSet((Rule(allow=(0,)), Rule(allow=(1,)))).check(2), "together leave no expert to any token"),
    ],
)
def test_senseless_sets_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert words in str(error.value)


def test_forbidding_everything_on_some_condition_is_a_policy_of_nowhere() -> None:
    layer = MoE(8, 4, 2, 1, "switch", rules=RuleSet((Rule({"task": (1,)}, forbid=(0, 1)),)))
    assert layer.route(torch.randn(4, 8), context(task=[1, 0, 1, 0])).kept_N.tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("token", "Rule 1 asks for the token of every token"),
        ("task", "asks for the task"),
        ("tenant", "asks for the tenant"),
        ("position", "asks for the position"),
        ("metadata.minor", 'asks for the metadata.minor .* Did you mean "metadata.minors"'),
    ],
)
def test_a_rule_is_never_skipped_for_lack_of_a_fact(field: str, words: str) -> None:
    layer = MoE(8, 4, 4, 2, rules=RuleSet((Rule({field: (1,)}, forbid=(0,)),)))
    with pytest.raises(ConfigError, match=words):
        layer(torch.randn(3, 8), TokenContext(metadata={"minors": torch.zeros(3, dtype=torch.int64)}))


def test_facts_of_the_wrong_shape_or_kind_are_refused() -> None:
    rules = RuleSet((Rule({"metadata.minor": (1,)}, forbid=(0,)),))
    for minor_T, words in [
        (torch.zeros(2, dtype=torch.int64), r"3 in all; it got \(2,\)"),
        (torch.zeros(3), "float32"),
    ]:
        with pytest.raises(ConfigError, match=words):
            rules.evaluate(TokenContext(metadata={"minor": minor_T}), 3, 4)
    assert allowed(rules, TokenContext(metadata={"minor": torch.tensor([True, False, True])}), 3)[0] == [1, 2, 3]
    assert allowed(rules, TokenContext(metadata={"minor": torch.tensor([1, 0, 1], dtype=torch.int32)}), 3)[0] == [
        1,
        2,
        3,
    ]


def test_explain_counts_tokens_and_leaves_padding_out() -> None:
    ctx = replace(context(task=[1, 0, 1, 1], tenant=[7, 7, 0, 7]), valid_T=torch.tensor([True, True, True, False]))
    assert RuleSet((*CLASH, Rule(allow=(2,), weight=1.0)), "fallback", 3).explain(ctx, 4, 4) == RuleCounts(
        tokens=3, matched={'Rule 1 "one"': 2, 'Rule 2 "seven"': 2, "Rule 3": 3}, without=1
    )


def test_in_a_model_by_config_in_every_sparse_layer() -> None:
    rules = RuleSet((Rule({"tenant": (1,)}, allow=(0,)), Rule({"token": ((5, None),)}, forbid=(3,))))
    config = tiny(MoEConfig(num_experts=4, k=2, hidden=8, losses={}, rules=rules, router=RouterConfig("topk")))
    model, ids_BS = build_model(config, seed=0), some_ids(2, 6)
    tenant_BS = torch.tensor([[1], [0]]).expand(2, 6)
    plans = model(ids_BS, tenant_BS=tenant_BS).plans
    assert len(plans) == config.num_layers
    for plan in plans.values():
        assert set(plan.expert_TK[:6].flatten().tolist()) == {0, 4}
        large_T = ids_BS.flatten() >= 5
        assert not (plan.expert_TK[large_T] == 3).any()
    with pytest.raises(ConfigError, match="asks for the tenant"):
        model(ids_BS)
    with pytest.raises(ConfigError, match="names expert 3, but the layer has experts 0 to 1"):
        build_model(tiny(MoEConfig(num_experts=(4, 2), k=2, hidden=8, losses={}, rules=rules)))


def test_sub_tokens_of_multi_head_layers_obey_the_rules_of_their_token() -> None:
    rules = RuleSet((Rule({"position": ((2, 3),)}, allow=(1,)), Rule({"task": (5,)}, allow=(0,))))
    layer = MultiHeadMoE(8, 4, 4, 2, heads=2, rules=rules)
    _, plan = layer(torch.randn(6, 8), context(position=[0, 1, 2, 3, 4, 5], task=[5, 0, 0, 0, 0, 0]))
    used = [sorted(set(row.tolist())) for row in plan.expert_N.view(6, 4)]
    assert used[0] == [0, 4]
    assert used[2] == used[3] == [1, 4]
    assert all(4 not in experts for experts in (used[1], used[4], used[5]))


def test_rules_on_positions_mean_the_text_where_a_block_computes_a_part_of_it() -> None:
    rules = RuleSet((Rule({"position": ((4, None),)}, allow=(1,)),))
    config = tiny(MoEConfig(num_experts=4, k=2, hidden=8, losses={}, rules=rules))
    config = replace(config, depth=DepthConfig(capacity=0.5, every=1, allow_leak=True))
    plans = build_model(config, seed=0).train()(some_ids(3, 8)).plans
    for plan in plans.values():
        used = plan.expert_N.view(3, 8, 2)
        assert set(used[:, 4:].flatten().tolist()) <= {1, 4}
        assert not set(used[:, :4].flatten().tolist()) <= {1, 4}


# ---- training --------------------------------------------------------------------------------------------------


def test_training_may_be_taught_instead_of_forced() -> None:
    hard = Rule(allow=(0,))
    x_TD = torch.randn(50, 8)
    layer = MoE(8, 4, 4, 2, rules=RuleSet((hard,), in_training="teach"))
    taught = layer.route(x_TD)
    assert (taught.counts_E > 0).sum() > 1
    assert taught.gate is not None
    assert torch.equal(taught.gate.extra["free_logits_TE"], taught.gate.logits_TE)
    assert taught.gate.extra["rules_TE"].nonzero()[:, 1].unique().tolist() == [0]
    assert layer.eval().route(x_TD).counts_E.tolist() == [50, 0, 0, 0]  # evaluation always obeys
    layer.rules = RuleSet((hard,))
    forced = layer.train().route(x_TD)
    assert forced.counts_E.tolist() == [50, 0, 0, 0]
    assert forced.gate is not None
    assert torch.equal(forced.gate.extra["free_logits_TE"], taught.gate.logits_TE)
    assert "rules_TE" not in layer.eval().route(x_TD).gate.extra  # type: ignore[union-attr]


def test_the_semantic_loss_teaches_the_gate_to_obey_without_being_forced() -> None:
    """Trained by the loss alone, the gate sends nearly all tokens where rules would have, whether training obeys or not."""
    for in_training in ("teach", "enforce"):
        torch.manual_seed(0)
        rules = RuleSet(
            (Rule({"task": (1,)}, allow=(0, 1)), Rule({"task": (0,)}, forbid=(0, 1))), in_training=in_training
        )  # type: ignore[arg-type]
        layer = MoE(8, 4, 6, 1, "switch", {"jitter": 0.0}, rules=rules)
        task_T = torch.arange(64) % 2
        x_TD = torch.randn(64, 8)
        x_TD[:, 0] = 2.0 * task_T - 1
        allowed_TE, _ = rules.evaluate(TokenContext(task_T=task_T), 64, 6)
        assert allowed_TE is not None
        optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.1)
        for _ in range(60):
            _, plan = layer(x_TD, TokenContext(task_T=task_T))
            loss, _ = balance_loss(plan, {"semantic": 1.0})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        layer.rules = None
        expert_T = layer.eval().route(x_TD).expert_N
        assert allowed_TE[torch.arange(64), expert_T].float().mean() > 0.95
        assert loss < 0.1


def test_the_semantic_loss_is_refused_where_no_rule_is_hard() -> None:
    losses = {"semantic": 0.1}
    for rules in (None, RuleSet((Rule(allow=(0,), weight=1.0),))):
        with pytest.raises(ConfigError, match='"semantic" teaches hard rules, and the layer has none'):
            build_model(tiny(MoEConfig(num_experts=4, k=2, hidden=8, losses=losses, rules=rules)))
    config = tiny(MoEConfig(num_experts=4, k=2, hidden=8, losses=losses, rules=RuleSet((Rule(forbid=(0,)),))))
    model, zeros_BS = build_model(config, seed=0), torch.zeros(2, 9, dtype=torch.int64)
    batch = Batch(some_ids(2, 9), some_ids(2, 9, 4), zeros_BS == 0, zeros_BS, zeros_BS)
    reading, _ = train_step(model, torch.optim.SGD(model.parameters()), [batch], lr=0.0, clip=0.0, step=0)
    # A gate that has learned nothing gives the three permitted of four experts about 3/4.
    assert reading.losses["semantic"] == pytest.approx(math.log(4 / 3), abs=0.02)


# ---- the proof -------------------------------------------------------------------------------------------------

B, S, E = 16, 32, 8
SETTINGS = [(overflow, priority) for overflow in get_args(Overflow) for priority in get_args(Priority)]


def random_rules(rng: random.Random) -> RuleSet:
    """Two to five rules, mostly hard, on random facts."""

    def values(limit: int) -> tuple[int | tuple[int | None, ...], ...]:
        first = rng.randrange(limit)
        return (rng.randrange(limit), (first, rng.choice([None, min(limit, first + limit // 4)])))

    limits = {"token": VOCAB, "task": 8, "tenant": B, "position": S, "metadata.kind": 6}
    rules = []
    for _ in range(rng.randint(2, 5)):
        fields = rng.sample(sorted(limits), rng.randint(1, 2))
        experts = tuple(rng.sample(range(1, E), rng.randint(1, 4)))
        weight = rng.choice([None, None, None, 50.0])
        kind = rng.choice(["allow", "forbid"])
        rules.append(Rule({name: values(limits[name]) for name in fields}, weight=weight, **{kind: experts}))  # type: ignore[arg-type]
    return RuleSet(tuple(rules), **rng.choice([{}, {"on_none": "fallback", "fallback_expert": 0}]))


def permitted(rules: RuleSet, facts: dict[str, int]) -> set[int]:
    """Rules read in the plainest way, one token at a time."""

    def holds(name: str, value: Any) -> bool:
        if isinstance(value, int):
            return facts[name] == value
        first, last = value
        return (first is None or facts[name] >= first) and (last is None or facts[name] <= last)

    left = set(range(E))
    for rule in rules.rules:
        if rule.weight is None and all(any(holds(name, v) for v in values) for name, values in rule.when.items()):
            left = {e for e in left if (e in rule.allow if rule.allow else e not in rule.forbid)}  # type: ignore[operator]
    if not left and rules.on_none == "fallback":
        left = {0}
    return left


def constrained(seed: int) -> tuple[Input, TokenContext, RuleSet, Tensor]:
    """A batch, its context, rules, and ``allowed_TE`` of the plain reading."""
    batch = some_input(B, S, seed=seed, dtype=torch.float32)
    kind_T = torch.randint(6, (B * S,), generator=torch.Generator().manual_seed(seed))
    ctx = batch.context(metadata={"kind": kind_T})
    rules = random_rules(random.Random(seed))
    columns = {"token": ctx.ids_T, "task": ctx.task_T, "tenant": ctx.tenant_T, "position": ctx.position_T}
    facts = {name: column_T.tolist() for name, column_T in {**columns, "metadata.kind": kind_T}.items()}  # type: ignore[union-attr]
    allowed_TE = torch.zeros(B * S, E, dtype=torch.bool)
    for t in range(B * S):
        allowed_TE[t, list(permitted(rules, {name: column[t] for name, column in facts.items()}))] = True
    return batch, ctx, rules, allowed_TE


TRIALS = [(*setting, *constrained(seed)) for seed, setting in enumerate(SETTINGS)]


def broken(plan: RoutingPlan | SoftPlan, allowed_TE: Tensor) -> int:
    """Rows (or slot weights) that reach a forbidden expert."""
    if isinstance(plan, SoftPlan):
        forbidden_TS = (~allowed_TE).repeat_interleave(plan.slots_per_expert, dim=1)
        weights_TS = torch.stack([plan.dispatch_GTS, plan.combine_GTS]).flatten(1, 2)
        return int((weights_TS[:, forbidden_TS] != 0).sum())
    kept_N = plan.kept_N
    return int((~allowed_TE[plan.token_N[kept_N], plan.expert_N[kept_N]]).sum())


def layer_of(case: Case, router: Router | None = None) -> MoE:
    """A layer around the case's router, or around another."""
    return MoE(DIM, 1, E - case.special, case.k, router or case.build(torch.float32), zero=case.special)


def trial(layer: MoE, number: int) -> tuple[int, int]:
    """One batch of 512 tokens: rows that break a rule, and rows that would without rules."""
    overflow, priority, batch, ctx, rules, allowed_TE = TRIALS[number]
    x_TD = batch.x_BSD.flatten(0, 1)
    layer.rules, layer.capacity, layer.edits = None, None, ()
    free = layer.route(x_TD, ctx)
    layer.rules = rules
    if isinstance(free, SoftPlan):
        return broken(layer.route(x_TD, ctx), allowed_TE), broken(free, allowed_TE)
    scored = free.gate is not None and free.per_token is not None
    if overflow == "next_best" and not scored:
        overflow = "reroute_to_free"
    fallback = 2 if overflow == "fallback_expert" else None
    layer.capacity = CapacityRule(0.7, 0.7, minimum=0, priority=priority, overflow=overflow, fallback_expert=fallback)
    edits = {
        "none": (),
        "balanced": (force_balanced,),
        "replay": (partial(replay, recorded=free),),
        "knockout": (
            partial(mask_experts, experts=[1, 5], policy="next_best" if scored else "drop", renormalize=True),
        ),
        "foreign": (lambda _plan: free,),  # a plan that knows of no rules
    }
    layer.edits = edits[[*edits][(number + number // 4) % len(edits)]]
    return broken(layer.route(x_TD, ctx), allowed_TE), broken(free, allowed_TE)


@pytest.mark.parametrize("case", [case for case in CASES if case.experts == E], ids=lambda case: case.id)
def test_no_forbidden_expert_in_ten_thousand_constrained_routings(case: Case) -> None:
    """Every overflow policy with every priority; noise, jitter and random selection biases on; edits of every kind."""
    assert len(TRIALS) * B * S > 10_000
    layer = layer_of(case)
    counts = [trial(layer, number) for number in range(len(TRIALS))]
    assert sum(free for _, free in counts) > 1000  # the rules do bite
    assert sum(ruled for ruled, _ in counts) == 0


def test_the_proof_sees_what_happens_without_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """``RoutingPlan.send`` without its check: capacity and edits then lead to forbidden experts."""

    def unguarded(plan: RoutingPlan, expert_N: Tensor, weight_N: Tensor | None = None) -> RoutingPlan:
        weight_N = plan.weight_N if weight_N is None else weight_N
        return replace(plan, expert_N=expert_N, weight_N=torch.where(expert_N < plan.num_experts, weight_N, 0.0))

    layer = layer_of(Case("topk"))
    monkeypatch.setattr(RoutingPlan, "send", unguarded)
    assert sum(trial(layer, number)[0] for number in range(len(TRIALS))) > 1000


class Stubborn(TopK):
    """A router that has never heard of rules."""

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """The plain top-k of the gate."""
        probs_TE = self.gate(x_TD).softmax(dim=-1)
        weight_TK, expert_TK = probs_TE.topk(self.k)
        return from_topk(expert_TK, weight_TK, self.num_experts)


def test_a_router_that_ignores_rules_is_held_to_them_by_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(Case("topk"), Stubborn(DIM, E, 2))
    assert sum(trial(layer, number)[0] for number in range(4)) == 0
    monkeypatch.setattr(layer_module, "restrict", lambda plan, _allowed_TE: plan)
    assert sum(trial(layer, number)[0] for number in range(4)) > 100


def test_rerouting_by_capacity_looks_for_a_permitted_expert() -> None:
    # Four tokens want expert 0, which has one slot. They may use 0, 2 and 3: each of the others finds a seat there, and
    # neither is turned away because expert 1 was offered first.
    allowed_TE = torch.tensor([[True, False, True, True]] * 4)
    logits_TE = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 4)
    for overflow, counts in [("next_best", [1, 0, 1, 1]), ("reroute_to_free", [1, 0, 1, 1])]:
        layer = MoE(4, 4, 4, 1, "switch", {"jitter": 0.0}, capacity=CapacityRule(1.0, minimum=0, overflow=overflow))  # type: ignore[arg-type]
        with torch.no_grad():
            layer.router.get_parameter("gate.weight").copy_(torch.eye(4))
        plan = layer.route(logits_TE, TokenContext(allowed_TE=allowed_TE))
        assert plan.counts_E.tolist() == counts
