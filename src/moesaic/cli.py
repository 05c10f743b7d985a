"""The command line: a dict of command -> plain function. ``moesaic COMMAND --help`` shows each one's options and examples.

Results go to standard output (as one JSON object with ``--json``), progress to standard error. A mistake of the user's is
one sentence on standard error and exit status 2; an interrupted run exits with 130.
"""

from __future__ import annotations

import inspect
import json as json_module
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from tyro.conf import Positional, arg

import moesaic
from moesaic.checkpoint.native import load_config
from moesaic.commands.compare import compare
from moesaic.commands.lint import lint
from moesaic.commands.output import Json, Overrides, console_for, print_json, sayer
from moesaic.commands.profile import profile
from moesaic.commands.routers import routers
from moesaic.config import from_dict, load_config_file, to_dict
from moesaic.cost.count import count_parameters
from moesaic.cost.devices import doctor as examine
from moesaic.cost.devices import format_doctor
from moesaic.data.config import DataConfig
from moesaic.data.corpus import load_corpus, load_store
from moesaic.data.packing import PackedRows
from moesaic.errors import ConfigError, nearest
from moesaic.infer.generate import generate_texts
from moesaic.infer.sampling import SamplingConfig
from moesaic.models import ModelConfig
from moesaic.quickstart import run_quickstart, show_comparison
from moesaic.report.page import write_report
from moesaic.settings import merge, override, refuse_taken, saved_run, shape
from moesaic.terminal import guarded, parse, visible
from moesaic.train.config import TrainConfig
from moesaic.train.evaluate import evaluate, spread
from moesaic.train.loop import fit_vocabulary, run_training
from moesaic.train.recipes import RECIPES
from moesaic.train.resume import check_run, load_run_config, saved_tokenizer
from moesaic.train.snapshot import resolve_model_folder
from moesaic.train.stop import StopRequest
from moesaic.twins import run_twins

_OF_QUICKSTART = "of the recipe, or of the run resumed"
_OF_TRAIN = "of --config, the recipe, or the run resumed"


def _int(words: str, default: str) -> Any:
    """A whole number whose default is not known before other options are read; help says where it comes from."""
    return arg(metavar="INT", help=words, help_behavior_hint=f"(default: {default})")


def quickstart(
    out: Annotated[Path, arg(help="Folder for both runs and the report.")] = Path("quickstart"),
    steps: Annotated[int | None, _int("Optimiser steps of each model.", _OF_QUICKSTART)] = None,
    seed: Annotated[int | None, _int("Seed of initialisation and data order.", _OF_QUICKSTART)] = None,
    set_: Overrides = (),
    resume: Annotated[bool, arg(help="Go on with an interrupted quickstart.")] = False,
    json: Json = False,
) -> int:
    """Train a sparse model and its dense twin on text already on this machine, and report.

    Examples:
      moesaic quickstart
      moesaic quickstart --out try --steps 50
      moesaic quickstart --set model.moe.num_experts=32 model.moe.k=4 optim.lr=2e-3
    """
    start = saved_run(out, twin=True) if resume else RECIPES["quickstart"]()
    config = override(to_dict(start), set_, steps=steps, seed=seed)
    refuse_taken(out, resume=resume, twin=True)
    if resume:
        check_run(config, out / "sparse")
    comparison = run_quickstart(config, out, resume=resume, console=console_for(json))
    if json:
        print_json({"folder": str(out), "report": str(comparison.report), **comparison.summary})
    return 0 if comparison.finished else 130


