"""Claim: at fixed active FLOPs, time hardly grows with the number of experts, memory only by parameters and their gradients.

    python bench/scaling.py --plot docs/scaling.svg
    python bench/scaling.py --experts 8 64 512 --dtypes bf16

Layers of one D, H and k with E = 8 to 1024 experts and a balanced load of T = 4096 tokens, forward and backward with gradients
of input and of all weights; Hugging Face's ``grouped_mm`` on the same weights; a dense twin of equal active FLOPs, which knows
no E. All sizes and contenders are timed in turns (``common.py``) after proving that they compute the same layer.
Peak memory comes from processes of their own, see ``memory.py``: resident memory at the peak of forward and backward, beyond
what was there before (weights and inputs). "besides" is that peak less the gradients of parameters: hidden activations,
buffers and what the router keeps, which is of size T x E. If memory grows only by parameters and gradients, it is flat.
The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from agreement import check, reference
from common import (
    DTYPES,
    BenchError,
    Clock,
    Contender,
    Shape,
    about,
    common_arguments,
    finish,
    interleave,
    milliseconds,
    positive,
    prepare_device,
    progress,
    ratio,
    run_main,
    spread,
)
from loads import draw_choice, draw_input, skew
from loglog import Line, Panel, draw
from memory import MIB, Spec, peak_of
from peers import Turns, asked_hf, dense_peers, draw_weights, hf_peers, moesaic_peer

HF = "hf grouped_mm"
COLOURS = {"moesaic": "#b4432f", HF: "#3b6fb6", "dense": "#777777"}


def main() -> None:
    """Measure, print the tables and verdicts, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=positive, default=512)
    parser.add_argument("--hidden", type=positive, default=256)
    parser.add_argument("--k", type=positive, default=8)
    parser.add_argument("--experts", type=positive, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--tokens", type=positive, default=4096)
    parser.add_argument("--dtypes", choices=tuple(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--hf", choices=("none", "grouped_mm"), default="grouped_mm")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write an SVG here")
    common_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.dim, args.hidden, args.k, args.experts, args.tokens, args.rounds = 32, 16, 2, [4, 8], 64, 2
    device = prepare_device(args)
    args.hf = asked_hf([args.hf])
    if args.k > min(args.experts):
        raise BenchError(f"--k {args.k} experts per token do not fit into {min(args.experts)} experts.")
    shapes = [Shape(args.dim, args.hidden, E, args.k) for E in sorted(set(args.experts))]
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        found = measure(shapes, dtype, args, device)
        print(table(found, dtype, args), flush=True)
        rows += found
    results = [one for dtype in args.dtypes for one in verdicts([row for row in rows if row["dtype"] == dtype])]
    for one in results:
        print(one["text"])
    if args.plot is not None:
        args.plot.write_text(picture(rows), encoding="utf-8")
    sizes = {
        "D": args.dim,
        "H": args.hidden,
        "k": args.k,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "quick": args.quick,
    }
    finish({"rows": rows, "targets": results, **sizes, **about(device)}, args.out)


# ---- measuring -----------------------------------------------------------------------------------------------------


def measure(
    shapes: Sequence[Shape], dtype: str, args: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """One row per contender and E (E None for the dense twin)."""
    names = ["moesaic", *(f"hf {backend}" for backend in args.hf)]
    with progress(len(shapes) * (1 + len(names)) + 2, f"{dtype} step") as (say, advance):
        contenders, skews = _contenders(shapes, dtype, args, device, say, advance)
        block_s = 0.002 if args.quick else 0.05
        seconds = interleave(contenders, args.rounds, Clock(device), block_s=block_s, say=say)
        contenders.clear()  # gigabytes that the processes below need
        advance()
        rows = []
        for name, E in [*itertools.product(names, [one.E for one in shapes]), ("dense", None)]:
            say(f"memory of {name} {E or ''}")
            key = name if E is None else f"{name} E={E}"
            spec = Spec(
                name,
                args.dim,
                args.hidden,
                E or args.k,
                args.k,
                dtype,
                args.tokens,
                torch.get_num_threads(),
                device.type,
            )
            peak = peak_of(spec)
            advance()
            rows.append(
                {
                    "contender": name,
                    "E": E,
                    "dtype": dtype,
                    "skew": skews.get(E),
                    "seconds": spread(seconds[key]) | {"all": seconds[key]},
                    "tax": ratio(seconds[key], seconds["dense"]),
                    **peak,
                    "besides_gradients": peak["peak"] - peak["gradients"],
                }
            )
    return rows


def _contenders(
    shapes: Sequence[Shape],
    dtype: str,
    args: argparse.Namespace,
    device: torch.device,
    say: Callable[[str], None],
    advance: Callable[[], None],
) -> tuple[dict[str, Contender], dict[int | None, float]]:
    """Everybody who is timed, checked; and the load that each E reached."""
    contenders: dict[str, Contender] = {}
    skews: dict[int | None, float] = {}
    rng = torch.Generator().manual_seed(0)
    grad_TD = torch.randn(args.tokens, args.dim, generator=rng).to(device, DTYPES[dtype])
    for layer in shapes:
        say(f"building and checking E={layer.E}")
        weights = draw_weights(layer, DTYPES[dtype], device)
        choice_TK = draw_choice("balanced", args.tokens, layer.E, layer.k, rng)
        x_TD = draw_input(weights.router_ED.cpu(), choice_TK, rng).to(device, DTYPES[dtype])
        peers = {"moesaic": moesaic_peer(layer, weights)} | (hf_peers(layer, weights, args.hf) if args.hf else {})
        truth = reference(x_TD, weights, layer.k, grad_TD)
        for name, peer in peers.items():
            check(f"{name} with E={layer.E}", peer, x_TD, truth, grad_TD)
            contenders[f"{name} E={layer.E}"] = Turns([peer], [x_TD], grad_TD)
        with torch.no_grad():
            skews[layer.E] = skew(peers["moesaic"].module(x_TD)[1].counts_E)
        advance()
    dense = dense_peers(shapes[0], DTYPES[dtype], device)["dense"]
    contenders["dense"] = Turns([dense], [x_TD], grad_TD)
    return contenders, skews


# ---- words and picture ---------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]], dtype: str, args: argparse.Namespace) -> str:
    """Milliseconds with their range, tax, and MiB."""
    out = [f"\nD {args.dim}  H {args.hidden}  k {args.k}  T {args.tokens}  {dtype}    forward + backward"]
    out.append(
        f"{'':<16}{'E':>6}{'ms':>10}{'min-max':>18}{'tax':>7}{'load':>7}"
        f"{'weights MiB':>13}{'gradients':>11}{'peak':>9}{'besides':>9}"
    )
    for row in rows:
        s = row["seconds"]
        bounds = f"{milliseconds(s['min'])}-{milliseconds(s['max'])}"
        load = "" if row["skew"] is None else f"{row['skew']:.2f}"
        mib = [row[c] / MIB for c in ("parameters", "gradients", "peak", "besides_gradients")]
        out.append(
            f"{row['contender']:<16}{row['E'] or '':>6}{milliseconds(s['median']):>10}{bounds:>18}{row['tax']['median']:>7.2f}"
            f"{load:>7}{mib[0]:>13.1f}{mib[1]:>11.1f}{mib[2]:>9.1f}{mib[3]:>9.1f}"
        )
    return "\n".join(out)


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Growth of time and of memory besides gradients from the smallest E to 512 (or the largest measured), per contender."""
    out = []
    for name in dict.fromkeys(row["contender"] for row in rows if row["E"] is not None):
        mine = [row for row in rows if row["contender"] == name and row["E"] <= 512]
        if len(mine) < 2:
            continue
        first, last = mine[0], mine[-1]
        grown = ratio(last["seconds"]["all"], first["seconds"]["all"])["median"]
        more = last["besides_gradients"] - first["besides_gradients"]
        share = more / first["besides_gradients"]
        text = f"{name} {first['dtype']}, E {first['E']} to {last['E']}: time x{grown:.2f}"
        text += f", memory besides parameters and gradients {more / MIB:+.1f} MiB ({share:+.0%})"
        is_target = name == "moesaic" and (first["E"], last["E"]) == (8, 512)
        met = grown <= 1.5 and share <= 0.1 if is_target else None
        if is_target:
            text += f"  (target 5: time at most x1.50, memory besides at most +10%)  {'met' if met else 'NOT MET'}"
        out.append(
            {"contender": name, "dtype": first["dtype"], "time": grown, "memory": share, "met": met, "text": text}
        )
    return out


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """Time on the left, memory on the right, one row of panels per dtype."""
    panels = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = [row for row in rows if row["dtype"] == dtype]
        sizes = sorted({row["E"] for row in mine if row["E"] is not None})
        times, total = [], []
        for name in dict.fromkeys(row["contender"] for row in mine):
            group = [row for row in mine if row["contender"] == name]
            flat = group * len(sizes) if name == "dense" else group  # the twin knows no E: a level line
            dash = "6 4" if name == "dense" else ""
            times.append(Line(name, COLOURS[name], sizes, [row["seconds"]["median"] * 1e3 for row in flat], dash))
            total.append(Line(name, COLOURS[name], sizes, [(r["parameters"] + r["peak"]) / MIB for r in flat], dash))
        ours = [row for row in mine if row["contender"] == "moesaic"]
        least = [(row["parameters"] + row["gradients"]) / MIB for row in ours]
        total.append(Line("parameters and gradients alone", "#2f7d4f", sizes, least, "2 4"))
        panels.append(
            [
                Panel(f"{dtype}: forward and backward, ms", times),
                Panel(f"{dtype}: weights and peak memory, MiB", total),
            ]
        )
    about_it = "Time and peak memory of a sparse layer at fixed active FLOPs against its number of experts, log-log."
    return draw(panels, "experts E", about_it)


if __name__ == "__main__":
    torch.manual_seed(0)
    run_main(main)
