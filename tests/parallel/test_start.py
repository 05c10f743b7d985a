"""Processes that start: alone, together, in a store full of a dead run's keys; and everything that can be wrong, in words."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore

from moesaic.errors import ConfigError, MoesaicError
from moesaic.layout import Layout, ParallelConfig
from moesaic.parallel import torchrun
from moesaic.parallel.rollcall import roll_call
from moesaic.parallel.start import Started, start_processes
from moesaic.parallel.torchrun import interface_to, loopback, read_launch, tell_torchrun, threads
from moesaic.parallel.world import World
from moesaic.train.sharded.agree import together as all_together
from tests.parallel.processes import free_port, run_started

WHOLE = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "5",
}

# ---- what torchrun says --------------------------------------------------------------------------------------------


def test_the_environment_of_torchrun_is_read() -> None:
    launch = read_launch(WHOLE)
    assert launch is not None
    assert (launch.rank, launch.world, launch.local_rank, launch.local_world) == (3, 4, 1, 2)
    assert (launch.host, launch.port, launch.hosted, launch.restarts) == ("first", 29400, True, 5)
    assert not launch.one_node
    assert read_launch({"MASTER_ADDR": "first", "LOCAL_RANK": "0"}) is None  # leftovers without a rank: alone


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"MASTER_PORT": None, "LOCAL_RANK": None},
            "the environment lacks LOCAL_RANK, MASTER_PORT; start it with torchrun",
        ),
        ({"RANK": None}, "lacks RANK"),
        ({"MASTER_ADDR": ""}, "lacks MASTER_ADDR"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE must be a whole number, not 'four'"),
        ({"RANK": "-1"}, "RANK must be a whole number, not '-1'"),
        ({"RANK": "4"}, r"RANK=4 must be below WORLD_SIZE=4\."),
        ({"LOCAL_RANK": "2"}, r"LOCAL_RANK=2 must be below LOCAL_WORLD_SIZE=2\."),
        ({"LOCAL_WORLD_SIZE": "8"}, r"LOCAL_WORLD_SIZE=8 must be at most WORLD_SIZE=4\."),
    ],
)
def test_a_contradictory_environment_is_refused_in_words(change: dict[str, str | None], words: str) -> None:
    environ = {name: value for name, value in {**WHOLE, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=words):
        read_launch(environ)


def test_alone_torch_distributed_is_not_touched() -> None:
    with start_processes(5.0, device="cpu", environ={}) as here:
        assert (here.rank, here.world, here.local_rank, here.local_world, here.restarts) == (0, 1, 0, 1, 0)
        assert here.device == torch.device("cpu")
        assert here.store is None
        assert not dist.is_initialized()
    with pytest.raises(MoesaicError, match="^plain$"), start_processes(5.0, device="cpu", environ={}):
        raise MoesaicError("plain")


@pytest.mark.parametrize("gpus", [1, 0])
def test_devices_are_checked_in_words(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if gpus:
        with pytest.raises(
            ConfigError, match="2 processes were started on this node, which has 1 GPU: each needs its own"
        ):
            start_processes(5.0, environ=WHOLE)
    else:
        with pytest.raises(ConfigError, match='device="cuda" needs a GPU'):
            start_processes(5.0, device="cuda", environ={})


def test_cores_are_divided_unless_the_user_has_decided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)), raising=False)
    assert threads(2, {}) == 3
    assert threads(8, {}) == 1
    assert threads(2, {"OMP_NUM_THREADS": "5"}) is None
    assert threads(2, {"OMP_NUM_THREADS": "1"}) is None
    # torchrun's own 1: what it was started with tells.
    under = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}
    started_with = tmp_path / "environ"
    monkeypatch.setattr(torchrun, "_PARENT_ENVIRON", str(started_with))
    started_with.write_bytes(b"HOME=/root\0PATH=/bin\0")
    assert threads(2, under) == 3
    started_with.write_bytes(b"HOME=/root\0OMP_NUM_THREADS=1\0")
    assert threads(2, under) is None


def test_the_interface_is_the_loopback_within_a_node_and_the_way_to_the_first_node_else() -> None:
    names = {name for _, name in socket.if_nameindex()}
    assert interface_to("no such host", one_node=True) in names
    assert interface_to("127.0.0.1", one_node=False) in {"lo", None}  # None where the system does not tell
    assert interface_to("no such host", one_node=False) is None
    assert loopback("127.0.0.1")
    assert not loopback("192.0.2.1")


def test_torchrun_is_told_the_first_reason(tmp_path: Path) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    path = tmp_path / "error.json"
    environ = {"TORCHELASTIC_ERROR_FILE": str(path)}
    tell_torchrun("Rank 1: the disk is full.", environ)
    tell_torchrun("Rank 1: and more.", environ)
    assert json.loads(path.read_text())["message"]["message"] == "Rank 1: the disk is full."
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=2, error_file=str(path))  # as torchrun reads it
    assert "the disk is full" in str(failure.message)
    assert abs(failure.timestamp - time.time()) < 60
    tell_torchrun("nobody listens", {})
    tell_torchrun("the folder is gone", {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "none" / "error.json")})


# ---- roll call -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Any:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def together(server: Any, worlds: dict[int, int], timeout_s: float = 15.0) -> dict[int, Any]:
    """Roll calls of one thread and one connection per rank, each started for its own world: the stores, or the errors."""
    found: dict[int, Any] = {}

    def call(rank: int) -> None:
        store = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))
        try:
            found[rank] = roll_call(store, rank, worlds[rank], timeout_s)
        except MoesaicError as error:
            found[rank] = error

    parts = [threading.Thread(target=call, args=(rank,)) for rank in worlds]
    for part in parts:
        part.start()
        time.sleep(0.05)
    for part in parts:
        part.join()
    return found


def test_all_ranks_get_the_same_part_of_the_store_and_it_is_empty(server: Any) -> None:
    seen = set()
    for attempt in range(3):  # the store lives on, as torchrun's does
        stores = together(server, {2: 3, 0: 3, 1: 3})
        assert all(not stores[0].check([key]) for key in ("address", "left/0"))
        stores[0].set("address", str(attempt))
        assert stores[1].get("address") == stores[2].get("address") == str(attempt).encode()
        seen.add(PrefixStore("moesaic", server).get("read/out"))
    assert len(seen) == 3


def test_a_dead_attempt_of_any_stage_and_size_does_not_disturb(server: Any) -> None:
    old = PrefixStore("moesaic", server)
    old.set("word/0", "dead of 4")
    old.set("word/1", "dead of 4")
    old.set("word/3", "dead of 4")
    old.set("read/out", json.dumps({"round": old.add("rounds", 1), "words": ["dead of 4"] * 4}))
    for rank in range(4):
        old.set(f"answer/1/{rank}", "")
    old.set("go/1", "")
    stores = together(server, {0: 2, 1: 2})
    stores[0].set("here", "")
    assert stores[1].check(["here"])


def test_ranks_that_do_not_come_are_named_by_all_that_do(server: Any) -> None:
    PrefixStore("moesaic", server).set("word/3", "dead of 4")  # a leftover is nobody
    found = together(server, {0: 4, 2: 4}, timeout_s=1.0)
    assert str(found[0]) == "Rank 0: of 4 processes, rank 1, 3 did not come within 1 s; see what their nodes say."
    assert str(found[2]) == "Rank 2: of 4 processes, rank 1, 3 did not come within 1 s; see what their nodes say."


def test_a_missing_first_rank_is_named(server: Any) -> None:
    found = together(server, {1: 2}, timeout_s=0.2)
    assert str(found[1]).startswith("Rank 1: rank 0 did not call the roll within 0.2 s")


def test_ranks_of_different_worlds_are_refused_by_all(server: Any) -> None:
    found = together(server, {0: 2, 1: 3})
    assert {rank: str(error) for rank, error in found.items()} == {
        rank: f"Rank {rank}: the processes were started for different worlds, of [2, 3]." for rank in (0, 1)
    }


def test_a_rank_that_was_started_twice_is_refused(server: Any) -> None:
    twice: list[Any] = []

    def call(delay: float) -> None:
        time.sleep(delay)
        store = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))
        try:
            twice.append(roll_call(store, 1, 2, 0.5))
        except MoesaicError as error:
            twice.append(str(error))

    parts = [threading.Thread(target=call, args=(delay,)) for delay in (0.0, 0.5)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    assert any("another process was started as rank 1 too" in said for said in twice), twice


# ---- whole processes -----------------------------------------------------------------------------------------------


def _facts(here: Started) -> Any:
    total = torch.tensor([float(here.rank)])
    dist.all_reduce(total)
    assert here.store is not None
    facts = [here.rank, here.world, here.local_rank, here.local_world, str(here.device), total.item()]
    return [*facts, os.environ["GLOO_SOCKET_IFNAME"], dist.get_backend(), torch.get_num_threads()]


def test_processes_find_each_other_and_leave_in_order() -> None:
    shared = threads(2, {})
    assert shared is not None
    for asked, number in (("", shared), ("3", 3)):
        ended = run_started(2, _facts, environ={"OMP_NUM_THREADS": asked})
        assert [(e.code, e.said) for e in ended] == [(0, ""), (0, "")]
        assert [e.answer for e in ended] == [[rank, 2, rank, 2, "cpu", 1.0, "lo", "gloo", number] for rank in (0, 1)]


def _one_fails(here: Started) -> Any:
    def work() -> None:
        if here.rank == 1:
            raise MoesaicError("The disk is full.")

    everyone = World(Layout.of(ParallelConfig(), here.world), here.rank, here.watch).everyone
    try:
        all_together(everyone, "work", work)
    except MoesaicError:
        time.sleep(here.rank / 4)  # the one that is to print it comes last
        raise


def test_what_one_rank_alone_found_wrong_is_said_once_by_it() -> None:
    ended = run_started(2, _one_fails)
    assert [e.code for e in ended] == [2, 2]
    said = [
        [line for line in e.said.splitlines() if line.startswith("moesaic: ")] for e in ended
    ]  # torch misses the store
    assert said == [[], ["moesaic: Rank 1: The disk is full."]]


def _group_timeouts(here: Started) -> Any:
    world = World(Layout.of(ParallelConfig(ep=2), here.world), here.rank, here.watch)
    handles = [world["ep"].handle, world.everyone.handle]
    assert all(handle is not None for handle in handles)
    return [handle._get_backend(torch.device("cpu")).options._timeout.total_seconds() for handle in handles]  # type: ignore[union-attr]


def test_every_group_has_the_time_of_the_run() -> None:
    assert [e.answer for e in run_started(4, _group_timeouts, timeout_s=17.0)] == [[17.0, 17.0]] * 4


def test_the_first_rank_waits_for_the_others_to_leave_its_store() -> None:
    ended = run_started(2, _leaves_late)
    assert [(e.code, e.said) for e in ended] == [(0, ""), (0, "")]


def _leaves_late(here: Started) -> None:
    if here.rank == 1:
        original = dist.destroy_process_group

        def slowly() -> None:
            time.sleep(1.0)
            original()

        dist.destroy_process_group = slowly


_EXIT = """
import os, subprocess, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # gloo's threads compete with another process, and lose
import torch
from moesaic.layout import Layout, ParallelConfig
from moesaic.parallel.start import start_processes
from moesaic.parallel.world import World
import torch.distributed as dist
with start_processes(20.0, device="cpu") as here:
    world = World(Layout.of(ParallelConfig(), 1), 0, here.watch)
    world.itself, world.handles = world, [dist.new_group([0]) for _ in range(8)]
    for task in os.listdir("/proc/self/task"):
        if "gloo" in open(f"/proc/self/task/{task}/comm").read():
            os.setpriority(os.PRIO_PROCESS, int(task), 19)
    subprocess.Popen([sys.executable, "-c", "import time; end = time.time() + 6\\nwhile time.time() < end: pass"])
    for handle in world.handles:
        dist.all_reduce(torch.ones(3), group=handle)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="threads are found through /proc")
