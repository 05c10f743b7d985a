"""Claim: a training step of a sparse decoder costs little more than its dense twin's, and less than Hugging Face's.

    python bench/train_step.py --out train.json         # 270M parameters, 100M active: 15 GiB, about half an hour
    python bench/train_step.py --dtypes fp32 --rounds 3 --hf grouped_mm

A step is forward, loss, backward, clipping and AdamW, on the same batch of random tokens for all contenders of a round,
another one every round. moesaic and the dense twin (``moesaic.models.twin``: equal active parameters) take the project's own
``train_step``, balancing losses and readings included. Hugging Face's model is Mixtral with copies of the same weights in a
plain loop: cross entropy, its own balancing loss with the same factor, ``clip_grad_norm_``, the same fused AdamW with the same
settings; one model for all its back ends. "bf16" is what the project's training does: fp32 parameters, bf16 activations. At
Hugging Face that is ``torch.autocast``, which leaves the products of ``grouped_mm`` in fp32; so there is a second model with
parameters, gradients and optimiser in bf16 ("bf16 weights"): another training, of less precision, but the fastest to be had.

Where the time goes is read off hooks that all contenders have alike: forward is the model's call; "loss" ends when the
gradient of the logits is known, and at moesaic holds the step's readings; backward ends with the last parameter's gradient,
"clip" with the start of AdamW; "rest" is what follows it. A sparse model has more parameters than its twin, and each step
clears, clips and updates all of them: AdamW alone reads and writes 28 bytes of each in fp32.
The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    BenchError,
    Shape,
    about,
    common_arguments,
    finish,
    positive,
    prepare_device,
    progress,
    run_main,
)
from hf_models import (
    backend_of,
    check_logits,
    check_memory,
    draw_decoder,
    hf_model,
    model_arguments,
    model_of,
    our_name,
    parameters,
    set_backend,
    sizes_of,
)
from peers import asked_hf, hf_batched_bytes
from rounds import Laps, Run, fastest, in_rounds, medians, summary, times_faster, verdict
from torch import nn

from moesaic.data.packing import Batch
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder
from moesaic.models.twin import dense_twin
from moesaic.train.optim import OptimConfig, make_optimizer
from moesaic.train.step import train_step

OPTIM = OptimConfig(lr=1e-4)
PARTS = ("forward", "loss", "backward", "clip", "optimiser", "rest")
TWIN = "dense twin"


def main() -> None:
    """Measure one dtype after the other, print tables and verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_arguments(parser, dim=768, hidden=256, experts=32, heads=(12, 4))
    parser.add_argument("--batch", type=positive, default=8, help="rows")
    parser.add_argument("--seq", type=positive, default=256, help="positions of a row")
    common_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.layers, args.dim, args.hidden, args.experts, args.k, args.heads = 2, 64, 32, 8, 2, [4, 2]
        args.vocab, args.batch, args.seq, args.rounds = 300, 2, 24, 2
    if prepare_device(args).type != "cpu":
        raise BenchError("This benchmark trains on the CPU only.")
    args.hf = asked_hf(args.hf)
    config = model_of(args, args.seq)
    check_memory(args, {dtype: state_bytes(config, dtype, hf=bool(args.hf)) for dtype in args.dtypes})
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        row = measure(config, dtype, args)
        print(table(row), flush=True)
        rows.append(row)
        gc.collect()  # the next dtype's models need the memory
    found = targets(rows)
    print("\nTargets (medians of ratios within rounds)")
    print("\n".join(one["text"] for one in found))
    settings = {"batch": args.batch, "seq": args.seq, "rounds": args.rounds, "quick": args.quick}
    finish({"rows": rows, "targets": found, **settings, **about(torch.device("cpu"))}, args.out)


def state_bytes(config: ModelConfig, dtype: str, *, hf: bool) -> int:
    """Weights and AdamW's two moments of all contenders, and the gradients of the one whose turn it is."""
    sparse, dense = parameters(config), parameters(dense_twin(config))
    copies = (12 + (12 if hf else 0) + (6 if hf and dtype == "bf16" else 0)) * sparse
    return copies + 12 * dense + 4 * sparse


# ---- contenders ----------------------------------------------------------------------------------------------------