def train(
    data: Annotated[tuple[str, ...], arg(help='Files, folders, globs, hf://owner/name; or "stdlib".')] = (),
    out: Annotated[Path, arg(help="Run folder.")] = Path("runs/latest"),
    config: Annotated[
        Path | None,
        arg(metavar="PATH", help="A .json or .toml file with any of the settings.", help_behavior_hint="(optional)"),
    ] = None,
    recipe: Annotated[
        Literal["small", "quickstart", "compare"], arg(help="Where settings not given come from.")
    ] = "small",
    steps: Annotated[int | None, _int("Optimiser steps.", _OF_TRAIN)] = None,
    seed: Annotated[int | None, _int("Seed of initialisation, data order and noise.", _OF_TRAIN)] = None,
    set_: Overrides = (),
    twin: Annotated[bool, arg(help="Also train the dense twin on the same tokens and compare.")] = False,
    resume: Annotated[bool, arg(help="Go on with the run in --out from its last checkpoint.")] = False,
    json: Json = False,
) -> int:
    """Train a model on your text.

    Examples:
      moesaic train --data books/ --out runs/books
      moesaic train --data 'corpus/*.jsonl' --set data.label_field=lang model.moe.num_experts=32
      moesaic train --data a.txt b.txt --config run.toml --steps 5000
      moesaic train --data stdlib --twin --out runs/twins
      moesaic train --resume --out runs/books
    """
    say = sayer(console_for(json))
    saved = out / "sparse" if twin else out
    settings = to_dict(saved_run(out, twin=twin) if resume else RECIPES[recipe]())
    given = {} if config is None else load_config_file(config)
    settings = merge(settings, given)
    if data and isinstance(settings["data"], dict):
        settings["data"]["sources"] = list(data)
    run = override(settings, set_, steps=steps, seed=seed)
    if not run.data.sources:
        raise ConfigError(
            "There is no text to train on; name it with --data, for example --data books/ or --data stdlib."
        )
    refuse_taken(out, resume=resume, twin=twin)
    if resume:
        check_run(run, saved)
    corpus = load_corpus(run.data, run.seed, say, tokenizer=saved_tokenizer(saved) if resume else None)
    fixed = resume or "vocab_size" in given.get("model", {}) or any(s.startswith("model.vocab_size=") for s in set_)
    run = fit_vocabulary(run, corpus, explicit=fixed)
    again = f"moesaic train --resume --out {shlex.quote(str(out))}"
    if twin:
        with StopRequest(say, resume_with=f"{again} --twin") as stop:
            comparison = run_twins(run, corpus, out, resume=resume, say=say, stop=stop)
        show_comparison(comparison, console_for(json), resume_with=f"{again} --twin")
        if json:
            print_json({"folder": str(out), "report": str(comparison.report), **comparison.summary})
        return 0 if comparison.finished else 130
    with StopRequest(say, resume_with=again) as stop:
        result = run_training(run, corpus, out, resume=resume, say=say, stop=stop)
    report_path = write_report(out)
    if result.reason == "interrupted":
        say(f"Stopped at step {result.step} of {run.steps}. Go on with: {again}")
    else:
        loss = "not measured" if result.val_loss is None else f"{result.val_loss:.4f} nats per token"
        rate = f"{result.tokens_per_s:,.0f} tokens/s"
        say(f"Done: {result.step} steps, {result.tokens:,} tokens at {rate}, validation loss {loss}.")
    say(f"Report: {report_path.resolve()}")
    if json:
        print_json({**result.record(), "report": str(report_path)})
    return 0 if result.reason == "done" else 130


