"""Claim: converting a checkpoint takes the memory of one layer's experts, and a kill at any moment costs one file of the work.

    python bench/convert_memory.py                        # 1.5 GB in bf16, there and back, killed 4 times each way
    python bench/convert_memory.py --gb 6 --kills 10

A random Mixtral-shaped checkpoint is written as a Hugging Face folder (one piece in memory at a time), converted to a moesaic
folder and that back, each by the command ``moesaic convert`` in a process of its own. Columns:

    peak        the process's largest resident memory (VmHWM), interpreter and libraries included
    anonymous   the largest sample of what is not a mapped file (smaps_rollup, every 20 ms)
    converter   the peak less that of ``moesaic convert --dry-run`` of the same: what the conversion itself holds
    limit       1.3 times the larger of the bytes of source and target
    MB/s        bytes of the target per second, start of the interpreter included

Then each conversion is started again and killed with SIGKILL at random moments, the same command finishing what is left; every
file of the result must have the sha256 of the undisturbed one. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import BenchError, about, finish, positive, progress, run_main
from torch import Tensor

from moesaic.checkpoint.stream import Slot, plan_shards, write_shards
from moesaic.convert.write import plan_export
from moesaic.models.config import ModelConfig, MoEConfig, RouterConfig

MIB = 2**20


@dataclass(frozen=True)
class Run:
    """One conversion, undisturbed, and what killing it came to. Bytes and seconds."""

    name: str
    peak: int
    anonymous: int
    dry_peak: int
    limit: int
    seconds: float
    target_bytes: int
    kills: int
    resumed: int
    seconds_killed: float
    equal: bool


def main() -> None:
    """Make the checkpoint, convert it both ways, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.5, help="size of the checkpoint in 10^9 bytes")
    parser.add_argument(
        "--shard-gb", type=float, default=0.2, help="largest file, so that there is something to go on with"
    )
    parser.add_argument("--kills", type=int, default=4, help="SIGKILLs per direction")
    parser.add_argument("--seed", type=int, default=0, help="of weights and moments")
    parser.add_argument("--threads", type=positive, default=1, help="threads of torch in the converter")
    parser.add_argument(
        "--folder", type=Path, help="where to work: five times the size is needed (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here as well")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny checkpoint, to see that it runs; figures mean nothing"
    )
    args = parser.parse_args()
    if args.quick:
        args.gb, args.shard_gb, args.kills = 0.01, 0.002, 1
    if not sys.platform.startswith("linux"):
        raise BenchError("The memory of a process is read from /proc, which only Linux has.")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="convert-") as name:
        place = Path(name)
        source, ours, theirs = place / "hf", place / "moesaic", place / "again"
        config = shape_of(args.gb, args.quick)
        chance = random.Random(args.seed)
        with progress(3 + 2 * args.kills, "step") as (say, advance):
            say("writing the checkpoint")
            write_checkpoint(config, source, int(args.shard_gb * 1e9), args.seed)
            advance()
            runs = []
            for label, here, there in (("hf -> moesaic", source, ours), ("moesaic -> hf", ours, theirs)):
                say(label)
                runs.append(measure(label, here, there, args, chance, advance))
                advance()
        same = bytes_by_tensor(source) == bytes_by_tensor(theirs)
        size = files_bytes(source)
    print(f"{size / 1e9:.2f} GB in files of {args.shard_gb} GB, {args.threads} thread(s)    MiB")
    print(
        f"{'':<16}{'peak':>8}{'anonymous':>11}{'converter':>11}{'limit':>8}{'s':>8}{'MB/s':>8}{'kills':>7}{'equal':>7}"
    )
    for run in runs:
        print(
            f"{run.name:<16}{run.peak / MIB:>8.0f}{run.anonymous / MIB:>11.0f}{(run.peak - run.dry_peak) / MIB:>11.0f}"
            f"{run.limit / MIB:>8.0f}{run.seconds:>8.1f}{run.target_bytes / 1e6 / run.seconds:>8.0f}{run.kills:>7}"
            f"{'yes' if run.equal else 'NO':>7}"
        )
    print(f"every tensor of the Hugging Face folder came back with the same bytes: {'yes' if same else 'NO'}")
    met = all(run.peak <= run.limit and run.equal for run in runs) and same
    print(f"target 6 {'met' if met else 'MISSED'}")
    result = {"bytes": size, "runs": [asdict(run) for run in runs], "round_trip": same, "met": met}
    finish(result | about(torch.device("cpu")) | {"seed": args.seed, "threads": args.threads}, args.out)


