"""Time training steps and decoded tokens of a model and its dense twin, in turns, plain and with every part traced.

In each round every model takes one plain step and one traced step; who goes first changes from round to round, so that a
machine that slows down slows down all of them. One round before the first warms up and is thrown away. Every step sees new
tokens, as in training: what is prepared once per load must be prepared again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from moesaic.cost.speed import matmul_gflops, read_gb_per_s
from moesaic.data.packing import Batch
from moesaic.infer.domains import routers_by_task
from moesaic.infer.sampling import SamplingConfig
from moesaic.infer.token_loop import generate_ids
from moesaic.models.decoder import Decoder
from moesaic.ops import phases
from moesaic.profile.clock import Clock, Lap
from moesaic.profile.trace import OTHER, SAMPLING, traced
from moesaic.train.optim import OptimConfig, make_optimizer
from moesaic.train.step import train_step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """What is timed.

    Attributes:
        batch, seq, accumulate: rows and positions of a micro-batch, micro-batches of a step.
        prompt, new_tokens: of one decoded stream.
        rounds: how often everything is timed; dtype: of activations in training, of everything in decoding.
        seed: of the random tokens.
    """

    batch: int
    seq: int
    prompt: int
    new_tokens: int
    accumulate: int = 1
    rounds: int = 5
    dtype: str = "fp32"
    device: str = "cpu"
    seed: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass
class Times:
    """One model's: seconds of plain steps or tokens by round, and laps of traced ones."""

    plain: list[float] = field(default_factory=list)
    laps: list[Lap] = field(default_factory=list)
    rows: list[list[float]] = field(default_factory=list)  # by step: rows per token of each sparse layer


class Machine:
    """The best arithmetic and reads seen so far. Measured again in every round: other work only ever makes them slower."""

    def __init__(self, work: Work) -> None:
        self.dtype, self.device = DTYPES[work.dtype], work.device
        self.gflops = self.read_gb_per_s = 0.0
        self.measure()

    def measure(self) -> None:
        """About a third of a second."""
        self.gflops = max(self.gflops, matmul_gflops(self.dtype, device=self.device))
        self.read_gb_per_s = max(self.read_gb_per_s, read_gb_per_s(device=self.device))


def waiter(device: str) -> Callable[[], None]:
    """What makes the host wait for a device."""
    if device.startswith("cuda"):
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def measure_training(models: Mapping[str, Decoder], work: Work, machine: Machine, say: Say) -> dict[str, Times]:
    """Seconds of whole training steps (losses, backward, clipping, AdamW) by model. Weights stay: the learning rate is 0."""
    optimizers = {name: make_optimizer(model, work.optim) for name, model in models.items()}
    generator = torch.Generator().manual_seed(work.seed)
    wait = waiter(work.device)

    def step(name: str, clock: Clock | None) -> tuple[float, Lap | None, list[float]]:
        batches = [_batch(models[name], work, generator) for _ in range(work.accumulate)]
        wait()
        start = time.perf_counter()
        if clock is not None:
            clock.start(OTHER)
        reading, _ = train_step(models[name], optimizers[name], batches, lr=0.0, clip=work.optim.clip, step=0)
        lap = None if clock is None else clock.stop()
        wait()
        rows = [layer.computed / max(layer.tokens, 1.0) for layer in reading.layers.values()]
        return time.perf_counter() - start, lap, rows

    times = {name: Times() for name in models}
    for turn in range(work.rounds + 1):
        say("training: warming up" if turn == 0 else f"training: round {turn} of {work.rounds}")
        for name, trace in _order(models, turn):
            if trace:
                with _listening(work.device) as seconds:
                    clock = Clock(wait=wait, phases=seconds)
                    with traced(models[name], clock, optimizers[name]):
                        _, lap, rows = step(name, clock)
                if turn and lap is not None:
                    times[name].laps.append(lap)
                    times[name].rows.append(rows)
            else:
                spent, _, _ = step(name, None)
                if turn:
                    times[name].plain.append(spent)
        machine.measure()
    return times


@dataclass
class DecodeTimes:
    """One model's reading of the prompt, and its decoded tokens (laps of all of them together)."""

    prefill: Times = field(default_factory=Times)
    decode: Times = field(default_factory=Times)


def measure_decoding(models: Mapping[str, Decoder], work: Work, machine: Machine, say: Say) -> dict[str, DecodeTimes]:
    """Seconds of reading one prompt, and per token of continuing it greedily, by model."""
    generator = torch.Generator().manual_seed(work.seed)
    wait = waiter(work.device)
    tasks = {name: 0 if routers_by_task(model) else None for name, model in models.items()}

    def generate(name: str, clock: Clock | None) -> tuple[float, float, list[Lap]]:
        """Seconds of the prompt, seconds per new token, and the laps of both."""
        vocab = models[name].config.vocab_size
        prompt = torch.randint(vocab, (work.prompt,), generator=generator).tolist()
        laps: list[Lap] = []

        def on_token(_row: int, _token: int) -> None:
            if clock is not None and not laps:  # the first new token ends the reading of the prompt
                laps.append(clock.restart(SAMPLING))

        wait()
        if clock is not None:
            clock.start(SAMPLING)
        done = generate_ids(
            models[name],
            [prompt],
            max_new_tokens=work.new_tokens,
            sampling=SamplingConfig(temperature=0.0),
            on_token=on_token,
            task=tasks[name],
        )
        if clock is not None:
            laps.append(clock.stop())
        return done.prefill_seconds, done.decode_seconds / done.decode_tokens, laps

    times = {name: DecodeTimes() for name in models}
    for turn in range(work.rounds + 1):
        say("decoding: warming up" if turn == 0 else f"decoding: round {turn} of {work.rounds}")
        for name, trace in _order(models, turn):
            if trace:
                with _listening(work.device) as seconds:
                    clock = Clock(wait=wait, phases=seconds)
                    with traced(models[name], clock):
                        _, _, laps = generate(name, clock)
                if turn:
                    times[name].prefill.laps.append(laps[0])
                    times[name].decode.laps.append(laps[1].shared(work.new_tokens - 1))
            else:
                prefill, token, _ = generate(name, None)
                if turn:
                    times[name].prefill.plain.append(prefill)
                    times[name].decode.plain.append(token)
        machine.measure()
    return times


def _order(models: Mapping[str, Decoder], turn: int) -> list[tuple[str, bool]]:
    """(model, traced) in the order of this round."""
    runs = [(name, trace) for trace in (False, True) for name in models]
    first = turn % len(runs)
    return runs[first:] + runs[:first]


def _listening(device: str) -> AbstractContextManager[Mapping[str, float] | None]:
    """Seconds by phase; nothing on a GPU, where the host's clock sees phases being queued rather than done."""
    return nullcontext() if device.startswith("cuda") else phases.listen()


def _batch(model: Decoder, work: Work, generator: torch.Generator) -> Batch:
    """Random tokens: rows full of one document, everything a target."""
    ids_BS1 = torch.randint(model.config.vocab_size, (work.batch, work.seq + 1), generator=generator)
    zeros_BS = torch.zeros(work.batch, work.seq, dtype=torch.int64)
    batch = Batch(ids_BS1[:, :-1].contiguous(), ids_BS1[:, 1:].contiguous(), zeros_BS == 0, zeros_BS, zeros_BS)
    return batch.to(work.device)
