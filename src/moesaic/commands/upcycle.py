"""``moesaic upcycle`` and ``moesaic densify``: dense models made sparse, sparse ones made dense."""

from __future__ import annotations

import json as json_module
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from tyro.conf import Positional, arg

import moesaic
from moesaic.checkpoint.atomic import settle
from moesaic.commands.options import at_least, whole_number
from moesaic.commands.output import Json, Overrides, console_for, print_json, sayer
from moesaic.compare.variants import VARIANTS
from moesaic.config import apply_overrides, from_dict
from moesaic.convert.hub import resolve
from moesaic.convert.read import is_foreign
from moesaic.cost.count import count_parameters
from moesaic.data.config import DataConfig
from moesaic.data.corpus import load_store
from moesaic.data.packing import PackedRows
from moesaic.errors import ConfigError, MoesaicError
from moesaic.models import Decoder
from moesaic.routing import ROUTERS
from moesaic.train.evaluate import evenly
from moesaic.train.snapshot import find_model_folder
from moesaic.upcycle import (
    PRESERVING,
    DensifyConfig,
    Difference,
    UpcycleConfig,
    assemble,
    densify,
    difference,
    random_ids,
    upcycle,
)

_SEQ_LEN = 256
_MADE = "The model made"

Text = Annotated[
    tuple[str, ...],
    arg(help="Files or folders of text to look at and to measure on; btx with prompts: one per model, in order."),
]
Rows = Annotated[int, arg(help="Rows of the text to use, spread over it; of up to 256 tokens each.")]
Out = Annotated[Path, arg(help="Model directory to write; must not exist.")]


