"""Claim: experts on two processes cost little over one process on the same cores, and it is known where it goes.

    python bench/expert_parallel.py --out ep.json

One machine cannot show speed-up: two processes share the cores that one has alone. What it can show is the price: the same
steps of the same model on the same batch by one process with all threads, by two processes that share the batch (dp 2, whole
experts), and by two that share experts as well (ep 2), with half the threads each. Contenders run in turns, freshly started
each time; a turn is the median over its steps after two warm-up ones. Losses must agree to 1e-4 or nothing is believed.

Of the ep run, per step and rank: seconds waiting for and moving rows (dispatch and combine, there and back), in other
collectives (gradients, sums of losses and load), and the rest, which is computing. Bytes of the all-to-all are set beside
formula 4.2, 4 T k d b (P - 1) / P for a uniform load. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import BenchError, about, common_arguments, finish, positive, progress, run_main
from rich.console import Console
from rich.table import Table

from moesaic.data.packing import Batch
from moesaic.layout import Layout, ParallelConfig
from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig, MoEConfig
from moesaic.parallel.apply import apply
from moesaic.parallel.world import World
from moesaic.train.optim import OptimConfig, make_optimizer
from moesaic.train.step import train_step

# name: processes, layout
CONTENDERS: dict[str, tuple[int, ParallelConfig]] = {
    "one process": (1, ParallelConfig()),
    "dp 2": (2, ParallelConfig()),
    "ep 2": (2, ParallelConfig(ep=2)),
    "ep 2, fsdp": (2, ParallelConfig(ep=2, fsdp=True)),
    "ep 2, 2 chunks": (2, ParallelConfig(ep=2, chunks=2)),
}
WARM_UP = 2


def main() -> None:
    """Run the rounds, print the table, say where the time of ep 2 goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=positive, default=512)
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--hidden", type=positive, default=512, help="width of an expert")
    parser.add_argument("--experts", type=positive, default=16)
    parser.add_argument("--k", type=positive, default=2)
    parser.add_argument("--batch", type=positive, default=8, help="rows")
    parser.add_argument("--seq", type=positive, default=256, help="positions of a row")
    parser.add_argument("--steps", type=positive, default=6, help="timed steps of a turn")
    common_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.dim, args.layers, args.hidden, args.experts, args.batch, args.seq, args.steps = 32, 2, 16, 4, 4, 16, 2
        args.rounds = min(args.rounds, 2)
    if args.device != "cpu":
        raise BenchError("This benchmark shares the cores of one processor; --device must be cpu.")
    threads = args.threads or torch.get_num_threads()
    sizes = {name: getattr(args, name) for name in ("dim", "layers", "hidden", "experts", "k", "batch", "seq", "steps")}
    names = list(CONTENDERS)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with progress(args.rounds * len(names), "rounds") as (say, tick):
        for r in range(args.rounds):
            for i in range(len(names)):
                name = names[(r + i) % len(names)]
                say(name)
                turns[name].append(_turn(name, sizes, threads))
                tick()
    wrong = {n: t[0]["loss"] for n, t in turns.items() if abs(t[0]["loss"] - turns[names[0]][0]["loss"]) > 1e-4}
    if wrong:
        raise BenchError(f"The losses differ: {turns[names[0]][0]['loss']} and {wrong}; nothing was measured.")
    result = {
        "claim": "expert_parallel",
        "about": about(torch.device("cpu")),
        "sizes": sizes,
        "threads": threads,
        "contenders": {name: _summary(turns[name], turns[names[0]], sizes) for name in names},
    }
    _show(result)
    finish(result, args.out)


