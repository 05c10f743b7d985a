"""Forecasts of memory and traffic by hand, rough times, the search, and DeepSeek-V3 beside what was published of it."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from moesaic.cost import layout_published as published
from moesaic.cost.activations import block_activations, head_activations
from moesaic.cost.blocks import blocks_of
from moesaic.cost.count import count_config
from moesaic.cost.forecast import Training
from moesaic.cost.layout import forecast
from moesaic.cost.layout_search import divisors, search_layouts
from moesaic.cost.layout_time import Rates, step_time, within_nodes
from moesaic.cost.precision import PRECISIONS
from moesaic.layout import Layout, ParallelConfig
from moesaic.models import ModelConfig, MoEConfig
from moesaic.models.config import RouterConfig
from moesaic.models.presets import preset

MODEL = ModelConfig(
    vocab_size=32, dim=8, num_layers=4, num_heads=2, hidden=16, max_seq_len=64, tie_embeddings=False,
    moe=MoEConfig(num_experts=4, k=2, hidden=8),
)  # fmt: skip
ATTENTION, EXPERT, ENDS = 4 * 8 * 8, 3 * 8 * 8, 32 * 8
DENSE_BLOCK = ATTENTION + 2 * 8 + 4 * 8


def test_state_by_hand() -> None:
    """fp32: 4 + 4 + 8 bytes; bf16 with fp32 gradients: 2 + 4 + 12; ZeRO-1 spreads the optimiser's over copies."""
    parallel = ParallelConfig(ep=2)
    dense, experts = 4 * DENSE_BLOCK + 8 + 2 * ENDS, 4 * 2 * EXPERT
    (own,) = forecast(MODEL, parallel, 4, Training(4, seq_len=8)).groups
    held = dense + experts
    assert (own.memory.weights, own.memory.gradients, own.memory.optimizer) == (4 * held, 4 * held, 8 * held)
    assert own.memory.gathered == 0
    mixed = Training(4, seq_len=8, precision=PRECISIONS["bf16-mixed-fp32-gradient"])
    (theirs,) = forecast(MODEL, parallel, 4, mixed).groups
    assert theirs.memory.state == 18 * held
    assert theirs.memory.casts == 0  # the weights have 16 bits already
    (zero,) = forecast(MODEL, parallel, 4, replace(mixed, sharded="optimizer")).groups
    # Dense parameters over four copies, those of experts over two; all dimensions here divide.
    assert zero.memory.optimizer == 12 * (dense // 4 + experts // 2)
    assert zero.memory.weights == 2 * held


def test_fsdp_by_hand() -> None:
    """A quarter of dense parameters and half of the experts'; in every micro-batch blocks are gathered twice, the rest once."""
    parallel = ParallelConfig(ep=2, fsdp=True)
    (rank,) = forecast(MODEL, parallel, 4, Training(4, 3, 8)).groups
    dense, experts, ends = 4 * DENSE_BLOCK, 4 * 2 * EXPERT, 8 + 2 * ENDS
    assert rank.parameters.dense == (dense + ends) // 4
    assert rank.parameters.experts == experts // 2
    assert rank.memory.state == 16 * rank.parameters.total
    assert rank.memory.gathered == 2 * 4 * (DENSE_BLOCK + 2 * EXPERT)
    assert rank.traffic.weights == 3 * 4 * (3 * (2 * dense + ends) // 4 + 2 * experts // 2)
    assert rank.traffic.gradients == 3 * 4 * (3 * (dense + ends) // 4 + experts // 2)


def test_stages_by_hand() -> None:
    """Two stages, 1F1B, four micro-batches of 2 rows of 8: 16 tokens of 8 numbers go on, and their gradients come back."""
    first, last = forecast(MODEL, ParallelConfig(pp=2), 2, Training(2, 4, 8, dtype="fp32")).groups
    assert (first.layers, last.layers) == ((0, 1), (2, 3))
    assert first.traffic.stages == last.traffic.stages == 4 * 16 * 8 * 4
    assert first.parameters.total == 2 * (DENSE_BLOCK + 4 * EXPERT) + ENDS
    assert last.parameters.total == 2 * (DENSE_BLOCK + 4 * EXPERT) + ENDS + 8
    head = 16 * (3 * 8 * 4 + 4 + 2 * 32 * 4)
    assert first.memory.activations == 2 * (last.memory.activations - head)  # two micro-batches against one


def test_a_tied_matrix_is_summed_over_its_two_stages() -> None:
    tied = replace(MODEL, tie_embeddings=True)
    for dp, parallel in ((1, ParallelConfig(pp=2)), (2, ParallelConfig(pp=2, fsdp=True))):
        training = Training(2, 2, 8)
        both, one = (forecast(model, parallel, 2 * dp, training).groups[0].traffic for model in (tied, MODEL))
        assert both.gradients - one.gradients == 4 * ENDS // dp


def test_plans_are_kept_whole_where_rows_are_shared_out() -> None:
    """tp 2 with whole experts: a rank executes half of the rows, and keeps the plan and the outputs of all."""
    (rank,) = forecast(MODEL, ParallelConfig(tp=2, ep=2, etp=1), 2, Training(1, 1, 16, dtype="fp32")).groups
    block = blocks_of(MODEL)[0]
    layer = block_activations(MODEL, block, 16, sent=32, received=16, b=4, tp=2)
    assert rank.memory.activations == 4 * layer.kept + head_activations(MODEL, 16, 4)
    assert rank.expert_rows == 4 * 16  # of both shares those for its two experts


def test_recomputation_keeps_inputs_and_one_block() -> None:
    full = forecast(MODEL, ParallelConfig(), 1, Training(2, 1, 8)).groups[0].memory
    light = forecast(MODEL, ParallelConfig(), 1, Training(2, 1, 8, recompute=True)).groups[0].memory
    assert light.activations < full.activations
    assert light.casts == 2 * ENDS  # the head's, which is not recomputed


def test_flops_are_those_of_the_model() -> None:
    """All ranks together compute three forwards of the whole batch; recomputation a fourth of the blocks."""
    from moesaic.cost.flops import part_flops

    tokens = 8 * 2 * 16
    parts = part_flops(MODEL, 16, 1)
    for parallel in (ParallelConfig(ep=2), ParallelConfig(pp=2, ep=2), ParallelConfig(pp=4)):
        found = forecast(MODEL, parallel, 4, Training(8, 2, 16))
        total = sum(group.flops * len(group.ranks) for group in found.groups)
        assert total == pytest.approx(3 * tokens * sum(parts.values()))
    again = forecast(MODEL, ParallelConfig(ep=2), 4, Training(8, 2, 16, recompute=True))
    total = sum(group.flops * len(group.ranks) for group in again.groups)
    assert total == pytest.approx(tokens * (4 * sum(parts.values()) - parts["head"]))
    sliced = forecast(MODEL, ParallelConfig(tp=2), 2, Training(8, 2, 16))
    router = parts["router"]  # every rank of a tp group computes it, and the head
    total = sum(group.flops * len(group.ranks) for group in sliced.groups)
    assert total == pytest.approx(3 * tokens * (sum(parts.values()) + router + parts["head"]))


def test_uneven_rows_of_a_batch() -> None:
    """Three rows over two ranks: the first computes two."""
    first, second = forecast(MODEL, ParallelConfig(), 2, Training(3, 1, 8)).groups
    assert first.flops == pytest.approx(2 * second.flops)
    assert (first.expert_rows, second.expert_rows) == (4 * 2 * 16, 4 * 2 * 8)


# ---- time ----------------------------------------------------------------------------------------------------------


def test_time_by_hand() -> None:
    found = forecast(MODEL, ParallelConfig(ep=2, pp=2), 4, Training(4, 4, 8))
    slowest = max(found.groups, key=lambda group: group.flops)
    time = step_time(found, Rates(flops=1e6, network=1e3, node=1e4), ranks_per_node=2)
    assert time.compute == pytest.approx(slowest.flops / 1e6)
    assert time.sends["exchange"] == pytest.approx(slowest.traffic.exchange / 1e4)  # ranks 0 and 1 share a node
    assert time.sends["stages"] == pytest.approx(slowest.traffic.stages / 1e3)  # ranks 0 and 2 do not
    busy = time.compute + sum(time.sends.values())
    assert time.bubble == pytest.approx(busy * found.bubble / (1 - found.bubble))
    assert time.apart == pytest.approx(busy / (1 - found.bubble))
    assert time.overlapped < time.apart


def test_groups_within_nodes() -> None:
    layout = Layout.of(ParallelConfig(tp=2, pp=2), 8)
    assert within_nodes(layout, "tp", 4)
    assert within_nodes(layout, "dp", 4)
    assert not within_nodes(layout, "dp", 2)
    assert not within_nodes(layout, "pp", 4)
    assert within_nodes(layout, "ep", 1)  # groups of one


# ---- search --------------------------------------------------------------------------------------------------------


def test_the_search_finds_what_fits_and_keeps_the_rows() -> None:
    training = Training(8, 2, 16)
    whole = forecast(MODEL, ParallelConfig(), 8, training).largest.memory.total
    found = search_layouts(MODEL, 8, training, whole, ranks_per_node=4)
    traffic = [one.forecast.busiest.traffic.total for one in found]
    assert traffic == sorted(traffic)
    assert ParallelConfig() in [one.parallel for one in found]
    for one in found:
        assert one.training.rows == 16
        assert one.forecast.largest.memory.total <= whole
        again = forecast(MODEL, one.parallel, 8, one.training)  # all ranks, not only those that can be the largest
        assert again.largest.memory.total == one.forecast.largest.memory.total
        assert again.busiest.traffic.total == one.forecast.busiest.traffic.total
    tight = search_layouts(MODEL, 8, training, whole / 3, ranks_per_node=4)
    assert 0 < len(tight) < len(found)
    assert search_layouts(MODEL, 8, training, 10) == []


def test_the_search_keeps_sequences_together_where_a_router_must_see_all() -> None:
    leaky = replace(MODEL, moe=replace(MODEL.moe, k=1, router=RouterConfig("base", allow_leak=True)))
    found = search_layouts(leaky, 4, Training(4, 4, 8), 1e9, ranks_per_node=4)
    assert found
    assert {one.forecast.layout.dp for one in found} == {1}


def test_divisors() -> None:
    assert divisors(12, 100) == [1, 2, 3, 4, 6, 12]
    assert divisors(12, 5) == [1, 2, 3, 4]


# ---- DeepSeek-V3 ---------------------------------------------------------------------------------------------------

D, E, H, V = 7168, 256, 2048, 129280
EXPERT_V3 = 3 * D * H
MLA = D * 1536 + 1536 + 1536 * 128 * 192 + D * 576 + 512 + 512 * 128 * 256 + 128 * 128 * D
SPARSE = MLA + 2 * D + E * D + EXPERT_V3  # router and one shared expert, without the routed ones
DENSE = MLA + 2 * D + 3 * D * 18432


@pytest.fixture(scope="module")
def v3() -> published.Forecast:
    return published.deepseek_v3()


def test_v3_parameters_by_hand(v3: published.Forecast) -> None:
    """61 layers over 16 stages, 3 or 4 each; every rank has stages i and 15 - i and 4 of 256 experts."""
    assert (
        v3.parameters.total
        == 3 * DENSE + 58 * (SPARSE + E * EXPERT_V3) + 2 * V * D + D
        == count_config(preset("deepseek-v3")).total
    )
    first = v3.groups[0]
    assert first.ranks[0] == 0
    assert first.layers == (0, 1, 2, 57, 58, 59, 60)
    assert first.parameters.dense == 3 * DENSE + 4 * SPARSE + 2 * V * D + D
    assert first.parameters.experts == 4 * 4 * EXPERT_V3
    second = next(group for group in v3.groups if 128 in group.ranks)
    assert second.layers == (3, 4, 5, 6, 53, 54, 55, 56)
    assert second.parameters.total == 8 * (SPARSE + 4 * EXPERT_V3)
    total = sum(group.parameters.total * len(group.ranks) for group in v3.groups)
    # Dense parameters lie on 128 ranks twice, experts on 2 twice.
    assert total == 2 * (128 * v3.parameters.dense + 2 * v3.parameters.experts)


def test_v3_memory_by_hand(v3: published.Forecast) -> None:
    """Of the second group: bf16 weights, fp32 gradients, and of 8 bytes of optimiser state its part of 128, 2 and 2."""
    group = next(group for group in v3.groups if 128 in group.ranks)
    held = group.parameters.total
    assert group.memory.weights == 2 * held
    assert group.memory.gradients == 4 * held
    exact = 8 * (8 * SPARSE / 128 + 8 * 4 * EXPERT_V3 / 2) / 2
    assert group.memory.optimizer == pytest.approx(exact, rel=1e-3)  # 576 rows over 128 ranks do not divide
    # 17 micro-batches of 4,096 tokens over two stages of four layers: two norms (fp32 twice, bf16), fp32 input of the router,
    # fp32 scores, 16 bytes for each of 8 rows. Of one layer everything is made again.
    kept = 17 * 4 * 4096 * (2 * (10 * D + 4) + 4 * D + 4 * E + 16 * 8)
    again = group.memory.activations - kept
    attention = (2 * 128 * 192 + 128 * 256 + 2 * 128 * 128 + 64) * 2 + 4 * 128 + (10 * 512 + 4) + (10 * 1536 + 4)
    rows = 8 * (2 * D + 8 * H + 4 * D + 28)
    assert again == 4096 * (attention + rows + 8 * H)
    assert v3.largest.memory.total < 80e9


def test_v3_traffic_by_hand(v3: published.Forecast) -> None:
    """120 micro-batches, half of them through each of two stages; 63/64 of 8 rows a token leave, FP8 there and bf16 back."""
    group = next(group for group in v3.groups if 128 in group.ranks)
    away = Fraction(63, 64) * 4096 * 8
    once = away * D * (Fraction(132, 128) + 2)
    assert group.traffic.exchange == 60 * 8 * once * 3  # forward, again, backward
    nodes = published.once_per_node_bytes(58 / 16)
    assert nodes == pytest.approx(2 * 491520 * 58 / 16 * 3.17 * D * (132 / 128 + 2), rel=0.01)


def test_v3_beside_what_was_published(v3: published.Forecast) -> None:
    """Figures that were published: ours are within what their digits say."""
    ours = {figure.what: figure for figure in published.figures(v3)}
    assert ours["training FLOPs of a token"].value == pytest.approx(250e9, rel=0.01)
    assert ours["tokens of a step"].value == 15360 * 4096 == pytest.approx(272.80e9 * 19.926 / 86400, rel=0.001)
    assert ours["FLOP/s of a GPU in a step of 19.926 s"].value == pytest.approx(385e12, rel=0.01)
    assert ours["parameters"].value == pytest.approx(671e9, rel=0.001)
    assert 0.4 < ours["computing : all-to-all"].value / 2 < 2.5  # about 1 : 1, with FP8 products
    assert all(figure.forecast for figure in ours.values())
    unpublished = [what for what, figure in ours.items() if not figure.published]
    assert unpublished == ["all-to-all of a GPU and step, once per node", "all-to-all of a GPU and step, row by row"]


def test_another_count_of_v3() -> None:
    """arXiv 2502.07846 has 11.64 GiB of bf16 weights; it slices neither rotary queries nor shared experts, and we do."""
    ours = published.other_layout()
    left_whole = 4 * (1536 * 128 * 64 // 2 + EXPERT_V3 // 2)
    assert 2 * (ours + left_whole) / 2**30 == pytest.approx(11.64, abs=0.005)
