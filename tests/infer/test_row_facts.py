"""Facts about prompts reach routing rules in every step of a generation, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moesaic as mo
from moesaic.errors import ConfigError
from moesaic.infer.row_facts import row_facts
from moesaic.infer.token_loop import generate_ids
from moesaic.models import MoEConfig
from moesaic.plan import RoutingPlan
from moesaic.routing import Rule, RuleSet
from tests.models.tiny import lively, tiny


def test_one_number_for_all_or_one_each() -> None:
    facts = row_facts(3, tenant=5, metadata={"minor": [0, 1, 0]})
    inputs = facts.inputs([2, 1], 4, torch.device("cpu"))
    assert inputs["tenant_BS"].tolist() == [[5] * 4] * 2
    assert inputs["metadata"]["minor"].tolist() == [[0] * 4, [1] * 4]
    assert row_facts(3).inputs([0], 2, torch.device("cpu")) == {}  # models that know no facts are not given any
    assert row_facts(0, tenant=1).inputs([], 1, torch.device("cpu"))["tenant_BS"].shape == (0, 1)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"tenant": [1, 2]}, "3 prompts need one tenant or as many, but 2 were given"),
        ({"metadata": {"minor": [1]}}, "3 prompts need one metadata minor or as many"),
        ({"tenant": 1.5}, "tenant must be a whole number, or one per prompt, not 1.5"),
        ({"tenant": [1, 2, "x"]}, "tenant must be a whole number, or one per prompt, not 'x'"),
        ({"tenant": True}, "not True"),
    ],
)
def test_other_facts_are_refused(facts: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        row_facts(3, **facts)


def test_rules_hold_while_generating_and_ask_for_what_they_need() -> None:
    rules = RuleSet(
        (
            Rule({"tenant": (1,)}, allow=(0, 1)),
            Rule({"metadata.minor": (1,), "task": (2,)}, forbid=(0,)),
            Rule({"position": ((3, None),)}, forbid=(3,)),
        )
    )
    model = lively(tiny(MoEConfig(num_experts=4, k=2, hidden=8, losses={}, rules=rules)))
    prompts, said = [[5, 6, 7, 8], [9]], {"task": 2, "tenant": [0, 1], "metadata": {"minor": [0, 1]}}
    with mo.trace(model) as trace:
        generate_ids(model, prompts, max_new_tokens=5, **said)  # type: ignore[arg-type]
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    for plans in trace.plans:
        for plan in plans.values():
            assert isinstance(plan, RoutingPlan)
            rows_BN = plan.expert_N.view(2, -1)
            for row in (0, 1):
                seen[row] |= set(rows_BN[row].tolist())
    assert seen[1] == {1, 4}  # of its tenant's experts 0 and 1 a minor may not use 0; 4 is nowhere
    assert seen[0] == {0, 1, 2, 3}
    late = {e for plans in trace.plans[1:] for p in plans.values() for e in p.expert_N.view(2, -1)[0].tolist()}  # type: ignore[union-attr]
    assert 3 not in late
    for missing in said:
        with pytest.raises(ConfigError, match=f"asks for the .*{'minor' if missing == 'metadata' else missing}"):
            generate_ids(model, prompts, max_new_tokens=2, **{k: v for k, v in said.items() if k != missing})  # type: ignore[arg-type]
