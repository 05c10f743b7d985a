"""Parameters of every rank: as many as the real modules hold once placed, sliced and cut into stages; and sums over ranks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moesaic.cost.blocks import blocks_of
from moesaic.cost.count import count_config
from moesaic.cost.forecast import Training
from moesaic.cost.layout import forecast
from moesaic.cost.schedule import even_stages
from moesaic.errors import ConfigError
from moesaic.layout import Layout, ParallelConfig
from moesaic.models import ModelConfig, MoEConfig, build_model
from moesaic.models.config import DepthConfig, LatentConfig, RouterConfig
from moesaic.parallel.apply import hold, shard_ends
from moesaic.parallel.comm import Group
from moesaic.parallel.experts import keep_slots, stack_of
from moesaic.parallel.stages import split_stages, take_stages
from moesaic.parallel.tensor import slice_model
from moesaic.parallel.watch import Watch
from moesaic.plan.placement import Placement

MOE = MoEConfig(num_experts=6, k=2, hidden=24, shared=1, dense_first=1)
BASE = ModelConfig(
    vocab_size=30, dim=16, num_layers=4, num_heads=4, num_kv_heads=4, hidden=40, max_seq_len=32, tie_embeddings=False, moe=MOE
)  # fmt: skip
MODELS = {
    "sparse": BASE,
    "dense, tied": replace(BASE, moe=None, tie_embeddings=True, mlp_bias=True, attention_bias="all"),
    "everything": replace(
        BASE,
        qk_norm="projection",
        attention_sinks=True,
        moe=replace(MOE, num_experts=(5, 6, 9), expert_bias=True, shared_gate=True, zero=1, constant=2, k=3),
    ),
    "latent": replace(BASE, num_kv_heads=None, latent=LatentConfig(6, 5, nope_dim=4, rope_dim=2, value_dim=6)),
    "sub-tokens": replace(BASE, moe=replace(MOE, heads=2), qk_norm="head"),
    "depth": replace(BASE, depth=DepthConfig(0.5, allow_leak=True), tie_embeddings=True),
    "neurons": replace(BASE, moe=replace(MOE, expert_kind="neuron", hidden=1, shared_hidden=8)),
}
LAYOUTS = [
    (ParallelConfig(), 1),
    (ParallelConfig(ep=4), 4),
    (ParallelConfig(ep=2), 4),
    (ParallelConfig(tp=2, ep=2), 4),
    (ParallelConfig(tp=2, ep=2, etp=1), 4),
    (ParallelConfig(tp=4, ep=2, etp=1), 4),
    (ParallelConfig(pp=2), 2),
    (ParallelConfig(pp=3, ep=2), 6),
    (ParallelConfig(pp=2, stages_per_rank=2, schedule="interleaved", tp=2), 4),
    (ParallelConfig(fsdp=True), 3),
    (ParallelConfig(fsdp=True, ep=2), 4),
    (ParallelConfig(fsdp=True, ep=2, tp=2, pp=2), 16),
]


def counted(config: ModelConfig, parallel: ParallelConfig, world: int, rank: int) -> tuple[int, int]:
    """Dense parameters and those of experts of a rank: the real module, cut by the real functions, without memory."""
    layout, watch = Layout.of(parallel, world), Watch(rank)
    at = layout.coordinates(rank)
    tp, etp = (Group(axis, layout.group_of(axis, rank), rank, None, watch) for axis in ("tp", "etp"))
    model = build_model(config, device="meta")
    held = hold(model)
    for index, layer in model.moe_layers().items():
        placement = Placement.even(stack_of(layer).num_experts, layout.ep)
        if layout.ep > 1:
            keep_slots(layer, f"blocks.{index}.ffn", placement, at["ep"], held)
    slice_model(model, tp, etp, held)
    take_stages(model, split_stages(config, layout.pp, parallel.stages_per_rank), layout.pp, at["pp"])
    total = {"dense": 0, "experts": 0}
    for name, parameter in model.named_parameters():
        kind, shape = held[name].kind, list(parameter.shape)
        axis = "edp" if kind == "experts" else "dp"
        if parallel.fsdp:
            dim = 1 if kind == "experts" and len(shape) > 1 and shape[1] % layout.size(axis) == 0 else 0
            start, stop = shard_ends(shape[dim], layout.size(axis), at[axis])
            shape[dim] = stop - start
        total[kind] += math.prod(shape)
    return total["dense"], total["experts"]


@pytest.mark.parametrize("name", MODELS)
def test_every_rank_holds_what_the_real_modules_do(name: str) -> None:
    config, tried = MODELS[name], 0
    for parallel, world in LAYOUTS:
        try:
            found = forecast(config, parallel, world, Training(world, 2, 8), split=split_stages)
        except ConfigError:  # no experts to spread, no width to slice
            continue
        tried += 1
        for group in found.groups:
            for rank in {group.ranks[0], group.ranks[-1]}:
                expected = counted(config, parallel, world, rank)
                assert (group.parameters.dense, group.parameters.experts) == expected, (parallel, rank)
        assert sorted(rank for group in found.groups for rank in group.ranks) == list(range(world))
    assert tried >= 4


def test_a_rank_by_hand() -> None:
    """Rank 0 of tp 2, ep 2 with experts in slices: half of every head and width, three of six experts at half width."""
    found = forecast(BASE, ParallelConfig(tp=2, ep=2), 4, Training(4, 1, 8))
    (group,) = found.groups
    attention, norms = 4 * 16 * 16 // 2, 2 * 16
    dense_block = attention + norms + 3 * 16 * 40 // 2
    sparse_block = attention + norms + 6 * 16 + 3 * 16 * 24 // 2
    assert group.parameters.dense == 30 * 16 + dense_block + 3 * sparse_block + 16 + 30 * 16
    assert group.parameters.experts == 3 * 3 * (3 * 16 * 24 // 2)
    assert group.layers == (0, 1, 2, 3)


def test_a_tied_matrix_lies_on_both_ends() -> None:
    tied = replace(BASE, tie_embeddings=True)
    alone = forecast(tied, ParallelConfig(), 1, Training(1)).groups[0].parameters.total
    assert alone == count_config(tied).total
    both = forecast(tied, ParallelConfig(pp=2), 2, Training(1))
    assert sum(group.parameters.total * len(group.ranks) for group in both.groups) == alone + 30 * 16


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_experts_of_all_ranks_over_their_copies_are_the_model(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 5), "layers")
    config = replace(
        BASE,
        num_layers=layers,
        moe=MoEConfig(num_experts=tuple(data.draw(st.integers(2, 9)) for _ in range(layers)), k=2, hidden=24),
    )
    parallel = ParallelConfig(
        ep=data.draw(st.integers(1, 6), "ep"),
        tp=data.draw(st.sampled_from([1, 2, 4]), "tp"),
        pp=data.draw(st.integers(1, 3), "pp"),
        etp=data.draw(st.sampled_from([None, 1]), "etp"),
        fsdp=data.draw(st.booleans(), "fsdp"),
    )
    world = parallel.pp * parallel.tp * data.draw(st.integers(1, 8), "dp")
    try:
        found = forecast(config, parallel, world, Training(world, 4, 8))
    except ConfigError:
        assume(False)
    whole = count_config(config)
    experts = sum(group.parameters.experts * len(group.ranks) for group in found.groups)
    copies = 1 if parallel.fsdp else found.layout.edp
    assert experts == copies * whole.parts["experts"]
    assert found.parameters.experts == whole.parts["experts"]
    assert found.parameters.dense == whole.total - whole.parts["experts"]
    if parallel.tp == 1:  # what is whole on every rank of tp counts as often
        dense = sum(group.parameters.dense * len(group.ranks) for group in found.groups)
        assert dense == (1 if parallel.fsdp else found.layout.dp) * found.parameters.dense


def test_blocks_of_one_kind_are_one_object() -> None:
    blocks = blocks_of(BASE)
    assert blocks[1] is blocks[2] is blocks[3]
    assert blocks[0] is not blocks[1]
    assert (blocks[1].experts, blocks[1].rows, blocks[1].hidden, blocks[1].shared) == (6, 2.0, 24, 24)
    assert (blocks[0].experts, blocks[0].hidden) == (0, 40)
    routed = replace(MOE, router=RouterConfig("topk", {}), zero=2, heads=2, k=2)
    special = blocks_of(replace(BASE, moe=routed))[1]
    assert (special.special, special.rows, special.heads) == (2, 4.0, 2)


def test_even_stages() -> None:
    assert even_stages(7, 3) == (range(2), range(2, 4), range(4, 7))
    assert even_stages(3, 3) == (range(1), range(1, 2), range(2, 3))
