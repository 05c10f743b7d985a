"""The linter: each finding from a config that deserves it, none from one that does not, and what to write instead."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesaic.errors import LintWarning
from moesaic.models import MoEConfig, build_model
from moesaic.models.config import DepthConfig
from moesaic.plan.capacity import CapacityRule
from moesaic.train.config import TrainConfig
from moesaic.train.lint import lint_model, lint_run
from moesaic.train.recipes import RECIPES
from tests.command import call, one_sentence
from tests.models.tiny import sparse

QUICK = RECIPES["quickstart"]()


def run(moe: dict[str, Any], **changes: Any) -> TrainConfig:
    assert QUICK.model.moe is not None
    return replace(QUICK, model=replace(QUICK.model, moe=replace(QUICK.model.moe, **moe)), **changes)


def router(name: str = "topk", **options: Any) -> dict[str, Any]:
    assert QUICK.model.moe is not None
    leak = name == "base"
    return {"router": replace(QUICK.model.moe.router, name=name, options=options, allow_leak=leak)}


OPTION = "model.moe.router.options."
CASES: list[tuple[dict[str, Any], str, str, str]] = [
    ({"k": 1}, "error", "model.moe", 'router gets no gradient; use normalize="none"'),
    (router("hash"), "error", "model.moe", "no gradient path"),
    (router(groups=4, groups_kept=1) | {"k": 8}, "error", "model.moe", "do not fit into groups_kept=1"),
    (router("expert_choice"), "error", "model.moe", "allow_leak=true"),
    ({"losses": {"load": 0.1}}, "error", "model.moe", "has none"),
    ({"losses": {}}, "warning", "model.moe.losses", "nothing balances .*model.moe.losses.switch=0.01"),
    ({"losses": {"switch": 0.0}}, "warning", "model.moe.losses.switch", "never acts"),
    ({"losses": {"switch": 3.0}}, "warning", "model.moe.losses.switch", "outweighs"),
    ({"k": 16}, "warning", "model.moe.losses.switch", "constant without gradient"),
    ({"loss_scope": "sequence", "losses": {"importance": 0.1}}, "warning", "model.moe.loss_scope", "not used"),
    (router(init_std=0.0), "warning", "model.moe.router.options.init_std", "ties go to the lowest"),
    (router(bias_rate=0.1), "warning", "model.moe.router.options.bias_rate", "Set balance_bias"),
    (router(balance_bias=True, bias_p=2.0), "warning", "model.moe.router.options.bias_p", 'Set bias_rule="pid"'),
    (router(group_score="max"), "warning", "model.moe.router.options.group_score", "Set groups"),
    (router("gshard", threshold=0.3), "warning", "model.moe.router.options.threshold", "which is not set"),
    ({"capacity": CapacityRule(0.5)}, "warning", "model.moe.capacity.factor", "at least 50% of rows are dropped"),
    (
        {"capacity": CapacityRule(1.25, count_k=False)},
        "warning",
        "model.moe.capacity.count_k",
        "places for 1.25 of the k=2",
    ),
    ({"capacity": CapacityRule(priority="batch")}, "warning", "model.moe.capacity.priority", "sees the future"),
    ({"capacity": CapacityRule()}, "note", "model.moe.capacity.priority", "later tokens"),
    ({"capacity": CapacityRule(8.0)}, "note", "model.moe.capacity.factor", "nothing is ever dropped"),
    ({"capacity": CapacityRule(overflow="shared")}, "warning", "model.moe.capacity.overflow", "model.moe.shared=1"),
    (router(balance_bias=True), "note", "model.moe.losses.switch", "DeepSeek-V3"),
    ({"gating_groups": 2}, "warning", "model.moe.gating_groups", "Set gating_dropout"),
    ({"capacity": CapacityRule("exact", max_factor=0.1)}, "warning", "model.moe.capacity.max_factor", "never reached"),
    ({"capacity": CapacityRule(0.01, priority="batch")}, "warning", "model.moe.capacity.factor", "hardly any token"),
    ({"capacity": CapacityRule(batch_score="sum")}, "warning", "model.moe.capacity.batch_score", "Set that"),
    ({"capacity": CapacityRule(overflow="fallback_expert", fallback_expert=99)}, "error", "model.moe", "one of the 16"),
    (router("base", epsilon=0.1) | {"k": 1, "losses": {}}, "warning", OPTION + "epsilon", 'Set solver="auction"'),
    (router("moepp") | {"zero": 2}, "note", "model.moe.losses.switch", "of its own"),
    ({"num_experts": 16384}, "warning", "batch_size", "sits out"),
    ({"loss_scope": "global_batch"}, "note", "model.moe.loss_scope", "same as"),
]


@pytest.mark.parametrize(("moe", "severity", "where", "words"), CASES)
def test_each_finding(moe: dict[str, Any], severity: str, where: str, words: str) -> None:
    found = [f for f in lint_run(run(moe)) if f.where == where and re.search(words, f"{f.what} {f.instead}")]
    assert [f.severity for f in found] == [severity]  # once, however many layers


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_the_recipes_are_clean(recipe: str) -> None:
    assert lint_run(RECIPES[recipe]()) == []


def test_sound_configs_are_clean() -> None:
    for moe in (
        router(score="sigmoid", balance_bias=True, bias_rate=0.01) | {"losses": {}},
        router("noisy_topk", init_std=0.0) | {"losses": {"importance": 0.1, "load": 0.1}},
        router("gshard", second="threshold", threshold=0.3),
        router("hash") | {"losses": {}, "k": 1},
        router("relu") | {"losses": {}},
    ):
        assert [f for f in lint_run(run(moe)) if f.severity != "note"] == [], moe


def test_depth_is_looked_at() -> None:
    def found(depth: DepthConfig) -> list[tuple[str, str]]:
        model = replace(QUICK.model, depth=depth)
        return [(f.severity, f.where) for f in lint_model(model)]

    assert found(DepthConfig())[0] == ("error", "model.depth")
    assert ("warning", "model.depth.allow_leak") in found(DepthConfig(allow_leak=True))
    assert found(DepthConfig(router="nope", allow_leak=True))[0] == ("error", "model.depth")
    assert ("note", "model.depth.capacity") in found(DepthConfig(capacity=1.0, allow_leak=True))


def test_a_switch_may_use_the_importance_loss() -> None:
    found = lint_run(run(router("switch") | {"k": 1, "losses": {"importance": 0.1}}))
    assert found == []


def test_errors_come_first_and_each_layer_counts() -> None:
    config = run({"num_experts": (4, 4, 4, 4), "k": (1, 2, 2, 2), "losses": {"switch": 0.0}})
    found = lint_model(config.model)
    assert [f.severity for f in found][:2] == ["error", "warning"]


def test_building_warns_and_loading_does_not() -> None:
    with pytest.warns(LintWarning, match="nothing balances"):
        build_model(sparse(losses={}))
    assert isinstance(sparse().moe, MoEConfig)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    clean = call(capsys, "lint", "quickstart")
    assert (clean.status, clean.out.strip()) == (0, "Nothing to find fault with.")
    (tmp_path / "run.toml").write_text("[model.moe]\nk = 1\n")
    bad = call(capsys, "lint", str(tmp_path / "run.toml"))
    assert bad.status == 1
    assert bad.out.startswith("error: model.moe: k=1")
    data = json.loads(call(capsys, "lint", "quickstart", "--set", "model.moe.losses.switch=0", "--json").out)
    assert data["warnings"] == 2
    assert data["findings"][0]["instead"]
    (tmp_path / "odd.json").write_text('{"modl": {}}')
    assert 'Did you mean "model"' in one_sentence(call(capsys, "lint", str(tmp_path / "odd.json")))
    assert "missing.toml" in one_sentence(call(capsys, "lint", "missing.toml"))