class StepClock:
    """Seconds of the parts of a step, read off hooks of a model and its optimiser."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.at: dict[str, float] = {}
        model.register_forward_pre_hook(lambda _module, _inputs: self._mark("start"))
        model.register_forward_hook(self._after_forward)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda _parameter: self._mark("backward")
            )
        optimizer.register_step_pre_hook(lambda _optimizer, _args, _kwargs: self._mark("clip"))
        optimizer.register_step_post_hook(lambda _optimizer, _args, _kwargs: self._mark("optimiser"))

    def time(self, step: Callable[[], object]) -> Laps:
        """One step's seconds, in all ("step") and by part; what comes before the model's call counts as forward."""
        start = time.perf_counter()
        step()
        self._mark("rest")
        ends = [start, *(self.at[part] for part in PARTS)]
        parts = {part: ends[i + 1] - ends[i] for i, part in enumerate(PARTS)}
        return {"step": self.at["rest"] - start, **parts}

    def _mark(self, part: str) -> None:
        self.at[part] = time.perf_counter()

    def _after_forward(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._mark("forward")
        output.logits.register_hook(lambda _grad: self._mark("loss"))


def our_runs(model: Decoder, backends: Mapping[str, str], batches: list[Batch]) -> dict[str, Run]:
    """moesaic's training step by contender, whose back ends (of the experts, if there are any) take turns with one model."""
    optimizer = make_optimizer(model, OPTIM)
    clock = StepClock(model, optimizer)

    def run_with(backend: str) -> Run:
        def run(turn: int) -> Laps:
            set_backend(model, backend)
            batch = batches[turn]
            return clock.time(lambda: train_step(model, optimizer, [batch], lr=OPTIM.lr, clip=OPTIM.clip, step=turn))

        return run

    return {name: run_with(backend) for name, backend in backends.items()}


def hf_runs(hf: Any, backends: list[str], batches: list[Batch], *, autocast: bool) -> dict[str, Run]:
    """A plain training loop over Hugging Face's model; its back ends take turns with one model and one optimiser."""
    optimizer = make_optimizer(hf, OPTIM)
    clock = StepClock(hf, optimizer)
    parameters = list(hf.parameters())

    def step(batch: Batch) -> None:
        hf.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = hf(input_ids=batch.ids_BS, use_cache=False, output_router_logits=True)
        loss = F.cross_entropy(out.logits.flatten(0, 1).float(), batch.targets_BS.flatten())
        loss = loss + hf.router_aux_loss_coef * out.aux_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def run_with(backend: str) -> Run:
        def run(turn: int) -> Laps:
            with backend_of(hf, backend):
                return clock.time(lambda: step(batches[turn]))

        return run

    return {backend: run_with(backend) for backend in backends}


def draw_batches(config: ModelConfig, args: argparse.Namespace) -> list[Batch]:
    """One batch of random tokens per round, without padding and with one document per row."""
    rng = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(args.rounds):
        drawn = torch.randint(config.vocab_size, (args.batch, args.seq + 1), generator=rng)
        zero_BS = torch.zeros(args.batch, args.seq, dtype=torch.int64)
        batches.append(Batch(drawn[:, :-1], drawn[:, 1:], torch.ones_like(zero_BS, dtype=torch.bool), zero_BS, zero_BS))
    return batches


# ---- measuring -----------------------------------------------------------------------------------------------------


