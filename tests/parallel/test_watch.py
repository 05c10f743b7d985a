"""A hung or dead rank ends the run in words that name rank, layer and collective, and who is missing."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moesaic.errors import DataError
from moesaic.models import build_model
from moesaic.models.config import ModelConfig, MoEConfig
from moesaic.parallel import limit
from moesaic.parallel.board import EXIT_STATUS, Record, Sight, missing
from moesaic.parallel.comm import Group
from moesaic.parallel.layers import name_layers
from moesaic.parallel.limit import Limit
from moesaic.parallel.start import Started
from moesaic.parallel.watch import CollectiveError, Watch
from tests.parallel.processes import Ended, run_started

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")


def everybody(here: Started) -> Group:
    return Group("ep", range(here.world), here.rank, dist.group.WORLD, here.watch)


def sentence(ended: Ended) -> str:
    """The one line a failed process said; nothing else may stand beside it but the libraries' own log lines."""
    lines = [line for line in ended.said.splitlines() if not re.match(r"\[\S+:?\S*\]|\[W|\[E", line)]
    assert len(lines) == 1, ended.said
    assert lines[0].startswith("moesaic: "), ended.said
    return lines[0].removeprefix("moesaic: ")


# ---- counting ------------------------------------------------------------------------------------------------------


def test_what_was_spent_is_counted_by_name_and_taken_once() -> None:
    watch = Watch()
    for sent in (10, 20):
        with watch.collective("dispatch", "ep", (0, 1), sent):
            time.sleep(0.01)
    with watch.collective("combine", "ep", (0, 1), 5):
        pass
    spent = watch.take()
    assert (spent["dispatch"].calls, spent["dispatch"].sent_bytes) == (2, 30)
    assert 0.02 <= spent["dispatch"].seconds < 0.2
    assert (spent["combine"].calls, spent["combine"].sent_bytes) == (1, 5)
    assert watch.take() == {}
    assert watch.entered == {"ep": 3}


def test_a_collective_costs_a_few_microseconds() -> None:
    watch = Watch()

    def once(calls: int = 20_000) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            with watch.collective("dispatch", "ep", (0, 1), 10):
                pass
        return (time.perf_counter() - started) / calls

    assert min(once() for _ in range(5)) < 5e-6


class FakeMark:
    """Stands in for a CUDA event: the device has come past it when told so."""

    def __init__(self, at_ms: float) -> None:
        self.at_ms, self.passed = at_ms, False

    def query(self) -> bool:
        return self.passed

    def elapsed_time(self, other: FakeMark) -> float:
        return other.at_ms - self.at_ms


def test_queued_collectives_are_timed_by_the_device_when_it_has_come_past_them() -> None:
    marks: list[FakeMark] = []

    def mark() -> FakeMark:
        marks.append(FakeMark(at_ms=float(len(marks) ** 2)))
        return marks[-1]

    watch = Watch(mark=mark)
    for _ in range(2):
        with watch.collective("dispatch", "ep", (0, 1), 10):
            pass
    assert watch.take()["dispatch"].seconds == 0.0  # called, not yet done
    marks[0].passed = marks[1].passed = True
    assert watch.take()["dispatch"].seconds == pytest.approx(0.001)  # 1 - 0 milliseconds
    marks[2].passed = marks[3].passed = True
    assert watch.take()["dispatch"].seconds == pytest.approx(0.005)  # 9 - 4
    assert not watch.queued


# ---- words ---------------------------------------------------------------------------------------------------------


def test_who_is_missing_in_words() -> None:
    now = time.time()
    sights = {
        0: Sight(Record(layer="layer 3", doing="combine over ep", entered={"ep": 7}), True),
        1: Sight(Record(layer="layer 1", entered={"ep": 6}, since_s=12.2), True),
        2: Sight(
            Record(layer="the backward of layer 2", doing="combine over ep", entered={"ep": 7}, at=now - 4), False
        ),
        3: Sight(Record(ended="Rank 3: the disk is full."), True),
        4: Sight(Record(ended="Rank 4: ...", blames=(2,)), True),
        5: Sight(Record(doing="gradients over dp", entered={"ep": 5}, since_s=3), True),
    }
    words, ranks = missing(sights, "ep", 7)
    assert ranks == (1, 2, 3, 5)  # 4 says nothing that 2 does not
    assert words == (
        "rank 1 has not entered it, it is in layer 1, between collectives for 12 s; "
        "rank 2 does not answer, last heard of 4 s ago in the backward of layer 2, in combine over ep; "
        "rank 3 has ended: the disk is full; "
        "rank 5 has not entered it, it is outside the model, in gradients over dp for 3 s"
    )
    assert missing({0: sights[0]}, "ep", 7) == ("", ())
    assert missing({4: sights[4]}, "ep", 7) == ("rank 4 has ended because of rank 2", (4,))
    words, ranks = missing(dict.fromkeys(range(9), sights[1]), "ep", 7)
    assert len(ranks) == 9
    assert words.endswith("; and so on for 5 more")
    assert missing({1: sights[1]}, "", 0) == ("", ())  # of a foreign collective nobody knows who has entered it


