"""Claim: forward and backward of a sparse layer need little more memory than a minimum written by hand.

    python bench/memory.py                                # the four shapes, fp32 and bf16, T = 2048
    python bench/memory.py --shapes 512,256,128,8 --tokens 4096

Every figure is the peak of a process of its own that builds one contender, runs a few tokens through it (which loads and
compiles), gives freed memory back to the system, resets the peak, and runs forward and backward once: resident memory at the
peak (VmHWM on Linux) less that before, on CUDA the allocator's. What a contender keeps between calls counts as far as it grows
from few tokens to T. The minimum, with s bytes per number, for T tokens:

    inputs      given, in memory before: x (T, D) and the gradient of the output (T, D)
    output      s T D
    hidden      s T k 2H    gate and up before the activation; activation and expert outputs are recomputed or not needed
    gradients   s T D for x, and s P for the P parameters (4 bytes for those of moesaic's router, which is always fp32)
    router      4 T E       fp32 probabilities

"over" is what a contender needs beyond that, "besides" everything but the gradients of parameters. The dense twin's minimum is
the same with its own P and no router. All contenders get a balanced load.
The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import re
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tax_report
import torch
from common import (
    DTYPES,
    BenchError,
    Shape,
    about,
    common_arguments,
    finish,
    positive,
    prepare_device,
    progress,
    run_main,
    shape,
)
from loads import draw_choice, draw_input
from peers import HF_BACKENDS, Peer, asked_hf, dense_peers, draw_weights, hf_batched_bytes, hf_peers, moesaic_peer

from moesaic.cost.machine import read_text
from moesaic.ops.grouped import BACKENDS

MIB = 2**20


@dataclass(frozen=True)
class Spec:
    """One process: which contender, of which shape, on how many tokens."""

    contender: str
    D: int
    H: int
    E: int
    k: int
    dtype: str
    tokens: int
    threads: int
    device: str = "cpu"

    @property
    def shape(self) -> Shape:
        """The layer."""
        return Shape(self.D, self.H, self.E, self.k)


def main() -> None:
    """Measure every contender in its own process, print the table."""
    if len(sys.argv) == 3 and sys.argv[1] == "--one":  # a process of peak_of
        print(json.dumps(_measure(Spec(**json.loads(sys.argv[2])))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape, nargs="+", default=list(tax_report.SHAPES), metavar="D,H,E,k")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[2048])
    parser.add_argument("--dtypes", choices=tuple(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--backends", choices=BACKENDS, nargs="+", default=["auto"], help="of moesaic's layer")
    parser.add_argument("--hf", choices=("none", *HF_BACKENDS), nargs="+", default=list(HF_BACKENDS))
    parser.add_argument("--memory", type=float, default=12.0, metavar="GIB", help="leave out what needs more")
    common_arguments(parser, rounds=3)
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.tokens, args.rounds = [Shape(64, 32, 16, 4)], [256], 1
    device = prepare_device(args)
    hf = [f"hf {backend}" for backend in asked_hf(args.hf)]
    contenders = ["dense", "dense (moesaic)", *(tax_report.ours(b) for b in args.backends), *hf]
    rows: list[dict[str, Any]] = []
    cells = list(itertools.product(args.shapes, args.dtypes, args.tokens))
    with progress(len(cells) * len(contenders), "process") as (say, advance):
        for layer, dtype, tokens in cells:
            print(f"\n{layer.label} {dtype} T {tokens}    MiB", flush=True)
            print(
                f"{'':<18}{'weights':>10}{'peak':>10}{'minimum':>10}{'over':>10}{'besides':>10}{'least':>10}{'ratio':>8}"
            )
            for name in contenders:
                say(f"{layer.label} {name}")
                advance()
                needed = hf_batched_bytes(layer, tokens, DTYPES[dtype], backward=True) / 2**30
                if name == "hf batched_mm" and needed > args.memory * 0.4:
                    print(f"{name:<18} left out: copies of the rows' weights would take {needed:.0f} GiB")
                    continue
                spec = Spec(
                    name,
                    **asdict(layer),
                    dtype=dtype,
                    tokens=tokens,
                    threads=torch.get_num_threads(),
                    device=device.type,
                )
                rows.append(_row(spec, [peak_of(spec) for _ in range(args.rounds)]))
                print(_line(rows[-1]), flush=True)
    finish({"rows": rows, "rounds": args.rounds, "quick": args.quick, **about(device)}, args.out)


def _row(spec: Spec, found: list[dict[str, int]]) -> dict[str, Any]:
    """The median process, with its minimum."""
    one = sorted(found, key=lambda each: each["peak"])[len(found) // 2]
    least = least_besides(spec)
    besides = one["peak"] - one["gradients"]
    return {
        "shape": spec.shape.label,
        "contender": spec.contender,
        "dtype": spec.dtype,
        "tokens": spec.tokens,
        **one,
        "peaks": [each["peak"] for each in found],
        "minimum": least + one["gradients"],
        "over": besides - least,
        "besides_gradients": besides,
        "minimum_besides_gradients": least,
        "ratio": besides / least,
    }


def _line(row: dict[str, Any]) -> str:
    columns = ("parameters", "peak", "minimum", "over", "besides_gradients", "minimum_besides_gradients")
    return f"{row['contender']:<18}" + "".join(f"{row[c] / MIB:>10.1f}" for c in columns) + f"{row['ratio']:>8.2f}"


def least_besides(spec: Spec) -> int:
    """Bytes of the minimum without gradients of parameters: output, hidden, gradient of the input, router probabilities."""
    T, size = spec.tokens, DTYPES[spec.dtype].itemsize
    router = 0 if spec.contender.startswith("dense") else 4 * T * spec.E
    return size * (2 * T * spec.D + T * spec.k * 2 * spec.H) + router


# ---- the peak of one process ---------------------------------------------------------------------------------------


def peak_of(spec: Spec) -> dict[str, int]:
    """Bytes of parameters, of their gradients, and of the peak of forward and backward, measured in a fresh process."""
    command = [sys.executable, str(Path(__file__).absolute()), "--one", json.dumps(asdict(spec))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise BenchError(f"The process that measures {spec.contender} on {spec.shape.label} failed: {last}")
    found: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def build(spec: Spec) -> tuple[Peer, torch.Tensor, torch.Tensor]:
    """The contender, its input and the gradient of its output; nothing else is kept in memory."""
    dtype, device = DTYPES[spec.dtype], torch.device(spec.device)
    rng = torch.Generator().manual_seed(0)
    weights = draw_weights(
        spec.shape if not spec.contender.startswith("dense") else Shape(spec.D, 1, spec.E, 1), dtype, device
    )
    if spec.contender.startswith("dense"):
        peer = dense_peers(spec.shape, dtype, device)[spec.contender]
    elif spec.contender.startswith("hf "):
        peer = hf_peers(spec.shape, weights, [spec.contender.removeprefix("hf ")])[spec.contender]
    else:
        peer = moesaic_peer(spec.shape, weights, spec.contender.removeprefix("moesaic").strip() or "auto")
    choice_TK = draw_choice("balanced", spec.tokens, spec.E, spec.k, rng)
    x_TD = draw_input(weights.router_ED.cpu(), choice_TK, rng).to(device, dtype)
    grad_TD = torch.randn(spec.tokens, spec.D, generator=rng).to(device, dtype)
    return peer, x_TD, grad_TD


def _measure(spec: Spec) -> dict[str, int]:
    torch.set_num_threads(spec.threads)
    peer, x_TD, grad_TD = build(spec)
    peer.module.train()
    few = min(spec.tokens, max(spec.E // spec.k, 2))
    for _ in range(2):  # loading and compiling is not the layer's
        _step(peer, x_TD[:few], grad_TD[:few])
        peer.clear()
    before = _settle(spec.device)
    x_TD = x_TD.requires_grad_()
    torch.autograd.backward(peer.forward(x_TD), grad_TD)
    peak = _peak(spec.device) - before
    grads = [p.grad for p in peer.module.parameters() if p.grad is not None]
    parameters = list(peer.module.parameters())
    return {
        "parameters": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(g.numel() * g.element_size() for g in grads),
        "peak": peak,
    }


def _step(peer: Peer, x_TD: torch.Tensor, grad_TD: torch.Tensor) -> None:
    torch.autograd.backward(peer.forward(x_TD.detach().requires_grad_()), grad_TD)


def _settle(device: str) -> int:
    """Give freed memory back, start a new peak; bytes in use now."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (AttributeError, OSError):  # no glibc, or no /proc: the peak then counts from the start of the process
        pass
    return _status("VmRSS") or _lifetime_peak()


def _peak(device: str) -> int:
    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else _status("VmHWM") or _lifetime_peak()


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", read_text("/proc/self/status"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _lifetime_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    run_main(main)