def _turn(name: str, sizes: dict[str, int], threads: int) -> dict[str, Any]:
    processes, _ = CONTENDERS[name]
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        share = max(1, threads // processes)
        children = [context.Process(target=_work, args=(rank, name, sizes, share, folder)) for rank in range(processes)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        if any(child.exitcode for child in children):
            raise BenchError(f"{name}: a process ended with {[child.exitcode for child in children]}.")
        answers = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    return {"loss": answers[0]["loss"], "ranks": answers, "s": max(a["s"] for a in answers)}


def _work(rank: int, name: str, sizes: dict[str, int], threads: int, folder: str) -> None:
    """One process of a contender."""
    torch.set_num_threads(threads)
    processes, parallel = CONTENDERS[name]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if processes > 1:
        store = dist.FileStore(f"{folder}/store", processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    moe = MoEConfig(num_experts=sizes["experts"], k=sizes["k"], hidden=sizes["hidden"])
    config = ModelConfig(
        1024, sizes["dim"], sizes["layers"], max(1, sizes["dim"] // 64), max_seq_len=sizes["seq"], moe=moe
    )
    torch.manual_seed(0)
    model = build_model(config)
    world = World(Layout.of(parallel, processes), rank) if processes > 1 else None
    spread = None if world is None else apply(model, world, parallel)
    optimizer = make_optimizer(model, OptimConfig())
    laps, spent, loss = [], [], 0.0
    for step in range(WARM_UP + sizes["steps"]):
        ids_BS = torch.randint(1024, (sizes["batch"], sizes["seq"] + 1), generator=torch.Generator().manual_seed(step))
        part, parts = (0, 1) if world is None else (world["dp"].index, world["dp"].size)
        mine_BS = ids_BS.tensor_split(parts)[part]
        x_BS, zero_BS = mine_BS[:, :-1].contiguous(), torch.zeros_like(mine_BS[:, 1:])
        batch = Batch(x_BS, mine_BS[:, 1:].contiguous(), torch.ones_like(x_BS, dtype=torch.bool), zero_BS, zero_BS)
        if world is not None:
            world.everyone.barrier(what="begin")
            world.watch.take()
        started = time.perf_counter()
        reading, _ = train_step(model, optimizer, [batch], lr=1e-4, clip=1.0, step=step + 1, spread=spread)
        if step >= WARM_UP:
            laps.append(time.perf_counter() - started)
            figures = {} if world is None else world.watch.take()
            rows = [s for what, s in figures.items() if what.startswith(("dispatch", "combine"))]
            others = [s for what, s in figures.items() if not what.startswith(("dispatch", "combine"))]
            spent.append(
                (sum(s.seconds for s in rows), sum(s.seconds for s in others), sum(s.sent_bytes for s in rows))
            )
        loss = reading.loss
    rows_s, others_s, sent = (statistics.median(column) for column in zip(*spent, strict=True))
    answer = {"s": statistics.median(laps), "rows_s": rows_s, "others_s": others_s, "sent": float(sent), "loss": loss}
    torch.save(answer, f"{folder}/{rank}.pt")
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def _summary(turns: list[dict[str, Any]], base: list[dict[str, Any]], sizes: dict[str, int]) -> dict[str, Any]:
    def median(name: str) -> float:
        return statistics.median(statistics.mean(rank[name] for rank in turn["ranks"]) for turn in turns)

    processes = len(turns[0]["ranks"])
    tokens = sizes["batch"] * sizes["seq"] // processes
    uniform = 4 * tokens * sizes["k"] * sizes["dim"] * 4 * (processes - 1) // processes * sizes["layers"]
    ratios = [turn["s"] / one["s"] for turn, one in zip(turns, base, strict=True)]
    seconds = [turn["s"] for turn in turns]
    return {
        "s": statistics.median(seconds),
        "range_s": [min(seconds), max(seconds)],
        "over_one": statistics.median(ratios),
        "over_one_range": [min(ratios), max(ratios)],
        "rows_s": median("rows_s"),
        "others_s": median("others_s"),
        "sent_bytes": median("sent"),
        "uniform_bytes": uniform,
    }


def _show(result: dict[str, Any]) -> None:
    table = Table(title="A training step")
    for column in ("", "ms", "over one process", "rows", "other collectives", "the rest", "MB of rows", "uniform"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in result["contenders"].items():
        low, high = found["over_one_range"]
        rest = found["s"] - found["rows_s"] - found["others_s"]
        table.add_row(
            name,
            f"{found['s'] * 1e3:.1f}",
            f"{found['over_one']:.2f} ({low:.2f}-{high:.2f})",
            *(f"{x / found['s']:.0%}" for x in (found["rows_s"], found["others_s"], rest)),
            f"{found['sent_bytes'] / 1e6:.1f}",
            f"{found['uniform_bytes'] / 1e6:.1f}" if "ep" in name else "",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    run_main(main)