def test_an_error_in_a_collective_names_rank_layer_and_collective() -> None:
    watch = Watch(rank=2)
    watch.layer = "layer 3"
    with (
        pytest.raises(
            CollectiveError,
            match=r"^Rank 2: dispatch over ep with ranks 0, 2 failed in layer 3: Connection closed by peer\.$",
        ),
        watch.collective("dispatch", "ep", (0, 2), 0),
    ):
        raise RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:547] Connection closed by peer\nand a stack")


def test_other_errors_pass_through_unchanged() -> None:
    watch = Watch()
    with pytest.raises(ValueError, match="seven"), watch.collective("dispatch", "ep", (0, 1), 0):
        raise ValueError("seven")
    with pytest.raises(torch.OutOfMemoryError), watch.collective("dispatch", "ep", (0, 1), 0):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="shapes"), watch.others():
        torch.ones(2, 3) @ torch.ones(2, 3)
    watch.layer = "layer 1"
    with (
        pytest.raises(CollectiveError, match="FSDP or of the pipeline failed in layer 1: Connection reset"),
        watch.others(),
    ):
        raise RuntimeError(
            "[/gloo/transport/tcp/pair.cc:1] Read error [127.0.0.1]:7: Connection reset by peer. This is typically"
        )


# ---- where the model is --------------------------------------------------------------------------------------------


def test_hooks_say_where_the_model_is_forward_and_backward() -> None:
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(
            dim=8,
            num_layers=2,
            num_heads=2,
            vocab_size=11,
            moe=MoEConfig(num_experts=2, hidden=8),
        )
    )
    seen: list[str] = []

    class Listening(Watch):
        @property
        def layer(self) -> str:
            return ""

        @layer.setter
        def layer(self, name: str) -> None:
            if not seen or seen[-1] != name:
                seen.append(name)

    handles = name_layers(model, Listening())
    output = model(torch.arange(6).view(1, 6))
    assert seen == ["the embedding", "layer 0", "layer 1", "the head", "the loss", "the head", "the loss"]
    seen.clear()
    output.logits.sum().backward()
    assert seen == [f"the backward of {name}" for name in ("the head", "layer 1", "layer 0", "the embedding")]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(torch.arange(6).view(1, 6)).logits.sum().backward()
    assert seen == []


# ---- processes that fail -------------------------------------------------------------------------------------------


def _dies(here: Started, how: int) -> None:
    group = everybody(here)
    here.watch.layer = "layer 0"
    group.all_reduce(torch.ones(3), what="gradients")
    here.watch.layer = "layer 1"
    if here.rank == 2:
        os.kill(os.getpid(), how)
    group.all_reduce(torch.ones(3), what="dispatch")


def test_survivors_of_a_killed_rank_name_it() -> None:
    ended = run_started(3, _dies, signal.SIGKILL)
    assert [e.code for e in ended] == [2, 2, -signal.SIGKILL]
    for rank in (0, 1):
        said = sentence(ended[rank])
        assert re.match(
            rf"Rank {rank}: dispatch over ep with ranks 0, 1, 2 failed in layer 1: Connection (closed|reset) by peer",
            said,
        )
        assert re.search(
            r"\. Rank 2 does not answer, last heard of \d s ago (in layer [01]|outside the model), ", said
        ), said
        assert ended[rank].seconds < 10


@pytest.mark.slow
def test_a_stopped_rank_ends_the_run_within_the_time() -> None:
    ended = run_started(3, _dies, signal.SIGSTOP, timeout_s=4.0)
    assert [e.code for e in ended] == [2, 2, -signal.SIGKILL]  # the last one by the test
    for rank in (0, 1):
        said = sentence(ended[rank])
        assert said.startswith(
            f"Rank {rank}: dispatch over ep with ranks 0, 1, 2 took longer than 4 s in layer 1. Rank 2 does not"
        )
        assert 4 < ended[rank].seconds < 4 + 2.5 + 5


