"""``moesaic info``: what a model is made of and what it costs, from a name, a config or the headers of a checkpoint."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from moesaic.checkpoint.native import load_config
from moesaic.checkpoint.parts import is_sharded
from moesaic.commands.headers import (
    Headers,
    foreign_headers,
    has_weights,
    native_headers,
    native_infos,
    sharded_headers,
    sharded_parts,
)
from moesaic.commands.info_tables import show_model, show_names
from moesaic.commands.options import at_least, whole_number
from moesaic.commands.output import Json, print_json
from moesaic.config import from_dict, load_config_file, to_dict
from moesaic.convert.hub import resolve
from moesaic.cost.architectures import COUNTED, Counted, counted
from moesaic.cost.count import Embeddings, ParameterCount, count_config, count_parameters
from moesaic.cost.flops import part_flops
from moesaic.cost.published import PUBLISHED, Comparison, compare
from moesaic.cost.sizes import CacheSize, Format, TrainingSize, cache_of, training_of, weight_bytes
from moesaic.errors import ConfigError, nearest
from moesaic.models import Decoder, ModelConfig
from moesaic.models.presets import PRESETS, preset
from moesaic.settings import shape
from moesaic.train.snapshot import find_model_folder

_CONTEXT = 4096
_ESTIMATES: tuple[Format, ...] = ("bf16", "fp8", "int4")
_OTHER_EXPERTS = ("zero", "copy", "constant", "shared")


@dataclass(frozen=True)
class Facts:
    """Everything that is shown of one model.

    Attributes:
        name: of a preset or counted architecture, else None.
        config: None where it is counted and not built.
        architecture: of what is counted and not built.
        full, counts: all parameters, and those the convention ``embeddings`` counts.
        flops: part -> forward FLOPs per token; None where nothing is built.
        context: tokens that FLOPs and cache are for.
        weights: format -> bytes.
        cache, cache_dtype: None and "" where nothing is built.
        checkpoint: the headers, where there are some.
        published: empty where nothing is.
    """

    name: str | None
    config: ModelConfig | None
    architecture: Counted | None
    full: ParameterCount
    counts: ParameterCount
    embeddings: Embeddings
    flops: dict[str, float] | None
    context: int
    weights: dict[str, int]
    cache: CacheSize | None
    cache_dtype: str
    training: TrainingSize
    checkpoint: Headers | None
    published: list[Comparison]


def info(
    model: Annotated[
        Positional[str],
        arg(
            metavar="MODEL", help="A preset, a model, run or Hugging Face folder, or a config file; none lists presets."
        ),
    ] = "",
    embeddings: Annotated[
        Embeddings, arg(help="Which embedding matrices count: both, the output's alone (head), or none.")
    ] = "both",
    context: Annotated[
        int | None, whole_number("Tokens of context, for FLOPs and cache.", "4096, or what the model has")
    ] = None,
    dtype: Annotated[
        Literal["auto", "fp32", "fp16", "bf16", "fp8", "int4", "mxfp4"],
        arg(help="Of weights; auto takes those of a folder, and else shows bf16, fp8 and int4."),
    ] = "auto",
    list_: Annotated[bool, arg(name="list", help="List presets.")] = False,
    json: Json = False,
) -> int:
    """Parameters in all and per token, FLOPs, bytes of weights and cache, layers, experts, router. Nothing is allocated.

    Of a checkpoint only the headers are read, and compared with its config.

    Examples:
      moesaic info
      moesaic info deepseek-v3 --embeddings out --context 32768
      moesaic info quickstart
      moesaic info run.toml --dtype bf16 --json
    """
    at_least("--context", 1 if context is None else context, 1)
    if list_ or not model:
        if list_ and model:
            raise ConfigError(f'--list shows every preset; leave out "{model}", or --list.')
        rows = [_row(name) for name in (*PRESETS, *COUNTED)]
        if json:
            print_json({"presets": rows})
        else:
            show_names(rows)
        return 0
    found = _facts(model, embeddings, context, dtype)
    if json:
        print_json(_record(found))
    else:
        show_model(found, described(found))
    if found.checkpoint is not None and not found.checkpoint.matches:
        print("moesaic: warning: these files do not hold what their config asks for, see above.", file=sys.stderr)
        return 2
    return 0


def _facts(target: str, embeddings: Embeddings, context: int | None, dtype: str) -> Facts:
    config, model, checkpoint = None, None, None
    name = target if not Path(target).exists() and target in {*PRESETS, *COUNTED} else None
    architecture = counted(target) if name in COUNTED else None
    if architecture is not None:
        full = architecture.counts
    else:
        config, model, checkpoint = _decoder(target, name)
        full = count_parameters(model)
    flops, cache, cache_dtype = None, None, ""
    length = context or _CONTEXT
    if config is not None:
        if context is not None and context > config.max_seq_len:
            raise ConfigError(f"--context {context} is longer than the {config.max_seq_len} tokens of this model.")
        length = min(length, config.max_seq_len)
        flops = part_flops(config, length, 1)
        wide = dtype == "fp32" or (dtype == "auto" and checkpoint is not None and checkpoint.wide)
        cache_dtype = "fp32" if wide else "bf16"
        cache = cache_of(config, length, 4 if wide else 2)
    forms = _ESTIMATES if dtype == "auto" and checkpoint is None else () if dtype == "auto" else (dtype,)
    return Facts(
        name,
        config,
        architecture,
        full,
        full.counting(embeddings),
        embeddings,
        flops,
        length,
        {form: weight_bytes(full, form) for form in forms},  # type: ignore[arg-type]
        cache,
        cache_dtype,
        training_of(full.total),
        checkpoint,
        [] if name is None else compare(name, full),
    )


def _decoder(target: str, name: str | None) -> tuple[ModelConfig, Decoder, Headers | None]:
    """Config, model without memory, and headers where there is a checkpoint."""
    path = Path(target)
    if name is not None:
        config = preset(name)
        return config, shape(config), None
    if not path.exists() and target.count("/") == 1 and not path.parent.is_dir():
        path = resolve(target, download=False)
    if path.suffix == ".gguf" and path.is_file():
        raise ConfigError(f"{path} is a GGUF file, which info does not read; give the folder it was made from.")
    if not path.exists():
        hint = nearest(target, [*PRESETS, *COUNTED])
        raise ConfigError(
            f'There is no preset, folder or config file "{target}".{hint} moesaic info --list shows the presets.'
        )
    from moesaic.convert.read import config_of, is_foreign  # here: presets need no converters

    folder = path if path.is_dir() else path.parent
    if is_foreign(folder) and (path.is_dir() or path.name == "config.json"):
        config = config_of(folder)
        headers = foreign_headers(folder) if has_weights(folder) else None
        return config, shape(config), headers
    if path.is_file():
        data = load_config_file(path)
        config = from_dict(ModelConfig, data.get("model", data), where="model")
        return config, shape(config), None
    folder = find_model_folder(path)
    config = load_config(folder)
    if is_sharded(folder):
        parts = sharded_parts(folder, config)
        model = shape(config)
        return config, model, sharded_headers(parts, model)
    infos = native_infos(folder, config) if has_weights(folder) else None
    model = shape(config)
    return config, model, None if infos is None else native_headers(folder, infos, model)


def described(found: Facts) -> dict[str, Any]:
    """Layers, experts and router."""
    if (counted_only := found.architecture) is not None:
        return {
            "layers": counted_only.layers,
            "sparse_layers": counted_only.sparse_layers,
            "dim": counted_only.dim,
            "experts": counted_only.experts,
            "experts_per_token": counted_only.k,
        }
    config = found.config
    assert config is not None
    moe = config.moe
    windows = [config.window(layer) for layer in range(config.num_layers)]
    return {
        "layers": config.num_layers,
        "sparse_layers": list(config.moe_layers),
        "dim": config.dim,
        "heads": config.num_heads,
        "kv_heads": config.kv_heads,
        "head_width": config.heads_dim,
        "latent": None if config.latent is None else to_dict(config.latent),
        "sliding_window": None if not any(windows) else windows,
        "context": config.max_seq_len,
        "vocabulary": config.vocab_size,
        "experts": None if moe is None else to_dict(moe.num_experts),
        "experts_per_token": None if moe is None else to_dict(moe.k),
        **{f"{kind}_experts": None if moe is None else getattr(moe, kind) for kind in _OTHER_EXPERTS},
        "expert_width": None if moe is None else to_dict(moe.hidden),
        "shared_width": None if moe is None else moe.shared_hidden,
        "router": None if moe is None else {"name": moe.router.name, **moe.router.options},
        "depth_layers": list(config.depth_layers) or None,
        "depth": None if config.depth is None else {"name": config.depth.router, "capacity": config.depth.capacity},
    }


def _record(found: Facts) -> dict[str, Any]:
    counts, flops, cache = found.counts, found.flops, found.cache
    forward = None if flops is None else sum(flops.values())
    return {
        "preset": found.name,
        "built": found.architecture is None,
        "total": counts.total,
        "active": counts.active,
        "embeddings": found.embeddings,
        "parts": {p: {"total": n, "active": counts.active_parts[p]} for p, n in counts.parts.items()},
        **described(found),
        "flops": None
        if forward is None
        else {
            "context": found.context,
            "forward": forward,
            "training": 3 * forward,
            "training_recomputed": 4 * forward,
            "parts": flops,
        },
        "weights": found.weights,
        "cache": None if cache is None else {"dtype": found.cache_dtype, "context": found.context, **asdict(cache)},
        "training_state": asdict(found.training),
        "checkpoint": None if found.checkpoint is None else found.checkpoint.record(),
        "published": [asdict(row) for row in found.published],
        "config": to_dict(found.config),
    }


def _row(name: str) -> dict[str, Any]:
    """One line of the list."""
    said = PUBLISHED.get(name)
    built = name in PRESETS
    if built:
        config = preset(name)
        counts, moe = count_config(config), config.moe
        shared = 0 if moe is None else moe.shared
        sizes = (config.num_layers, len(config.moe_layers), moe and moe.num_experts, shared, moe and moe.k)
    else:
        found = counted(name)
        counts, sizes = found.counts, (found.layers, found.sparse_layers, found.experts, 0, found.k)
    words = ("layers", "sparse_layers", "experts", "shared_experts", "experts_per_token")
    return {
        "name": name,
        "built": built,
        "total": counts.total,
        "active": counts.counting(said.embeddings if said else "both").active,
        "embeddings": said.embeddings if said else "both",
        "published_total": said.total if said else None,
        "published_active": said.active if said else None,
        **dict(zip(words, sizes, strict=True)),
    }
