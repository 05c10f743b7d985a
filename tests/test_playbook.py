"""The router of docs/playbooks/add-a-router.md is real: its code is read from the page and keeps what the page promises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from moesaic.errors import ConfigError
from moesaic.models import build_model
from moesaic.routing import ROUTERS, Router
from tests.models.tiny import some_ids, tiny
from tests.routing import test_contract
from tests.routing.cases import Case

PAGE = Path(__file__).parent.parent / "docs" / "playbooks" / "add-a-router.md"
# What the page leaves to the editor.
IMPORTS = """
from __future__ import annotations
from typing import Any
from torch import Tensor
from moesaic.errors import ConfigError
from moesaic.plan.plan import Gate, RoutingPlan
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts, linear_cost
from moesaic.routing.gate import LinearGate, Router, check_k, choose, ruled
"""


@pytest.fixture(autouse=True)
def written(monkeypatch: pytest.MonkeyPatch) -> type[Router]:
    """The class of the page, registered as the page says."""
    block = re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert block
    # The module's docstring stands first on the page; the imports go before it here.
    space: dict[str, Any] = {"__name__": "playbook"}
    exec(compile(IMPORTS + block[1], str(PAGE), "exec"), space)
    monkeypatch.setitem(ROUTERS, "my_router", space["MyRouter"])
    return space["MyRouter"]  # type: ignore[no-any-return]


CASE = Case("my_router", {"temperature": 0.5})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("check", ["causal", "batch_invariant", "padding_goes_nowhere_and_is_not_counted",
                                   "rules_cannot_be_broken_and_are_used_where_scores_allow", "no_tokens_and_one"])  # fmt: skip
def test_it_keeps_its_promises_in_both_modes(check: str, training: bool) -> None:
    getattr(test_contract, f"test_{check}")(CASE, training)


@pytest.mark.parametrize(
    "check", ["balance_by_construction", "experts_per_token", "needs", "gate", "teaches", "inference"]
)
def test_it_keeps_its_promises(check: str) -> None:
    getattr(test_contract, f"test_{check}")(CASE)


def test_it_costs_what_it_says() -> None:
    test_contract.test_cost(CASE, (24, 16, 8))


def test_it_decodes_inside_a_model_and_refuses_in_words() -> None:
    model = build_model(tiny(CASE.config()), seed=0).eval()
    assert model(some_ids(2, 5)).plans[0].gate is not None
    with pytest.raises(ConfigError, match="temperature must be above 0, not 0"):
        Case("my_router", {"temperature": 0.0}).build()
    with pytest.raises(ConfigError, match='Did you mean "temperature"'):
        Case("my_router", {"temprature": 1.0}).build()


def test_every_file_and_hook_it_names_exists() -> None:
    text = PAGE.read_text("utf-8")
    root = PAGE.parents[2]
    named = set(re.findall(r"`((?:src|tests|docs)/[\w/.-]+)`", text)) - {"tests/routing/test_my_router.py"}
    assert named
    assert sorted(name for name in named if not (root / name).exists()) == []
    hooks = set(re.findall(r"`(\w+)\((?:plan|stats|text|outcome|, )+\)`", text))
    assert hooks >= {"own_losses", "after_step", "fit"}
    assert all(hasattr(Router, hook) for hook in hooks)
