"""The family of docs/playbooks/add-a-model-family.md is real: its code is read from the page and passes the parity test."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from moesaic.convert.families import FAMILIES
from tests.convert import parity

PAGE = Path(__file__).parents[2] / "docs" / "playbooks" / "add-a-model-family.md"
# What the page leaves to the editor.
IMPORTS = """
from __future__ import annotations
from pathlib import Path
from typing import Any
from moesaic.convert.family import (
    Family, Layout, by_layer, common_keys, common_values, frame, gated_mlp, grouped_attention, grouped_heads, grouped_values,
    one_value,
)
from moesaic.convert.keys import Keys
from moesaic.convert.pieces import Entry
from moesaic.convert.windows import FULL, SLIDING, kinds_and_window, layer_kinds, window_key, windows_of
from moesaic.models.config import ModelConfig, pick
from tests.convert.parity import assert_parity, transformers
from tests.convert.variants import TINY, rope
"""


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Everything the page defines; its family registered as the page says."""
    family, test = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    found: dict[str, Any] = {"__name__": "playbook"}
    for block in (family, test):
        exec(compile(IMPORTS + block, str(PAGE), "exec"), found)
    assert found["QWEN2"].model_type not in FAMILIES, "it is a family of its own now: the page needs another example"
    monkeypatch.setitem(FAMILIES, "qwen2", found["QWEN2"])
    return found


@pytest.mark.parametrize("name", ["plain", "windows", "yarn"])
def test_it_passes_its_own_test(space: dict[str, Any], name: str, tmp_path: Path) -> None:
    assert set(space["VARIANTS"]) == {"plain", "windows", "yarn"}
    space["check"](name, tmp_path)


def test_every_name_the_page_speaks_of_exists() -> None:
    text = PAGE.read_text("utf-8")
    for path in re.findall(r"`((?:src|tests)/[\w/.]+\.py)`", text):
        assert (PAGE.parents[2] / path).exists(), path
    assert parity.assert_parity.__name__ in text
