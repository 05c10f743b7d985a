"""The contract, for every router there is: each stated fact has a test that fails if the statement is false.

Facts that are promises ("causal") are checked on many inputs; facts that admit something ("not causal", "can drop") must be
seen happening, or the router would be called worse than it is.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moesaic.errors import ConfigError
from moesaic.plan import RoutingPlan, SoftPlan, restrict
from moesaic.plan.read import max_violation
from moesaic.routing import ROUTERS, Outcome, StepStats, TokenContext, build_router
from tests.routing.cases import CASES, DIM, Case, changed, decision, differs, rows_of, some_input

TRIALS = 12
every_router = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def test_every_router_has_a_case() -> None:
    assert {case.name for case in CASES} == set(ROUTERS)


@both_modes
@every_router
def test_causal(case: Case, training: bool) -> None:
    """Changing token t changes no earlier decision, if the router says so."""
    router = case.build(training=training)
    leaked = False
    for trial in range(TRIALS):
        batch = some_input(seed=trial)
        t = 11 - trial % 6
        before, after = batch.route(router), changed(batch, 0, t, seed=trial).route(router)
        leaked |= bool(differs(before, after).view(2, 12)[0, :t].any())
    facts = router.facts
    assert leaked != (facts.causal if training else facts.causal_in_evaluation)


@both_modes
@every_router
def test_batch_invariant(case: Case, training: bool) -> None:
    """Another sequence in the batch changes nothing, if the router says so."""
    router = case.build(training=training)
    moved = False
    for trial in range(TRIALS):
        batch, other = some_input(seed=trial), some_input(seed=100 + trial)
        mixed = replace(
            other,
            x_BSD=torch.cat([batch.x_BSD[:1], other.x_BSD[1:]]),
            ids_BS=torch.cat([batch.ids_BS[:1], other.ids_BS[1:]]),
            task_BS=torch.cat([batch.task_BS[:1], other.task_BS[1:]]),
            seed=batch.seed,
        )
        moved |= bool(differs(batch.route(router), mixed.route(router)).view(2, 12)[0].any())
    facts = router.facts
    assert moved != (facts.batch_invariant if training else facts.batch_invariant_in_evaluation)


@every_router
def test_noisy(case: Case) -> None:
    """Other random numbers lead to other decisions in training, if the router says so, and never in evaluation."""
    for training in (True, False):
        router, apart = case.build(training=training), False
        for trial in range(TRIALS):
            batch = some_input(seed=trial)
            plan, other = batch.route(router), replace(batch, seed=trial + 1000).route(router)
            apart |= bool(differs(plan, other).any())
        assert apart == (router.facts.noisy and training)


@every_router
def test_balance_by_construction(case: Case) -> None:
    """Skewed vectors: "exact" gives equal loads, "approximate" nearly, and "no" does not."""
    router = case.build()
    worst = 0.0
    for trial in range(TRIALS):
        plan = some_input(4, 16, seed=trial).route(router)
        counts_E = plan.choice_counts_E if isinstance(plan, RoutingPlan) else plan.counts_E
        worst = max(worst, float(max_violation(counts_E)))
    if router.facts.balance == "exact":
        assert worst == 0
    elif router.facts.balance == "approximate":
        assert worst < 0.75
    elif router.facts.balance == "no":
        assert worst > 0.75


@every_router
def test_experts_per_token(case: Case) -> None:
    """The number of experts per token is fixed, varies, or may be none, as stated."""
    router = case.build()
    seen: set[int] = set()
    for trial in range(TRIALS):
        plan = some_input(4, seed=trial).route(router)
        if isinstance(plan, SoftPlan):
            assert router.facts.experts == "all, mixed"
            return
        seen |= set(rows_of(plan).tolist())
    assert (len(seen) > 1) == router.facts.varies
    assert (0 in seen) == router.facts.can_drop
    if router.facts.experts == "k":
        assert seen == {case.k}
    if router.facts.experts == "1":
        assert seen == {1}


@every_router
def test_needs(case: Case) -> None:
    """Nothing but the stated needs is needed, and each of those is asked for by name."""
    router, batch = case.build(), some_input()
    needs = router.facts.needs
    ctx = batch.context()
    bare = TokenContext(**{name: getattr(ctx, name) for name in needs}, num_sequences=2)
    x_TD = batch.x_BSD.flatten(0, 1)
    router(x_TD, replace(bare, generator=ctx.generator))
    for name in needs:
        with pytest.raises(ConfigError, match=name):
            router(x_TD, replace(bare, **{name: None}))


@every_router
def test_gate(case: Case) -> None:
    """Plans carry (T, E) scores with a gradient, and a load estimate, exactly if stated."""
    router = case.build()
    plan = some_input().route(router)
    assert (plan.gate is not None) == router.facts.has_gate
    if plan.gate is None:
        return
    assert plan.gate.logits_TE.shape == plan.gate.probs_TE.shape == (24, case.experts)
    assert plan.gate.probs_TE.requires_grad
    assert (plan.gate.probs_TE >= 0).all()
    assert (plan.gate.load_probs_TE is not None) == router.facts.has_load_estimate


@every_router
def test_teaches(case: Case) -> None:
    """Which logits the task gradient reaches: those of all experts, of the chosen only, or none."""
    router = case.build()
    if router.facts.teaches == "estimated" or not router.facts.has_gate:
        return
    chosen_reached = unchosen_reached = False
    for trial in range(TRIALS):
        plan = some_input(seed=trial).route(router)
        if isinstance(plan, SoftPlan):
            return
        assert plan.gate is not None
        upstream_N = torch.randn(plan.num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(trial))
        loss = (plan.weight_N * upstream_N).sum()
        grad_TE = None
        if loss.requires_grad:
            (grad_TE,) = torch.autograd.grad(loss, plan.gate.logits_TE, allow_unused=True)
        if grad_TE is None:
            continue
        chosen_TE = torch.zeros(24, case.experts + 1, dtype=torch.bool)
        chosen_TE[plan.token_N, plan.choice_N] = True
        if case.name == "gshard":  # a second expert that was considered and sampled away is in the normalisation
            chosen_TE.scatter_(1, plan.gate.probs_TE.topk(2, dim=1).indices, True)
        if case.name == "hierarchical":  # a chosen group's gate normalises over the whole group
            of_group_TGb = chosen_TE[:, : case.experts].unflatten(1, (case.options["groups"], -1))
            of_group_TGb |= of_group_TGb.any(dim=2, keepdim=True)
        reached_TE = grad_TE.abs() > 1e-6
        chosen_reached |= bool(reached_TE[chosen_TE[:, : case.experts]].any())
        unchosen_reached |= bool(reached_TE[~chosen_TE[:, : case.experts]].any())
    # Where every expert is chosen there is nobody else to reach.
    assert unchosen_reached == (router.facts.teaches == "all" and router.rows_per_token < case.experts)
    assert chosen_reached == (router.facts.teaches != "none")


@every_router
def test_reads_previous(case: Case) -> None:
    """What the previous sparse layer's router said changes the plan exactly if stated."""
    router, batch = case.build(), some_input()
    plan = batch.route(router, previous=None)
    if plan.gate is None:
        assert not router.facts.reads_previous
        return
    again = batch.route(router, previous=plan.gate)
    assert bool(differs(plan, again).any()) == router.facts.reads_previous


