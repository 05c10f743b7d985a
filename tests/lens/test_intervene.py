"""Trace and edit: what was routed is recorded once per forward, edits hold inside the block and leave nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError, MoesaicError
from moesaic.lens import edit, trace
from moesaic.models.config import MoEConfig, RouterConfig
from moesaic.models.decoder import Decoder
from moesaic.plan import RoutingPlan
from moesaic.plan.edit import force_balanced
from tests.models.tiny import lively, tiny

IDS_BS = torch.arange(24).reshape(2, 12) % 31


@pytest.fixture
def model() -> Decoder:
    return lively(tiny(MoEConfig(num_experts=4, k=2, hidden=12, dense_first=1, losses={}), num_layers=3))


def clean(model: Decoder) -> bool:
    """No hook and no edit is left."""
    hooks = bool(model._forward_hooks or model._forward_pre_hooks)
    return not hooks and all(not moe.edits and not moe._forward_hooks for moe in model.moe_layers().values())


def logits(model: Decoder) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS_BS).logits
    return result


# ---- trace -----------------------------------------------------------------------------------------------------------


def test_a_layer_called_by_itself_has_a_record_of_its_own(model: Decoder) -> None:
    layers = model.moe_layers()
    x_BSD = torch.randn(2, 5, model.config.dim)
    with trace(model) as recorded, torch.no_grad():
        layers[2](x_BSD)
        model(IDS_BS)
        layers[2](x_BSD)
        layers[1](x_BSD)
    assert [list(plans) for plans in recorded.plans] == [[2], [1, 2], [2], [1]]
    assert [plan.num_tokens for plan in recorded.layer(2)] == [10, 24, 10]


def test_forwards_whose_first_sparse_layer_is_skipped_stay_apart(model: Decoder) -> None:
    block = model.blocks[1]
    block.forward = lambda x_BSD, *_: (x_BSD, None, None)
    with trace(model) as recorded, torch.no_grad():
        model(IDS_BS)
        model(IDS_BS)
    assert [list(plans) for plans in recorded.plans] == [[2], [2]]


def test_a_forward_that_fails_ends_its_record(model: Decoder) -> None:
    layers = model.moe_layers()
    with trace(model) as recorded, torch.no_grad():
        with pytest.raises(MoesaicError, match="outside this model's vocabulary"):
            model(torch.full((1, 3), 10**6))
        layers[1](torch.randn(1, 4, model.config.dim))
    assert [list(plans) for plans in recorded.plans] == [[], [1]]


def test_one_record_per_forward_and_what_it_holds(model: Decoder) -> None:
    with trace(model) as recorded:
        outputs = [model(IDS_BS), model(IDS_BS[:1, :5])]
        assert not clean(model)
    assert clean(model)
    model(IDS_BS)  # after the block nothing is added
    assert len(recorded.plans) == 2
    for output, plans in zip(outputs, recorded.plans, strict=True):
        assert list(plans) == [1, 2]
        for layer, plan in plans.items():
            theirs = output.plans[layer]
            assert isinstance(plan, RoutingPlan)
            assert isinstance(theirs, RoutingPlan)
            assert torch.equal(plan.expert_N, theirs.expert_N)
            assert torch.equal(plan.weight_N, theirs.weight_N)
            assert not plan.weight_N.requires_grad
            assert theirs.weight_N.requires_grad  # only the record is detached
            assert plan.gate is not None
            assert theirs.gate is not None
            assert not plan.gate.logits_TE.requires_grad
            assert torch.equal(plan.gate.logits_TE, theirs.gate.logits_TE)
    assert [plan.num_tokens for plan in recorded.layer(2)] == [24, 5]
    assert recorded.layer(0) == []


def test_trace_changes_nothing(model: Decoder) -> None:
    before = logits(model)
    with trace(model):
        assert torch.equal(logits(model), before)


def test_traces_nest_and_see_edited_plans(model: Decoder) -> None:
    with trace(model) as outer:
        model(IDS_BS)
        with edit(model, layer=1, knockout=[0]), trace(model) as inner:
            model(IDS_BS)
    assert (len(outer.plans), len(inner.plans)) == (2, 1)
    assert outer.plans[0][1].counts_E[0] > 0
    assert outer.plans[1][1].counts_E[0] == inner.plans[0][1].counts_E[0] == 0


def test_hooks_are_removed_when_the_block_fails(model: Decoder) -> None:
    with pytest.raises(KeyError), trace(model):
        model(IDS_BS).plans[7]
    assert clean(model)
    with pytest.raises(MoesaicError, match="context is 64"), trace(model):
        model(IDS_BS.repeat(1, 9))  # the forward itself fails
    assert clean(model)


def test_a_dense_model_has_no_plans() -> None:
    dense = lively(tiny())
    with trace(dense) as recorded:
        dense(IDS_BS)
    assert recorded.plans == []


# ---- edit ------------------------------------------------------------------------------------------------------------


def plan_of(model: Decoder, layer: int) -> RoutingPlan:
    with torch.no_grad():
        plan = model(IDS_BS).plans[layer]
    assert isinstance(plan, RoutingPlan)
    return plan


def weights_TK(plan: RoutingPlan) -> Tensor:
    return torch.where(plan.kept_N, plan.weight_N, 0).reshape(plan.num_tokens, -1)


def test_knockout_drops_the_rows_of_these_experts_only(model: Decoder) -> None:
    before, base = plan_of(model, 1), logits(model)
    with edit(model, layer=1, knockout=[0, 3]):
        after = plan_of(model, 1)
        assert not torch.equal(logits(model), base)
    hit_N = (before.expert_N == 0) | (before.expert_N == 3)
    assert hit_N.any()
    assert not hit_N.all()
    assert torch.equal(after.expert_N, torch.where(hit_N, 4, before.expert_N))
    assert torch.equal(after.weight_N[~hit_N], before.weight_N[~hit_N])
    assert after.dropped == hit_N.sum()
    assert clean(model)
    assert torch.equal(logits(model), base)


def test_knockout_of_everything_silences_the_layer(model: Decoder) -> None:
    seen: list[Tensor] = []
    handle = model.moe_layers()[1].register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    with edit(model, layer=1, knockout=range(4)):
        logits(model)
    handle.remove()
    assert seen[0].abs().max() == 0


def test_knockout_with_reroute_sends_to_the_next_best(model: Decoder) -> None:
    before = plan_of(model, 2)
    with edit(model, layer=2, knockout=[1], reroute=True):
        after = plan_of(model, 2)
    assert before.gate is not None
    probs_TE = before.gate.probs_TE
    assert (before.expert_N == 1).any()
    for row, (old, new) in enumerate(zip(before.expert_N.tolist(), after.expert_N.tolist(), strict=True)):
        token = int(before.token_N[row])
        taken = before.expert_N[before.token_N == token].tolist()
        free = [e for e in range(4) if e not in taken]
        assert new == (old if old != 1 else max(free, key=lambda e: float(probs_TE[token, e])))
    assert torch.equal(after.weight_N, before.weight_N)
    assert after.dropped == 0


def test_knockout_with_renormalize_keeps_the_sum_of_weights(model: Decoder) -> None:
    before = plan_of(model, 1)
    with edit(model, layer=1, knockout=[2], renormalize=True):
        after = plan_of(model, 1)
    alive_T = after.kept_N.reshape(24, 2).any(1)
    hit_T = (before.expert_N == 2).reshape(24, 2).any(1)
    assert (alive_T & hit_T).any()
    torch.testing.assert_close(weights_TK(after).sum(1)[alive_T], weights_TK(before).sum(1)[alive_T])


def test_balanced(model: Decoder) -> None:
    with edit(model, balanced=True):
        for layer in (1, 2):
            assert plan_of(model, layer).counts_E.tolist() == [12, 12, 12, 12]


def test_replay_reproduces_the_logits_exactly(model: Decoder) -> None:
    with trace(model) as recorded:
        base = logits(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        saved = {i: moe.router.gate.weight.clone() for i, moe in model.moe_layers().items()}  # type: ignore[union-attr]
        for moe in model.moe_layers().values():
            moe.router.gate.weight.normal_(generator=generator)  # type: ignore[union-attr, operator]
    assert not torch.equal(logits(model), base)
    with edit(model, replay=recorded.plans[0]):  # type: ignore[arg-type]
        assert torch.equal(logits(model), base)
    # Today's weights on the recorded experts: other logits, and the old router gives the old ones.
    with edit(model, replay=recorded.plans[0], live_weights=True):  # type: ignore[arg-type]
        live = plan_of(model, 1)
        assert torch.equal(live.expert_N, recorded.plans[0][1].expert_N)  # type: ignore[union-attr]
        assert not torch.equal(live.weight_N, recorded.plans[0][1].weight_N)  # type: ignore[union-attr]
        model(IDS_BS).logits.sum().backward()
        for moe in model.moe_layers().values():
            assert moe.router.gate.weight.grad is not None  # type: ignore[union-attr]
            assert moe.router.gate.weight.grad.abs().sum() > 0  # type: ignore[union-attr, operator]
        with torch.no_grad():
            for i, moe in model.moe_layers().items():
                moe.router.gate.weight.copy_(saved[i])  # type: ignore[union-attr, operator]
        assert torch.equal(logits(model), base)


def test_replay_of_one_layer_leaves_the_others_live(model: Decoder) -> None:
    with trace(model) as recorded:
        base = logits(model)
    with edit(model, layer=1, knockout=[0]):
        only = {1: recorded.plans[0][1]}
        with edit(model, replay=only):  # type: ignore[arg-type]
            assert model.moe_layers()[2].edits == ()
            assert torch.equal(logits(model), base)  # the inner edit comes last and wins


def test_replay_of_one_layer_and_knockout_of_all(model: Decoder) -> None:
    with trace(model) as recorded:
        model(IDS_BS)
    with edit(model, knockout=[0], replay={1: recorded.plans[0][1]}):  # type: ignore[dict-item]
        assert plan_of(model, 1).counts_E[0] == plan_of(model, 2).counts_E[0] == 0


def test_an_edit_refused_for_one_layer_changes_none() -> None:
    uneven = lively(tiny(MoEConfig(num_experts=(4, 2), k=1, hidden=12, losses={}, router=RouterConfig("switch"))))
    with (
        pytest.raises(ConfigError, match="Layer 1 has no expert 3; it has experts 0 to 1."),
        edit(uneven, knockout=[3]),
    ):
        pass
    assert clean(uneven)


def test_fn_is_any_function_of_a_plan(model: Decoder) -> None:
    seen: list[Any] = []

    def halve(plan: RoutingPlan) -> RoutingPlan:
        seen.append(plan)
        return plan.send(plan.expert_N, plan.weight_N * 0.5)

    before = plan_of(model, 2)
    with edit(model, layer=[2], fn=halve):
        after = plan_of(model, 2)
    assert torch.equal(after.weight_N, before.weight_N * 0.5)
    assert len(seen) == 1


def test_edits_nest_inner_ones_last(model: Decoder) -> None:
    with edit(model, balanced=True), edit(model, layer=1, knockout=[0]):
        assert plan_of(model, 1).counts_E.tolist() == [0, 12, 12, 12]
        assert plan_of(model, 2).counts_E.tolist() == [12, 12, 12, 12]
    with edit(model, layer=1, knockout=[0]), edit(model, fn=force_balanced):
        assert plan_of(model, 1).counts_E[0] > 0
        with edit(model, knockout=[3]):
            pass
        assert len(model.moe_layers()[1].edits) == 2
        assert len(model.moe_layers()[2].edits) == 1
    assert clean(model)


def test_edits_are_undone_when_the_block_fails(model: Decoder) -> None:
    base = logits(model)
    with pytest.raises(ZeroDivisionError), edit(model, knockout=[0]):
        _ = 1 / 0
    assert clean(model)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layer": 0, "knockout": [1]}, "Layer 0 is not a sparse layer; this model's sparse layers are [1, 2]."),
        ({"layer": [1, 7], "knockout": [1]}, "Layer 7 is not a sparse layer"),
        ({"knockout": [4]}, "Layer 1 has no expert 4; it has experts 0 to 3."),
        ({"knockout": [-1]}, "Layer 1 has no expert -1"),
        ({}, "Nothing to edit: give knockout, balanced, replay or fn."),
        ({"layer": 1}, "Nothing to edit"),
        ({"replay": {}}, "Nothing to edit"),
    ],
)
def test_refused_in_words(arguments: dict[str, Any], words: str, model: Decoder) -> None:
    with pytest.raises(ConfigError) as caught, edit(model, **arguments):
        pass
    assert words in str(caught.value)
    assert clean(model)


def test_replay_of_other_layers_or_another_input_is_refused(model: Decoder) -> None:
    with trace(model) as recorded:
        model(IDS_BS)
    other = edit(model, layer=2, replay={1: recorded.plans[0][1]})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"The recorded plans cover layers \[1\], none of those to be edited"), other:
        pass
    with edit(model, replay=recorded.plans[0]), pytest.raises(ConfigError, match="record it on the same input"):  # type: ignore[arg-type]
        model(IDS_BS[:1])
    assert clean(model)
