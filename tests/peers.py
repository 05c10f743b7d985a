"""The parts of a batch in one process: threads that play ``Peers`` to each other, and plans cut into parts.

>>> values = with_peers(3, work)                    # work(peers) -> anything; answers in the order of parts
>>> parts = cut(plan, [5, 0, 7])                    # plans of 5, 0 and 7 tokens, in the graph of the whole

Every question is checked: all parts must ask for the same thing, of one shape and dtype, and nobody may ask alone. A mistake
is an error within seconds, where real processes would hang.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from moesaic.plan import RoutingPlan, SoftPlan
from moesaic.plan.lift import per_token
from moesaic.plan.peers import Peers
from moesaic.plan.plan import Gate

Answer = TypeVar("Answer")
PATIENCE = 20.0  # seconds


def with_peers(count: int, work: Callable[[Peers], Answer]) -> list[Answer]:
    """``work(peers)`` for each of ``count`` parts at once.

    Raises what the first failing part raised; ``AssertionError`` where parts asked different questions.
    """
    meeting = _Meeting(count)

    def part(index: int) -> Answer:
        ask = [partial(_ask, meeting, index, kind) for kind in ("total", "most")]
        try:
            answer = work(Peers(count, ask[0], ask[1], index))
            meeting.ask(index, "the end", torch.zeros(()))
        except BaseException:
            meeting.barrier.abort()  # or the others would wait
            raise
        return answer

    with ThreadPoolExecutor(count) as threads:
        futures = [threads.submit(part, index) for index in range(count)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))
    return [future.result() for future in futures]


class _Meeting:
    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=PATIENCE)
        self.said: list[Any] = [None] * count

    def ask(self, index: int, kind: str, x: Tensor) -> Tensor:
        self.said[index] = (kind, x.detach())
        self.barrier.wait()
        asked = {(kind, tuple(x.shape), x.dtype) for kind, x in self.said}
        assert len(asked) == 1, f"the parts asked different questions: {asked}"
        stacked = torch.stack([x for _, x in self.said])
        answer = stacked.amax(dim=0) if kind == "most" else stacked.sum(dim=0, dtype=x.dtype)
        self.barrier.wait()  # nobody speaks again before all have listened
        return answer


def _ask(meeting: _Meeting, index: int, kind: str, x: Tensor) -> Tensor:
    answer: Tensor = _Asked.apply(x, meeting, index, kind)
    return answer


class _Asked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, meeting: _Meeting, index: int, kind: str) -> Tensor:
        return meeting.ask(index, kind, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


def cut(plan: Any, sizes: Sequence[int]) -> list[Any]:
    """The plans of consecutive parts of so many tokens; soft plans are cut between groups."""
    stops = torch.tensor([0, *sizes]).cumsum(0).tolist()
    assert stops[-1] == plan.num_tokens
    return [_between(plan, first, stop) for first, stop in pairwise(stops)]


def _between(plan: RoutingPlan | SoftPlan, first: int, stop: int) -> RoutingPlan | SoftPlan:
    valid_T = None if plan.valid_T is None else plan.valid_T[first:stop]
    gate = None if plan.gate is None else _gate(plan.gate, first, stop)
    if isinstance(plan, SoftPlan):
        size = plan.dispatch_GTS.shape[1]
        assert first % size == stop % size == 0, "a part cannot begin within a group"
        groups = slice(first // size, stop // size)
        return replace(
            plan,
            dispatch_GTS=plan.dispatch_GTS[groups],
            combine_GTS=plan.combine_GTS[groups],
            valid_T=valid_T,
            gate=gate,
        )
    mine_N = (plan.token_N >= first) & (plan.token_N < stop)
    scale_N = plan.input_weight_N
    return replace(
        plan,
        token_N=plan.token_N[mine_N] - first,
        expert_N=plan.expert_N[mine_N],
        choice_N=plan.choice_N[mine_N],
        weight_N=plan.weight_N[mine_N],
        input_weight_N=None if scale_N is None else scale_N[mine_N],
        num_tokens=stop - first,
        valid_T=valid_T,
        gate=gate,
        allowed_TE=None if plan.allowed_TE is None else plan.allowed_TE[first:stop],
    )


def _gate(gate: Gate, first: int, stop: int) -> Gate:
    load_TE, noisy_TE = gate.load_probs_TE, gate.noisy_TE
    return Gate(
        gate.logits_TE[first:stop],
        gate.probs_TE[first:stop],
        None if load_TE is None else load_TE[first:stop],
        None if noisy_TE is None else noisy_TE[first:stop],
        {name: value[first:stop] if per_token(name) else value for name, value in gate.extra.items()},
    )
