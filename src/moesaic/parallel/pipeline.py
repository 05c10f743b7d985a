"""The micro-batches of a step through the stages of a pipeline, on the schedules of ``torch.distributed.pipelining``.

>>> ranges = split_stages(config, group.size, stages_per_rank)
>>> take_stages(model, ranges, group.size, group.index)       # then experts, slices, recomputation, compilation
>>> pipeline = Pipeline(model, ranges, group)                 # FSDP wraps pipeline.stages
>>> pipeline.run(batches, loss_of)                            # instead of: for batch: loss_of(..., model(batch)).backward()

``loss_of(i, batch, output)`` is called once per stage of this rank and micro-batch, in the order of micro-batches for each
stage, and returns what the stage adds to the loss. No forward is ever repeated: shapes are told to the schedules and not found
out by a trial, so a routing decision is made once. All ranks of a pipeline must make the same calls.

| stages per rank | micro-batches | schedule |
|---|---|---|
| 1 | at least as many as ranks | 1F1B: a rank holds the activations of as many micro-batches as there are stages behind it |
| 1 | fewer | all forwards, then all backwards, which here is the same |
| several | a multiple of the ranks | interleaved 1F1B: shorter waits, more messages |

Legend: B rows, S positions, D model width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleLoopedBFS

from moesaic.data.packing import Batch
from moesaic.errors import ConfigError
from moesaic.models.decoder import Decoder
from moesaic.parallel.comm import Group
from moesaic.parallel.gradients import local
from moesaic.parallel.stages import LossOf, Stage, StageOutput
from moesaic.parallel.watch import Spent

WHAT = "activations"  # the name of a pipeline's messages among a watch's figures
_SCHEDULES = 8  # kept; each holds its buffers


def check_micro_batches(number: int, pp: int, stages_per_rank: int = 1) -> None:
    """Raises ``ConfigError`` for a number of micro-batches that the schedule cannot run."""
    if stages_per_rank > 1 and number % pp:
        raise ConfigError(
            f'parallel.schedule="interleaved" sends micro-batches in rounds of pp={pp}, and accumulate={number} is no multiple '
            f'of it; choose accumulate={-(-number // pp) * pp}, or schedule="1f1b".'
        )


class Pipeline:
    """This rank's stages, and the calls that run them together with those of the other ranks.

    Args:
        model: what ``take_stages`` left of it. ranges: the blocks of all stages. group: the ranks of the pipeline, in order.

    Attributes:
        stages: the stages of this rank, first to last.
        copies: names of parameters that another stage holds, too, and counts: this rank leaves them out of norms and files.
    """

    def __init__(self, model: Decoder, ranges: Sequence[range], group: Group) -> None:
        self.model, self.group = model, group
        places = range(group.index, len(ranges), group.size)
        self.stages = [Stage(model, ranges[i], i, len(ranges)) for i in places]
        tied = model.config.tie_embeddings and group.size > 1
        self.copies = frozenset({"embedding.weight"} if tied and group.index == group.size - 1 else ())
        self._shares_matrix = tied and group.index in (0, group.size - 1)
        self._schedules: dict[tuple[bool, int, int, int], Any] = {}

    def run(self, batches: Sequence[Batch], loss_of: LossOf) -> None:
        """Forward and backward of a step's micro-batches; gradients are added to the parameters of this rank.

        Once per step: at the end the gradients of a tied matrix are summed over the two stages that hold it. Raises
        ``ConfigError`` where micro-batches differ in shape, or cannot be scheduled in this number.
        """
        shapes = sorted({tuple(batch.ids_BS.shape) for batch in batches})
        if len(shapes) > 1:
            raise ConfigError(
                f"The micro-batches of a pipeline must have one shape, and this step's are "
                f"{' and '.join('x'.join(map(str, shape)) for shape in shapes)} (rows x positions); choose a batch_size that "
                "every micro-batch can fill, or parallel.pp=1."
            )
        check_micro_batches(len(batches), self.group.size, len(self.stages))
        if self._shares_matrix and self.model.embedding.weight.grad is not None:
            raise ValueError(
                "the gradient of the tied matrix is of an earlier run; it would be summed over stages again"
            )
        self._drive(batches, loss_of, training=True)
        if self._shares_matrix and self.model.embedding.weight.grad is not None:
            self._sum_tied(local(self.model.embedding.weight.grad))

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch], seen: Callable[[int, Batch, StageOutput], None]) -> None:
        """Forwards alone, without gradients, of any batches; the model's mode is as it is. ``seen`` is called as ``loss_of``
        above: logits are seen on the last stage, the plans of a layer on its own.
        """
        start = 0
        while start < len(batches):
            shape, stop = batches[start].ids_BS.shape, start + 1
            # Enough at once to keep all ranks busy, few enough to keep their activations.
            while stop < min(start + 4 * self.group.size, len(batches)) and batches[stop].ids_BS.shape == shape:
                stop += 1

            def pass_on(i: int, batch: Batch, output: StageOutput, first: int = start) -> None:
                seen(first + i, batch, output)

            self._drive(batches[start:stop], pass_on, training=False)
            start = stop

    def from_last(self, x: Tensor) -> Tensor:
        """What the rank of the last stage says, on all ranks, in place; for losses. The others give a tensor of its shape."""
        return self.group.broadcast(x, self.group.size - 1, what="loss of the last stage")

    def _drive(self, batches: Sequence[Batch], loss_of: LossOf, training: bool) -> None:
        B, S = batches[0].ids_BS.shape
        key = training, len(batches), B, S
        schedule, meter = self._schedules.pop(key, None) or self._build(*key)
        for stage in self.stages:
            stage.batches, stage.loss_of = batches, loss_of
        started = time.perf_counter()
        meter.clear()
        try:
            with self.group.watch.others():
                numbers = torch.arange(len(batches)) if training else None  # the targets that the schedule wants to cut
                schedule.step(target=numbers, return_outputs=False)
        finally:
            for stage in self.stages:
                stage.batches, stage.loss_of = (), None
        spent = self.group.watch.spent.setdefault(WHAT, Spent())
        spent.calls += meter.messages
        spent.sent_bytes += meter.sent_bytes
        spent.seconds += time.perf_counter() - started - meter.seconds  # waiting for other stages included
        self._schedules[key] = schedule, meter  # the latest used comes last; after a failure it is built anew
        if len(self._schedules) > _SCHEDULES:
            del self._schedules[next(iter(self._schedules))]

    def _build(self, training: bool, number: int, B: int, S: int) -> tuple[Any, _Meter]:
        model, meter = self.model, _Meter()
        # Shapes alone; the schedule takes strides, dtype and whether gradients come back from them.
        x_BSD = torch.empty(B, S, model.config.dim, dtype=model.compute_dtype, device="meta", requires_grad=training)
        loss = torch.empty((), device="meta")
        device = next(model.parameters()).device
        stages: list[Any] = [
            _Engine(
                stage,
                stage.index,
                len(self.stages) * self.group.size,
                device,
                input_args=() if stage.is_first else (x_BSD,),
                output_args=(loss,) if stage.is_last else (x_BSD,),
                group=self.group.handle,
                meter=meter,
            )
            for stage in self.stages
        ]
        # The loss has been divided by what the whole step holds, so gradients of micro-batches are summed as they are.
        options: dict[str, Any] = {"loss_fn": _itself if training else None, "scale_grads": False}
        if len(stages) > 1:
            kind = ScheduleInterleaved1F1B if training else ScheduleLoopedBFS
            return kind(stages, number, **options), meter
        single = Schedule1F1B if training and number >= self.group.size else ScheduleGPipe
        return single(stages[0], number, **options), meter

    def _sum_tied(self, grad: Tensor) -> None:
        """Both holders of the matrix get the sum: of two numbers, which is the same bits on either side."""
        group, other = self.group, torch.empty_like(grad)
        peer = group.ranks[0 if group.index else -1]
        with group.watch.collective(
            "gradient of the tied matrix", group.axis, (group.ranks[0], group.ranks[-1]), grad.nbytes
        ):
            ops = [dist.P2POp(op, x, peer, group.handle) for op, x in ((dist.isend, grad), (dist.irecv, other))]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
        grad.add_(other)


def _itself(loss: Tensor, number: Tensor) -> Tensor:
    """The last stage's output is the loss of its micro-batch already."""
    return loss