def shape_of(gb: float, quick: bool) -> ModelConfig:
    """Mixtral's proportions (8 experts of 3.5 times the width, 2 per token), as many layers as fill ``gb`` in bf16."""
    dim = 64 if quick else 1024
    hidden, vocab = dim * 7 // 2, 500 if quick else 16000
    layer = 8 * 3 * dim * hidden + dim * dim * 5 // 2
    layers = max(1, round((gb * 1e9 / 2 - 2 * vocab * dim) / layer))
    return ModelConfig(
        vocab_size=vocab,
        dim=dim,
        num_layers=layers,
        num_heads=dim // 32,
        num_kv_heads=dim // 128 or 1,
        max_seq_len=4096,
        tie_embeddings=False,
        moe=MoEConfig(num_experts=8, k=2, hidden=hidden, router=RouterConfig("topk", {"normalize": "chosen"})),
    )


def write_checkpoint(config: ModelConfig, folder: Path, max_shard_bytes: int, seed: int) -> None:
    """A Hugging Face folder with random bf16 weights, one of their tensors in memory at a time."""
    export = plan_export(config, family="mixtral")
    pieces = [piece for entry in export.table for piece in entry.pieces]
    shards = plan_shards((Slot(p.theirs, torch.bfloat16, p.shape) for p in pieces), "model", max_shard_bytes)
    rng = torch.Generator().manual_seed(seed)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for piece in pieces:
            yield piece.theirs, (torch.randn(piece.shape, generator=rng) * 0.02).bfloat16()

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(export.config_text(torch.bfloat16), encoding="utf-8")
    write_shards(folder, "model", shards, tensors())


def measure(
    label: str, source: Path, target: Path, args: argparse.Namespace, chance: random.Random, advance: Any
) -> Run:
    """Convert once undisturbed and once with kills."""
    command = [sys.executable, "-m", "moesaic", "convert", str(source), str(target), "--shard-gb", str(args.shard_gb)]
    dry_peak = watched([*command, "--dry-run"], args.threads)[0]
    peak, anonymous, seconds = watched(command, args.threads)
    expected = digests(target)
    other = target.with_name(target.name + "-killed")
    command[5] = str(other)
    resumed, began = 0, time.perf_counter()
    for _ in range(args.kills):
        process = start(command, args.threads)
        try:
            process.wait(chance.uniform(0.15, 0.95) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if other.exists() and digests(other) != expected:
            raise BenchError(f"{other} was there after a kill and is not whole.")
        advance()
    done = subprocess.run(
        command + ["--json"], env=environment(args.threads), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"The conversion was not finished after the kills: {done.stderr.strip()}")
    resumed = json.loads(done.stdout)["resumed"]
    equal = digests(other) == expected and not list(other.parent.glob(".*"))
    seconds_killed = time.perf_counter() - began
    shutil.rmtree(other)
    size = files_bytes(target)
    limit = int(1.3 * max(files_bytes(source), size))
    return Run(label, peak, anonymous, dry_peak, limit, seconds, size, args.kills, resumed, seconds_killed, equal)


def watched(command: list[str], threads: int) -> tuple[int, int, float]:
    """Peak resident bytes, the largest sample of anonymous ones, seconds.

    Not ru_maxrss: it also counts what the parent had before the program was replaced.
    """
    began = time.perf_counter()
    process = start(command, threads)
    peak = anonymous = 0
    while process.poll() is None:
        try:
            found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            rollup = re.search(r"^Anonymous:\s+(\d+)", Path(f"/proc/{process.pid}/smaps_rollup").read_text(), re.M)
        except OSError:
            break
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        anonymous = max(anonymous, int(rollup[1]) * 1024 if rollup else 0)
        time.sleep(0.02)
    if process.wait():
        raise BenchError(f"{' '.join(command)} failed.")
    return peak, anonymous, time.perf_counter() - began


def start(command: list[str], threads: int) -> subprocess.Popen[bytes]:
    """The command, silent."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment(threads), stdout=quiet, stderr=quiet)


def environment(threads: int) -> dict[str, str]:
    """This process's import path, so many threads."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": str(threads)}


def files_bytes(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def digests(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file."""
    return {path.name: _sha256(path) for path in sorted(folder.iterdir())}


def bytes_by_tensor(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every tensor (fp32 routers as bf16, which is what was there), one in memory."""
    from moesaic.checkpoint.shards import find_tensors, read_tensors

    found = {}
    for name, tensor in read_tensors(find_tensors(folder, "model")):
        flat = tensor.to(torch.bfloat16).reshape(-1).view(torch.uint8).numpy()
        found[name] = hashlib.sha256(flat).hexdigest()
    return found


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


if __name__ == "__main__":
    run_main(main)
