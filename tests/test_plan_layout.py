"""``moesaic plan-layout``: what it prints and refuses, the same numbers as the forecast's, and its exit status."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import moesaic as mo
from moesaic.commands.plan_layout_asked import memory_size
from moesaic.commands.plan_layout_tables import ranks_in_words
from moesaic.config import to_dict
from moesaic.cost.forecast import Training
from moesaic.cost.layout import forecast
from moesaic.errors import ConfigError
from moesaic.layout import ParallelConfig
from moesaic.models import ModelConfig, MoEConfig, build_model
from moesaic.models.presets import preset
from moesaic.parallel.stages import split_stages
from tests.command import call, make_project, one_sentence

SMALL = ModelConfig(
    vocab_size=50, dim=8, num_layers=4, num_heads=4, hidden=16, max_seq_len=64, moe=MoEConfig(num_experts=6, hidden=8)
)


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def small(**settings: Any) -> str:
    Path("small.json").write_text(json.dumps({"model": to_dict(SMALL), **settings}))
    return "small.json"


def found(capsys: pytest.CaptureFixture[str], *args: str, status: int = 0) -> dict[str, Any]:
    done = call(capsys, "plan-layout", *args, "--json")
    assert (done.status, done.err) == (status, ""), done
    return json.loads(done.out)  # type: ignore[no-any-return]


def test_the_numbers_are_the_forecast(capsys: pytest.CaptureFixture[str]) -> None:
    result = found(
        capsys, "deepseek-v2-lite", "--world", "32", "--ep", "8", "--pp", "2", "--seq-len", "1024", "--recompute"
    )
    model = preset("deepseek-v2-lite")
    training = Training(16, 8, 1024, recompute=True)
    expected = forecast(model, ParallelConfig(ep=8, pp=2), 32, training, split=split_stages)
    assert (result["batch_size"], result["accumulate"], result["dtype"]) == (16, 8, "bf16")
    assert [row["ranks"] for row in result["ranks"]] == [list(group.ranks) for group in expected.groups]
    for row, group in zip(result["ranks"], expected.groups, strict=True):
        assert row["parameters"]["total"] == group.parameters.total
        assert row["memory"]["total"] == group.memory.total
        assert row["traffic"]["exchange"] == group.traffic.exchange
        assert row["layers"] == list(group.layers)
    assert result["parameters"]["total"] == expected.parameters.total
    assert result["fits"] is True
    assert result["search"] is result["time"] is result["impossible"] is None


def test_settings_of_a_config_are_used(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "model": to_dict(SMALL),
        "batch_size": 8,
        "accumulate": 3,
        "seq_len": 32,
        "dtype": "fp32",
        "recompute": True,
    }
    Path("run.json").write_text(json.dumps({**settings, "parallel": {"ep": 2}}))
    result = found(capsys, "run.json", "--world", "4")
    assert result["parallel"]["ep"] == 2
    sizes = {name: result[name] for name in ("batch_size", "accumulate", "seq_len", "dtype", "recompute")}
    assert sizes == {name: settings[name] for name in sizes}
    other = found(
        capsys, "run.json", "--world", "4", "--ep", "4", "--batch-size", "4", "--set", "parallel.exchange=hierarchical"
    )
    assert (other["parallel"]["ep"], other["parallel"]["exchange"], other["batch_size"]) == (4, "hierarchical", 4)


def test_tables_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(
        capsys,
        "plan-layout",
        small(),
        "--world",
        "4",
        "--ep",
        "4",
        "--seq-len",
        "64",
        "--memory",
        "1GB",
        "--tflops",
        "1",
    )
    assert (done.status, done.err) == (0, "")
    # Six experts on four ranks: 1, 2, 1, 2 of each of four layers.
    lines = [line.split() for line in done.out.splitlines()]
    one, two = 4 * 3 * 8 * 8, 8 * 3 * 8 * 8
    assert any(line[:2] == ["0,", "2"] and f"{one:,}" in line for line in lines)
    assert any(line[:2] == ["1,", "3"] and f"{two:,}" in line for line in lines)
    assert "4 processes: dp 4, ep 4" in done.out
    assert "has 1.33 times the mean rows" in done.out  # 2 of 6 experts on a rank of 4
    assert "Fits: the largest rank needs" in done.out
    assert "A rough step: computing" in done.out


def test_what_does_not_fit_is_said_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "plan-layout", small(), "--world", "4", "--seq-len", "64", "--memory", "100kB")
    assert (done.status, done.err) == (2, "")
    assert "Does not fit: rank 0 needs" in done.out
    assert "of 100 kB; try --recompute, --fsdp, --batch-size 4, or --search." in done.out
    again = call(
        capsys,
        "plan-layout",
        small(),
        "--world",
        "4",
        "--seq-len",
        "64",
        "--memory",
        "100kB",
        "--recompute",
        "--fsdp",
        "--batch-size",
        "4",
    )
    assert "try --search, or more processes." in again.out


def test_an_impossible_layout_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "plan-layout", small(seq_len=64), "--world", "4", "--tp", "3")
    assert "4 processes cannot form pp=1 stages of tp=3" in one_sentence(done)
    done = call(capsys, "plan-layout", small(seq_len=64), "--world", "8", "--ep", "8")
    assert "2 of them would hold none" in one_sentence(done)
    done = call(capsys, "plan-layout", small(seq_len=64), "--world", "5", "--pp", "5")
    assert "5 pipeline stages" in one_sentence(done)


def test_the_search_lists_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    whole = found(capsys, small(), "--world", "1", "--seq-len", "64", "--batch-size", "4")["ranks"][0]["memory"][
        "total"
    ]
    args = (
        small(),
        "--world",
        "4",
        "--seq-len",
        "64",
        "--batch-size",
        "4",
        "--node",
        "4",
        "--search",
        "--memory",
        f"{whole // 2}",
    )
    result = found(capsys, *args)
    sent = [one["traffic"] for one in result["search"]]
    assert sent == sorted(sent)
    assert all(one["memory"] <= whole // 2 for one in result["search"])
    done = call(capsys, "plan-layout", *args)
    assert "least traffic first" in done.out
    # An impossible layout is said, and what would do is listed.
    done = call(capsys, "plan-layout", *args, "--ep", "3")
    assert done.status == 0
    assert done.out.startswith("ep=3 does not divide")
    none = call(capsys, "plan-layout", small(seq_len=64), "--world", "2", "--search", "--memory", "1kB")
    assert none.status == 2
    assert "No layout tried fits" in none.out


def test_what_stages_cannot_share_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("--set", "model.moe.gating_dropout=0.1", "model.moe.gating_groups=2")
    done = call(capsys, "plan-layout", small(seq_len=64), "--world", "2", "--pp", "2", *changes)
    assert "gating_dropout" in one_sentence(done)


def test_load_skews_rows(capsys: pytest.CaptureFixture[str]) -> None:
    even = found(capsys, small(), "--world", "2", "--ep", "2", "--seq-len", "64")
    skewed = found(capsys, small(), "--world", "2", "--ep", "2", "--seq-len", "64", "--load", "zipf:1.0")
    assert even["imbalance"] == 1
    assert skewed["imbalance"] > 1.2
    rows = [row["expert_rows"] for row in skewed["ranks"]]
    assert sum(rows) == sum(row["expert_rows"] * len(row["ranks"]) for row in even["ranks"])
    assert rows[0] > rows[1]


def test_model_folders_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    mo.save(build_model(SMALL, seed=0), "model")
    result = found(capsys, "model", "--world", "2", "--seq-len", "64")
    assert result["parameters"]["total"] == sum(p.numel() for p in build_model(SMALL, seed=0).parameters())
    assert found(capsys, "small", "--world", "2")["batch_size"] == 16  # the recipe's own


def test_a_config_without_a_vocabulary_takes_the_tokenizer_s(capsys: pytest.CaptureFixture[str]) -> None:
    make_project(Path())
    result = found(capsys, "tiny.json", "--world", "2")
    assert result["parameters"]["dense"] > 300 * 16


def test_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "plan-layout", "--published")
    assert (done.status, done.err) == (0, "")
    for text in ("250 GFLOP [2]", "250.5 GFLOP", "not published", "385 TFLOP/s [2]", "arXiv 2505.09343"):
        assert text in done.out
    result = found(capsys, "--published")
    assert result["world"] == 2048
    assert len(result["figures"]) == 12
    assert sum(len(row["ranks"]) for row in result["ranks"]) == 2048


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "Name a model to lay out"),
        (("mixtral-8x7",), 'no preset, recipe, config file or folder "mixtral-8x7"'),
        (("mixtral-8x7b", "--world", "0"), "--world must be at least 1"),
        (("mixtral-8x7b", "--fsdp", "--zero"), "leave out --zero"),
        (("mixtral-8x7b", "--memory", "much"), '"much" is no size of memory'),
        (("mixtral-8x7b", "--search"), "say which with --memory"),
        (("mixtral-8x7b", "--seq-len", "999999"), "longer than the 32768 tokens"),
        (("mixtral-8x7b", "--batch-size", "0"), "batch_size must be a whole number of at least 1"),
        (("mixtral-8x7b", "--network", "0"), "Rates are above 0"),
        (("mixtral-8x7b", "--set", "parallel.eps=2"), 'Unknown key "eps" in parallel'),
        (("mixtral-8x7b", "--load", "even"), '"even" is no load'),
    ],
)
def test_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str], args: tuple[str, ...], words: str) -> None:
    assert words in one_sentence(call(capsys, "plan-layout", *args))


def test_sizes_of_memory() -> None:
    assert memory_size("80GB") == 80 * 10**9
    assert memory_size("80 GiB") == 80 * 2**30
    assert memory_size("1.5t") == 1.5e12
    assert memory_size("8e10") == 8 * 10**10
    for text in ("", "GB", "-1GB", "80 cows", "0", "1e400"):
        with pytest.raises(ConfigError, match="no size of memory"):
            memory_size(text)


def test_ranks_in_words() -> None:
    assert ranks_in_words([3]) == "3"
    assert ranks_in_words([0, 1, 2, 5]) == "0 to 2, 5"
    assert ranks_in_words(range(0, 64, 2)) == "32 ranks, 0 the first"


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "plan-layout", "--help")
    assert done.status == 0
    assert "moesaic plan-layout --published" in done.out
    assert os.linesep in done.out
