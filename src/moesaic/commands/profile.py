"""``moesaic profile``: where the time of a training step and of a decoded token goes, and how near the limits that is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from moesaic.checkpoint.native import load_model
from moesaic.commands.output import Json, Overrides, console_for, print_json, sayer
from moesaic.config import apply_overrides, from_dict
from moesaic.errors import ConfigError
from moesaic.models import Decoder, ModelConfig, build_model
from moesaic.profile.measure import Work
from moesaic.profile.page import write_page, write_svg
from moesaic.profile.result import Side
from moesaic.profile.run import MODEL, TWIN, Pair, Profile
from moesaic.profile.run import profile as run_profile
from moesaic.profile.words import digits, milliseconds, notes, percent, sentences, table
from moesaic.settings import named_settings, shape
from moesaic.terminal import visible
from moesaic.train.config import TrainConfig
from moesaic.train.recipes import RECIPES
from moesaic.train.snapshot import resolve_model_folder


def _int(words: str, default: str) -> object:
    return arg(metavar="INT", help=words, help_behavior_hint=f"(default: {default})")


def profile(
    model: Annotated[
        Positional[str],
        arg(metavar="CONFIG|MODEL", help="A recipe, a .json or .toml config, or a model, run or comparison folder."),
    ],
    set_: Overrides = (),
    only: Annotated[
        Literal["train", "decode", "both"], arg(help="What to time; decode needs a fourth of the memory.")
    ] = "both",
    batch: Annotated[int | None, _int("Rows of a training batch.", "of the config")] = None,
    seq: Annotated[int | None, _int("Positions of a row.", "of the config")] = None,
    prompt: Annotated[int | None, _int("Tokens of the prompt before decoding.", "128, or half the context")] = None,
    new_tokens: Annotated[int | None, _int("Tokens to decode.", "64, or what the context leaves")] = None,
    dtype: Annotated[
        Literal["auto", "fp32", "bf16"],
        arg(help="Of activations in training, of everything in decoding; auto takes the config's."),
    ] = "auto",
    rounds: Annotated[int, arg(help="How often everything is timed; medians are shown.")] = 5,
    threads: Annotated[int | None, _int("Threads of the processor.", "as torch finds them")] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], arg(help="Where to run; auto takes a GPU if there is one.")
    ] = "auto",
    seed: Annotated[int, arg(help="Seed of random tokens, and of weights where none are loaded.")] = 0,
    page: Annotated[
        Path | None, arg(metavar="FILE", help="Also write a page (HTML).", help_behavior_hint="(optional)")
    ] = None,
    plot: Annotated[
        Path | None, arg(metavar="FILE", help="Also write the picture alone (SVG).", help_behavior_hint="(optional)")
    ] = None,
    json: Json = False,
) -> int:
    """Show where the time of a training step and of a decoded token goes, the sparsity tax, and the share of the limits.

    The dense twin of equal active parameters runs in turns with the model. Products and memory reads are measured beside them.

    Examples:
      moesaic profile small
      moesaic profile runs/books --only decode --dtype bf16
      moesaic profile quickstart --set model.moe.num_experts=64 model.moe.k=8 --batch 4 --seq 128
      moesaic profile run.toml --rounds 9 --threads 2 --page profile.html
    """
    for option, value, least in (
        ("--batch", batch, 1), ("--seq", seq, 1), ("--prompt", prompt, 1), ("--new-tokens", new_tokens, 2),
        ("--rounds", rounds, 1), ("--threads", threads, 1), ("--seed", seed, 0),
    ):  # fmt: skip
        if value is not None and value < least:
            raise ConfigError(f"{option} must be at least {least}, not {value}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU that torch can use, and there is none; see moesaic doctor.")
    if threads is not None:
        torch.set_num_threads(threads)
    config = _config(model, set_)
    context = config.model.max_seq_len
    shown = prompt if prompt is not None else max(1, min(128, context // 2))
    work = Work(
        batch=batch or config.batch_size,
        seq=seq or min(config.seq_len, context),
        accumulate=1 if batch else config.accumulate,
        prompt=shown,
        new_tokens=new_tokens if new_tokens is not None else max(2, min(64, context - shown)),
        rounds=rounds,
        dtype=config.dtype if dtype == "auto" else dtype,
        device=("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device,
        seed=seed,
        optim=config.optim,
    )
    console = console_for(json)
    found = run_profile(
        _model(model, config, set_, seed),
        work,
        name=model,
        train=only != "decode",
        decode=only != "train",
        recompute=config.recompute,
        say=_progress,
    )
    if json:
        print_json({**found.to_dict(), "reading": sentences(found), "notes": notes(found)})
    else:
        _show(found, console)
    say = sayer(console)
    if page is not None:
        say(f"Page (open in a browser): {write_page(found, page).resolve()}")
    if plot is not None:
        say(f"Picture: {write_svg(found, plot).resolve()}")
    return 0


def _config(name: str, overrides: tuple[str, ...]) -> TrainConfig:
    """The settings named; those of a model without a run around it are the defaults of training."""
    settings = apply_overrides(named_settings(name), overrides)
    if "steps" in settings or "batch_size" in settings:
        config = from_dict(TrainConfig, settings)
        shape(config.model)
        return config
    model = from_dict(ModelConfig, settings["model"], where="model")
    shape(model)
    base = RECIPES["small"]()
    return TrainConfig(model=model, seq_len=min(base.seq_len, model.max_seq_len), optim=base.optim, dtype=base.dtype)


def _model(name: str, config: TrainConfig, overrides: tuple[str, ...], seed: int) -> Decoder:
    """The weights of a folder, as long as no setting was changed; else new ones."""
    if Path(name).is_dir() and not any(setting.startswith("model.") for setting in overrides):
        return load_model(resolve_model_folder(name))
    return build_model(config.model, seed=seed)


def _progress(words: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{visible(words)}", end="", file=sys.stderr, flush=True)
    else:
        print(visible(words), file=sys.stderr)


def _show(found: Profile, console: Console) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    say, work = sayer(console), found.work
    say(
        f"{found.name}: {found.parameters:,} parameters, {found.active:,} of them used per token; {work.dtype} on {work.device}"
    )
    for title, pair, training in (
        (f"Training step, {work.batch * work.accumulate} rows of {work.seq} tokens", found.training, True),
        (f"Decoded token, after a prompt of {work.prompt}", found.token, False),
        ("Reading that prompt", found.prompt, False),
    ):
        if pair is not None:
            _table(title, pair, console, training)
    say("")
    for sentence in sentences(found):
        say(sentence)
    say("")
    for note in notes(found):
        say(note)


def _table(title: str, pair: Pair, console: Console, training: bool) -> None:
    """One table, wide enough for every figure: a narrow terminal wraps lines rather than losing columns."""
    wide = Console(file=console.file, width=max(console.width, 100), highlight=False)
    rows = Table(title=title, title_justify="left", pad_edge=False, box=box.SIMPLE_HEAD, padding=(0, 1))
    rows.add_column("part", no_wrap=True)
    for name in (*(("forward", "backward") if training else ()), "ms", "share"):
        rows.add_column(name, justify="right", no_wrap=True)
    rows.add_column("", no_wrap=True, min_width=20)
    rows.add_column("of limit", justify="right", no_wrap=True)
    block = "█▏▎▍▌▋▊▉"
    plain = "utf" not in (wide.encoding or "").lower()
    for part, forward, backward, both, share, bar, limit in table(pair.model):
        drawn = bar if not plain else "#" * sum(c == block[0] for c in bar)
        rows.add_row(part, *((forward, backward) if training else ()), both, share, drawn, limit)
    rows.add_section()
    for name, side in ((MODEL, pair.model), (TWIN, pair.twin)):
        if side is not None:
            rows.add_row(name, *_totals(side, training))
    wide.print()
    wide.print(rows)


def _totals(side: Side, training: bool) -> list[str]:
    """The last lines: the plain runs, with their range where there is room for it."""
    spread = f"{milliseconds(side.least)} to {milliseconds(side.most)}"
    return [*(("", "") if training else ()), digits(side.seconds), "", spread, percent(side.of_limit)]
