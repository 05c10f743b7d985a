"""Two nodes, each with its own address and torchrun: the link is cut and restored, processes and a whole node are killed."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moesaic.parallel.limit import UNWINDING_S
from tests.parallel.elastic import Run, launch, records, steps_done
from tests.parallel.test_elastic import COMMANDS, TIMEOUT_S, Command, sentences, toy, undisturbed
from tests.parallel.two_nodes import TwoNodes, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("none_left")]

STEPS = 60


@pytest.fixture
def nodes() -> Iterator[TwoNodes]:
    if reason := why_not():
        pytest.skip(reason)
    with TwoNodes() as made:
        yield made


def start(nodes: TwoNodes, node: int, module: list[str], log: Path) -> Run:
    """One agent with one process. Where agents come and go they must not share the store of the rendezvous (torchrun.py)."""
    environ = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    options = nodes.meeting(node)
    return launch(module, 1, log, max_restarts=4, options=options, before=nodes.inside(node), environ=environ)


def until(condition: Callable[[], bool], runs: list[Run], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        said = "\n----\n".join(run.said[-4000:] for run in runs)
        assert time.monotonic() < deadline, said
        assert all(run.process.poll() is None for run in runs), said
        time.sleep(0.05)


def finish(runs: list[Run]) -> None:
    for run in runs:
        assert run.wait(240) == 0, run.said[-6000:]
        assert "Traceback" not in run.said
        assert "terminate called" not in run.said


@pytest.mark.parametrize("name", COMMANDS)
def test_a_cut_link_is_said_on_both_nodes_within_the_time_and_a_restored_one_goes_on(
    tmp_path: Path, nodes: TwoNodes, name: str
) -> None:
    command: Command = COMMANDS[name]
    expected = undisturbed(command, tmp_path / "undisturbed", STEPS)
    out = tmp_path / "run"
    runs = [start(nodes, node, command(out, STEPS), tmp_path / f"{node}.log") for node in range(2)]
    until(lambda: steps_done(out) >= 8, runs)
    nodes.cut()
    cut = time.monotonic()
    until(lambda: all(sentences(run.said) for run in runs), runs)
    # The limit, the look at the others, a checkpoint that can no longer be written, a slow machine.
    assert time.monotonic() - cut < TIMEOUT_S + 3.5 + UNWINDING_S + 15
    nodes.restore()
    finish(runs)
    assert records(out) == expected
    first, second = (sentences(run.said)[0] for run in runs)
    assert re.match(r"Rank 0: .* with ranks 0, 1 took longer than 5 s in [^.]+\. ", first), first
    assert re.match(r"Rank 1: .* with ranks 0, 1 took longer than 5 s in [^.]+\. ", second), second
    assert "Rank 1 does not answer" in first or "The store of the run does not answer" in first, first
    assert "The store of the run does not answer" in second, second


@pytest.mark.parametrize("node", [0, 1])
def test_a_killed_process_restarts_those_of_both_nodes(tmp_path: Path, nodes: TwoNodes, node: int) -> None:
    expected = undisturbed(toy, tmp_path / "undisturbed", STEPS)
    out = tmp_path / "run"
    runs = [start(nodes, number, toy(out, STEPS), tmp_path / f"{number}.log") for number in range(2)]
    until(lambda: steps_done(out) >= 8, runs)
    os.kill(runs[node].workers()[node], signal.SIGKILL)
    finish(runs)
    assert records(out) == expected
    # The trap that the roll call is for: each agent counts the restarts it decided on itself.
    starts = [(out / f"starts-{rank}").read_text().split() for rank in (0, 1)]
    assert starts[node] == ["0", "1"]
    assert starts[1 - node] in (["0", "0"], ["0", "1"])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_node_that_is_lost_and_comes_back_is_taken_in(tmp_path: Path, nodes: TwoNodes, name: str) -> None:
    command: Command = COMMANDS[name]
    expected = undisturbed(command, tmp_path / "undisturbed", STEPS)
    out = tmp_path / "run"
    runs = [start(nodes, node, command(out, STEPS), tmp_path / f"{node}.log") for node in range(2)]
    until(lambda: steps_done(out) >= 8, runs)
    runs[1].kill()
    until(lambda: bool(sentences(runs[0].said)), runs[:1])
    runs[1] = start(nodes, 1, command(out, STEPS), tmp_path / "again.log")
    finish(runs)
    assert records(out) == expected
    assert re.search(r"Rank 1 (does not answer|has ended)|store of the run", sentences(runs[0].said)[0])