def test_the_end_of_a_process_waits_for_gloos_threads() -> None:
    """Without that, about every second of these aborts."""
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for _ in range(4):
        environ = {**os.environ, **places, "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", _EXIT], env=environ, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (first, _) = run_started(2, _facts, environ={"MASTER_PORT": str(port)}, join_s=1.0, patience=20.0, mourning=1.0)
    assert first.code == 2
    assert (
        f"Rank 0: port {port} of this machine is taken by another program; choose another with torchrun's" in first.said
    )


def test_a_rank_that_never_comes_is_named_within_the_time() -> None:
    ended = run_started(3, _facts, absent=(1,), join_s=2.0)
    assert [e.code for e in ended] == [2, 2]
    assert "moesaic: Rank 0: of 3 processes, rank 1 did not come within 2 s" in ended[0].said
    assert "moesaic: Rank 2: of 3 processes, rank 1 did not come within 2 s" in ended[1].said


def test_a_store_that_is_not_there_is_named_with_the_reason_where_it_can_be_seen() -> None:
    port = free_port()
    environ = {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    (alone,) = run_started(2, _facts, absent=(0,), join_s=1.0, environ=environ)
    assert f"Rank 1: no answer within 1 s from 127.0.0.1:{port}, where the run's store should be" in alone.said
    assert "loopback" not in alone.said
    (alone,) = run_started(3, _facts, absent=(0, 2), join_s=1.0, environ=environ)  # of a second node
    assert "On this machine 127.0.0.1 is its own loopback address" in alone.said