def measure(config: ModelConfig, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: all contenders of one dtype."""
    backends, left_out = _hf_backends(config, args)
    turns = len(args.backends) + 1 + len(backends) * (2 if dtype == "bf16" else 1)
    with progress(turns * (args.rounds + 1) + 1, f"{dtype} turn") as (say, advance):
        say("drawing weights")
        batches = draw_batches(config, args)
        model = draw_decoder(config, torch.float32)
        twin = draw_decoder(dense_twin(config), torch.float32)
        runs: dict[str, Run] = {}
        errors: dict[str, Any] = {}
        if backends:
            ids_BS = batches[0].ids_BS[:1, :64]
            hf = hf_model(model)
            errors["hf"] = check_logits(model, hf, ids_BS)
            mixed = " autocast" if dtype == "bf16" else ""
            for backend, run in hf_runs(hf, backends, batches, autocast=dtype == "bf16").items():
                runs[f"hf {backend}{mixed}"] = run
            if dtype == "bf16":
                low = hf_model(model, dtype=torch.bfloat16)
                for backend, run in hf_runs(low, backends, batches, autocast=False).items():
                    runs[f"hf {backend} bf16 weights"] = run
        if dtype == "bf16":
            model.compute_dtype = twin.compute_dtype = torch.bfloat16
        advance()
        ours = our_runs(model, {our_name(backend): backend for backend in args.backends}, batches)
        dense = our_runs(twin, {TWIN: "auto"}, batches)
        laps = in_rounds({**ours, **dense, **runs}, args.rounds, limit_s=args.limit, say=say, advance=advance)
    return _row(model, twin, dtype, args, laps, {"logits": errors, "left_out": left_out})


def _hf_backends(config: ModelConfig, args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Back ends that fit into memory, and why others do not."""
    moe = config.moe
    assert moe is not None
    shape = Shape(config.dim, int(moe.hidden), int(moe.num_experts), int(moe.k))  # type: ignore[arg-type]
    needed = hf_batched_bytes(shape, args.batch * args.seq, torch.float32, backward=True) * config.num_layers / 2**30
    if "batched_mm" in args.hf and needed > args.memory * 0.2:
        why = f"copies of the rows' weights would take {needed:.0f} GiB"
        return [name for name in args.hf if name != "batched_mm"], {"hf batched_mm": why}
    return list(args.hf), {}


def _row(
    model: Decoder,
    twin: Decoder,
    dtype: str,
    args: argparse.Namespace,
    laps: Mapping[str, list[Laps | None]],
    more: dict[str, Any],
) -> dict[str, Any]:
    step, mine = summary(laps, "step"), next(iter(laps))
    tokens = args.batch * args.seq
    return {
        "dtype": dtype,
        **sizes_of(model),
        "twin_parameters": sizes_of(twin)["total_parameters"],
        "tokens": tokens,
        "seconds": step,
        "tokens_per_s": {name: tokens / found["median"] for name, found in step.items()},
        "split": {name: medians(one, PARTS) for name, one in laps.items()},
        "over_twin": {name: times_faster(one, laps[TWIN], "step") for name, one in laps.items() if name != TWIN},
        "times_faster": {name: times_faster(one, laps[mine], "step") for name, one in laps.items() if name != mine},
        "best_hf": fastest(step, "hf "),
        **more,
    }


# ---- words ---------------------------------------------------------------------------------------------------------


def table(row: dict[str, Any]) -> str:
    """One dtype: whole steps, then where they go."""
    total, active, twin = (row[f"{name}_parameters"] / 1e6 for name in ("total", "active", "twin"))
    head = (
        f"\n{row['dtype']}: {total:,.1f}M parameters, {active:,.1f}M active, twin {twin:,.1f}M; {row['tokens']} tokens"
    )
    columns = f"{'':<28}{'s/step (min-max)':>24}{'tok/s':>9}{'over twin (min-max)':>22}  " + "".join(
        f"{p:>10}" for p in PARTS
    )
    out = [head, columns]
    for name, found in row["seconds"].items():
        span = f"{found['median']:.3f} ({found['min']:.3f}-{found['max']:.3f})"
        over = row["over_twin"].get(name)
        tax = "" if over is None else f"{over['median']:.2f} ({over['min']:.2f}-{over['max']:.2f})"
        parts = "".join(f"{row['split'][name][part]:>10.3f}" for part in PARTS)
        out.append(f"{name:<28}{span:>24}{row['tokens_per_s'][name]:>9.0f}{tax:>22}  {parts}")
    out += [f"{name} left out: {why}" for name, why in row["left_out"].items()]
    for name, error in row["logits"].items():
        out.append(f"logits at the start, {name}: differ by {error['max']:.1e} of the largest at most, fp32")
    rounds = max(found["rounds"] for found in row["seconds"].values())
    slow = {name: found["rounds"] for name, found in row["seconds"].items() if found["rounds"] < rounds}
    out += [f"{name} is slow: {count} of {rounds} rounds" for name, count in slow.items()]
    return "\n".join(out)


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Target 7 for every dtype, and how much faster than Hugging Face's best."""
    found = []
    for row in rows:
        mine = next(iter(row["seconds"]))
        value = float(row["over_twin"][mine]["median"])
        found.append(verdict(7, f"{row['dtype']} training step over the dense twin's", value, "<= 1.25"))
        best = row["best_hf"]
        faster = None if best is None else float(row["times_faster"][best]["median"])
        found.append(verdict(7, f"{row['dtype']} times faster than Hugging Face's best ({best})", faster, None))
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    run_main(main)
