"""What a run does besides steps: its folder, refusals, checkpoints kept, validation, dead experts, sample, trace."""

from __future__ import annotations

import itertools
import json
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.native import load_config, load_model
from moesaic.config import from_dict
from moesaic.data.packing import PackedRows
from moesaic.errors import CheckpointError, ConfigError, MoesaicError
from moesaic.models.config import MoEConfig, RouterConfig
from moesaic.models.decoder import Decoder
from moesaic.plan.plan import RoutingPlan
from moesaic.plan.store import load_trace
from moesaic.train import loop
from moesaic.train.config import TrainConfig
from moesaic.train.evaluate import Evaluation, evaluate, spread
from moesaic.train.log import read_metrics
from moesaic.train.loop import fit_vocabulary, load_run_config, run_training
from moesaic.train.optim import learning_rate
from moesaic.train.step import train_step
from tests.checkpoint.test_atomic import tree
from tests.train.tiny_run import StopAfter, tiny_config, tiny_corpus, train

SHORT = tiny_config(steps=12, eval_every=5, checkpoint_every=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps."""
    folder = tmp_path_factory.mktemp("loop") / "run"
    result = train(replace(SHORT, tensorboard=True, trace_every=6), folder, name="mine")
    assert (result.reason, result.step, result.tokens, result.folder) == ("done", 12, 12 * 4 * 24, folder)
    assert result.tokens_per_s == pytest.approx(result.tokens / result.seconds)
    assert result.evaluation is not None
    assert json.loads(json.dumps(result.record()))["val_loss"] == result.val_loss == result.evaluation.loss
    return folder


def of_kind(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_metrics(folder) if r["kind"] == kind]


def test_the_folder_holds_what_was_promised(run: Path) -> None:
    assert {p.name for p in run.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "sample.txt",
        "tb",
        "trace",
    }
    assert load_run_config(run) == replace(SHORT, tensorboard=True, trace_every=6)
    assert from_dict(TrainConfig, json.loads((run / "config.json").read_text())) == load_run_config(run)
    assert (run / "sample.txt").read_text() == of_kind(run, "sample")[0]["text"] + "\n"
    assert sorted(p.name for p in (run / "trace").iterdir()) == [f"step-{i:08d}.safetensors" for i in (6, 12)]
    assert set(load_trace(run / "trace" / "step-00000006.safetensors")[0]) == {0, 1}


def test_the_first_record_describes_the_run(run: Path) -> None:
    (record,) = of_kind(run, "run")
    assert read_metrics(run)[0] == record
    assert (record["name"], record["model"], record["layers"]) == ("mine", "sparse", [0, 1])
    assert (record["num_experts"], record["routers"], record["domains"]) == ([4, 4], ["topk"], ["code", "prose"])
    attention, expert, norms = 4 * 16 * 16, 3 * 16 * 12, 5 * 16
    shared = 320 * 16 + 2 * (attention + 16 * 4) + norms
    assert record["params_total"] == shared + 2 * 4 * expert
    assert record["params_active"] == shared + 2 * 2 * expert
    assert record["config"]["steps"] == 12


def test_each_step_is_one_record_with_the_scheduled_rate(run: Path) -> None:
    steps = of_kind(run, "step")
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert [r["tokens"] for r in steps] == [96 * i for i in range(1, 13)]
    assert [r["lr"] for r in steps] == [learning_rate(SHORT.optim, i, 12) for i in range(12)]
    assert all(a["time_s"] < b["time_s"] for a, b in itertools.pairwise(steps))
    assert all(r["load"] and sum(r["load"][0]) == 2 * 96 for r in steps[:1])


def test_validation_comes_at_its_steps_at_checkpoints_and_at_the_end(run: Path) -> None:
    found = of_kind(run, "val")
    assert [r["step"] for r in found] == [4, 5, 8, 10, 12]  # every 5th, each checkpoint (every 4th), and the last
    data = PackedRows(tiny_corpus().val, 24)
    again = evaluate(load_model(run / "checkpoints" / "step-00000012"), data, spread(data, 4), 4)
    assert found[-1]["loss"] == pytest.approx(again.loss, rel=1e-6)
    assert found[-1]["domain_load"] == again.domain_load


def test_checkpoints_are_kept_by_age_and_by_merit(run: Path) -> None:
    """Every 4 steps and at the end; the two newest stay, and the best."""
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["best", "latest", "step-00000008", "step-00000012"]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-00000012"
    assert (run / "checkpoints" / "best").read_text().strip() == "step-00000012"
    assert load_config(run / "checkpoints" / "step-00000012") == SHORT.model


def test_an_old_best_outlives_newer_and_worse_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.0, 9.0])  # an equal loss is no better
    monkeypatch.setattr(loop, "evaluate", lambda *_: Evaluation(next(losses), 1))
    config = replace(SHORT, steps=10, eval_every=2, checkpoint_every=2, keep_last=1)
    train(config, tmp_path / "run", stop=StopAfter(7))
    result = train(config, tmp_path / "run", resume=True)  # what was best is remembered across sittings
    assert (result.best_val_loss, result.val_loss) == (2.0, 9.0)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["best", "latest", "step-00000004", "step-00000010"]
    assert (checkpoints / "best").read_text().strip() == "step-00000004"


def test_cadence_zero_means_only_at_the_end(tmp_path: Path) -> None:
    train(replace(SHORT, eval_every=0, checkpoint_every=0, sample_tokens=0), tmp_path / "run")
    assert [r["step"] for r in of_kind(tmp_path / "run", "val")] == [12]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "metrics.jsonl", "checkpoints"}
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["best", "latest", "step-00000012"]


def test_dead_experts_are_those_without_a_token_for_a_window_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 0 never uses experts 2 and 3; layer 1 uses every expert, but expert 0 only at steps 1 and 7."""

    def send(layer: int, step: int, plan: RoutingPlan) -> RoutingPlan:
        used = [0, 1] if layer == 0 else ([0, 1, 2, 3] if step in (1, 7) else [1, 2, 3])
        place_N = torch.arange(plan.num_rows)
        expert_N = torch.tensor(used)[place_N % len(used)]
        return replace(plan, expert_N=expert_N, choice_N=expert_N)

    def forced(model: Decoder, *args: Any, step: int, **more: Any) -> Any:
        for layer, sparse in model.moe_layers().items():
            sparse.edits = (partial(send, layer, step),)
        return train_step(model, *args, step=step, **more)

    monkeypatch.setattr(loop, "train_step", forced)
    config = replace(SHORT, dead_window=4)
    train(config, tmp_path / "run", stop=StopAfter(9))
    train(config, tmp_path / "run", resume=True)
    dead = [r["dead"] for r in of_kind(tmp_path / "run", "step")]
    # Never used: dead from step 4 on. Used at step 1: dead at 5 and 6, alive at 7, dead again from 11 on.
    assert [d[0] for d in dead] == [0, 0, 0] + [2] * 9
    assert [d[1] for d in dead] == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]


