"""``moesaic eval``: loss and perplexity on a run's own validation text, or on any text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

import moesaic
from moesaic.commands.options import at_least, device, whole_number
from moesaic.commands.output import Json, console_for, print_json, sayer
from moesaic.convert.hub import resolve
from moesaic.data.config import DataConfig
from moesaic.data.corpus import load_corpus, load_store
from moesaic.data.packing import PackedRows
from moesaic.errors import ConfigError
from moesaic.train.config import TrainConfig
from moesaic.train.evaluate import evaluate, evenly
from moesaic.train.resume import load_run_config
from moesaic.train.snapshot import resolve_model_folder


def evaluate_command(
    model: Annotated[Positional[Path], arg(metavar="MODEL", help="Model directory, run or comparison folder.")],
    data: Annotated[tuple[str, ...], arg(help="Text to evaluate on; without it, the run's own validation text.")] = (),
    rows: Annotated[int, arg(help="Rows of text to use, spread over it; 0 uses all.")] = 0,
    seq_len: Annotated[
        int | None, whole_number("Positions of a row.", "as in training, else the model's context")
    ] = None,
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
    at_least("--rows", rows, 0)
    at_least("--batch-size", batch_size, 1)
    at_least("--seq-len", 1 if seq_len is None else seq_len, 1)
    folder = resolve_model_folder(resolve(str(model)))
    loaded = moesaic.load(folder, device=device())
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
    indices = evenly(packed, rows or len(packed))
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
