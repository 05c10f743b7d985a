"""The training run: steps, validation, checkpoints, log, resume, clean stop.

>>> result = run_training(config, corpus, "runs/first")          # a new run
>>> result = run_training(config, corpus, "runs/first", resume=True)

Everything a step depends on is in the last checkpoint (weights, optimiser, random state, data position, selection biases), so a
run killed at any moment and resumed gives the losses of an uninterrupted one to the last bit on the same machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.atomic import atomic_file
from moesaic.config import to_dict
from moesaic.cost.count import count_parameters
from moesaic.data.corpus import Corpus
from moesaic.data.packing import Batch, PackedRows
from moesaic.errors import CheckpointError, ConfigError, MoesaicError, disk_errors
from moesaic.infer.domains import routers_by_task
from moesaic.infer.generate import generate
from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder
from moesaic.plan.read import num_logged
from moesaic.plan.store import TraceWriter
from moesaic.train.config import TrainConfig
from moesaic.train.evaluate import Evaluation, evaluate, spread
from moesaic.train.fit import fit_routers
from moesaic.train.log import MetricsLog, Progress
from moesaic.train.optim import learning_rate, make_optimizer
from moesaic.train.recompute import recompute_activations
from moesaic.train.resume import check_run
from moesaic.train.snapshot import latest_snapshot, restore_snapshot, save_snapshot
from moesaic.train.step import StepReading, train_step
from moesaic.train.stop import StopRequest


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        folder: the run folder. reason: "done" or "interrupted".
        step, tokens, seconds: reached in all, earlier sittings included; seconds of steps alone, without validation.
        val_loss, best_val_loss: last and best validation loss in nats per token; None if never measured.
        tokens_per_s: mean over these.
        evaluation: the last validation, or None.
    """

    folder: Path
    reason: str
    step: int
    tokens: int
    seconds: float
    val_loss: float | None
    best_val_loss: float | None
    tokens_per_s: float
    evaluation: Evaluation | None

    def record(self) -> dict[str, Any]:
        """Plain JSON data."""
        values = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("folder", "evaluation")
        }
        return {"folder": str(self.folder), **values}