def upcycle_command(
    dense: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="DENSE", help="Model directory, Hugging Face folder or run; several for btx."),
    ],
    out: Out,
    method: Annotated[
        Literal["copy", "noise", "granular", "drop", "split", "btx"], arg(help="How experts are made; see below.")
    ] = "copy",
    experts: Annotated[int | None, whole_number("Experts per sparse layer.", "8; of btx one per model")] = None,
    k: Annotated[int, arg(help="Experts per token.")] = 2,
    every: Annotated[int, arg(help="Every n-th layer becomes sparse.")] = 1,
    dense_first: Annotated[int, arg(help="This many first layers stay dense.")] = 0,
    router: Annotated[str, arg(metavar="NAME", help="Router of the sparse layers; see moesaic routers.")] = "topk",
    shards: Annotated[int, arg(help="granular: parts of a layer; k must be a multiple.")] = 2,
    drop: Annotated[float, arg(help="drop: share of hidden units drawn anew.")] = 0.5,
    noise: Annotated[
        float | None,
        arg(
            metavar="FLOAT",
            help="Noise on every matrix, in its standard deviations.",
            help_behavior_hint="(default: 0.05 of noise, else 0)",
        ),
    ] = None,
    split_by: Annotated[
        Literal["order", "random", "weights", "activations"], arg(help="split: which units go together.")
    ] = "random",
    shared: Annotated[int, arg(help="split: hidden units of a shared expert.")] = 0,
    router_init: Annotated[
        Literal["random", "activations", "prompts"], arg(help="How gates start; the last two need text.")
    ] = "random",
    seed: Annotated[int, arg(help="Seed of routers, noise and choices.")] = 0,
    set_: Overrides = (),
    text: Text = (),
    rows: Rows = 32,
    json: Json = False,
) -> int:
    """Make a dense model sparse, and measure how far its function moved.

    copy: every expert is the dense layer. noise: with noise on it. granular: copies cut into shards, whole copies chosen. drop:
    a share of each copy's hidden units drawn anew. split: the hidden units dealt out to the experts. btx: one expert from each
    of several fine-tunes of one model, everything else averaged.

    copy and granular compute at first what the dense model does: the weights of the chosen experts are divided by what they add
    up to, 1 for the default router, k/E where they are not renormalised (--set router.options.normalize=none); the gate then
    starts small, so that this holds for every token.

    Without --text the models are compared on random tokens.

    Examples:
      moesaic upcycle runs/books/dense --out books-moe --experts 8 --k 2
      moesaic upcycle llama-hf --out llama-moe --method granular --experts 16 --k 4 --shards 4 --every 2
      moesaic upcycle dense --out sparse --method drop --drop 0.5 --text books/
      moesaic upcycle dense --out sparse --method split --k 4 --split-by activations --router-init activations --text books/
      moesaic upcycle base code law --out mixed --method btx --router-init prompts --text base.txt code.txt law.txt
      moesaic upcycle dense --out sparse --k 1 --set router.options.normalize=none
    """
    at_least("--rows", rows, 1)
    named = {
        "method": method, "experts": experts, "k": k, "every": every, "dense_first": dense_first, "shards": shards,
        "drop": drop, "noise": noise, "split_by": split_by, "shared": shared, "router_init": router_init, "seed": seed,
        "router": {"name": router},
    }  # fmt: skip
    if router not in ROUTERS and router in VARIANTS:
        variant = VARIANTS[router]
        options = " ".join(
            f"router.options.{name}={json_module.dumps(value)}" for name, value in variant.options.items()
        )
        raise ConfigError(
            f'"{router}" is a variant of the router "{variant.router}"; write --router {variant.router}'
            + (f" --set {options}." if options else ".")
        )
    config = from_dict(UpcycleConfig, apply_overrides(named, set_), where="")
    _refuse_taken(out)
    if not dense:
        raise ConfigError('"upcycle" needs a model before its options; see moesaic upcycle --help.')
    if len(dense) > 1 and config.method != "btx":
        raise ConfigError(f'{len(dense)} models were given, and method="{config.method}" takes one; btx takes several.')
    if config.needs_text and not text:
        raise ConfigError("What is asked for looks at what the model does on text; name some with --text.")
    folders = [_folder_of(source, out) for source in dense]
    say = sayer(console_for(json))
    models = [moesaic.load(folder) for folder in folders]
    own = config.router_init == "prompts"
    texts = [_ids(models[0], (source,) if own else text, rows, say) for source in (text if own else text[:1])]
    shortest = min((ids_BS.shape[1] for ids_BS in texts), default=0)
    seen = torch.cat([ids_BS[:, :shortest] for ids_BS in texts]) if texts else None
    made = assemble(models, config, texts) if config.method == "btx" else upcycle(models[0], config, seen)
    shown = random_ids(models[0]) if seen is None else seen
    apart = [difference(model, made, shown, (str(folder), _MADE)) for folder, model in zip(dense, models, strict=True)]
    moesaic.save(made, out)
    _say_result(say, made, out)
    for folder, gap in zip(dense, apart, strict=True):
        _say_difference(say, str(folder), gap, "text" if texts else "random tokens")
    if config.method in PRESERVING and not all(gap.same for gap in apart):
        say(
            "The function is kept where a router's weights add up to the same for every token, as they do where they are "
            "normalised over the chosen; this router's, or rounding, keep it from that."
        )
    if json:
        differences = {str(folder): gap.record() for folder, gap in zip(dense, apart, strict=True)}
        print_json(
            {**_record(made, out), "method": config.method, "on": "text" if texts else "random", "step0": differences}
        )
    return 0


