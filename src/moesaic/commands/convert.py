"""``moesaic convert``: a checkpoint from one form to another, with an account of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from tyro.conf import Positional, arg

from moesaic.checkpoint.native import open_model
from moesaic.checkpoint.parts import is_sharded
from moesaic.commands.output import Json, console_for, print_json, sayer
from moesaic.convert.convert import check_plan, plan_conversion, run_plan
from moesaic.convert.coverage import size_in_words
from moesaic.convert.hub import resolve
from moesaic.convert.read import is_foreign
from moesaic.convert.source import Source, native_source
from moesaic.convert.target import kind_of_target
from moesaic.errors import ConfigError
from moesaic.train.sharded.checkpoint import open_sharded
from moesaic.train.sharded.consolidate import stream_tensors
from moesaic.train.snapshot import find_model_folder


def convert(
    source: Annotated[
        Positional[str],
        arg(
            metavar="SOURCE",
            help="Hugging Face folder, moesaic folder, run (its best checkpoint), or OWNER/NAME[@REVISION] on the hub.",
        ),
    ],
    target: Annotated[Positional[Path], arg(metavar="TARGET", help="Folder to write; for gguf a file.")],
    to: Annotated[
        Literal["moesaic", "hf", "gguf"] | None,
        arg(
            help="What to write.",
            help_behavior_hint="(default: gguf for a TARGET that ends in .gguf or with --type; else moesaic, of a moesaic "
            "folder hf unless it is in parts)",
        ),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        arg(help="Of parameters; routers stay fp32.", help_behavior_hint="(default: as stored)"),
    ] = None,
    family: Annotated[
        str | None,
        arg(
            metavar="NAME",
            help="Model type of a Hugging Face target.",
            help_behavior_hint="(default: the one it came from)",
        ),
    ] = None,
    layout: Annotated[
        Literal["per_expert", "stacked"] | None,
        arg(
            help="Experts in a Hugging Face target: a tensor for each, or one for all.",
            help_behavior_hint="(default: the family's)",
        ),
    ] = None,
    shard_gb: Annotated[float, arg(metavar="GB", help="Largest file of weights, in 10^9 bytes.")] = 5.0,
    type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q4_0", "mxfp4"] | None,
        arg(
            help="Number type of a GGUF file; mxfp4 is for experts, the rest is bf16.",
            help_behavior_hint="(default: f16)",
        ),
    ] = None,
    report: Annotated[
        bool, arg(help="Print what was used: tensors, parameters, bytes, experts, every config key.")
    ] = False,
    dry_run: Annotated[bool, arg(help="Check everything, write nothing.")] = False,
    no_verify: Annotated[bool, arg(help="Do not hash the files of a moesaic folder first.")] = False,
    restart: Annotated[bool, arg(help="Do not go on with an earlier conversion that was cut short.")] = False,
    json: Json = False,
) -> int:
    """Convert a checkpoint: Hugging Face to moesaic and back, other dtypes and layouts, GGUF for llama.cpp.

    Every tensor and config key is accounted for before anything is written. One layer's experts are in memory at a time. A
    conversion that was killed goes on where it stopped when the same command is given again. A checkpoint that lies in
    parts, as several processes write it, is read from these.

    Examples:
      moesaic convert mixtral-hf mixtral --report
      moesaic convert mistralai/Mixtral-8x7B-v0.1 mixtral --dtype bf16
      moesaic convert mixtral mixtral-hf --to hf --layout stacked
      moesaic convert runs/books books.gguf --type q8_0
      moesaic convert runs/books/checkpoints/step-00000100 books-100
      moesaic convert mixtral-hf out --dry-run --report --json
    """
    if not 0 < shard_gb < 1e9:
        raise ConfigError(f"--shard-gb must be positive, not {shard_gb}.")
    console = console_for(json)
    say = sayer(console)
    to = kind_of_target(target, to, type)  # before anything is fetched or hashed
    opened = _opened(resolve(source), not no_verify)
    if isinstance(opened, Source) and to is None:
        to = "hf" if family or layout else "moesaic"
    plan = plan_conversion(opened, target, to, dtype, family, layout, max(1, int(shard_gb * 1e9)), not no_verify, type)
    if report and not json:
        for line in plan.source.coverage.lines(names=True):
            say(line)
    with _progress() as progress:
        if dry_run:
            done = check_plan(plan, progress)
        else:
            done = run_plan(plan, not restart, progress, sayer(Console(stderr=True, highlight=False)))
    if dry_run and not json:
        say("Nothing is written (--dry-run). It would be:")
    if json:
        print_json(done.record() | {"written": not dry_run})
    else:
        for line in done.lines():
            say(line)
    return 0


def _opened(source: Path, verify: bool) -> Path | Source:
    """The folder meant; one that lies in parts opened, to be read one tensor at a time, each against its fingerprint."""
    if source.is_dir() and not is_foreign(source):
        source = find_model_folder(source)
    if not is_sharded(source):
        return source
    checkpoint = open_sharded(source, (0, 1) if verify else None)
    opened = open_model(checkpoint.folder, infos=checkpoint.model)
    return native_source(opened, lambda name: next(stream_tensors(checkpoint, [name]))[1])


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Bytes, speed and time left on standard error; off a terminal a line every ten seconds."""
    console = Console(stderr=True)
    if not console.is_terminal:
        begun = last = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= 10 and done:
                last = now
                print(
                    f"{size_in_words(done)} of {size_in_words(total)}, {now - begun:.0f} s", file=sys.stderr, flush=True
                )

        yield line
        return
    columns = (
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("converting", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