class _Meter:
    """What a rank computed and sent in one run of a schedule."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """From zero."""
        self.seconds, self.messages, self.sent_bytes = 0.0, 0, 0

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around what the stages themselves do. torch wraps their errors in shapes of arguments: out come their own."""
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            raise error.__cause__ or error  # noqa: B904
        self.seconds += time.perf_counter() - started

    def sending(self, ops: list[dist.P2POp]) -> list[dist.P2POp]:
        """Counted and handed on."""
        self.messages += len(ops)
        self.sent_bytes += sum(op.tensor.nbytes for op in ops)
        return ops


class _Engine(PipelineStage):
    """torch's stage, which tells its module the number of the micro-batch, and a meter what is done."""

    def __init__(self, *args: Any, meter: _Meter, **options: Any) -> None:
        super().__init__(*args, **options)
        self.meter = meter

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: Any = None, save_forward_output: bool = True
    ) -> Any:
        with self.meter.computing():
            return super().forward_one_chunk(fwd_chunk_id, args, {"micro": fwd_chunk_id}, save_forward_output)

    def backward_one_chunk(self, *args: Any, **options: Any) -> None:
        with self.meter.computing():
            super().backward_one_chunk(*args, **options)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self.meter.sending(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self.meter.sending(super().get_bwd_send_ops(bwd_chunk_id))