def test_a_run_is_not_overwritten(run: Path) -> None:
    before = tree(run)
    with pytest.raises(
        MoesaicError, match="already holds a training run; add --resume to go on with it, or choose another"
    ):
        train(SHORT, run)
    assert tree(run) == before


def test_resuming_a_finished_run_changes_no_record(run: Path) -> None:
    before = [r for r in read_metrics(run) if r["kind"] != "end"]
    result = train(load_run_config(run), run, resume=True)
    assert (result.reason, result.step) == ("done", 12)
    assert [r for r in read_metrics(run) if r["kind"] != "end"] == before
    assert len(of_kind(run, "end")) == 1


def test_resuming_with_other_text_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(SHORT, folder, stop=StopAfter(3))
    before = tree(folder)
    other = replace(SHORT, data=replace(SHORT.data, sources=("elsewhere",)))
    with pytest.raises(CheckpointError, match="was trained on other text than it is resumed with"):
        run_training(other, tiny_corpus("other"), folder, resume=True, show_progress=False)
    assert tree(folder) == before
    assert train(SHORT, folder, resume=True).step == 12


def test_resuming_with_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(SHORT, folder, stop=StopAfter(3))
    before = tree(folder)
    with pytest.raises(CheckpointError):
        train(replace(SHORT, model=replace(SHORT.model, moe=None)), folder, resume=True)
    assert tree(folder) == before