@every_router
def test_reads_loss(case: Case) -> None:
    """The model's loss of every token changes the router's own losses, or what it remembers, exactly if stated."""
    router = case.build()
    plan = some_input().route(router)
    E = router.num_experts
    router.after_step(StepStats(torch.ones(E, dtype=torch.int64), 24, sums=router.statistics(plan)))  # a first step
    before = {name: value.clone() for name, value in router.state_dict().items()}
    said, kept = [], []
    for loss_T in (torch.linspace(1, 2, 24), torch.linspace(2, 1, 24)):
        outcome = Outcome(loss_T.to(torch.float64), num_layers=2)
        said.append({name: value.detach() for name, value in router.own_losses(plan, outcome).items()})
        router.load_state_dict(before)
        router.observe(plan.detach(), outcome)
        kept.append({name: value.clone() for name, value in router.state_dict().items()})
    differ = any(not torch.equal(a[name], b[name]) for a, b in (said, kept) for name in a)
    assert differ == router.facts.reads_loss


@every_router
def test_inference(case: Case) -> None:
    """Evaluation routes the same way, or differs as stated."""
    router = case.build()
    apart = False
    for trial in range(TRIALS):
        batch = some_input(seed=trial)
        plan, quiet = batch.route(router.train()), batch.route(router.eval())
        if type(plan) is not type(quiet) or decision(plan).shape != decision(quiet).shape:
            apart = True
        else:
            apart |= bool(differs(plan, quiet).any())
    assert apart == (router.facts.inference != "same")
    assert bool(router.facts.inference_rule) == (router.facts.inference == "other rule")


