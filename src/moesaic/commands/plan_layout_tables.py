"""How ``moesaic plan-layout`` looks: ranks alike in one line, then what is largest, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from moesaic.commands.info_tables import amount, new_table, print_table, ranges, size
from moesaic.cost.forecast import Forecast, RankForecast, Training
from moesaic.cost.layout_published import Figure
from moesaic.cost.layout_search import Candidate
from moesaic.cost.layout_time import StepTime
from moesaic.layout import ParallelConfig

_WIDEST = 28
_MEMORY = ("weights", "gradients", "optimizer", "gathered", "activations", "casts")
_TRAFFIC = ("exchange", "gradients", "weights", "slices", "stages")
_WORDS = {"gathered": "made whole", "casts": "16-bit copies", "exchange": "all-to-all", "slices": "tensor slices"}


def show_forecast(
    training: Training,
    parallel: ParallelConfig,
    found: Forecast,
    limit: int | None,
    time: StepTime | None,
    searched: bool,
) -> None:
    """Everything about one layout. ``searched``: what fits is listed below anyway."""
    print(
        f"{found.layout.describe()}; steps of {training.accumulate} micro-batch{'es' * (training.accumulate > 1)} of "
        f"{training.batch_size} rows of {training.seq_len:,} tokens, {training.rows * training.seq_len:,} tokens in all"
    )
    print(f"Kept per parameter: {training.precision.total} bytes ({training.precision.words}).")
    print_table(_ranks_table(found), 140)
    print_table(_bytes_table(found, "memory", _MEMORY))
    print_table(_bytes_table(found, "traffic", _TRAFFIC))
    _say_totals(training, parallel, found)
    if time is not None:
        _say_time(time)
    if limit is not None:
        _say_fit(training, parallel, found, limit, searched)


def _ranks_table(found: Forecast) -> Table:
    table = new_table("rank", "layers", ">dense", ">experts", ">parameters", ">rows of experts", ">FLOPs")
    for group, ranks in _alike(found, _parameters):
        table.add_row(ranks_in_words(ranks), *_parameters(group))
    return table


def _parameters(group: RankForecast) -> list[str]:
    held = group.parameters
    rows = f"{group.expert_rows:,}" if group.expert_rows else ""
    return [
        ranges(sorted(group.layers)),
        f"{held.dense:,}",
        f"{held.experts:,}",
        f"{held.total:,}",
        rows,
        amount(group.flops),
    ]


def _bytes_table(found: Forecast, part: str, names: Sequence[str]) -> Table:
    """Bytes of ``part``; columns of nothing are left out."""
    shown = [name for name in names if any(getattr(getattr(group, part), name) for group in found.groups)]
    table = new_table(part, *(f">{_WORDS.get(name, name)}" for name in shown), ">total")

    def cells(group: RankForecast) -> list[str]:
        kinds = getattr(group, part)
        return [size(getattr(kinds, name)) if getattr(kinds, name) else "" for name in shown] + [size(kinds.total)]

    for group, ranks in _alike(found, cells):
        table.add_row(ranks_in_words(ranks), *cells(group))
    return table


def _alike(found: Forecast, cells: object) -> list[tuple[RankForecast, list[int]]]:
    """Ranks whose line would be the same, by the first of them."""
    lines: dict[tuple[str, ...], tuple[RankForecast, list[int]]] = {}
    for group in found.groups:
        _, ranks = lines.setdefault(tuple(cells(group)), (group, []))  # type: ignore[operator]
        ranks += group.ranks
    return list(lines.values())


def ranks_in_words(ranks: Sequence[int]) -> str:
    """0 to 31; a long list is its number and the first."""
    text = ranges(sorted(ranks))
    return text if len(text) <= _WIDEST else f"{len(ranks):,} ranks, {min(ranks)} the first"


def _say_totals(training: Training, parallel: ParallelConfig, found: Forecast) -> None:
    held = sum(group.parameters.total * len(group.ranks) for group in found.groups)
    sent = sum(group.traffic.total * len(group.ranks) for group in found.groups)
    print(
        f"The model has {found.parameters.total:,} parameters; all ranks together hold {held:,} and send {size(sent)} a step."
    )
    largest, busiest = found.largest, found.busiest
    print(
        f"Largest is rank {largest.ranks[0]} with {size(largest.memory.total)}; rank {busiest.ranks[0]} sends most, "
        f"{size(busiest.traffic.total)} a step."
    )
    if found.imbalance > 1.0005:
        print(
            f"In every layer the others wait for the busiest rank, which has {found.imbalance:.2f} times the mean rows."
        )
    if found.bubble:
        print(f"A rank idles {found.bubble:.1%} of a step while the pipeline fills and drains.")
    if parallel.exchange == "hierarchical" and parallel.ranks_per_node is None:
        print("The exchange is counted flat: set parallel.ranks_per_node to count both of its levels.")
    if training.recompute and found.layout.ep > 1:
        print("With activations recomputed, rows travel to their experts and back once more in every step.")


def _say_time(time: StepTime) -> None:
    parts = {"computing": time.compute, **{_WORDS.get(name, name): seconds for name, seconds in time.sends.items()}}
    parts["waiting for the pipeline"] = time.bubble
    print(f"A rough step: {', '.join(f'{name} {seconds:.3g} s' for name, seconds in parts.items() if seconds)};")
    print(f"together {time.apart:.3g} s, or {time.overlapped:.3g} s where everything sent is sent while computing.")


def _say_fit(training: Training, parallel: ParallelConfig, found: Forecast, limit: int, searched: bool) -> None:
    need = found.largest.memory.total
    if need <= limit:
        print(
            f"Fits: the largest rank needs {size(need)} of {size(limit)}. Leave room for what products need while they run."
        )
        return
    ways = []
    if not training.recompute:
        ways.append("--recompute")
    if not parallel.fsdp and found.layout.world > found.layout.pp * found.layout.tp:
        ways.append("--fsdp")
    if training.batch_size > found.layout.dp:
        ways.append(f"--batch-size {found.layout.dp}")
    tried = f"try {', '.join(ways)}, or --search" if ways else "try --search, or more processes"
    needs = f"Does not fit: rank {found.largest.ranks[0]} needs {size(need)} of {size(limit)}"
    print(f"{needs}." if searched else f"{needs}; {tried}.")


def show_candidates(candidates: Sequence[Candidate], number: int) -> None:
    """Layouts that fit."""
    if not candidates:
        print("No layout tried fits; more processes, shorter rows or a smaller batch would help.")
        return
    numbers = (">rows", ">micro-batches", "recompute", ">largest rank", ">sent a step", ">bubble")
    table = new_table("pp", "tp", "ep", "fsdp", *numbers)
    for one in candidates:
        parallel, training = one.parallel, one.training
        table.add_row(
            str(parallel.pp),
            str(parallel.tp),
            str(parallel.ep),
            "yes" if parallel.fsdp else "",
            str(training.batch_size),
            str(training.accumulate),
            "yes" if training.recompute else "",
            size(one.forecast.largest.memory.total),
            size(one.forecast.busiest.traffic.total),
            f"{one.forecast.bubble:.1%}",
        )
    print_table(table)
    shown = f", {len(candidates)} shown" if number > len(candidates) else ""
    print(f"{number:,} layout{'s fit' if number > 1 else ' fits'}; least traffic first{shown}.")


def show_published(rows: Sequence[Figure], found: Forecast) -> None:
    """Published figures beside ours."""
    print(
        "DeepSeek-V3 on 2,048 H800 GPUs: 16 pipeline stages, experts over 64 GPUs on 8 nodes, ZeRO-1, no tensor parallelism."
    )
    table = new_table("of the step", "published", "forecast")
    for row in rows:
        table.add_row(row.what, row.published or "not published", row.forecast)
    print_table(table, 180)
    for row in rows:
        if row.note:
            print(f"- {row.what}: {row.note}.")
    print("[1] arXiv 2412.19437  [2] arXiv 2505.09343  [3] arXiv 2502.07846, of other people, about another layout")
    print_table(_bytes_table(found, "memory", _MEMORY))
