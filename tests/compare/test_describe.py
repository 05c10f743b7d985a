"""``moesaic routers`` and its page in the docs say what the code says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesaic.compare.describe import describe_all, markdown
from moesaic.compare.variants import VARIANTS
from tests.command import call, one_sentence

ROOT = Path(__file__).parents[2]


def test_the_page_in_the_docs_is_what_the_code_says() -> None:
    written = (ROOT / "docs" / "routers.md").read_text("utf-8")
    assert written == markdown(describe_all()), "run: moesaic routers --markdown > docs/routers.md"


def test_the_matrix() -> None:
    """The property matrix of the field, by router: causal, independent of batch mates, balance, experts, drops."""
    rows = {row.name: row.cells() for row in describe_all()}
    leaks = {name for name, cells in rows.items() if cells["causal"] != "yes"}
    assert leaks == {
        *(
            "base",
            "sinkhorn",
            "expert_choice",
            "expert_choice_capped",
            "soft_moe",
            "capacity",
            "batch_priority",
            "next_best",
        ),
        *("mixture_of_depths", "mixture_of_depths_moe"),
    }
    batch = {name for name, cells in rows.items() if cells["batch-invariant"] != "yes"}
    assert batch == {
        *("base", "sinkhorn", "expert_choice", "expert_choice_capped", "expert_choice_causal"),
        *("capacity", "batch_priority", "next_best"),
    }
    assert {n for n, cells in rows.items() if cells["inference"] not in ("same", "noise off")} >= {
        *("base", "sinkhorn", "tree_soft", "mixture_of_depths"),
    }
    assert {n for n, cells in rows.items() if cells["balance"] == "exact"} >= {"base", "expert_choice", "soft_moe"}
    assert {n for n, cells in rows.items() if cells["needs"] != "–"} == {
        *("hash_random", "hash_balanced", "hash_bigram", "hash_clustered", "multi_hash", "task", "demix")
    }


def test_the_command_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    listed = call(capsys, "routers")
    assert listed.status == 0
    assert all(f" {name} " in listed.out for name in VARIANTS)
    data = json.loads(call(capsys, "routers", "--json").out)["routers"]
    assert [row["router"] for row in data] == list(VARIANTS)
    one = call(capsys, "routers", "expert_choice")
    assert "Zhou et al. 2022" in one.out
    assert "max_experts" in one.out
    assert 'Did you mean "expert_choice"' in one_sentence(call(capsys, "routers", "expert_chois"))
