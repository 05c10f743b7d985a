"""How ``moesaic info`` looks: tables of parts, memory and published sizes, and one fact a line."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from moesaic.checkpoint.parts import to_make_whole
from moesaic.checkpoint.shards import names_in_words
from moesaic.commands.headers import Headers
from moesaic.cost.sizes import STORAGE

if TYPE_CHECKING:
    from moesaic.commands.info import Facts

_OTHER_EXPERTS = ("zero", "copy", "constant", "shared")
_CONVENTIONS = {
    "both": "",
    "out": "Of the embeddings, the output's alone is counted.",
    "none": "Embeddings are not counted.",
}
_UNITS = ((10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def show_model(found: Facts, facts: dict[str, Any]) -> None:
    """Everything about one model."""
    moe = None if found.config is None else found.config.moe
    # How many of its k experts compute anything is the router's choice, token by token.
    free = 0 if moe is None else moe.zero + moe.copy + moe.constant
    counts = found.counts
    share = f"{counts.active / max(1, counts.total):.0%}"
    print(
        f"{counts.total:,} parameters, {'at most ' if free else ''}{counts.active:,} of them used per token ({share})"
    )
    if words := _CONVENTIONS[found.embeddings]:
        print(words)
    if (only := found.architecture) is not None:
        print(f"Counted by its formulas, not yet built: it needs {only.missing}.")
        if only.left_out:
            print(f"Not counted: {only.left_out}.")
    print_table(_parts(found))
    if found.flops is not None:
        forward = sum(found.flops.values())
        print(
            f"FLOPs per token at a context of {found.context:,}: forward {amount(forward)}, training {amount(3 * forward)}, "
            f"{amount(4 * forward)} with everything recomputed"
        )
    print_table(_memory(found))
    if found.checkpoint is not None:
        _say_checkpoint(found.checkpoint)
    if found.published:
        print_table(_published(found))
    for name, value in facts.items():
        if value is not None and not (name.removesuffix("_experts") in _OTHER_EXPERTS and not value):
            label = "feed-forward experts" if name == "experts" and free else name.replace("_", " ")
            more = f", chosen among all, the {free} zero-computation experts included" * (name == "experts_per_token")
            print(f"{label:<22}{_plain(name, value)}{more if free else ''}")


def show_names(rows: list[dict[str, Any]]) -> None:
    """The list of presets."""
    table = new_table("name", ">total", ">active", ">published", ">layers", ">experts", ">k", "")
    for row in rows:
        printed = row["published_total"] or ""
        if row["published_active"]:
            printed += f" / {row['published_active']}"
        experts = (
            ""
            if row["experts"] is None
            else str(row["experts"]) + f"+{row['shared_experts']}" * bool(row["shared_experts"])
        )
        k = row["experts_per_token"]
        table.add_row(
            row["name"],
            billions(row["total"]),
            billions(row["active"]),
            printed,
            str(row["layers"]),
            experts,
            "" if k is None else str(k),
            "" if row["built"] else "counted, not yet built",
        )
    print_table(table)
    print("Active: under the convention of the published number. More about one: moesaic info NAME")


def _parts(found: Facts) -> Table:
    table = new_table("part", ">parameters", ">per token", *([">FLOPs"] if found.flops is not None else []))
    counts, flops = found.counts, found.flops or {}
    names = sorted({*counts.parts, *flops}, key=lambda part: (-counts.parts.get(part, 0), part))
    for part in names:
        number, cost = counts.parts.get(part, 0), flops.get(part, 0.0)
        if number or cost:
            table.add_row(
                part,
                f"{number:,}",
                f"{counts.active_parts.get(part, 0):,}",
                *([amount(cost) if cost else ""] if found.flops is not None else []),
            )
    return table


def _memory(found: Facts) -> Table:
    table = new_table("memory", ">size", "")
    if (held := found.checkpoint) is not None:
        table.add_row("weights, as stored", size(held.bytes), ", ".join(held.dtypes))
    for form, number in found.weights.items():
        routers = "routers fp32" if found.full.parts.get("router") and form != "fp32" else ""
        table.add_row(f"weights, {form}", size(number), "; ".join(filter(None, (STORAGE[form].words, routers))))
    if (cache := found.cache) is not None:
        table.add_row("cache, per token", f"{cache.per_token:,} B", found.cache_dtype)
        windowed = "windowed layers cut to their window" if cache.needed != cache.held else ""
        table.add_row(f"cache, {found.context:,} tokens", size(cache.needed), windowed)
        if windowed:
            table.add_row("cache, as moesaic holds", size(cache.held), "windowed layers whole")
    training = found.training
    table.add_row("training, bf16 + AdamW", size(training.mixed), "16 B a parameter, with bf16 gradients")
    table.add_row("", size(training.mixed_fp32_gradient), "18 B, with fp32 gradients")
    table.add_row("training, as moesaic", size(training.own), "16 B, all fp32; activations come on top")
    return table


def _published(found: Facts) -> Table:
    table = new_table("", ">published", ">counted", ">difference", "")
    for row in found.published:
        note = "" if row.embeddings == "both" else "without the input embedding"
        table.add_row(
            row.what,
            row.published,
            billions(row.counted),
            f"{row.difference:+.1%}",
            "; ".join(filter(None, (note, row.why))),
        )
    return table


def _say_checkpoint(held: Headers) -> None:
    more = held.numbers - held.expected
    print(
        f"{held.folder}: {held.tensors:,} tensors in {held.files:,} file{'s' * (held.files != 1)}, "
        f"{held.numbers:,} numbers by their headers"
        + (", as many as the config asks for." if not more else f", but the config asks for {held.expected:,}.")
    )
    if more:
        print(f"! {abs(more):,} numbers too {'many' if more > 0 else 'few'}: this config is not that of these weights.")
    for names, words in (
        (held.missing, "that the config asks for are not there"),
        (held.unexpected, "are there that the config has no place for"),
        (held.wrong, "have another shape than the config says"),
        (held.leftovers, "are named like parts of this model and are of another save; move them away"),
    ):
        if names:
            print(
                f"! {len(names):,} {'file' if names is held.leftovers else 'tensor'}s {words}: {names_in_words(names)}."
            )
    if held.repeated:
        print(
            f"Stored although the config ties it to another: {names_in_words(held.repeated)}; whether both are equal, which "
            "moesaic convert checks, their headers do not say."
        )
    if held.saved_by:
        print(f"In parts, as written by {held.saved_by}; make it one with: {to_make_whole(held.folder)}")
    if held.aside:
        print(f"Kept aside, no part of the model: {held.aside:,} numbers.")


def new_table(*columns: str) -> Table:
    """A table of these columns; ">" before a name sets it to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.removeprefix(">"), justify="right" if right else "left", no_wrap=right or bool(name))
    return table


