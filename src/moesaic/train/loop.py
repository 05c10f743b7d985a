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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.atomic import atomic_file
from moesaic.config import to_dict
from moesaic.cost.check_layout import check_layout, in_distribution
from moesaic.data.corpus import Corpus
from moesaic.data.packing import Batch, PackedRows
from moesaic.errors import ConfigError, disk_errors
from moesaic.infer.domains import routers_by_task
from moesaic.infer.generate import generate
from moesaic.models.decoder import Decoder
from moesaic.parallel.moves import ExpertMoves
from moesaic.parallel.start import Started
from moesaic.plan.store import TraceWriter
from moesaic.train.config import TrainConfig
from moesaic.train.evaluate import Evaluation, evaluate, evenly
from moesaic.train.fit import fit_routers
from moesaic.train.keeper import Found, Keeper
from moesaic.train.log import MetricsLog, NoLog, Progress
from moesaic.train.optim import learning_rate, make_optimizer
from moesaic.train.recompute import recompute_activations
from moesaic.train.record import begin_step, ranks_record, run_record, step_record
from moesaic.train.result import RunState, TrainResult
from moesaic.train.resume import check_run
from moesaic.train.step import train_step
from moesaic.train.stop import StopRequest
from moesaic.train.team import Team

__all__ = ["TrainResult", "fit_vocabulary", "run_training"]


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
    here: Started | None = None,
) -> TrainResult:
    """Train to ``config.steps``, or to a clean stop.

    Args:
        folder: the run folder, made if missing.
        name: shown in the progress line and the report.
        resume: go on from the newest whole checkpoint (a folder without one starts anew). What a run is made of may not
            change (see ``train.resume``); other changes are said, and the log then holds one more "run" record.
        stop: asked after every step; Ctrl-C and SIGTERM set it while ``StopRequest`` listens. A stop asked of one process is
            one of all.
        here: this process among those of the run (``parallel.start``), which all call this alike; None is a run of one.

    Raises ``MoesaicError`` in words; the newest checkpoint then stays as it was.
    """
    return _Run(config, corpus, Path(folder), name, resume, say, show_progress, stop or StopRequest(), here).go()


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
        here: Started | None,
    ) -> None:
        self.config, self.corpus, self.folder, self.name, self.stop = config, corpus, folder, name, stop
        world = 1 if here is None else here.world
        check_layout(config.model, config.parallel, world, batch_size=config.batch_size, accumulate=config.accumulate)
        self.team = Team(here, config.parallel, say or (lambda _: None))
        self.show_progress = show_progress and self.team.first
        self.say, self.device = self.team.say, self.team.device
        for sentence in in_distribution(config.model, self.team.layout):
            self.say(f"Equal to one process in distribution only: {sentence}")
        self.feed = corpus.feed(config.seq_len, config.batch_size, config.accumulate, config.seed)
        self.val_rows = PackedRows(corpus.val, config.seq_len)
        self.val_indices = evenly(self.val_rows, config.eval_rows)
        self.state = RunState()
        self.evaluation: Evaluation | None = None
        self.resumed_at: int | None = None
        self.keeper = Keeper(folder, config, corpus, self.team)
        found = self.keeper.find(resume)
        changes = self.team.from_first(lambda: check_run(config, folder), "changes") if found is not None else []
        self.model = self._build(found)
        if found is not None:
            self._restore(found)
            if self.finished_before:
                return
        if changes:
            self.say(f"Changed from here on: {', '.join(changes)}.")
        # Last, so that a refused run leaves nothing behind and a refused resume the config it was started with.
        self.team.from_first(self._begin, "the run folder")

    # ---- before the first step ---------------------------------------------------------------------------------

    def _build(self, found: Found | None) -> Decoder:
        """The model, or the part of it that is here, and its optimiser."""
        torch.manual_seed(self.config.seed)
        recompute = recompute_activations if self.config.recompute else None
        placements = None if found is None else self.keeper.placements(found)
        model, self.spread = self.team.build(self.config.model, recompute, placements)
        if self.config.dtype == "bf16":
            model.compute_dtype = torch.bfloat16
        if found is None:
            # Together, because stages without a sparse layer have nothing to find wrong.
            self.team.together(lambda: fit_routers(model, self.corpus.train, self.say), "the routers' tables")
        self.described = run_record(self.config, self.folder, self.name, self.corpus.labels, self.team)
        self.optimizer = make_optimizer(model, self.config.optim)
        self.moves = ExpertMoves(self.spread)
        # Noise drawn while training must not depend on how many numbers initialisation used.
        self.team.seed(self.config.seed + 1)
        return model

    def _begin(self) -> None:
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        atomic_file(self.folder / "config.json", json.dumps(to_dict(self.config), indent=2) + "\n")

    @property
    def finished_before(self) -> bool:
        """Whether nothing was left to train when this sitting began."""
        return self.resumed_at == self.config.steps

    def _restore(self, found: Found) -> None:
        saved = self.keeper.restore(found, self.model, self.optimizer, self.spread)
        self.feed.load_state_dict(saved["sampler"])
        self.moves.load_state_dict(saved)
        self.state = RunState(step=saved["step"], **saved["run"])
        self.resumed_at = self.state.step
        if self.state.step > self.config.steps:
            raise ConfigError(
                f"steps={self.config.steps} is less than the {self.state.step} steps {self.folder} has trained already; "
                "give at least as many, or start a new run."
            )
        self.say(f"Resuming {self.folder} at step {self.state.step}.")

    # ---- the run -----------------------------------------------------------------------------------------------

    def go(self) -> TrainResult:
        """Train; returns how it ended."""
        config, state, team = self.config, self.state, self.team
        self.log: MetricsLog | NoLog = self._open_log()
        progress = Progress(config.steps, state.step, label=self.name) if self.show_progress else None
        trace = TraceWriter(team.own_folder(self.folder / "trace"), config.trace_every) if config.trace_every else None
        agreement = team.agreement(lambda: self.stop.requested)
        reason = "done"
        try:
            if self.log.config != to_dict(config) and not self.finished_before:
                self.log.write(self.described)
            while state.step < config.steps:
                begin_step(team)
                started = time.perf_counter()
                batches = self._batches()
                lr = learning_rate(config.optim, state.step, config.steps)
                reading, plans = train_step(
                    self.model,
                    self.optimizer,
                    batches,
                    lr=lr,
                    clip=config.optim.clip,
                    step=state.step + 1,
                    spread=self.spread,
                    agreement=agreement,
                )
                state.step += 1
                self.keeper.check()
                loads = {layer: mine.load_E for layer, mine in reading.layers.items()}
                moved = self.moves.after_step(self.optimizer, state.step, loads)
                seconds = time.perf_counter() - started
                record = step_record(config, state, reading, lr, seconds)
                record |= moved | ranks_record(team, self.spread, seconds)
                self.log.write(record)
                if trace is not None:
                    trace.add(state.step, plans)
                if progress is not None:
                    progress.update(record)
                last = state.step == config.steps
                stopping = agreement.stopping
                saving = last or _due(config.checkpoint_every, state.step)
                # Every regular checkpoint is validated, or the best one could not be told among them.
                if saving or _due(config.eval_every, state.step):
                    self._validate()
                if saving or stopping:
                    self._save(validated=saving or _due(config.eval_every, state.step), wait=last or stopping)
                if stopping and not last:
                    reason = "interrupted"
                    break
            if reason == "done" and self.log.sampled_at != state.step:
                self._sample()
            self.log.write({"kind": "end", "step": state.step, "reason": reason})
        finally:
            if progress is not None:
                progress.close()
            self.log.close()
            self.feed.close()
            self.keeper.close()
        if reason == "done" and self.evaluation is None:  # resumed after its last step: measured, not logged again
            self.evaluation = self._evaluate()
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

    def _open_log(self) -> MetricsLog | NoLog:
        opened: list[MetricsLog] = []

        def open_it() -> list[Any]:
            opened.append(MetricsLog(self.folder, self.resumed_at, tensorboard=self.config.tensorboard, say=self.say))
            return [opened[0].config, opened[0].sampled_at]

        config, sampled_at = self.team.from_first(open_it, "the log")
        return opened[0] if opened else NoLog(config, sampled_at)

    def _batches(self) -> list[Batch]:
        """This process's share of the step's micro-batches on its device."""
        return [batch.to(self.device) for batch in self.feed.next_step(self.team.part, self.team.parts)]

    def _evaluate(self) -> Evaluation:
        return evaluate(self.model, self.val_rows, self.val_indices, self.config.batch_size, spread=self.spread)

    def _validate(self) -> None:
        state = self.state
        self.evaluation = self._evaluate()
        loss = self.evaluation.loss
        where = {"step": state.step, "tokens": state.tokens, "time_s": state.seconds}
        self.log.write({"kind": "val", **where, **self.evaluation.record()})
        state.val_loss = loss
        state.best_val_loss = loss if state.best_val_loss is None else min(loss, state.best_val_loss)

    def _save(self, validated: bool, wait: bool) -> None:
        """Write a checkpoint; it is the best one if it was validated and beats every one saved before."""
        state, loss = self.state, self.state.val_loss
        best = validated and loss is not None and (state.best_saved_loss is None or loss < state.best_saved_loss)
        if best:
            state.best_saved_loss = loss
        run = {name: getattr(state, name) for name in state.__dataclass_fields__ if name != "step"}
        saved = {
            "corpus": self.corpus.fingerprint,
            "sampler": self.feed.state_dict(self.team.all_values(self.feed.progress(), "how far the text was read")),
            "run": run,
            **self.moves.state_dict(),
        }
        self.keeper.save(state.step, self.model, self.optimizer, self.spread, saved, is_best=best, wait=wait)

    def _sample(self) -> None:
        if not self.config.sample_tokens:
            return
        if self.team.layout.pp > 1:
            self.say("No sample is written: a pipeline's stages hold no whole model to generate with.")
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
        self.team.from_first(lambda: atomic_file(self.folder / "sample.txt", text + "\n"), "the sample")
        self.log.write({"kind": "sample", "step": self.state.step, "prompt": "", "text": text})

    def _asks_for_tasks(self) -> bool:
        moe = self.config.model.moe
        rules = moe.rules if moe is not None else None
        return bool(routers_by_task(self.model)) or (rules is not None and "task" in rules.fields)


def _due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0