def test_resuming_a_folder_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    said: list[str] = []
    result = train(SHORT, tmp_path / "run", resume=True, say=said.append)
    assert result.step == 12
    assert said[0] == f"{tmp_path / 'run'} has no checkpoint yet, so the run starts from step 0."
    assert len(of_kind(tmp_path / "run", "run")) == 1


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(SHORT, folder, stop=StopAfter(9))
    newest = folder / "checkpoints" / "step-00000009" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train(SHORT, folder, resume=True, say=said.append).step == 12
    assert "Passing over the damaged snapshot step-00000009" in str(caught[0].message)
    assert said[0] == f"Resuming {folder} at step 8."
    whole = tmp_path / "whole"
    train(SHORT, whole)
    assert [r["loss"] for r in of_kind(folder, "step")] == [r["loss"] for r in of_kind(whole, "step")]


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(num_experts=4, router=RouterConfig("topkk")),
        MoEConfig(num_experts=4, k=1, hidden=8),
        MoEConfig(num_experts=4, losses={"none": 1.0}),
    ],
    ids=["router", "k=1", "loss"],
)
def test_a_model_that_cannot_be_leaves_no_folder_behind(moe: MoEConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        train(replace(SHORT, model=replace(SHORT.model, moe=moe)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_output_path_that_is_a_file_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MoesaicError, match="file"):
        train(SHORT, tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    torch.manual_seed(123)  # the caller's state is no input
    losses = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(replace(SHORT, seed=seed), tmp_path / name)
        torch.manual_seed(7)
        losses[name] = [r["loss"] for r in of_kind(tmp_path / name, "step")]
    assert losses["a"] == losses["b"]
    assert set(losses["a"]).isdisjoint(losses["c"])


def test_recomputation_changes_no_figure(tmp_path: Path) -> None:
    for name, recompute in (("a", False), ("b", True)):
        train(replace(SHORT, recompute=recompute), tmp_path / name)
    strip = ("time_s", "tokens_per_s")
    one, two = ([{k: v for k, v in r.items() if k not in strip} for r in of_kind(tmp_path / n, "step")] for n in "ab")
    assert one == two


def test_a_dense_run_has_empty_lists_per_layer(tmp_path: Path) -> None:
    train(replace(SHORT, model=replace(SHORT.model, moe=None)), tmp_path / "run")
    (record,) = of_kind(tmp_path / "run", "run")
    assert (record["model"], record["layers"], record["routers"]) == ("dense", [], [])
    step = of_kind(tmp_path / "run", "step")[0]
    assert all(step[key] == [] for key in ("load", "max_vio", "drop_rate", "dead", "entropy", "margin"))
    assert of_kind(tmp_path / "run", "val")[0]["domain_load"] == {"code": [], "prose": []}


def test_the_vocabulary_is_fitted_or_refused() -> None:
    corpus = tiny_corpus()
    config = replace(SHORT, model=replace(SHORT.model, vocab_size=64))
    assert fit_vocabulary(config, corpus).model.vocab_size == 320
    with pytest.raises(ConfigError, match="model.vocab_size=64 is smaller than the tokenizer's 300 tokens"):
        fit_vocabulary(config, corpus, explicit=True)
    large = replace(config, model=replace(config.model, vocab_size=1000))
    assert fit_vocabulary(large, corpus, explicit=True) is large


def test_a_folder_that_is_no_run_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a training run: it has no config.json"):
        load_run_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="Cannot read .*config.json"):
        load_run_config(tmp_path)
