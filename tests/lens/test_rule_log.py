"""Counting where rules apply, from outside, over several forwards."""

from __future__ import annotations

import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.lens import rule_log
from moesaic.models import MoEConfig
from moesaic.routing import Rule, RuleCounts, RuleSet
from tests.models.tiny import lively, some_ids, tiny

RULES = RuleSet(
    (
        Rule({"tenant": (1,)}, allow=(0,), name="first"),
        Rule({"position": ((4, None),)}, forbid=(0,)),
        Rule(allow=(2,), weight=1.0),
    )
)


def test_counts_add_up_over_forwards_and_change_nothing() -> None:
    model = lively(tiny(MoEConfig(num_experts=4, k=2, hidden=8, losses={}, rules=RULES))).eval()
    ids_BS = some_ids(2, 6)
    tenant_BS = torch.tensor([[1], [0]]).expand(2, 6)
    valid_BS = torch.arange(6).expand(2, 6) < 5
    free = model(ids_BS, tenant_BS=tenant_BS, valid_BS=valid_BS).logits
    with rule_log(model) as log:
        assert torch.equal(model(ids_BS, tenant_BS=tenant_BS, valid_BS=valid_BS).logits, free)
        # Five real tokens a row; place 4 of each is at position 4; tenant 1 and position 4 leave no expert there.
        assert log.counts[0] == RuleCounts(10, {'Rule 1 "first"': 5, "Rule 2": 2, "Rule 3": 10}, 1)
        model(ids_BS, tenant_BS=tenant_BS)
        assert log.counts[1] == RuleCounts(22, {'Rule 1 "first"': 11, "Rule 2": 6, "Rule 3": 22}, 3)
    model(ids_BS, tenant_BS=tenant_BS)  # outside of the block nothing is counted
    assert log.counts[1].tokens == 22
    assert all(not layer._forward_pre_hooks for layer in model.moe_layers().values())


def test_a_layer_by_itself_and_rules_that_change() -> None:
    model = lively(tiny(MoEConfig(num_experts=4, k=2, hidden=8, losses={}, rules=RuleSet((Rule(forbid=(1,)),)))))
    layer = model.moe_layers()[1]
    with rule_log(model) as log:
        layer(torch.randn(3, 16))
        layer(x=torch.randn(2, 2, 16))
        layer.rules = RuleSet((Rule(forbid=(1,), name="renamed"),))
        layer(torch.randn(5, 16))
        layer.rules = None
        layer(torch.randn(5, 16))
    assert log.counts == {1: RuleCounts(12, {"Rule 1": 7, 'Rule 1 "renamed"': 5}, 0)}


def test_without_rules_there_is_nothing_to_count() -> None:
    model = lively(tiny(MoEConfig(num_experts=4, k=2, hidden=8, losses={})))
    with pytest.raises(ConfigError, match="no routing rules to count"), rule_log(model):
        pass