def evaluate_command(
    model: Annotated[Positional[Path], arg(metavar="MODEL", help="Model directory, run or comparison folder.")],
    data: Annotated[tuple[str, ...], arg(help="Text to evaluate on; without it, the run's own validation text.")] = (),
    rows: Annotated[int, arg(help="Rows of text to use, spread over it; 0 uses all.")] = 0,
    seq_len: Annotated[int | None, _int("Positions of a row.", "as in training, else the model's context")] = None,
    batch_size: Annotated[int, arg(help="Rows computed together.")] = 16,
    label_field: Annotated[
        str | None,
        arg(
            metavar="NAME",
            help="Field of JSONL or parquet that holds the domain.",
            help_behavior_hint="(default: the file's name)",
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Measure loss and perplexity, in all and by domain.

    Examples:
      moesaic eval runs/books
      moesaic eval runs/books --data other.txt --rows 200
      moesaic eval quickstart/dense --json
    """
    _at_least("--rows", rows, 0)
    _at_least("--batch-size", batch_size, 1)
    _at_least("--seq-len", 1 if seq_len is None else seq_len, 1)
    folder = resolve_model_folder(model)
    loaded = moesaic.load(folder, device=_device())
    if loaded.tokenizer is None:
        raise ConfigError(
            f"{folder} has no tokenizer.json, so text cannot be read with it; add the tokenizer to the folder."
        )
    trained = _training_config(folder)
    say = sayer(console_for(json))
    if data:
        # All of it counts as validation text: nothing here was trained on, as far as we know.
        settings = DataConfig(sources=tuple(data), label_field=label_field)
        view = load_store(settings, loaded.tokenizer, say).view
    elif trained is not None:
        view = load_corpus(trained.data, trained.seed, say, tokenizer=loaded.tokenizer).val
    else:
        raise ConfigError(f"{model} is not a training run, so it has no text of its own; give some with --data.")
    length = seq_len or (trained.seq_len if trained is not None else loaded.config.max_seq_len)
    packed = PackedRows(view, min(length, loaded.config.max_seq_len))
    indices = spread(packed, rows or len(packed))
    result = evaluate(loaded, packed, indices, batch_size, progress=_counter(len(indices)))
    if json:
        print_json({"model": str(folder), "tokens": result.tokens, **result.record()})
        return 0
    say(
        f"{folder}: loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, over {result.tokens:,} tokens"
    )
    for domain, loss in sorted(result.by_domain.items(), key=lambda item: item[1]):
        say(f"  {domain:<24} {loss:.4f}")
    return 0


def generate(
    model: Annotated[Positional[Path], arg(metavar="MODEL", help="Model directory, run or comparison folder.")],
    prompt: Annotated[tuple[str, ...], arg(help="One prompt or several; without it, the start of a document.")] = ("",),
    max_new_tokens: Annotated[int, arg(help="Longest continuation.")] = 100,
    temperature: Annotated[float, arg(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, arg(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, arg(help="Keep the likeliest tokens of this total probability.")] = 0.95,
    min_p: Annotated[float, arg(help="Keep tokens at least this likely, relative to the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, arg(help="Above 1 discourages tokens already seen.")] = 1.0,
    stop: Annotated[tuple[str, ...], arg(help="Stop before any of these strings.")] = (),
    seed: Annotated[int, arg(help="Seed of sampling.")] = 0,
    task: Annotated[int | None, _int("Task or domain, for models routed by it; -1 if unknown.", "none")] = None,
    tenant: Annotated[int | None, _int("Whose prompts these are, for models with rules or memories.", "none")] = None,
    metadata: Annotated[tuple[str, ...], arg(help="Further facts that rules ask for, as name=number.")] = (),
    json: Json = False,
) -> int:
    """Continue a text, streaming it to the terminal.

    Examples:
      moesaic generate quickstart --prompt 'def main('
      moesaic generate runs/books --prompt 'It was' 'She said' --temperature 0
      moesaic generate runs/books --max-new-tokens 300 --top-p 0.9 --stop '\\n\\n'
    """
    if not prompt:
        raise ConfigError('--prompt needs a text, for example --prompt "Once upon"; leave it out to start a document.')
    stops = tuple(map(_unescaped, stop))
    sampling = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    loaded = moesaic.load(model, device=_device())
    prompts = list(prompt)
    live = len(prompts) == 1 and not json
    unshown = prompts[0]

    def show(_row: int, piece: str) -> None:
        nonlocal unshown
        sys.stdout.write(visible(unshown + piece))
        sys.stdout.flush()
        unshown = ""

    texts, generation = generate_texts(
        loaded,
        prompts,
        loaded.tokenizer,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stops,
        seed=seed,
        on_text=show if live else None,
        task=task,
        tenant=tenant,
        metadata=dict(map(_fact, metadata)),
    )
    if json:
        rows = [
            {"prompt": p, "text": t, "finish": f} for p, t, f in zip(prompts, texts, generation.finish, strict=True)
        ]
        print_json({"results": rows, "decode_tokens_per_s": generation.decode_tokens_per_s})
        return 0
    if not live:
        for p, text in zip(prompts, texts, strict=True):
            print(visible(f"--- {p}\n{p}{text}\n"))
    else:
        print(visible(unshown))
    rate = generation.decode_tokens_per_s
    print(
        f"[{generation.decode_tokens} tokens at {rate:.0f} tokens/s, {', '.join(generation.finish)}]", file=sys.stderr
    )
    return 0


def _fact(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    try:
        return name, int(number)
    except ValueError:
        raise ConfigError(f'--metadata needs name=number, for example minor=1, not "{text}".') from None


def report(
    folder: Annotated[Positional[Path], arg(metavar="FOLDER", help="A run or comparison folder.")],
    out: Annotated[
        Path | None,
        arg(metavar="PATH", help="Where to write the page.", help_behavior_hint="(default: report.html in the folder)"),
    ] = None,
    json: Json = False,
) -> int:
    """Write one self-contained page about a run: losses, load, entropy, drops, domains per expert, a sample.

    Examples:
      moesaic report runs/books
      moesaic report quickstart --out page.html
    """
    path = write_report(folder, out)
    if json:
        print_json({"report": str(path)})
    else:
        print(path.resolve())
    return 0


_OTHER_EXPERTS = ("zero", "copy", "constant", "shared")


def info(
    model: Annotated[Positional[Path], arg(metavar="MODEL", help="Model directory, run folder, or a config file.")],
    json: Json = False,
) -> int:
    """Parameters in all and per token, by part; layers, experts and routers. Nothing is allocated.

    Examples:
      moesaic info quickstart
      moesaic info run.toml --json
    """
    config = _model_config(model)
    counts = count_parameters(shape(config))
    moe = config.moe
    facts = {
        "layers": config.num_layers,
        "sparse_layers": list(config.moe_layers),
        "dim": config.dim,
        "heads": config.num_heads,
        "kv_heads": config.kv_heads,
        "context": config.max_seq_len,
        "vocabulary": config.vocab_size,
        "experts": None if moe is None else to_dict(moe.num_experts),
        "experts_per_token": None if moe is None else to_dict(moe.k),
        **{f"{kind}_experts": None if moe is None else getattr(moe, kind) for kind in _OTHER_EXPERTS},
        "expert_width": None if moe is None else to_dict(moe.hidden),
        "router": None if moe is None else {"name": moe.router.name, **moe.router.options},
        "depth_layers": list(config.depth_layers) or None,
        "depth": None if config.depth is None else {"name": config.depth.router, "capacity": config.depth.capacity},
    }
    if json:
        parts = {p: {"total": n, "active": counts.active_parts[p]} for p, n in counts.parts.items()}
        print_json({"total": counts.total, "active": counts.active, "parts": parts, **facts, "config": to_dict(config)})
        return 0
    # How many of its k experts compute anything is the router's choice, token by token.
    free = 0 if moe is None else moe.zero + moe.copy + moe.constant
    at_most = "at most " if free else ""
    share = f"{counts.active / counts.total:.0%}"
    print(f"{counts.total:,} parameters, {at_most}{counts.active:,} of them used per token ({share})\n")
    print(f"{'part':<16}{'parameters':>16}{'per token':>16}")
    for part, number in sorted(counts.parts.items(), key=lambda item: -item[1]):
        if number:
            print(f"{part:<16}{number:>16,}{counts.active_parts[part]:>16,}")
    print()
    for name, value in facts.items():
        if value is not None and not (name.removesuffix("_experts") in _OTHER_EXPERTS and not value):
            label = "feed-forward experts" if name == "experts" and free else name.replace("_", " ")
            more = f", chosen among all, the {free} zero-computation experts included" * (name == "experts_per_token")
            print(f"{label:<22}{_plain(value)}{more if free else ''}")
    return 0


def doctor(
    deep: Annotated[bool, arg(help="Also compile a small function (half a minute).")] = False,
    json: Json = False,
) -> int:
    """Say what this machine can do: torch, threads, instruction sets, GPU, distributed back ends, speed, advice.

    Examples:
      moesaic doctor
      moesaic doctor --json
    """
    found = examine(deep=deep)
    if json:
        print_json(found.to_dict())
    else:
        Console(highlight=False).print(format_doctor(found), markup=False, soft_wrap=True)
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "quickstart": quickstart,
    "train": train,
    "compare": compare,
    "routers": routers,
    "eval": evaluate_command,
    "generate": generate,
    "lint": lint,
    "report": report,
    "info": info,
    "profile": profile,
    "doctor": doctor,
}


def help_text() -> str:
    """What ``moesaic --help`` prints."""
    lines = [
        "usage: moesaic COMMAND [options]",
        "",
        "Mixture-of-Experts Transformers: train, look inside, understand.",
        "",
    ]
    lines += [f"  {name:<12}{summary(function)}" for name, function in COMMANDS.items()]
    lines += [
        "",
        "moesaic COMMAND --help shows options and examples; moesaic --version.",
    ]
    return "\n".join(lines)


def summary(function: Callable[..., int]) -> str:
    """First line of a command's docstring."""
    return (inspect.getdoc(function) or "").splitlines()[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``moesaic`` and ``python -m moesaic``; ends the process with the command's exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    sys.exit(guarded(lambda: _run(args), json="--json" in args))


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(f"moesaic {moesaic.__version__}")
        return 0
    name, *rest = args
    if name not in COMMANDS:
        raise ConfigError(f'There is no command "{name}".{nearest(name, COMMANDS)} Commands: {", ".join(COMMANDS)}.')
    warnings.showwarning = _show_warning
    return parse(COMMANDS[name], name, rest)()


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"moesaic: warning: {visible(str(message))}", file=sys.stderr)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{option} must be at least {least}, not {value}.")


def _unescaped(text: str) -> str:
    """A stop string with its escapes (``\\n``, ``\\t``, ``\\\\``) read."""
    try:
        return text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError:
        raise ConfigError(f'The stop string "{text}" ends in half an escape; write a backslash as \\\\.') from None


def _model_config(path: Path) -> ModelConfig:
    if path.is_file():
        data = load_config_file(path)
        return from_dict(ModelConfig, data.get("model", data), where="model")
    return load_config(resolve_model_folder(path))


def _training_config(folder: Path) -> TrainConfig | None:
    """The config of the run a checkpoint folder belongs to, if it belongs to one."""
    if folder.parent.name != "checkpoints":
        return None
    return load_run_config(folder.parent.parent)


def _counter(total: int) -> Callable[[int, int], None]:
    def count(done: int, _: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total} rows", end="\n" if done >= total else "", file=sys.stderr, flush=True)

    return count


def _plain(value: Any) -> str:
    return json_module.dumps(value) if isinstance(value, dict | list) else str(value)
