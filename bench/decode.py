"""Claim: decoding comes near what reading the active weights costs, and is far ahead of Hugging Face on the same weights.

    python bench/decode.py --out decode.json           # 1.27B parameters, 216M active: 12 GiB, some 20 minutes
    python bench/decode.py --dtypes bf16 --rounds 3

A prompt is read (prefill: until the first new token is known) and continued greedily, one stream. Contenders: moesaic's
``generate_ids``; Hugging Face's Mixtral with copies of the same weights and each of its expert back ends, both through
``model.generate(use_cache=True, do_sample=False)`` and through the shortest loop over its forward and cache that a user could
write ("loop"). ``batched_mm`` copies the weights of every row's expert, tens of GiB for a prompt, so there ``grouped_mm``
reads the prompt. All are timed from outside in the same way: a clock is read when a token is known. In each round all get the
same prompt, another one every round; ratios are within rounds. Before anything is timed, logits are compared, and after it the
texts: in fp32 they must be the same, unless two tokens were equally likely to rounding.

Share of the limit: the bytes of weights that a token uses (``moesaic.cost.traffic``) over the time per token, over
the best read bandwidth seen in the run. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from common import (
    DTYPES,
    BenchError,
    about,
    common_arguments,
    finish,
    positive,
    prepare_device,
    progress,
    run_main,
)
from greedy import Text, Writer, writers
from hf_models import (
    backend_of,
    check_logits,
    check_memory,
    draw_decoder,
    hf_model,
    model_arguments,
    model_of,
    parameters,
    sizes_of,
)
from peers import asked_hf
from rounds import Laps, Run, fastest, in_rounds, summary, times_faster, verdict
from torch import Tensor

from moesaic.cost.speed import best_rate, read_gb_per_s
from moesaic.cost.traffic import cache_bytes, decode_bytes
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder

TIE = 1e-3  # two tokens whose fp32 logits differ by less than this share of the largest may change places
ELSEWHERE = "llama.cpp, f16 weights, a like machine, measured elsewhere: 78 tokens/s (context, not part of this run)"


def main() -> None:
    """Measure one dtype after the other, print tables and verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_arguments(parser, dim=1024, hidden=512, experts=64, heads=(16, 4))
    parser.add_argument("--prompt", type=positive, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=positive, default=64, help="tokens to generate, at least 2")
    common_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.layers, args.dim, args.hidden, args.experts, args.k, args.heads = 2, 64, 32, 8, 2, [4, 2]
        args.vocab, args.prompt, args.new, args.rounds = 300, 24, 6, 2
    if prepare_device(args).type != "cpu":
        raise BenchError("This benchmark decodes on the CPU only.")
    if args.new < 2:
        raise BenchError("--new 1 leaves nothing to time: the first new token belongs to the prompt.")
    args.hf = asked_hf(args.hf)
    config = model_of(args, args.prompt + args.new)
    copies = 2 if args.hf else 1
    check_memory(args, {dtype: parameters(config) * copies * DTYPES[dtype].itemsize for dtype in args.dtypes})
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        row = measure(config, dtype, args)
        print(table(row, args), flush=True)
        rows.append(row)
        gc.collect()  # the next dtype's models need the memory
    found = targets(rows)
    print("\nTargets (medians; Hugging Face's best of back ends and of generate or loop)")
    print("\n".join(one["text"] for one in found))
    print(ELSEWHERE)
    settings = {"prompt": args.prompt, "new": args.new, "rounds": args.rounds, "quick": args.quick}
    finish({"rows": rows, "targets": found, **settings, **about(torch.device("cpu"))}, args.out)


# ---- measuring -----------------------------------------------------------------------------------------------------


class Bandwidth:
    """The best read bandwidth seen so far, bytes per second: other work only ever makes it slower, so it is tried often."""

    def __init__(self, quick: bool) -> None:
        self.best, self.how = 0.0, ""
        self.sizes = [16 << 20] if quick else [128 << 20, 512 << 20, 1 << 30]

    def measure(self, budget_s: float = 0.2) -> None:
        """Sums of vectors of several sizes, and a matrix-vector product, which shares its work between threads otherwise."""
        for size in self.sizes:
            self._take(f"sum of {size >> 20} MiB", read_gb_per_s(size, budget_s) * 1e9)
        rows = self.sizes[-1] // 4 // 4096
        matrix_MN, vector_N = torch.ones(rows, 4096), torch.ones(4096)
        rate = best_rate(lambda: matrix_MN @ vector_N, matrix_MN.numel() * 4, budget_s)
        self._take(f"matrix-vector product of {self.sizes[-1] >> 20} MiB", rate)

    def _take(self, how: str, rate: float) -> None:
        if rate > self.best:
            self.best, self.how = rate, how