@dataclass
class _State:
    """What a run carries from step to step besides model and optimiser; all of it is in every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # in steps: validation and checkpoints left out, so that sparse and dense compare
    best_val_loss: float | None = None
    best_saved_loss: float | None = None
    val_loss: float | None = None
    last_used: dict[str, list[int]] | None = None


def fit_vocabulary(config: TrainConfig, corpus: Corpus, explicit: bool = False) -> TrainConfig:
    """The config with the vocabulary the tokenizer needs. An ``explicit`` smaller one is refused."""
    if explicit:
        if config.model.vocab_size < corpus.tokenizer.get_vocab_size():
            raise ConfigError(
                f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's "
                f"{corpus.tokenizer.get_vocab_size()} tokens; leave it out to have it fitted."
            )
        return config
    return replace(config, model=replace(config.model, vocab_size=corpus.vocab_size))


def run_training(
    config: TrainConfig,
    corpus: Corpus,
    folder: str | Path,
    *,
    name: str = "",
    resume: bool = False,
    say: Callable[[str], None] | None = None,
    show_progress: bool = True,
    stop: StopRequest | None = None,
) -> TrainResult:
    """Train to ``config.steps``, or to a clean stop.

    Args:
        folder: the run folder, made if missing.
        name: shown in the progress line and the report.
        resume: go on from the newest whole checkpoint (a folder without one starts anew). What a run is made of may not
            change (see ``train.resume``); other changes are said, and the log then holds one more "run" record.
        stop: asked after every step; Ctrl-C and SIGTERM set it while ``StopRequest`` listens.

    Raises ``MoesaicError`` in words; the newest checkpoint then stays as it was.
    """
    return _Run(config, corpus, Path(folder), name, resume, say, show_progress, stop or StopRequest()).go()


class _Run:
    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        folder: Path,
        name: str,
        resume: bool,
        say: Callable[[str], None] | None,
        show_progress: bool,
        stop: StopRequest,
    ) -> None:
        self.config, self.corpus, self.folder, self.name, self.stop = config, corpus, folder, name, stop
        self.show_progress = show_progress
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.feed = corpus.feed(config.seq_len, config.batch_size, config.accumulate, config.seed)
        self.val_rows = PackedRows(corpus.val, config.seq_len)
        self.val_indices = spread(self.val_rows, config.eval_rows)
        self.state = _State()
        self.evaluation: Evaluation | None = None
        self.say = say or (lambda _: None)
        if not resume and (folder / "checkpoints").exists():
            raise MoesaicError(
                f"{folder} already holds a training run; add --resume to go on with it, or choose another --out."
            )
        found = self._found() if resume else None
        changes = check_run(config, folder) if found is not None else []
        self.model = self._build()
        self.optimizer = make_optimizer(self.model, config.optim)
        self.resumed_at: int | None = None
        if found is not None:
            self._restore(found)
            if self.finished_before:
                return
        else:
            fit_routers(self.model, corpus.train, self.say)
        if changes:
            self.say(f"Changed from here on: {', '.join(changes)}.")
        # Last, so that a refused run leaves nothing behind and a refused resume the config it was started with.
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        atomic_file(folder / "config.json", json.dumps(to_dict(config), indent=2) + "\n")

    # ---- before the first step ---------------------------------------------------------------------------------

    def _build(self) -> Decoder:
        torch.manual_seed(self.config.seed)
        model = build_model(self.config.model).to(self.device)
        if self.config.dtype == "bf16":
            model.compute_dtype = torch.bfloat16
        if self.config.recompute:
            recompute_activations(model)
        # Noise drawn while training must not depend on how many numbers initialisation used.
        torch.manual_seed(self.config.seed + 1)
        return model

    @property
    def finished_before(self) -> bool:
        """Whether nothing was left to train when this sitting began."""
        return self.resumed_at == self.config.steps

    def _found(self) -> Path | None:
        found = latest_snapshot(self.folder)
        if found is None and any((self.folder / "checkpoints").glob("step-*")):
            raise CheckpointError(
                f"Every checkpoint in {self.folder / 'checkpoints'} is damaged; restore one from a copy, or start a new run."
            )
        if found is None:
            self.say(f"{self.folder} has no checkpoint yet, so the run starts from step 0.")
        return found

    def _restore(self, found: Path) -> None:
        saved = restore_snapshot(found, self.model, self.optimizer)
        if saved["corpus"] != self.corpus.fingerprint:
            raise CheckpointError(
                f"{self.folder} was trained on other text than it is resumed with: the files, their options or the tokenizer "
                "changed. Restore them, or start a new run."
            )
        self.feed.load_state_dict(saved["sampler"])
        self.state = _State(step=saved["step"], **saved["run"])
        self.resumed_at = self.state.step
        if self.state.step > self.config.steps:
            raise ConfigError(
                f"steps={self.config.steps} is less than the {self.state.step} steps {self.folder} has trained already; "
                "give at least as many, or start a new run."
            )
        self.say(f"Resuming {self.folder} at step {self.state.step}.")

    def _run_record(self) -> dict[str, Any]:
        sparse = self.model.moe_layers()
        counts = count_parameters(self.model)
        return {
            "kind": "run",
            "time": time.time(),
            "name": self.name or self.folder.name,
            "config": to_dict(self.config),
            "params_total": counts.total,
            "params_active": counts.active,
            "layers": list(sparse),
            "num_experts": [num_logged(layer.router.num_experts) for layer in sparse.values()],
            "routers": sorted({_router_name(self.config.model)} if sparse else set()),
            "domains": list(self.corpus.labels),
            "model": "sparse" if sparse else "dense",
            "dead_window": self.config.dead_window,
        }

    # ---- the run -----------------------------------------------------------------------------------------------

    def go(self) -> TrainResult:
        """Train; returns how it ended."""
        config, state = self.config, self.state
        log = MetricsLog(self.folder, self.resumed_at, tensorboard=config.tensorboard, say=self.say)
        progress = Progress(config.steps, state.step, label=self.name) if self.show_progress else None
        trace = TraceWriter(self.folder / "trace", config.trace_every) if config.trace_every else None
        reason = "done"
        try:
            if log.config != to_dict(config) and not self.finished_before:
                log.write(self._run_record())
            while state.step < config.steps:
                started = time.perf_counter()
                batches = self._batches()
                lr = learning_rate(config.optim, state.step, config.steps)
                reading, plans = train_step(
                    self.model, self.optimizer, batches, lr=lr, clip=config.optim.clip, step=state.step + 1
                )
                state.step += 1
                record = self._step_record(reading, lr, time.perf_counter() - started)
                log.write(record)
                if trace is not None:
                    trace.add(state.step, plans)
                if progress is not None:
                    progress.update(record)
                last = state.step == config.steps
                stopping = self.stop.requested
                saving = last or _due(config.checkpoint_every, state.step)
                # Every regular checkpoint is validated, or the best one could not be told among them.
                if saving or _due(config.eval_every, state.step):
                    self._validate(log)
                if saving or stopping:
                    self._save(validated=saving or _due(config.eval_every, state.step))
                if stopping and not last:
                    reason = "interrupted"
                    break
            if reason == "done" and log.sampled_at != state.step:
                self._sample(log)
            log.write({"kind": "end", "step": state.step, "reason": reason})
        finally:
            if progress is not None:
                progress.close()
            log.close()
            self.feed.close()
        if reason == "done" and self.evaluation is None:  # resumed after its last step: measured, not logged again
            self.evaluation = evaluate(self.model, self.val_rows, self.val_indices, config.batch_size)
        rate = state.tokens / state.seconds if state.seconds else 0.0
        return TrainResult(
            self.folder,
            reason,
            state.step,
            state.tokens,
            state.seconds,
            state.val_loss,
            state.best_val_loss,
            rate,
            self.evaluation,
        )

    def _batches(self) -> list[Batch]:
        """The step's micro-batches on the run's device."""
        return [batch.to(self.device) for batch in self.feed.next_step(part=0, parts=1)]

    def _step_record(self, reading: StepReading, lr: float, seconds: float) -> dict[str, Any]:
        state = self.state
        positions = self.config.batch_size * self.config.accumulate * self.config.seq_len
        state.tokens += positions
        state.seconds += seconds
        return {
            "kind": "step",
            "step": state.step,
            "tokens": state.tokens,
            "time_s": state.seconds,
            "loss": reading.loss,
            "lm_loss": reading.lm_loss,
            "lr": lr,
            "grad_norm": reading.grad_norm,
            "tokens_per_s": positions / seconds,
            "losses": reading.losses,
            "dead": self._dead(reading),
            **reading.record(),
        }

    def _dead(self, reading: StepReading) -> list[int]:
        """Experts of each layer that no token chose in the last ``dead_window`` steps."""
        used = self.state.last_used or {}
        dead = []
        for layer, mine in reading.layers.items():
            last_E: Tensor = torch.tensor(used.get(str(layer), [0] * len(mine.load_E)))
            last_E = torch.where(mine.load_E.cpu() > 0, self.state.step, last_E)
            used[str(layer)] = last_E.tolist()
            dead.append(int((self.state.step - last_E >= self.config.dead_window).sum()))
        self.state.last_used = used
        return dead

    def _validate(self, log: MetricsLog) -> None:
        state = self.state
        self.evaluation = evaluate(self.model, self.val_rows, self.val_indices, self.config.batch_size)
        loss = self.evaluation.loss
        where = {"step": state.step, "tokens": state.tokens, "time_s": state.seconds}
        log.write({"kind": "val", **where, **self.evaluation.record()})
        state.val_loss = loss
        state.best_val_loss = loss if state.best_val_loss is None else min(loss, state.best_val_loss)

    def _save(self, validated: bool) -> None:
        """Write a checkpoint; it is the best one if it was validated and beats every one saved before."""
        state, loss = self.state, self.state.val_loss
        best = validated and loss is not None and (state.best_saved_loss is None or loss < state.best_saved_loss)
        if best:
            state.best_saved_loss = loss
        run = {name: getattr(state, name) for name in state.__dataclass_fields__ if name != "step"}
        saved = {"corpus": self.corpus.fingerprint, "sampler": self.feed.state_dict(), "run": run}
        save_snapshot(
            self.folder,
            state.step,
            self.model,
            self.optimizer,
            saved,
            self.corpus.tokenizer,
            keep_last=self.config.keep_last,
            is_best=best,
        )

    def _sample(self, log: MetricsLog) -> None:
        if not self.config.sample_tokens:
            return
        room = min(self.config.sample_tokens, self.config.model.max_seq_len - 1)
        text = generate(
            self.model,
            "",
            self.corpus.tokenizer,
            max_new_tokens=room,
            temperature=0.8,
            top_p=0.95,
            seed=self.config.seed,
            task=0 if self._asks_for_tasks() else None,  # of the first domain
        )
        # The file first: killed between the two, a resumed run finds no record and writes both again.
        atomic_file(self.folder / "sample.txt", text + "\n")
        log.write({"kind": "sample", "step": self.state.step, "prompt": "", "text": text})

    def _asks_for_tasks(self) -> bool:
        moe = self.config.model.moe
        rules = moe.rules if moe is not None else None
        return bool(routers_by_task(self.model)) or (rules is not None and "task" in rules.fields)


def _due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def _router_name(model: ModelConfig) -> str:
    assert model.moe is not None
    return model.moe.router.name
