"""A training run in one page, started by torchrun: what faults are injected into before, and beside, the real one.

A matrix learns sums; every rank has its share of each batch, gradients are summed. The first rank keeps metrics.jsonl (of
the real run's shape) and a checkpoint that is complete or absent. A restart goes on from it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moesaic.errors import MoesaicError
from moesaic.layout import Layout, ParallelConfig
from moesaic.parallel.agree import Agreement
from moesaic.parallel.start import Started, start_processes
from moesaic.parallel.world import World
from moesaic.train.stop import StopRequest

ROWS, WIDTH = 12, 6  # rows of a step, divisible by 2, 3 and 4 processes


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--checkpoint-every", type=int, default=5)
    parser.add_argument("--step-s", type=float, default=0.02)
    parser.add_argument("--timeout-s", type=float, default=20.0)
    args = parser.parse_args()
    try:
        with StopRequest() as stop, start_processes(args.timeout_s, device="cpu") as here:
            return train(args, here, stop)
    except MoesaicError as error:
        print(f"moesaic: {error}", file=sys.stderr, flush=True)
        return 2


def train(args: argparse.Namespace, here: Started, stop: StopRequest) -> int:
    world = World(Layout.of(ParallelConfig(), here.world), here.rank, here.watch)
    agreement = Agreement(world.everyone, stop=lambda: stop.requested)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"starts-{here.rank}").open("a") as log:
        log.write(f"{here.restarts}\n")
    saved = args.out / "saved.safetensors"
    state = {"weight": torch.zeros(WIDTH, WIDTH, dtype=torch.float64), "step": torch.zeros((), dtype=torch.int64)}
    if saved.exists():
        state = load_file(saved)
    world.everyone.barrier(what="resume")  # nobody saves before all have read
    for step in range(int(state["step"]) + 1, args.steps + 1):
        here.watch.layer = f"layer {step % 3}"
        x_RD = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        mine_RD = x_RD.tensor_split(here.world)[here.rank]
        error_RD = mine_RD @ state["weight"] - mine_RD.cumsum(1)
        told = torch.cat([(mine_RD.T @ error_RD).flatten(), error_RD.square().sum()[None]])
        world.everyone.all_reduce(told, what="gradients")
        state["weight"] = state["weight"] - 0.01 * told[:-1].view(WIDTH, WIDTH)
        state["step"] = torch.tensor(step)
        time.sleep(args.step_s)
        agreement.finite(True)
        if here.rank == 0:
            with (args.out / "metrics.jsonl").open("a") as log:
                log.write(json.dumps({"kind": "step", "step": step, "loss": told[-1].item()}) + "\n")
        if step % args.checkpoint_every == 0 or step == args.steps or agreement.stopping:
            if here.rank == 0:
                save_file(state, args.out / "saving")
                (args.out / "saving").rename(saved)
                with (args.out / "saves").open("a") as log:
                    log.write(f"{step}\n")
            world.everyone.barrier(what="checkpoint")
        if agreement.stopping:
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