def measure(config: ModelConfig, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: all contenders of one dtype."""
    bandwidth = Bandwidth(args.quick)
    bandwidth.measure()
    names = len(args.backends) + 2 * len(args.hf)
    with progress(names * (args.rounds + 1) + 2, f"{dtype} turn") as (say, advance):
        say("drawing weights")
        model = draw_decoder(config, DTYPES[dtype])
        advance()
        rng = torch.Generator().manual_seed(1)
        prompts = torch.randint(config.vocab_size, (args.rounds, args.prompt), generator=rng).tolist()
        hf = hf_model(model) if args.hf else None
        say("comparing logits")
        errors = _compare(model, hf, args, torch.tensor([prompts[0][:64]]))
        advance()
        texts: dict[str, dict[int, Text]] = {}
        runs = {
            name: _run(name, write, prompts, args.new, texts)
            for name, write in writers(model, hf, args.backends, args.hf).items()
        }
        runs[next(iter(runs))] = _after(bandwidth.measure, runs[next(iter(runs))])
        laps = in_rounds(runs, args.rounds, limit_s=args.limit, say=say, advance=advance)
    bandwidth.measure()
    same = {name: _agreement(model, prompts, texts, name, dtype) for name in texts if name.startswith("hf ")}
    return _row(model, dtype, args, laps, bandwidth, {"logits": errors, "same_text": same})


def _compare(model: Decoder, hf: Any, args: argparse.Namespace, ids_BS: Tensor) -> dict[str, dict[str, float]]:
    """Differences of logits by back end; ``batched_mm`` on few tokens."""
    found = {}
    for backend in args.hf:
        with backend_of(hf, backend):
            found[backend] = check_logits(model, hf, ids_BS[:, :4] if backend == "batched_mm" else ids_BS)
    return found


def _run(name: str, write: Writer, prompts: list[Text], new: int, texts: dict[str, dict[int, Text]]) -> Run:
    """One contender's turn: writes, keeps the text, returns the times."""

    def run(turn: int) -> Laps:
        text, laps = write(prompts[turn], new)
        texts.setdefault(name, {})[turn] = text
        return laps

    return run


def _after(first: Callable[[], None], run: Run) -> Run:
    """A turn before which, outside of its timing, something else is done: bandwidth is measured once a round."""

    def both(turn: int) -> Laps:
        first()
        return run(turn)

    return both


def _agreement(
    model: Decoder, prompts: list[Text], texts: Mapping[str, dict[int, Text]], name: str, dtype: str
) -> dict[str, int]:
    """Over the rounds: new tokens before the first that differs from moesaic's, and all. In fp32 only ties may differ."""
    mine, equal, total = texts[next(iter(texts))], 0, 0
    for turn, text in texts[name].items():
        differ = [i for i, (a, b) in enumerate(zip(mine[turn], text, strict=True)) if a != b]
        first = differ[0] if differ else len(text)
        if differ and dtype == "fp32":
            gap = _gap(model, prompts[turn] + text[:first], mine[turn][first], text[first])
            if gap > TIE:
                raise BenchError(
                    f"In round {turn + 1} {name} writes another text than moesaic from new token {first + 1} on, and not by a "
                    f"tie (the logits differ by {gap:.1e} of the largest): the models are not the same."
                )
        equal, total = equal + first, total + len(text)
    return {"equal": equal, "of": total}


@torch.inference_mode()
def _gap(model: Decoder, ids: Text, one: int, other: int) -> float:
    """How far apart two next tokens are, relative to the largest logit."""
    logits_V = model(torch.tensor([ids])).logits[0, -1].float()
    return float((logits_V[one] - logits_V[other]).abs() / logits_V.abs().max())


def _row(
    model: Decoder,
    dtype: str,
    args: argparse.Namespace,
    laps: Mapping[str, list[Laps | None]],
    bandwidth: Bandwidth,
    checks: dict[str, Any],
) -> dict[str, Any]:
    parts = decode_bytes(model)
    weights = sum(parts.values())
    prefill, token = summary(laps, "prefill"), summary(laps, "token")
    mine = next(iter(laps))
    row: dict[str, Any] = {
        "dtype": dtype,
        **sizes_of(model),
        "weight_bytes": weights,
        "weight_bytes_by_part": parts,
        "cache_bytes": cache_bytes(model, args.prompt + args.new / 2),
        "read_bytes_per_s": bandwidth.best,
        "read_by": bandwidth.how,
        "limit_tokens_per_s": bandwidth.best / weights,
        "prefill_seconds": prefill,
        "token_seconds": token,
        "prefill_tokens_per_s": {name: args.prompt / found["median"] for name, found in prefill.items()},
        "tokens_per_s": {name: 1 / found["median"] for name, found in token.items()},
        "share_of_limit": {name: weights / found["median"] / bandwidth.best for name, found in token.items()},
        "median_token_seconds": {name: found["median"] for name, found in summary(laps, "median_token").items()},
        "times_faster": {name: times_faster(laps[name], laps[mine], "token") for name in laps if name != mine},
        "prefill_times_faster": {
            name: times_faster(laps[name], laps[mine], "prefill") for name in laps if name != mine
        },
        **checks,
    }
    row["best_hf"], row["best_hf_prefill"] = fastest(token, "hf "), fastest(prefill, "hf ")
    return row


# ---- words ---------------------------------------------------------------------------------------------------------


def table(row: dict[str, Any], args: argparse.Namespace) -> str:
    """One dtype."""
    total, active = row["total_parameters"] / 1e6, row["active_parameters"] / 1e6
    head = f"\n{row['dtype']}: {total:,.1f}M parameters, {active:,.1f}M active; prompt {args.prompt}, {args.new} new tokens"
    columns = f"{'':<26}{'prefill tok/s':>14}{'faster':>8}{'decode tok/s':>14}{'ms/token (min-max)':>26}"
    out = [head, f"{columns}{'faster':>8}{'of limit':>10}"]
    for name, token in row["token_seconds"].items():
        span = f"{token['median'] * 1e3:.2f} ({token['min'] * 1e3:.2f}-{token['max'] * 1e3:.2f})"
        out.append(
            f"{name:<26}{row['prefill_tokens_per_s'][name]:>14.1f}{_times(row['prefill_times_faster'], name):>8}"
            f"{row['tokens_per_s'][name]:>14.2f}{span:>26}{_times(row['times_faster'], name):>8}"
            f"{row['share_of_limit'][name]:>10.1%}"
        )
    out.append(
        f"limit: {row['weight_bytes'] / 1e6:,.1f} MB of weights per token at {row['read_bytes_per_s'] / 1e9:.1f} GB/s "
        f"({row['read_by']}) is {row['limit_tokens_per_s']:.2f} tokens/s; keys and values add {row['cache_bytes'] / 1e6:.1f} MB"
    )
    for backend, error in row["logits"].items():
        out.append(
            f"logits, hf {backend}: differ by {error['median']:.1e} of the largest (median), {error['max']:.1e} at most"
        )
    for name, same in row["same_text"].items():
        out.append(f"text, {name}: {same['equal']} of {same['of']} new tokens before the first that differs")
    rounds = max(found["rounds"] for found in row["token_seconds"].values())
    slow = {name: found["rounds"] for name, found in row["token_seconds"].items() if found["rounds"] < rounds}
    out += [f"{name} is slow: {count} of {rounds} rounds" for name, count in slow.items()]
    return "\n".join(out)


def _times(faster: dict[str, dict[str, float]], name: str) -> str:
    return f"{faster[name]['median']:.2f}x" if name in faster else ""


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Target 6, for every dtype; the decode goal is about bf16."""
    found = []
    for dtype, part, key, best, goal in (
        ("bf16", "decode", "times_faster", "best_hf", ">= 2.50"),
        ("fp32", "decode", "times_faster", "best_hf", None),
        ("bf16", "prefill", "prefill_times_faster", "best_hf_prefill", ">= 1.50"),
        ("fp32", "prefill", "prefill_times_faster", "best_hf_prefill", ">= 1.50"),
    ):
        row = next((row for row in rows if row["dtype"] == dtype and row[best] is not None), None)
        value = None if row is None else float(row[key][row[best]]["median"])
        found.append(verdict(6, f"{dtype} {part}, times faster than Hugging Face's best", value, goal))
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    run_main(main)