def _is_told_to_stop(here: Started) -> None:
    """torchrun signals the others when it sees one die: here, while they look who it was."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    _dies(here, signal.SIGKILL)


def test_a_signal_does_not_keep_survivors_from_saying_who_died() -> None:
    ended = run_started(3, _is_told_to_stop)
    assert [e.code for e in ended] == [2, 2, -signal.SIGKILL]
    assert all("Rank 2 does not answer" in sentence(e) for e in ended[:2])


def _lags(here: Started) -> None:
    group = everybody(here)
    group.all_reduce(torch.ones(3), what="gradients")
    here.watch.layer = "layer 2" if here.rank == 0 else "the backward of layer 1"
    if here.rank == 1:
        time.sleep(60)
    group.all_reduce(torch.ones(3), what="combine")


def test_a_rank_that_is_stuck_elsewhere_is_named_with_its_place() -> None:
    ended = run_started(2, _lags, timeout_s=3.0, mourning=0.0)
    assert re.fullmatch(
        r"Rank 0: combine over ep with ranks 0, 1 took longer than 3 s in layer 2\. Rank 1 has not entered it, it is in the "
        r"backward of layer 1, between collectives for [3-6] s\.",
        sentence(ended[0]),
    ), ended[0].said


def _crosses(here: Started) -> None:
    """Each waits for the other in another group."""
    first, second = (Group(axis, (0, 1), here.rank, dist.new_group([0, 1]), here.watch) for axis in ("dp", "ep"))
    group, what = (first, "gradients") if here.rank == 0 else (second, "dispatch")
    group.all_reduce(torch.ones(3), what=what)


@pytest.mark.slow
def test_ranks_that_wait_for_each_other_in_different_collectives_are_told_so() -> None:
    ended = run_started(2, _crosses, timeout_s=3.0)
    assert any("has not entered it, it is outside the model, in " in e.said for e in ended), ended


def _saves(here: Started) -> None:
    """A thread with a group of its own, while the main thread computes; one rank's never comes."""
    handle = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    group = Group("saving", (0, 1), here.rank, handle, Watch(here.rank, 2.0))
    group.watch.beside(here.watch)
    here.watch.layer = "layer 1"
    for what in ("begin", "write") if here.rank == 0 else ("begin",):
        ThreadPoolExecutor(1).submit(group.all_reduce, torch.ones(3), what=what).result()
    time.sleep(60)


@pytest.mark.slow
def test_a_save_beside_the_training_is_told_who_is_missing() -> None:
    ended = run_started(2, _saves, timeout_s=3.0, mourning=0.0)
    said = sentence(ended[0])
    assert said.startswith("Rank 0: write over saving with ranks 0, 1 "), said
    assert "Rank 1 has not entered it, it is in layer 1" in said


def _both_fail(here: Started) -> Any:
    """What saves beside the training fails with it, and is waited for on the way out."""
    saving = Group("saving", (0, 1), here.rank, dist.new_group([0, 1]), Watch(here.rank))
    saving.watch.beside(here.watch)
    everybody(here).all_reduce(torch.ones(3), what="gradients")
    beside = ThreadPoolExecutor(1).submit(saving.all_reduce, torch.ones(3), what="write") if here.rank == 0 else None
    here.watch.layer = "layer 1"
    if here.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        everybody(here).all_reduce(torch.ones(3), what="dispatch")
    finally:
        assert beside is not None
        beside.result()


def test_a_process_that_fails_twice_says_one_thing() -> None:
    said = sentence(run_started(2, _both_fail)[0])
    assert re.match(r"Rank 0: (dispatch over ep|write over saving) with ranks 0, 1 failed", said), said
    assert "Rank 1 does not answer" in said


def _errs(here: Started) -> None:
    group = everybody(here)
    group.all_reduce(torch.ones(3), what="gradients")
    if here.rank == 1:
        raise DataError("books.txt is empty.")
    group.all_reduce(torch.ones(3), what="gradients")


def test_a_rank_that_failed_in_words_is_quoted_by_the_others() -> None:
    ended = run_started(2, _errs)
    assert sentence(ended[1]) == "Rank 1: books.txt is empty."
    assert sentence(ended[0]).endswith(" Rank 1 has ended: books.txt is empty.")


def _foreign(here: Started, watched: bool) -> None:
    here.watch.layer = "layer 1"
    with here.watch.others() if watched else nullcontext():
        dist.all_reduce(torch.ones(3))
        if here.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(3))


@pytest.mark.parametrize("watched", [True, False])
def test_a_failure_in_a_collective_that_is_not_ours_names_rank_and_layer(watched: bool) -> None:
    ended = run_started(2, _foreign, watched)
    assert ended[0].code == 2
    said = sentence(ended[0])
    assert said.startswith("Rank 0: a collective of FSDP or of the pipeline failed in layer 1: Connection "), said
    assert "Rank 1 does not answer" in said