def densify_command(
    model: Annotated[Positional[Path], arg(metavar="MODEL", help="Model directory, Hugging Face folder or run.")],
    out: Out,
    method: Annotated[
        Literal["average", "most-used"], arg(help="The mean of the experts, or the one most tokens of the text go to.")
    ] = "average",
    by_load: Annotated[bool, arg(help="Weigh the mean by how many tokens of the text each expert serves.")] = False,
    shards: Annotated[
        int, arg(help="Experts that are parts of one layer, side by side: as upcycled; of split all experts.")
    ] = 1,
    text: Text = (),
    rows: Rows = 32,
    json: Json = False,
) -> int:
    """Make a sparse model dense, the inverse of upcycling, and measure how far its function moved.

    Examples:
      moesaic densify books-moe --out books-dense
      moesaic densify books-moe --out books-dense --method most-used --text books/
      moesaic densify granular-moe --out dense --shards 4 --by-load --text books/ --json
    """
    at_least("--rows", rows, 1)
    config = DensifyConfig("average" if method == "average" else "most_used", by_load, shards)
    _refuse_taken(out)
    if config.needs_text and not text:
        raise ConfigError("Which experts are used is seen on text; name some with --text.")
    folder = _folder_of(model, out)
    say = sayer(console_for(json))
    sparse = moesaic.load(folder)
    seen = _ids(sparse, text, rows, say) if text else None
    made = densify(sparse, config, seen)
    gap = difference(sparse, made, random_ids(sparse) if seen is None else seen, (str(model), _MADE))
    moesaic.save(made, out)
    _say_result(say, made, out)
    _say_difference(say, str(model), gap, "random tokens" if seen is None else "text")
    if json:
        on = "random" if seen is None else "text"
        print_json({**_record(made, out), "method": method, "on": on, "step0": {str(model): gap.record()}})
    return 0


def _refuse_taken(out: Path) -> None:
    """Raise ``ConfigError`` if something is at ``out`` already: an input must not be overwritten by what is made of it."""
    found = settle(out)
    if found.is_file() or (found.is_dir() and any(found.iterdir())):
        raise ConfigError(f"{out} exists already; choose another --out, or remove it.")


def _folder_of(source: Path, out: Path) -> Path:
    """The model directory that ``source`` means. Raises ``MoesaicError`` if ``out`` lies in it, or around it."""
    folder = resolve(str(source))
    if not is_foreign(folder):
        folder = find_model_folder(folder)
    here, there = Path(os.path.realpath(folder)), Path(os.path.realpath(out))
    if there.is_relative_to(here) or here.is_relative_to(there):
        raise MoesaicError(f"The target {out} and the source {source} lie in each other; choose another --out.")
    return folder


def _ids(model: Decoder, sources: tuple[str, ...], rows: int, say: Callable[[str], None]) -> Tensor:
    """int64 (rows, positions): tokens of the text, rows spread over it; the last, padded one left out if there are others."""
    if model.tokenizer is None:
        raise ConfigError("The model has no tokenizer, so it cannot read text; add tokenizer.json to its folder.")
    length = min(_SEQ_LEN, model.config.max_seq_len)
    packed = PackedRows(load_store(DataConfig(sources=sources), model.tokenizer, say).view, length)
    whole = max(1, len(packed) - 1)
    batch = packed.batch(evenly(packed, rows)[:rows].clamp(max=whole - 1).unique())
    return batch.ids_BS[:, : int(batch.valid_BS.sum(dim=1).amin())]


def _record(made: Decoder, out: Path) -> dict[str, Any]:
    counts, moe = count_parameters(made), made.config.moe
    return {
        "folder": str(out),
        "params_total": counts.total,
        "params_active": counts.active,
        "sparse_layers": list(made.config.moe_layers),
        "experts": None if moe is None else moe.num_experts,
        "experts_per_token": None if moe is None else moe.k,
        "expert_width": None if moe is None else moe.hidden,
        "router": None if moe is None else {"name": moe.router.name, **moe.router.options},
    }


def _say_result(say: Callable[[str], None], made: Decoder, out: Path) -> None:
    counts, moe = count_parameters(made), made.config.moe
    what = "dense" if moe is None else f"{len(made.config.moe_layers)} of {made.config.num_layers} layers sparse"
    say(f"{out}: {counts.total:,} parameters, {counts.active:,} of them used per token, {what}.")


def _say_difference(say: Callable[[str], None], name: str, gap: Difference, on: str) -> None:
    say(f"Against {name}, on {on}: {gap}.")
