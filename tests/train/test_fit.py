"""Routers that make tables from the training text: when it is read, resumed runs, refusals; routers of tasks in whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.native import load_model
from moesaic.data.statistics import count_tokens
from moesaic.errors import ConfigError
from moesaic.models import RouterConfig, build_model
from moesaic.routing.hashing import Hash
from moesaic.train.config import TrainConfig
from moesaic.train.fit import fit_routers
from moesaic.train.log import read_metrics
from moesaic.train.loop import run_training
from tests.train.tiny_run import StopAfter, tiny_config, tiny_corpus, train


def config(router: str, options: dict[str, Any] | None = None, k: int = 2, **changes: Any) -> TrainConfig:
    moe = {"router": RouterConfig(router, options or {}), "losses": {}, "k": k}
    return tiny_config(moe=moe, **({"steps": 9, "eval_every": 9, "checkpoint_every": 4} | changes))


def steps(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in r.items() if k not in ("time_s", "tokens_per_s")}
        for r in read_metrics(folder)
        if r["kind"] == "step"
    ]


def tables(model: Any) -> list[torch.Tensor]:
    return [layer.router.table_KV for layer in model.moe_layers().values()]


def test_the_text_is_read_only_if_a_router_asks_and_then_once() -> None:
    view = tiny_corpus().train
    for router, options, expected in [
        ("topk", {}, 0),
        ("hash", {}, 0),
        ("hash", {"kind": "bigram"}, 0),
        ("hash", {"kind": "balanced"}, 1),
        ("hash", {"kind": "clustered"}, 2),
    ]:
        said: list[str] = []
        state = torch.get_rng_state()
        fit_routers(build_model(config(router, options).model, seed=0), view, said.append)
        assert len(said) == expected  # two sparse layers, one reading
        assert torch.equal(torch.get_rng_state(), state)
    assert "Counting the tokens of the training text" in said[0]


def test_a_balanced_table_balances_the_training_text() -> None:
    view = tiny_corpus().train
    model = build_model(config("hash", {"kind": "balanced"}, k=1).model, seed=0)
    counts_V = count_tokens(view, model.config.vocab_size)

    def violation(table_V: torch.Tensor) -> float:
        load_E = torch.zeros(4, dtype=torch.int64).index_add(0, table_V[:-1], counts_V)
        return float(load_E.max() / load_E.double().mean() - 1)

    before = [violation(table[0]) for table in tables(model)]
    fit_routers(model, view, lambda _: None)
    assert max(violation(table[0]) for table in tables(model)) < 0.01
    assert min(before) > 0.02


@pytest.mark.parametrize("kind", ["balanced", "dispersed", "bigram"])
def test_a_resumed_run_keeps_its_tables_and_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    run = config("hash", {"kind": kind})
    said: list[str] = []
    train(run, tmp_path / "whole")
    train(run, tmp_path / "parts", stop=StopAfter(5))
    train(run, tmp_path / "parts", resume=True, say=said.append)
    assert not any("Counting" in sentence for sentence in said)
    assert steps(tmp_path / "parts") == steps(tmp_path / "whole")
    a, b = (load_model(tmp_path / name / "checkpoints" / "step-00000009") for name in ("whole", "parts"))
    assert all(torch.equal(x, y) for x, y in zip(tables(a), tables(b), strict=True))
    assert isinstance(a.moe_layers()[0].router, Hash)


def test_too_few_tasks_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="The text has 2 domains, but num_tasks=1"):
        train(config("task", {"num_tasks": 1}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("router", "options", "k"),
    [("task", {}, 2), ("task", {"normalize": "none", "num_tasks": 2}, 1), ("demix", {}, 4), ("sentence", {}, 2)],
)
def test_tasks_are_the_domains_of_the_text(router: str, options: dict[str, Any], k: int, tmp_path: Path) -> None:
    """They train, write a sample, resume; with DEMix the load of each domain is its expert's alone."""
    run = config(router, options, k=k)
    train(run, tmp_path / "run", stop=StopAfter(3))
    train(run, tmp_path / "run", resume=True)
    found = steps(tmp_path / "run")
    assert found[-1]["lm_loss"] < found[0]["lm_loss"]
    assert (tmp_path / "run" / "sample.txt").exists()
    loads = next(r for r in read_metrics(tmp_path / "run") if r["kind"] == "val")["domain_load"]
    if router == "demix":
        assert [[i for i, n in enumerate(layer) if n] for layer in (loads["code"][0], loads["prose"][0])] == [[0], [1]]


def test_a_text_of_one_domain_trains_too(tmp_path: Path) -> None:
    corpus = tiny_corpus("one domain")
    single = replace(corpus, train=replace(corpus.train, label_D=corpus.train.label_D * 0, labels=("all",)))
    single = replace(single, val=replace(corpus.val, label_D=corpus.val.label_D * 0, labels=("all",)))
    for router, k in (("task", 2), ("demix", 1)):
        result = run_training(config(router, k=k), single, tmp_path / router, show_progress=False)
        assert result.val_loss is not None


def test_a_wrong_vocabulary_size_is_refused() -> None:
    shape = config("hash", {"vocab_size": 7}).model
    with pytest.raises(ConfigError, match="model.moe.router.options.vocab_size=7 is not the model's vocab_size="):
        build_model(shape)
    fitted = config("hash", {"vocab_size": shape.vocab_size}).model
    assert tables(build_model(fitted))[0].shape == (2, shape.vocab_size + 1)
