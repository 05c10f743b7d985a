"""What one rank is told or finds, all decide: to stop, or to refuse the step, in the same words."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.errors import MoesaicError, NonFiniteError
from moesaic.layout import Layout, ParallelConfig
from moesaic.parallel.agree import Agreement
from moesaic.parallel.apply import apply
from moesaic.parallel.start import Started
from moesaic.parallel.world import World
from moesaic.train.guard import check_finite
from moesaic.train.stop import StopRequest
from tests.parallel.processes import run_started
from tests.parallel.truth import Case, build


def test_one_process_decides_alone() -> None:
    asked = [False]
    agreement = Agreement(stop=lambda: asked[0])
    assert agreement.finite(True)
    assert not agreement.stopping
    asked[0] = True
    assert not agreement.stopping  # as of the last step
    assert not agreement.finite(False)
    assert agreement.stopping
    assert agreement.first(((1, 2), "words")) == "words"
    assert agreement.first(None) is None


def _decides(here: Started) -> Any:
    world = World(Layout.of(ParallelConfig(), here.world), here.rank, here.watch)
    asked = here.rank == 1
    agreement = Agreement(world.everyone, stop=lambda: asked)
    seen: list[Any] = []
    for finite in (True, here.rank != 2):
        seen.append((agreement.finite(finite), agreement.stopping))
        asked = False
    found = {0: None, 1: ((3, 5), "late"), 2: ((3, 4), "early")}[here.rank]
    seen += [agreement.first(found), agreement.first(None), agreement.first(((1,), "alike"))]
    seen += [agreement.first(((int(here.rank == 0),), "twice")), here.watch.take()["stop and step guard"].calls]
    return seen


def test_all_ranks_decide_alike_with_one_small_reduction_per_step() -> None:
    expected = [
        [True, True],
        [False, False],
        "on rank 2, early",
        None,
        "on every rank, alike",
        "on ranks 1, 2, twice",
        2,
    ]
    ended = run_started(3, _decides)
    assert [e.said for e in ended] == [""] * 3
    assert [e.answer for e in ended] == [expected] * 3


# ---- a step that is not finite -------------------------------------------------------------------------------------


def _breaks(here: Started, where: str) -> Any:
    """A tiny sparse model over 2 ranks (experts spread); something goes wrong on rank 1 alone."""
    config = ParallelConfig(ep=2)
    world = World(Layout.of(config, here.world), here.rank, here.watch)
    model = build(Case("", config))
    apply(model, world, config)
    sparse: Any = model.blocks[1].ffn
    attention: nn.Module = model.blocks[0].attention  # type: ignore[assignment]
    if here.rank == 1 and where == "weight":
        with torch.no_grad():
            next(sparse.experts.parameters()).view(-1)[3] = math.nan
    if here.rank == 1 and where == "output":
        attention.register_forward_hook(lambda module, inputs, y: y.clone().fill_(math.inf))
    ids = torch.arange(8).view(2, 4) + here.rank

    def run() -> Tensor:
        return model(ids).logits  # type: ignore[no-any-return]

    loss = world.peers.total(run().sum().detach()).item()
    said: list[str] = []
    try:
        check_finite(model, loss, 1.0, 17, run, Agreement(world.everyone))
    except NonFiniteError as error:
        said.append(str(error))
    return said


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("weight", "on rank 1, the parameter blocks.1.ffn.experts.w_in already holds a non-finite value"),
        ("output", "on rank 1, the first non-finite value came out of blocks.0.attention"),
    ],
)
def test_a_step_that_breaks_on_one_rank_is_refused_by_all_in_the_same_words(where: str, words: str) -> None:
    ended = run_started(2, _breaks, where)
    assert [e.said for e in ended] == ["", ""]
    assert ended[0].answer == ended[1].answer
    (sentence,) = ended[0].answer
    assert sentence.startswith("Step 17: the loss is nan; "), sentence
    assert words in sentence, sentence


def _finite(here: Started) -> Any:
    world = World(Layout.of(ParallelConfig(), here.world), here.rank, here.watch)
    here.watch.take()
    check_finite(nn.Linear(2, 2), 1.0, 2.0, 1, lambda: pytest.fail("nothing to look for"), Agreement(world.everyone))
    return sum(spent.calls for spent in here.watch.take().values())


def test_a_finite_step_costs_one_reduction() -> None:
    assert [e.answer for e in run_started(2, _finite)] == [1, 1]


# ---- signals save once ---------------------------------------------------------------------------------------------


def _stops(here: Started, folder: str, signalled: list[int], number: int) -> Any:
    """Steps until one rank is signalled, between the others' steps; the first rank saves."""
    world = World(Layout.of(ParallelConfig(), here.world), here.rank, here.watch)
    if here.rank in signalled:
        Path(folder, f"pid-{here.rank}").write_text(str(os.getpid()))
    with StopRequest() as stop:
        agreement = Agreement(world.everyone, stop=lambda: stop.requested)
        for step in range(1, 1000):
            if step == 5 and here.rank in signalled:
                os.kill(os.getpid(), number)
            time.sleep(0.01 * here.rank)
            agreement.finite(True)
            if agreement.stopping:
                if here.rank == 0:
                    with Path(folder, "saved").open("a") as saved:
                        saved.write(f"{step}\n")
                return step
    raise MoesaicError("never stopped")


@pytest.mark.parametrize(
    ("signalled", "number"), [([0], signal.SIGTERM), ([2], signal.SIGINT), ([0, 1, 2], signal.SIGTERM)]
)
def test_a_signal_to_any_rank_stops_all_after_the_same_step_and_saves_once(
    tmp_path: Path, signalled: list[int], number: int
) -> None:
    ended = run_started(3, _stops, str(tmp_path), signalled, number)
    assert [(e.code, e.said, e.answer) for e in ended] == [(0, "", 5)] * 3
    assert (tmp_path / "saved").read_text() == "5\n"
