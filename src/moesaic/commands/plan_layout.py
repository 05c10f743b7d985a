"""``moesaic plan-layout``: what every process of a layout would hold, need and send, before there is any of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from moesaic.commands.options import at_least, whole_number
from moesaic.commands.output import Json, Overrides, print_json
from moesaic.commands.plan_layout_asked import Asked, asked_for, memory_size
from moesaic.commands.plan_layout_tables import show_candidates, show_forecast, show_published
from moesaic.config import to_dict
from moesaic.cost.forecast import Forecast, Memory
from moesaic.cost.layout import Split, forecast
from moesaic.cost.layout_published import WORLD, deepseek_v3, figures
from moesaic.cost.layout_search import Candidate, search_layouts
from moesaic.cost.layout_time import Rates, StepTime, step_time
from moesaic.cost.load import parse_load
from moesaic.errors import ConfigError
from moesaic.models import ModelConfig
from moesaic.models.presets import PRESETS
from moesaic.parallel.stages import check_stages, split_stages
from moesaic.settings import shape

_SHOWN = 12


def plan_layout(
    model: Annotated[
        Positional[str],
        arg(metavar="MODEL", help="A preset, a recipe, a config file, or a model, run or Hugging Face folder."),
    ] = "",
    world: Annotated[int | None, whole_number("Processes, one per GPU.", "1")] = None,
    ep: Annotated[
        int | None, whole_number("Parts that the experts of a layer are spread over.", "of the config, or 1")
    ] = None,
    tp: Annotated[int | None, whole_number("Slices of attention heads and widths.", "of the config, or 1")] = None,
    pp: Annotated[int | None, whole_number("Pipeline stages.", "of the config, or 1")] = None,
    etp: Annotated[int | None, whole_number("Slices of experts: tp or 1.", "tp where ep fits beside it")] = None,
    fsdp: Annotated[bool, arg(help="Shard parameters, gradients and optimiser state over copies.")] = False,
    zero: Annotated[bool, arg(help="Shard optimiser state alone (ZeRO-1), as others do.")] = False,
    batch_size: Annotated[
        int | None, whole_number("Rows of a micro-batch, over all processes.", "of the config, or one per dp rank")
    ] = None,
    accumulate: Annotated[
        int | None, whole_number("Micro-batches of a step.", "of the config, or 4 for every pipeline rank")
    ] = None,
    seq_len: Annotated[int | None, whole_number("Positions of a row.", "of the config, or 4096")] = None,
    dtype: Annotated[
        Literal["auto", "fp32", "bf16"], arg(help="Of activations; auto is the config's, or bf16.")
    ] = "auto",
    recompute: Annotated[bool, arg(help="Recompute activations in the backward pass.")] = False,
    precision: Annotated[
        Literal["moesaic", "bf16-mixed", "bf16-mixed-fp32-gradient", "deepseek-v3"],
        arg(help="How weights, gradients and optimiser state are kept."),
    ] = "moesaic",
    load: Annotated[
        str,
        arg(metavar="LOAD", help="How evenly experts are used: uniform, zipf:EXPONENT, or the path of a stored trace."),
    ] = "uniform",
    memory: Annotated[
        str, arg(metavar="SIZE", help="Of one GPU, for example 80GB: says whether the largest rank fits.")
    ] = "",
    search: Annotated[bool, arg(help="List layouts that fit into --memory, least traffic first.")] = False,
    node: Annotated[int, arg(metavar="INT", help="GPUs of a node.")] = 8,
    tflops: Annotated[
        float, arg(metavar="FLOAT", help="10^12 operations a second that a GPU reaches: gives a rough time.")
    ] = 0.0,
    network: Annotated[float, arg(metavar="FLOAT", help="10^9 bytes a second that a GPU sends between nodes.")] = 50.0,
    inside: Annotated[float, arg(metavar="FLOAT", help="10^9 bytes a second that a GPU sends within a node.")] = 160.0,
    published: Annotated[bool, arg(help="DeepSeek-V3 on 2,048 GPUs: its published figures beside ours.")] = False,
    set_: Overrides = (),
    json: Json = False,
) -> int:
    """Every rank's parameters, memory and traffic of a parallel layout, and why an impossible one is. Nothing is allocated.

    Ranks alike are one line. Exit status 2 if the layout is impossible or does not fit into --memory.

    Examples:
      moesaic plan-layout qwen3-30b-a3b --world 64 --ep 16 --fsdp --memory 80GB
      moesaic plan-layout deepseek-v3 --world 2048 --pp 16 --ep 64 --recompute --memory 80GB --tflops 400
      moesaic plan-layout run.toml --world 8 --ep 4 --tp 2 --load zipf:1.0
      moesaic plan-layout mixtral-8x22b --world 128 --memory 80GB --search
      moesaic plan-layout --published
    """
    if published:
        return _published(json)
    if not model:
        raise ConfigError(
            f"Name a model to lay out: a preset ({', '.join(list(PRESETS)[:3])}, ...), a config or a folder."
        )
    for option, value in (("--world", world), ("--node", node)):
        at_least(option, 1 if value is None else value, 1)
    if fsdp and zero:
        raise ConfigError("--fsdp shards optimiser state already; leave out --zero.")
    limit = memory_size(memory) if memory else None
    named = {
        "parallel.ep": ep,
        "parallel.tp": tp,
        "parallel.pp": pp,
        "parallel.etp": etp,
        "parallel.fsdp": fsdp or None,
    }
    named |= {"batch_size": batch_size, "accumulate": accumulate, "seq_len": seq_len, "recompute": recompute or None}
    overrides = [*set_, *(f"{name}={str(value).lower()}" for name, value in named.items() if value is not None)]
    asked = asked_for(model, overrides, world or 1, dtype, precision, zero)
    loads, split = parse_load(load), cached_split()
    rates = Rates(tflops * 1e12, network * 1e9, inside * 1e9) if tflops > 0 else None
    if tflops < 0 or network <= 0 or inside <= 0:
        raise ConfigError(f"Rates are above 0; got --tflops {tflops}, --network {network} and --inside {inside}.")
    if search and limit is None:
        raise ConfigError(
            "--search looks for layouts that fit into a memory; say which with --memory, for example 80GB."
        )
    found, impossible = None, ""
    try:
        if asked.parallel.pp > 1:
            check_stages(shape(asked.model), split(asked.model, asked.parallel.pp, asked.parallel.stages_per_rank))
        found = forecast(asked.model, asked.parallel, asked.world, asked.training, loads, split=split)
    except ConfigError as error:
        if not search:
            raise
        impossible = str(error)
    candidates = None
    if search:
        assert limit is not None
        candidates = search_layouts(
            asked.model, asked.world, asked.training, limit, loads, ranks_per_node=node, split=split
        )
    fits = found is not None and (limit is None or found.largest.memory.total <= limit)
    time = None if found is None or rates is None else step_time(found, rates, node)
    if json:
        print_json(_record(asked, found, impossible, limit, fits, time, candidates))
    else:
        if found is not None:
            show_forecast(asked.training, asked.parallel, found, limit, time, search)
        else:
            print(impossible)
        if candidates is not None:
            show_candidates(candidates[:_SHOWN], len(candidates))
    return 0 if fits or candidates else 2


def cached_split() -> Split:
    """``split_stages``, which builds the model anew each time, once per number of stages of one model."""
    kept: dict[tuple[int, int], tuple[range, ...]] = {}

    def split(model: ModelConfig, pp: int, stages_per_rank: int) -> Sequence[range]:
        key = pp, stages_per_rank
        if key not in kept:
            kept[key] = split_stages(model, pp, stages_per_rank)
        return kept[key]

    return split


def _published(json: bool) -> int:
    found = deepseek_v3()
    rows = figures(found)
    if json:
        print_json({"model": "deepseek-v3", "world": WORLD, "figures": [asdict(row) for row in rows], **_ranks(found)})
    else:
        show_published(rows, found)
    return 0


def _ranks(found: Forecast) -> dict[str, Any]:
    return {
        "layout": {**asdict(found.layout)},
        "parameters": {
            "dense": found.parameters.dense,
            "experts": found.parameters.experts,
            "total": found.parameters.total,
        },
        "bubble": found.bubble,
        "imbalance": found.imbalance,
        "largest": found.largest.ranks[0],
        "busiest": found.busiest.ranks[0],
        "ranks": [
            {
                "ranks": list(group.ranks),
                "layers": list(group.layers),
                "parameters": {**asdict(group.parameters), "total": group.parameters.total},
                "memory": _memory(group.memory),
                "traffic": {**asdict(group.traffic), "total": group.traffic.total},
                "expert_rows": group.expert_rows,
                "flops": group.flops,
            }
            for group in found.groups
        ],
    }


def _memory(memory: Memory) -> dict[str, int]:
    return {**asdict(memory), "state": memory.state, "total": memory.total}


def _record(
    asked: Asked,
    found: Forecast | None,
    impossible: str,
    limit: int | None,
    fits: bool,
    time: StepTime | None,
    candidates: list[Candidate] | None,
) -> dict[str, Any]:
    training = asked.training
    return {
        "world": asked.world,
        "parallel": to_dict(asked.parallel),
        "batch_size": training.batch_size,
        "accumulate": training.accumulate,
        "seq_len": training.seq_len,
        "dtype": training.dtype,
        "recompute": training.recompute,
        "memory_limit": limit,
        "fits": fits,
        "impossible": impossible or None,
        **({} if found is None else _ranks(found)),
        "time": None if time is None else {**asdict(time), "apart": time.apart, "overlapped": time.overlapped},
        "search": None
        if candidates is None
        else [
            {
                "parallel": to_dict(one.parallel),
                "batch_size": one.training.batch_size,
                "accumulate": one.training.accumulate,
                "recompute": one.training.recompute,
                "memory": one.forecast.largest.memory.total,
                "traffic": one.forecast.busiest.traffic.total,
                "bubble": one.forecast.bubble,
            }
            for one in candidates
        ],
    }
