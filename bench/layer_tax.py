"""Claim: a sparse layer costs what its active arithmetic costs, against a dense twin and against Hugging Face's back ends.

    python bench/layer_tax.py --out tax.json                                    # every cell: hours
    python bench/layer_tax.py --tokens 2048 --modes fw+bw --loads balanced      # targets 1 to 3 but for skew
    python bench/layer_tax.py --tokens 1 16 --modes fw                          # decode

A cell is a shape (D, H, E, k), a dtype, T tokens, forward without gradient ("fw") or forward and backward with gradients of
input and of all weights ("fw+bw"), and a balanced or Zipf-skewed load (``loads.py``; all contenders compute the routing).
In a cell all contenders run in turns (``common.py``); sparse ones first prove that they compute the same layer
(``agreement.py``). Gradients are dropped before each call, outside of the timing. tax = time / time of the dense twin.

T <= 16 is decode, where weights come from memory, as they do in a model of many layers: each call takes another input and
the next of several layers, so many that the weights which single tokens use in all of them exceed 4 times the last-level
cache. ``--warm`` keeps to one layer and one input instead. Hugging Face's ``batched_mm`` copies the weights of every row's
expert; it is left out where those copies would take more than 0.4 of ``--memory``.
For fw+bw at T > 16 the layer's time is split: the router is timed alone, forward and backward; the other parts report
themselves (``moesaic.ops.phases``). The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import tax_report
import torch
from agreement import check, reference
from common import (
    DTYPES,
    Clock,
    Seconds,
    Shape,
    about,
    common_arguments,
    finish,
    interleave,
    known,
    last_level_cache,
    positive,
    prepare_device,
    progress,
    ratio,
    run_main,
    shape,
    spread,
)
from loads import LOADS, draw_choice, draw_input, skew
from peers import (
    HF_BACKENDS,
    Peer,
    Turns,
    Weights,
    asked_hf,
    cuda_peers,
    dense_peers,
    draw_weights,
    hf_batched_bytes,
    hf_peers,
    moesaic_peer,
)
from torch import Tensor

from moesaic.ops.grouped import BACKENDS
from moesaic.ops.phases import listen
from moesaic.plan.plan import RoutingPlan

MODES = ("fw", "fw+bw")
DECODE = 16  # tokens up to which a call is bound by reading weights
INPUTS = 16  # different inputs in decode


def main() -> None:
    """Measure all cells, print tables, means and verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape, nargs="+", default=list(tax_report.SHAPES), metavar="D,H,E,k")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[2048, 256, 16, 1])
    parser.add_argument("--dtypes", choices=tuple(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--loads", choices=LOADS, nargs="+", default=list(LOADS))
    parser.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--backends", choices=BACKENDS, nargs="+", default=["auto"], help="of moesaic's layer")
    parser.add_argument("--hf", choices=("none", *HF_BACKENDS), nargs="+", default=list(HF_BACKENDS))
    parser.add_argument(
        "--warm", action="store_true", help="decode with one layer and one input: weights stay in cache"
    )
    parser.add_argument("--memory", type=float, default=12.0, metavar="GIB", help="stay below this")
    parser.add_argument(
        "--limit", type=float, default=60.0, metavar="S", help="longest time for one contender in a cell"
    )
    common_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.tokens, args.rounds = [Shape(64, 32, 16, 4), Shape(32, 16, 8, 2)], [48, 1], 2
    device = prepare_device(args)
    args.hf = asked_hf(args.hf)
    rows: list[dict[str, Any]] = []
    total = len(args.shapes) * len(args.dtypes) * len(args.tokens) * len(args.loads) * len(args.modes)
    with progress(total, "cell") as (say, advance):
        for layer, dtype in itertools.product(args.shapes, args.dtypes):
            print(tax_report.heading(layer, dtype, args.backends, args.hf, device.type == "cuda"), flush=True)
            bench = Bench(layer, dtype, device, args)
            for tokens, load in itertools.product(args.tokens, args.loads):
                for row in bench.cells(tokens, load, say):
                    rows.append(row)
                    print(tax_report.line(row), flush=True)
                    advance()
    print(tax_report.summary(rows), flush=True)
    settings = {"rounds": args.rounds, "warm": args.warm, "quick": args.quick}
    finish({"rows": rows, "targets": tax_report.targets(rows), **settings, **about(device)}, args.out)


class Bench:
    """All cells of one shape and dtype; the weights are drawn once."""

    def __init__(self, layer: Shape, dtype: str, device: torch.device, args: argparse.Namespace) -> None:
        self.shape, self.dtype_name, self.dtype, self.device, self.args = layer, dtype, DTYPES[dtype], device, args
        self.clock = Clock(device)
        self.weights: list[Weights] = []
        self.layers: dict[str, list[Peer]] = {}
        self._grow(1)

    def _grow(self, copies: int) -> None:
        """Have at least so many layers of each contender."""
        for copy in range(len(self.weights), copies):
            first = self.weights[0] if self.weights else draw_weights(self.shape, self.dtype, self.device)
            weights = first.rolled(copy) if copy else first
            made = dense_peers(self.shape, self.dtype, self.device, seed=copy)
            for backend in self.args.backends:
                made[tax_report.ours(backend)] = moesaic_peer(self.shape, weights, backend)
            made |= hf_peers(self.shape, weights, self.args.hf) if self.args.hf else {}
            made |= cuda_peers(self.shape, weights) if self.device.type == "cuda" else {}
            self.weights.append(weights)
            for name, peer in made.items():
                self.layers.setdefault(name, []).append(peer)

    def copies(self, tokens: int) -> tuple[int, int]:
        """Layers in rotation, and how many it takes to be cold: in decode, single tokens then use 4 times the cache."""
        if tokens > DECODE or self.args.warm:
            return 1, 1
        wanted = -(-4 * last_level_cache(self.device) // (self.shape.active_parameters * self.dtype.itemsize))
        one = self.shape.expert_parameters * self.dtype.itemsize * (2 if self.args.hf else 1)
        fit = int(self.args.memory * 2**30 * 0.6 / one)
        return max(1, min(wanted, 4 if self.args.quick else wanted, fit)), wanted

    def cells(self, tokens: int, load: str, say: Any) -> list[dict[str, Any]]:
        """One row per mode."""
        copies, wanted = self.copies(tokens)
        self._grow(copies)
        rng = torch.Generator().manual_seed(tokens)
        inputs = []
        for _ in range(INPUTS if tokens <= DECODE and not self.args.warm else 1):
            choice_TK = draw_choice(load, tokens, self.shape.E, self.shape.k, rng)
            x_TD = draw_input(self.weights[0].router_ED.cpu(), choice_TK, rng)
            inputs.append(x_TD.to(self.device, self.dtype))
        grad_TD = torch.randn(tokens, self.shape.D, generator=rng).to(self.device, self.dtype)
        backward = "fw+bw" in self.args.modes
        names, left_out = self._who(tokens, backward)
        errors = self._agree(names, inputs[0], grad_TD if backward else None, copies, say)
        loads = self._loads(inputs)
        rows = []
        for mode in self.args.modes:
            grad = grad_TD if mode == "fw+bw" else None
            contenders = {name: Turns(self.layers[name][:copies], inputs, grad) for name in names}
            with torch.set_grad_enabled(grad is not None):
                seconds = interleave(
                    contenders,
                    self.args.rounds,
                    self.clock,
                    block_s=0.002 if self.args.quick else 0.05,
                    limit_s=self.args.limit,
                    warm_calls=max(3, copies, len(inputs)),
                    say=say,
                )
            row = self._row(seconds, tokens, load, mode)
            row |= {**loads, "layers": copies, "layers_wanted": wanted, "inputs": len(inputs)}
            row |= {"errors": errors, "left_out": left_out}
            if grad is not None and tokens > DECODE and self.device.type != "cuda":
                row["split"] = self._split(inputs[0], grad)
            rows.append(row)
        return rows

    def _who(self, tokens: int, backward: bool) -> tuple[list[str], dict[str, str]]:
        """Who takes part, and who does not and why."""
        names, left_out = list(self.layers), {}
        needed = hf_batched_bytes(self.shape, tokens, self.dtype, backward=backward) / 2**30
        if "hf batched_mm" in names and needed > self.args.memory * 0.4:
            names.remove("hf batched_mm")
            left_out["hf batched_mm"] = f"copies of the rows' weights would take {needed:.0f} GiB"
        return names, left_out

    @torch.no_grad()
    def _loads(self, inputs: Sequence[Tensor]) -> dict[str, float]:
        """Means over the inputs: rows of the busiest expert over the mean, and experts with any row."""
        layer = self.layers[tax_report.ours(self.args.backends[0])][0].module
        counts = [layer(x_TD)[1].counts_E for x_TD in inputs]
        skews, used = [skew(counts_E) for counts_E in counts], [int((counts_E > 0).sum()) for counts_E in counts]
        return {"skew": statistics.fmean(skews), "experts_used": statistics.fmean(used)}

    def _agree(
        self, names: Sequence[str], x_TD: Tensor, grad_TD: Tensor | None, copies: int, say: Any
    ) -> dict[str, dict[str, float]]:
        """Errors of each sparse contender against the reference: the first layer with gradients, the others' outputs."""
        errors: dict[str, dict[str, float]] = {}
        for copy in range(copies):
            grad = grad_TD if copy == 0 else None
            truth = reference(x_TD, self.weights[copy], self.shape.k, grad)
            for name in names:
                if not name.startswith("dense"):
                    say(f"checking {name}")
                    found = check(name, self.layers[name][copy], x_TD, truth, grad)
                    errors.setdefault(name, found)
        return errors

    def _row(self, seconds: dict[str, Seconds], tokens: int, load: str, mode: str) -> dict[str, Any]:
        mine, hf = seconds[tax_report.ours(self.args.backends[0])], [n for n in seconds if n.startswith("hf ")]
        flops = self.shape.flops(tokens, backward=mode == "fw+bw")
        dense: Seconds = [min(known(pair)) for pair in zip(seconds["dense"], seconds["dense (moesaic)"], strict=True)]
        row: dict[str, Any] = {
            "shape": self.shape.label,
            "dtype": self.dtype_name,
            "tokens": tokens,
            "mode": mode,
            "load": load,
            "seconds": {name: spread(values) | {"all": values} for name, values in seconds.items()},
            "tflop_per_s": {name: flops / spread(values)["median"] / 1e12 for name, values in seconds.items()},
            "tax": {name: ratio(values, seconds["dense"]) for name, values in seconds.items() if name != "dense"},
            "tax_fastest_dense": ratio(mine, dense),
            "times_faster_than": {name: ratio(seconds[name], mine) for name in hf},
        }
        if hf:
            row["best_hf"] = min(hf, key=lambda name: row["seconds"][name]["median"])
        return row

    def _split(self, x_TD: Tensor, grad_TD: Tensor) -> dict[str, float]:
        """Median seconds of the layer's parts in forward and backward; "rest" is what no part reports."""
        peer = self.layers[tax_report.ours(self.args.backends[0])][0]
        whole, leaf = Turns([peer], [x_TD], grad_TD), x_TD.detach().requires_grad_()
        rounds: list[dict[str, float]] = []

        def route() -> None:
            plan = peer.module.route(leaf)  # type: ignore[operator]
            assert isinstance(plan, RoutingPlan)
            torch.autograd.backward(plan.weight_N, torch.ones_like(plan.weight_N))

        for _ in range(self.args.rounds):
            whole.prepare()
            with listen() as seconds:
                total = self.clock.seconds(whole.run)
            whole.rest()
            leaf.grad = None
            parts = {"router": self.clock.seconds(route), **seconds}
            rounds.append({"total": total, **parts, "rest": total - sum(parts.values())})
        return {name: spread([one.get(name) for one in rounds])["median"] for name in rounds[0]}


if __name__ == "__main__":
    torch.manual_seed(0)
    run_main(main)
