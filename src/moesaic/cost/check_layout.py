"""Whether a model and its batch can be laid out so, said before anything is allocated: the reason, and what would do.

>>> layout = check_layout(model, ParallelConfig(ep=8, tp=2), world=64, batch_size=64)
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from moesaic.errors import ConfigError
from moesaic.experts.layer import MoE
from moesaic.layout import Layout, ParallelConfig
from moesaic.models.build import build_ffn
from moesaic.models.config import ModelConfig, MoEConfig, pick
from moesaic.routing.spread import check_spread

_MOST_SLICES = 256  # offered in words


def check_layout(
    model: ModelConfig,
    parallel: ParallelConfig,
    world: int,
    *,
    batch_size: int,
    accumulate: int = 1,
    ask_router: bool = True,
) -> Layout:
    """The layout of ``world`` processes for this model and batch.

    Args:
        batch_size, accumulate: rows of a micro-batch over all processes, micro-batches of a step.
        ask_router: also build a sparse layer without memory, to ask whether its router may be spread.

    Raises ``ConfigError`` with the reason: processes that form no grid, widths or heads that cannot be sliced, fewer layers
    than stages, fewer experts than ranks, a batch with too few rows, capacity groups that lie on two ranks, a router that looks
    at sequences of other ranks. What only the built model knows of its stages is for ``parallel.stages.check_stages``.
    """
    layout = Layout.of(parallel, world)
    _check_experts(model, parallel, layout)
    _check_slices(model, layout)
    _check_stages(model, parallel, accumulate)
    _check_batch(model, layout, batch_size)
    if ask_router:
        check_router(model, layout.dp)
    _check_nodes(parallel, layout)
    return layout


def _check_experts(model: ModelConfig, parallel: ParallelConfig, layout: Layout) -> None:
    moe = model.moe
    if moe is None:
        if parallel.ep > 1:
            raise ConfigError(
                f"parallel.ep={parallel.ep} spreads experts, and the model has no sparse layer; use ep=1, or give it one by "
                "model.moe."
            )
        if parallel.padded:
            raise ConfigError(
                "parallel.padded is about rows of experts, and the model has no sparse layer; leave it out."
            )
        return
    fewest = _fewest_experts(model, moe)
    slots = fewest + parallel.replicas
    if parallel.ep > slots:
        raise ConfigError(
            f"parallel.ep={parallel.ep} ranks cannot share {_of_experts(fewest, parallel.replicas)}: {parallel.ep - slots} of "
            f"them would hold none and wait for the others; choose ep of at most {slots}."
        )
    if parallel.replicas:
        _check_replicas(model, moe, parallel)
    if parallel.fsdp and (parallel.replicas or parallel.rebalance_every or parallel.shadow):
        _check_equal_parts(model, moe, layout)
    if parallel.padded and moe.capacity is None:
        raise ConfigError(
            "parallel.padded exchanges as many rows as an expert's capacity allows, and model.moe.capacity is null; set it "
            "(a factor of 1.25 is usual), or leave padded out, which is dropless."
        )


def _check_replicas(model: ModelConfig, moe: MoEConfig, parallel: ParallelConfig) -> None:
    ep, replicas = parallel.ep, parallel.replicas
    for i in range(len(model.moe_layers)):
        experts = pick(moe.num_experts, i)
        if (experts + replicas) % ep:
            short = -(experts + replicas) % ep
            raise ConfigError(
                f"parallel.replicas={replicas} and {experts} experts are {experts + replicas} slots, which ep={ep} ranks "
                f"cannot hold equal numbers of; set replicas={replicas + short}."
            )
        if replicas > experts * (ep - 1):
            raise ConfigError(
                f"parallel.replicas={replicas} is more than one copy of each of {experts} experts on every other of ep={ep} "
                f"ranks; {experts * (ep - 1)} is the most that is of use."
            )


def _check_equal_parts(model: ModelConfig, moe: MoEConfig, layout: Layout) -> None:
    """Experts that are copied or move must be sharded alike, hence by their widths (``parallel/apply.py``)."""
    widths = {f"model.dim / model.moe.heads = {model.dim // moe.heads}": model.dim // moe.heads}
    widths |= {f"the expert width {pick(moe.hidden, i)}": pick(moe.hidden, i) for i in range(len(model.moe_layers))}
    for name, width in widths.items():
        part = width if name.startswith("model.dim") else width // layout.etp
        if part % layout.edp:
            raise ConfigError(
                f"parallel.fsdp with experts that are copied or move needs equal parts of each, and {name} is no multiple "
                f"of the {layout.edp} ranks with the same experts (edp) times their slices (etp={layout.etp}); set "
                "fsdp=false, or replicas=0, rebalance_every=0 and shadow=false, or choose another ep."
            )


def _check_slices(model: ModelConfig, layout: Layout) -> None:
    """Every width that is cut must be a multiple of the number of its slices."""
    tp, etp, moe = layout.tp, layout.etp, model.moe
    _sliced("parallel.tp", tp, "model.num_heads", model.num_heads, _heads(model))
    if model.latent is None and model.kv_heads % tp:
        raise ConfigError(
            f"parallel.tp={tp} must divide the {model.kv_heads} key/value heads (model.num_kv_heads), which are sliced with "
            f"their queries; choose tp among {_choices(_heads(model))}."
        )
    dense = [pick(model.hidden, layer) for layer in range(model.num_layers) if layer not in model.moe_layers]
    for width in dense:
        _sliced("parallel.tp", tp, "model.hidden", width, (*_heads(model), *dense))
    if moe is None:
        return
    experts = [pick(moe.hidden, i) for i in range(len(model.moe_layers))]
    shared = [shared_width(moe, i) for i in range(len(model.moe_layers))] if moe.shared else []
    for width in shared:
        _sliced("parallel.tp", tp, "the width of shared experts", width, (*_heads(model), *dense, *shared))
    if moe.expert_dropout and max(tp, etp) > 1:
        raise ConfigError(
            f"model.moe.expert_dropout={moe.expert_dropout} would drop other units than one process does where "
            f"parallel.tp={tp} ranks share an expert's work; set expert_dropout=0 or tp=1."
        )
    for width in experts:
        if width % etp:
            raise ConfigError(
                f"parallel.etp={etp} slices of every expert must divide model.moe.hidden, and {width} is no multiple of it; "
                "set parallel.etp=1, which leaves experts whole and spreads them over the tensor-parallel ranks as well."
            )


def _check_stages(model: ModelConfig, parallel: ParallelConfig, accumulate: int) -> None:
    stages = parallel.pp * parallel.stages_per_rank
    if stages > model.num_layers:
        raise ConfigError(
            f"{stages} pipeline stages (pp={parallel.pp} * stages_per_rank={parallel.stages_per_rank}) are more than the "
            f"{model.num_layers} layers of the model; at least one layer must be in each."
        )
    if parallel.schedule == "interleaved" and accumulate % parallel.pp:
        more = -(-accumulate // parallel.pp) * parallel.pp
        raise ConfigError(
            f'parallel.schedule="interleaved" sends micro-batches in rounds of pp={parallel.pp}, and accumulate={accumulate} '
            f"is no multiple of it; set accumulate={more}."
        )


def _check_batch(model: ModelConfig, layout: Layout, batch_size: int) -> None:
    dp = layout.dp
    more = -(-batch_size // dp) * dp
    if batch_size < dp:
        raise ConfigError(
            f"batch_size={batch_size} has fewer rows than the dp={dp} parts it is split into, so some ranks would have none; "
            f"set batch_size={more}, or fewer processes."
        )
    if layout.pp > 1 and batch_size % dp:
        raise ConfigError(
            f"batch_size={batch_size} must be a multiple of dp={dp} with pipeline stages, which pass on tensors of one shape; "
            f"set batch_size={more}."
        )
    rule = None if model.moe is None else model.moe.capacity
    if rule is None or (rule.factor == "exact" and rule.max_factor is None):
        return  # nothing is dropped, so nobody has to know how full experts are
    if rule.groups % dp:
        raise ConfigError(
            f"model.moe.capacity.groups={rule.groups} cannot be shared equally by dp={dp} data-parallel ranks, so one group of "
            f"tokens would lie on two of them; set groups={-(-rule.groups // dp) * dp}, or fewer data-parallel ranks."
        )


def check_router(model: ModelConfig, dp: int) -> str | None:
    """``check_spread`` of the model's router: a sentence where ranks equal one process in distribution only.

    Raises ``ConfigError`` for a router that looks at other sequences, where they lie on other ranks.
    """
    if model.moe is None or dp == 1:
        return None
    with torch.device("meta"):
        sparse = build_ffn(model, model.moe_layers[0])
    assert isinstance(sparse, MoE)
    return check_spread(sparse.router, model.moe.router.name, dp)


def in_distribution(model: ModelConfig, layout: Layout) -> list[str]:
    """What is drawn at random so that this layout equals one process in distribution only, as sentences for the user."""
    moe, parts = model.moe, layout.dp * layout.pp  # parts of the batch and stages draw their own numbers
    if moe is None or parts == 1:
        return []
    found = [check_router(model, parts)]
    if moe.expert_dropout:
        found.append(f"expert_dropout={moe.expert_dropout} drops other units than one process would.")
    if moe.expert_masking and layout.pp > 1:
        found.append(f"expert_masking={moe.expert_masking} masks other experts on later stages than one process would.")
    if moe.capacity is not None and moe.capacity.priority == "random":
        found.append('capacity.priority="random" lets other rows go first than one process would.')
    return [sentence for sentence in found if sentence is not None]


def _check_nodes(parallel: ParallelConfig, layout: Layout) -> None:
    """A hierarchical exchange needs groups that have as many ranks on each of their nodes."""
    size = parallel.ranks_per_node
    if parallel.exchange != "hierarchical" or size is None:
        return  # what torchrun says is looked at when processes have started
    for group in layout.groups("ep"):
        on_node = [sum(rank // size == node for rank in group) for node in sorted({rank // size for rank in group})]
        if len(set(on_node)) > 1:
            raise ConfigError(
                f'parallel.exchange="hierarchical" needs as many ranks of an expert group on each of its nodes, and ranks '
                f'{list(group)} lie {on_node} on nodes of {size}; change ep or ranks_per_node, or use exchange="flat".'
            )


def shared_width(moe: MoEConfig, index: int) -> int:
    """Width of the shared network of the ``index``-th sparse layer; 0 without shared experts."""
    return (moe.shared_hidden or moe.shared * pick(moe.hidden, index)) if moe.shared else 0


def _sliced(axis: str, slices: int, name: str, width: int, all_widths: Iterable[int]) -> None:
    if width % slices:
        raise ConfigError(
            f"{axis}={slices} must divide {name}, and {width} is no multiple of it; choose {axis.split('.')[1]} among "
            f"{_choices(all_widths)}."
        )


def _heads(model: ModelConfig) -> tuple[int, ...]:
    return (model.num_heads,) if model.latent is not None else (model.num_heads, model.kv_heads)


def _choices(widths: Iterable[int]) -> str:
    """The common divisors, as words."""
    common = math.gcd(*widths)
    return ", ".join(str(n) for n in range(1, min(common, _MOST_SLICES) + 1) if common % n == 0)


def _fewest_experts(model: ModelConfig, moe: MoEConfig) -> int:
    return min(pick(moe.num_experts, i) for i in range(len(model.moe_layers)))


def _of_experts(experts: int, replicas: int) -> str:
    copies = f" and {replicas} replicas" if replicas else ""
    return f"the {experts} experts{copies} of a layer"