def print_table(table: Table, least: int = 110) -> None:
    """Wide enough for every figure: a narrow terminal wraps lines rather than losing columns."""
    console = Console(file=sys.stdout, highlight=False)
    Console(file=sys.stdout, width=max(console.width, least), highlight=False).print(table)


def amount(number: float) -> str:
    """Three digits and a unit: 25.5 G."""
    for unit, letter in _UNITS:
        if number >= unit:
            return f"{_three(number / unit)} {letter}"
    return f"{number:.0f}"


def size(number: int) -> str:
    """Bytes: 93.4 GB (10^9)."""
    return f"{amount(number)}B" if number >= 1000 else f"{number} B"


def billions(number: int) -> str:
    """Parameters: 46.703B, 964.3M."""
    return f"{number / 10**9:,.3f}B" if number >= 10**9 else f"{number / 10**6:,.1f}M"


def ranges(numbers: list[int]) -> str:
    """Ascending numbers, runs of them shortened: 0, 3 to 60."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs) or "none"


def _three(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def _plain(name: str, value: Any) -> str:
    if name == "sparse_layers" and isinstance(value, list):
        return ranges(value)
    if name == "sliding_window" and isinstance(value, list):
        counted = {window: value.count(window) for window in value if window}
        return ", ".join(f"{window} tokens in {n} of {len(value)} layers" for window, n in counted.items())
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