def _hangs(here: Started) -> None:
    """As NCCL may: the limit of the library never comes."""
    if here.rank == 1:
        time.sleep(60)
    here.watch.layer = "layer 1"
    with here.watch.collective("dispatch", "ep", (0, 1), 0):
        time.sleep(60)


@pytest.mark.slow
def test_a_hang_that_nothing_else_ends_is_ended_by_the_limit() -> None:
    ended = run_started(2, _hangs, timeout_s=1.0, mourning=0.0)
    assert ended[0].code == EXIT_STATUS
    assert ended[0].seconds < 1.1 + 5 + 2.5 + 5
    assert sentence(ended[0]).startswith(
        "Rank 0: dispatch over ep with ranks 0, 1 took longer than 1 s in layer 1. Rank 1 has not entered it, it is outside"
    )


def test_a_process_that_gets_nowhere_is_ended_by_the_limit() -> None:
    ended = run_started(1, _quiet, timeout_s=0.5)
    assert ended[0].code == EXIT_STATUS
    assert re.fullmatch(r"Rank 0: nothing has happened for \d+ s in layer 1\.", sentence(ended[0]))


def _quiet(here: Started) -> None:
    here.watch.layer = "layer 1"
    time.sleep(60)


def _cleans_up(here: Started, where: str) -> None:
    """What cleans up after a failure waits for a rank that is gone: in the run, or in a thread that Python joins at its end."""
    limit.UNWINDING_S = 1.0
    if where == "run":
        try:
            with here.watch.collective("dispatch", "ep", (0,), 0):
                raise RuntimeError("Connection closed by peer")
        finally:
            time.sleep(60)
    ThreadPoolExecutor(1).submit(time.sleep, 60)
    raise DataError("books.txt is empty.")


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("run", "Rank 0: dispatch over ep with ranks 0 failed: Connection closed by peer."),
        ("end", "books.txt is empty."),
    ],
)
def test_a_failed_process_ends_even_if_its_cleaning_up_does_not(where: str, words: str) -> None:
    (ended,) = run_started(1, _cleans_up, where)
    assert ended.code == EXIT_STATUS
    assert sentence(ended) == words
    assert ended.seconds < 15


def _orphaned(here: Started, folder: str) -> None:
    """A process whose parent, standing for torchrun, ends."""
    if child := os.fork():
        os.waitpid(child, 0)
        deadline = time.monotonic() + 20
        while not Path(folder, "said").exists() or not Path(folder, "said").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return
    if os.fork():
        time.sleep(0.5)
        os._exit(0)
    os.dup2(os.open(f"{folder}/said", os.O_CREAT | os.O_WRONLY), 2)
    Limit(Watch(rank=5), limit_s=1.0, quiet_s=9.0, parent=os.getppid()).start()
    time.sleep(30)


def test_a_process_ends_when_torchrun_is_gone(tmp_path: Path) -> None:
    (ended,) = run_started(1, _orphaned, str(tmp_path))
    assert ended.code == 0, ended.said
    assert (tmp_path / "said").read_text() == "moesaic: Rank 5: the torchrun that started it is gone.\n"


def _fails_in_queue(here: Started) -> None:
    """Queued collectives: the call returns, and the device never comes past its end."""
    done = FakeMark(0.0)
    done.passed = True
    marks = iter([done, done, done, FakeMark(1.0)])
    here.watch.mark = lambda: next(marks)
    for what in ("gradients", "combine"):
        with here.watch.collective(what, "ep", (0,), 0):
            pass
    here.watch.take()
    time.sleep(60)


@pytest.mark.slow
def test_the_limit_names_the_queued_collective_that_hangs() -> None:
    (ended,) = run_started(1, _fails_in_queue, timeout_s=0.5)
    assert ended.code == EXIT_STATUS
    assert sentence(ended).startswith("Rank 0: combine over ep with ranks 0 took longer than 0.5 s.")


def _trains(here: Started) -> Any:
    group = everybody(here)
    for step in range(40):
        here.watch.layer = f"layer {step % 2}"
        group.all_reduce(torch.ones(8), what="gradients")
        time.sleep(0.05)
    return here.watch.take()["gradients"].calls


def test_a_run_without_failures_is_left_alone() -> None:
    """Longer than its limit in all, and never in one collective."""
    ended = run_started(2, _trains, timeout_s=1.0)
    assert [(e.code, e.answer, e.said) for e in ended] == [(0, 40, "")] * 2
