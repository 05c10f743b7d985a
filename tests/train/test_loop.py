"""What a run does besides steps: its folder, refusals, checkpoints kept, validation, dead experts, sample, trace."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.native import load_config, load_model
from moesaic.config import from_dict, to_dict
from moesaic.data.packing import PackedRows
from moesaic.errors import CheckpointError, ConfigError, MoesaicError
from moesaic.layout import ParallelConfig
from moesaic.models.config import MoEConfig, RouterConfig
from moesaic.models.decoder import Decoder
from moesaic.plan.capacity import CapacityRule
from moesaic.plan.plan import RoutingPlan
from moesaic.plan.store import load_trace
from moesaic.report.runs import read_run
from moesaic.train import loop
from moesaic.train.config import TrainConfig
from moesaic.train.evaluate import Evaluation, evaluate, evenly
from moesaic.train.log import read_metrics
from moesaic.train.loop import fit_vocabulary, run_training
from moesaic.train.optim import learning_rate
from moesaic.train.resume import load_run_config, saved_tokenizer
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
    again = evaluate(load_model(run / "checkpoints" / "step-00000012"), data, evenly(data, 4), 4)
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
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: Evaluation(next(losses), 1))
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
    before, config = read_metrics(run), (run / "config.json").read_text()
    for again in (load_run_config(run), replace(load_run_config(run), dead_window=9)):
        result = train(again, run, resume=True)
        assert (result.reason, result.step) == ("done", 12)
        assert result.evaluation is not None
        assert read_metrics(run) == before
        assert (run / "config.json").read_text() == config


def test_a_run_killed_around_its_sample_gets_one(tmp_path: Path) -> None:
    whole = tmp_path / "run"
    train(SHORT, whole)
    before = read_metrics(whole)
    log = whole / "metrics.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-2]))  # neither sample nor end was logged
    train(SHORT, whole, resume=True)
    assert read_metrics(whole) == before
    # Extended, and killed before the second sample: the file of the first does not stand for it.
    train(replace(SHORT, steps=14), whole, resume=True)
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-2]))
    train(replace(SHORT, steps=14), whole, resume=True)
    assert [r["step"] for r in of_kind(whole, "sample")] == [12, 14]


FIXED = {
    "seed": 7,
    "seq_len": 12,
    "batch_size": 2,
    "accumulate": 2,
    "dtype": "bf16",
    "data": replace(SHORT.data, val_fraction=0.3),
    "model": replace(SHORT.model, moe=None),
}
FREE = {
    "steps": 14,
    "optim": replace(SHORT.optim, lr=1e-4),
    "eval_every": 3,
    "eval_rows": 2,
    "checkpoint_every": 6,
    "keep_last": 1,
    "dead_window": 2,
    "sample_tokens": 4,
    "tensorboard": True,
    "trace_every": 5,
    "recompute": True,
    "parallel": ParallelConfig(chunks=2),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(SHORT, folder, stop=StopAfter(3))
    return folder


def test_every_setting_is_fixed_or_free() -> None:
    assert {*FIXED, *FREE} == set(SHORT.__dataclass_fields__)


@pytest.mark.parametrize("name", FIXED)
def test_what_a_run_is_made_of_cannot_change(name: str, stopped: Path) -> None:
    before = tree(stopped)
    with pytest.raises(ConfigError, match=rf"^{name}[.\w]* cannot change from .* to .*; start a new run"):
        train(replace(SHORT, **{name: FIXED[name]}), stopped, resume=True)
    assert tree(stopped) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"losses": {"switch": 0.5}}, "model.moe.losses.switch cannot change from 0.01 to 0.5"),
        ({"capacity": CapacityRule(1.5)}, "model.moe.capacity cannot change from unset to "),
    ],
)
def test_losses_and_capacity_are_no_other_architecture(change: dict[str, Any], said: str, stopped: Path) -> None:
    assert SHORT.model.moe is not None
    model = replace(SHORT.model, moe=replace(SHORT.model.moe, **change))
    with pytest.raises(ConfigError, match=said):
        train(replace(SHORT, model=model), stopped, resume=True)


def test_fewer_steps_than_trained_are_refused(stopped: Path) -> None:
    before = tree(stopped)
    with pytest.raises(ConfigError, match="steps=2 is less than the 3 steps"):
        train(replace(SHORT, steps=2), stopped, resume=True)
    assert tree(stopped) == before


def test_a_changed_resume_is_said_and_recorded(stopped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    said: list[str] = []
    changed = replace(SHORT, **FREE, data=replace(SHORT.data, cache_dir="elsewhere"))
    train(changed, folder, resume=True, say=said.append, stop=StopAfter(7))
    (sentence,) = [s for s in said if s.startswith("Changed from here on: ")]
    for words in ("steps from 12 to 14", "optim.lr from ", "eval_every from 5 to 3", "recompute from false to true"):
        assert words in sentence
    assert load_run_config(folder) == changed
    train(changed, folder, resume=True, say=said.append)
    assert len([s for s in said if s.startswith("Changed")]) == 1
    records = of_kind(folder, "run")
    assert [r["config"]["steps"] for r in records] == [12, 14]
    assert [r["step"] for r in of_kind(folder, "step")] == list(range(1, 15))
    page = read_run(folder)
    assert page.config == to_dict(changed)
    assert (list(page.step), page.end_reason) == (list(range(1, 15)), "done")


def test_the_tokenizer_of_the_last_checkpoint(stopped: Path, tmp_path: Path) -> None:
    found = saved_tokenizer(stopped)
    assert found is not None
    assert found.to_str() == tiny_corpus().tokenizer.to_str()
    assert saved_tokenizer(tmp_path) is None


def test_only_the_bytes_of_the_tokenizer_are_read_for_it(stopped: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    (newest,) = (folder / "checkpoints").glob("step-*")

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)

    flip(newest / "model.safetensors")
    assert saved_tokenizer(folder) is not None
    flip(newest / "tokenizer.json")
    assert saved_tokenizer(folder) is None


def test_resuming_with_other_text_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(SHORT, folder, stop=StopAfter(3))
    before = tree(folder)
    with pytest.raises(CheckpointError, match="was trained on other text than it is resumed with"):
        run_training(SHORT, tiny_corpus("other"), folder, resume=True, show_progress=False)
    assert tree(folder) == before
    assert train(SHORT, folder, resume=True).step == 12


def test_resuming_with_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(SHORT, folder, stop=StopAfter(3))
    before = tree(folder)
    (folder / "config.json").unlink()  # nothing to compare with but the checkpoint itself
    before.pop("config.json")
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
