"""Hugging Face's Trainer on a moesaic model: it learns, saves what loads, resumes, and routers learn of their load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import moesaic as mo
from moesaic.integrations.hf_model import MoesaicForCausalLM
from moesaic.integrations.hf_trainer import MoesaicCallback
from moesaic.integrations.hook import install
from moesaic.train.reading import StepReading
from tests.integrations.folders import VOCAB, loud_model, saved_folder, sparse_config

install()

DATA = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(VOCAB, (16, 12), generator=torch.Generator().manual_seed(3))
]


def trainer_of(model: Any, folder: Path, **changes: Any) -> Trainer:
    more = {name: changes.pop(name) for name in ("callbacks", "processing_class", "eval_dataset") if name in changes}
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 8,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": 1,
            **changes,
        },
    )
    return Trainer(model=model, args=arguments, train_dataset=DATA, **more)


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_training_saving_and_going_on(tmp_path: Path) -> None:
    _, folder = saved_folder(tmp_path / "m", sparse_config(losses={"switch": 0.01}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    out = tmp_path / "out"
    settings = {"save_strategy": "steps", "save_steps": 4, "processing_class": tokenizer}
    whole = trainer_of(AutoModelForCausalLM.from_pretrained(folder), out, **settings)
    whole.train()
    losses = losses_of(whole)
    assert losses[-1] < losses[0] - 0.3

    # Every checkpoint, with the Trainer's pickles beside it, is a model directory for both worlds.
    last = AutoModelForCausalLM.from_pretrained(out / "checkpoint-8")
    for name, tensor in mo.load(out / "checkpoint-8").state_dict().items():
        assert torch.equal(tensor, whole.model.model.state_dict()[name])
        assert torch.equal(tensor, last.model.state_dict()[name])
    whole.save_model(str(out))  # beside the checkpoints
    assert mo.load(out).tokenizer is not None
    assert AutoTokenizer.from_pretrained(out).eos_token == tokenizer.eos_token

    resumed = trainer_of(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_small_batches_train_as_one_large_one(tmp_path: Path) -> None:
    """Losses per token; a balancing loss is of each batch, so none here."""
    results = []
    for rows, accumulated in ((4, 1), (2, 2), (1, 4)):
        model = MoesaicForCausalLM.of(loud_model(sparse_config(losses={})))
        trainer = trainer_of(
            model, tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulated, max_steps=3
        )
        trainer.train()
        results.append((losses_of(trainer), model.model.embedding.weight))
    for losses, weight in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-4)
        torch.testing.assert_close(weight, results[0][1], rtol=1e-3, atol=1e-4)


def test_recomputation_evaluation_and_precision(tmp_path: Path) -> None:
    runs = []
    for recompute in (False, True):
        model = MoesaicForCausalLM.of(loud_model())
        trainer = trainer_of(model, tmp_path, activation_checkpointing=recompute, max_steps=2, eval_dataset=DATA[:4])
        trainer.train()
        assert model.is_activation_checkpointing == recompute
        runs.append((losses_of(trainer), trainer.evaluate()["eval_loss"]))
        predicted = trainer.predict(DATA[:4])
        assert predicted.predictions.shape == (4, 12, VOCAB)
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-5)


def test_routers_learn_of_their_load_through_the_callback(tmp_path: Path) -> None:
    options = {"score": "sigmoid", "balance_bias": True, "bias_rate": 0.01}
    biases = {}
    for name, callbacks in {"with": [MoesaicCallback()], "without": []}.items():
        model = MoesaicForCausalLM.of(loud_model(sparse_config(options=options, losses={})))
        trainer_of(model, tmp_path, callbacks=callbacks, max_steps=3, gradient_accumulation_steps=2).train()
        biases[name] = model.model.moe_layers()[1].router.choice_bias_E
        assert not model._forward_hooks
        assert model.training_step is None
    assert not biases["without"].any()
    assert biases["with"].abs().max() > 0.005  # three steps of 0.01 up or down


def test_the_callback_hands_on_what_a_training_step_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load, tokens and loss of both batches of a step reach the routers as one reading."""
    seen: list[StepReading] = []
    monkeypatch.setattr("moesaic.integrations.hf_trainer.after_step", lambda model, reading: seen.append(reading))
    model = MoesaicForCausalLM.of(loud_model())
    trainer = trainer_of(model, tmp_path, callbacks=[MoesaicCallback()], max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    assert len(seen) == 2
    for reading in seen:
        assert sorted(reading.layers) == [1, 2]
        for layer in reading.layers.values():
            assert layer.tokens == 2 * 4 * 12
            assert int(layer.load_E.sum()) == 2 * 4 * 12 * 2  # k = 2
        assert 2 < reading.lm_loss < 12