@pytest.mark.parametrize("size", [(24, DIM, 8), (6, 2 * DIM, 16)])
@every_router
def test_cost(case: Case, size: tuple[int, int, int]) -> None:
    """Stated FLOPs are those of the products that ran in training; stated parameters those of the module."""
    T, D, E = size
    if case.experts != 8:
        T, D, E = 24, DIM, case.experts
    router = ROUTERS[case.name]
    built = build_router(case.name, D, E, case.k, case.options, case.special).double().train()
    batch = some_input(1, T)
    x_TD = torch.randn(T, D, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        built(x_TD, batch.context())
    cost = router.cost(T, D, E, case.k, **case.options)
    assert counter.get_total_flops() == cost.flops
    assert sum(p.numel() for p in built.parameters()) == cost.parameters


@both_modes
@every_router
def test_padding_goes_nowhere_and_is_not_counted(case: Case, training: bool) -> None:
    router, batch = case.build(training=training), some_input()
    valid_BS = torch.ones(2, 12, dtype=torch.bool)
    valid_BS[1, 7:] = False
    x_BSD = batch.x_BSD.masked_fill(~valid_BS[:, :, None], 0.0)
    plan = replace(batch, valid_BS=valid_BS, x_BSD=x_BSD).route(router)
    padding_T = ~valid_BS.flatten()
    assert plan.valid_T is not None
    assert torch.equal(plan.valid_T, valid_BS.flatten())
    if isinstance(plan, SoftPlan):
        assert not plan.dispatch_GTS.flatten(0, 1)[padding_T].any()
        return
    on_padding_N = padding_T[plan.token_N]
    assert (plan.choice_N[on_padding_N] == plan.num_experts).all()
    assert (plan.expert_N[on_padding_N] == plan.num_experts).all()
    assert not plan.weight_N[on_padding_N].any()
    assert plan.weight_N.isfinite().all()


@both_modes
@every_router
def test_rules_cannot_be_broken_and_are_used_where_scores_allow(case: Case, training: bool) -> None:
    """Forbidden experts get nothing; a router that scores every expert still fills its places with permitted ones."""
    router = case.build(training=training)
    for trial in range(TRIALS):
        batch = some_input(seed=trial)
        allowed_TE = torch.rand(24, case.experts, generator=torch.Generator().manual_seed(trial)) < 0.5
        allowed_TE[0] = False  # nobody may serve this one
        allowed_TE[1] = torch.arange(case.experts) == 3
        plan = restrict(batch.route(router, allowed_TE=allowed_TE), allowed_TE)
        if isinstance(plan, SoftPlan):
            forbidden_TS = (~allowed_TE).repeat_interleave(plan.slots_per_expert, dim=1)
            assert not plan.dispatch_GTS.flatten(0, 1)[forbidden_TS].any()
            assert not plan.combine_GTS.flatten(0, 1)[forbidden_TS].any()
            continue
        kept_N = plan.kept_N
        assert allowed_TE[plan.token_N[kept_N], plan.expert_N[kept_N]].all()
        assert plan.weight_N.isfinite().all()
        if router.facts.has_gate and router.facts.experts == "k" and not case.special and case.k == 1:
            assert rows_of(plan)[1] == 1


@every_router
def test_the_same_twice(case: Case) -> None:
    router, batch = case.build(), some_input()
    first, second = batch.route(router), batch.route(router)
    assert torch.equal(decision(first), decision(second))


@both_modes
@every_router
def test_forward_changes_no_state(case: Case, training: bool) -> None:
    router = case.build(training=training)
    before, names = {key: value.clone() for key, value in router.state_dict().items()}, set(vars(router))
    some_input().route(router)
    assert set(vars(router)) == names
    if (
        training and case.options.get("query_norm") == "batch"
    ):  # batch normalisation's running statistics, as stated there
        before = {key: value for key, value in before.items() if "running_" not in key}
    assert all(torch.equal(value, router.state_dict()[key]) for key, value in before.items())


@both_modes
@every_router
def test_no_tokens_and_one(case: Case, training: bool) -> None:
    router = case.build(training=training)
    for S in (0, 1):
        plan = some_input(1, S).route(router)
        assert plan.num_tokens == S


@every_router
def test_weights_are_at_least_fp32_and_all_gradients_finite(case: Case) -> None:
    router = case.build(torch.float32)
    batch = some_input(dtype=torch.float32)
    plan = replace(batch, x_BSD=batch.x_BSD.bfloat16()).route(router)
    loss = torch.zeros(())
    if isinstance(plan, RoutingPlan):
        assert plan.weight_N.dtype == torch.float32
        loss = loss + (plan.weight_N * torch.linspace(-1, 1, plan.num_rows)).sum()
    else:
        assert plan.combine_GTS.dtype == plan.dispatch_GTS.dtype == torch.float32
        loss = loss + plan.dispatch_GTS.square().sum() + plan.combine_GTS.square().sum()
    if plan.gate is not None:
        loss = loss + plan.gate.logits_TE.square().mean()
    own = router.own_losses(plan, Outcome(torch.rand(24), num_layers=1))
    loss = loss + sum(own.values(), start=torch.zeros(()))
    if any(True for _ in router.parameters()):
        loss.backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, f"{name} is never taught"
        assert parameter.grad.isfinite().all(), name


@every_router
def test_decoding_token_by_token_routes_as_reading_at_once(case: Case) -> None:
    """What a router remembers lives in ``ctx.state``: a prompt of five, then single tokens, equal the whole text at once."""
    router = case.build(training=False)
    if not (router.facts.causal_in_evaluation and router.facts.batch_invariant_in_evaluation):
        return
    batch = some_input()
    whole = decision(batch.route(router)).view(2, 12, -1)
    state: dict[str, torch.Tensor] = {}
    for places in [slice(0, 5), *(slice(t, t + 1) for t in range(5, 12))]:
        plan = batch.part(slice(None), places).route(router, state=state)
        part = decision(plan).view(2, places.stop - places.start, -1)
        torch.testing.assert_close(part, whole[:, places], atol=1e-9, rtol=0)


@every_router
def test_a_document_routes_the_same_packed_or_alone(case: Case) -> None:
    router = case.build(training=False)
    if not (router.facts.causal_in_evaluation and router.facts.batch_invariant_in_evaluation):
        return
    batch = some_input()
    packed = replace(batch, position_BS=torch.cat([torch.arange(5), torch.arange(7)]).expand(2, 12))
    together = decision(packed.route(router)).view(2, 12, -1)
    for row in (0, 1):
        alone = decision(packed.part(slice(row, row + 1), slice(5, 12)).route(router))
        torch.testing.assert_close(together[row, 5:], alone, atol=1e-9, rtol=0)
