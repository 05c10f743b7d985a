"""Layouts that cannot be, each refused with its number and what would do; and those that can."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moesaic.cost.check_layout import check_layout
from moesaic.errors import ConfigError
from moesaic.layout import ParallelConfig
from moesaic.models.config import LatentConfig, ModelConfig, MoEConfig, RouterConfig
from moesaic.plan.capacity import CapacityRule

MOE = MoEConfig(num_experts=10, k=2, hidden=48, shared=1)
SPARSE = ModelConfig(vocab_size=64, dim=32, num_layers=4, num_heads=8, num_kv_heads=4, hidden=96, moe=MOE)
DENSE = replace(SPARSE, moe=None)
LATENT = replace(SPARSE, num_kv_heads=None, latent=LatentConfig(16, nope_dim=8, rope_dim=4, value_dim=8))


def sparse(**settings: object) -> ModelConfig:
    return replace(SPARSE, moe=replace(MOE, **settings))


@pytest.mark.parametrize(
    ("model", "parallel", "world"),
    [
        (SPARSE, ParallelConfig(), 1),
        (SPARSE, ParallelConfig(ep=4), 4),  # 10 experts over 4 ranks: 2, 3, 2, 3
        (SPARSE, ParallelConfig(ep=3), 6),
        (SPARSE, ParallelConfig(ep=2, tp=4), 8),
        (SPARSE, ParallelConfig(ep=4, tp=4, etp=1), 4),
        (SPARSE, ParallelConfig(pp=4), 4),
        (SPARSE, ParallelConfig(pp=2, stages_per_rank=2, schedule="interleaved"), 2),
        (SPARSE, ParallelConfig(ep=4, replicas=2), 4),
        (SPARSE, ParallelConfig(ep=2, replicas=2, fsdp=True), 4),
        (sparse(capacity=CapacityRule(groups=2)), ParallelConfig(ep=2, padded=True), 2),
        (sparse(capacity=CapacityRule("exact")), ParallelConfig(), 2),
        (sparse(capacity=CapacityRule(groups=4)), ParallelConfig(), 4),
        (sparse(num_experts=(4, 10, 8, 6)), ParallelConfig(ep=4), 4),
        (LATENT, ParallelConfig(tp=8, etp=1), 8),  # no key/value heads to slice
        (DENSE, ParallelConfig(tp=4, fsdp=True), 8),
        (SPARSE, ParallelConfig(ep=4, exchange="hierarchical", ranks_per_node=2), 8),
    ],
)
def test_what_can_be_passes(model: ModelConfig, parallel: ParallelConfig, world: int) -> None:
    layout = check_layout(model, parallel, world, batch_size=8, accumulate=2)
    assert layout.world == world
    assert layout.pp * layout.dp * layout.tp == layout.pp * layout.edp * layout.ep * layout.etp == world


@pytest.mark.parametrize(
    ("model", "parallel", "world", "words"),
    [
        (SPARSE, ParallelConfig(tp=2, pp=2), 6, "6 processes cannot form pp=2 stages of tp=2"),
        (SPARSE, ParallelConfig(ep=3), 4, "ep=3 does not divide the 4 places"),
        (SPARSE, ParallelConfig(ep=12), 12, "ep=12 ranks cannot share the 10 experts of a layer: 2 of them would hold none"),
        (sparse(num_experts=(10, 10, 3, 10)), ParallelConfig(ep=4), 4, "the 3 experts of a layer: 1 of them"),
        (DENSE, ParallelConfig(ep=2), 2, "ep=2 spreads experts, and the model has no sparse layer"),
        (DENSE, ParallelConfig(padded=True), 2, "the model has no sparse layer; leave it out"),
        (SPARSE, ParallelConfig(ep=4, replicas=3), 4, "are 13 slots, which ep=4 ranks cannot hold"),
        (SPARSE, ParallelConfig(ep=2, replicas=12), 2, "more than one copy of each of 10 experts"),
        (SPARSE, ParallelConfig(ep=2, padded=True), 2, "model.moe.capacity is null"),
        (SPARSE, ParallelConfig(tp=3), 3, "and 8 is no multiple of it; choose tp among 1, 2, 4."),
        (SPARSE, ParallelConfig(tp=8), 8, "tp=8 must divide the 4 key/value heads"),
        (replace(SPARSE, hidden=90, moe=replace(MOE, dense_first=1)), ParallelConfig(tp=4), 4, "model.hidden, and 90 is no"),
        (replace(SPARSE, hidden=(96, 96, 98, 96), moe=None), ParallelConfig(tp=4), 4, "98 is no multiple of it"),
        (sparse(shared_hidden=50), ParallelConfig(tp=4), 4, "the width of shared experts, and 50 is no multiple"),
        (sparse(hidden=50, shared=0), ParallelConfig(tp=4), 4, "etp=4 slices of every expert"),
        (LATENT, ParallelConfig(tp=3, etp=1), 3, "tp=3 must divide model.num_heads"),
        (SPARSE, ParallelConfig(pp=5), 5, "5 pipeline stages (pp=5 * stages_per_rank=1) are more than the 4 layers"),
        (SPARSE, ParallelConfig(pp=2, stages_per_rank=3, schedule="interleaved"), 2, "6 pipeline stages"),
        (SPARSE, ParallelConfig(), 16, "batch_size=8 has fewer rows than the dp=16 parts"),
        (SPARSE, ParallelConfig(pp=2), 6, "batch_size=8 must be a multiple of dp=3 with pipeline stages"),
        (sparse(capacity=CapacityRule()), ParallelConfig(), 4, "groups=1 cannot be shared equally by dp=4"),
        (sparse(capacity=CapacityRule(groups=4)), ParallelConfig(), 3, "set groups=6"),
        (sparse(router=RouterConfig("base", allow_leak=True), k=1), ParallelConfig(), 2, '"base" looks at the other sequences'),
        (sparse(hidden=51), ParallelConfig(ep=2, replicas=2, fsdp=True), 4, "expert width 51 is no multiple of the 2 ranks"),
        (sparse(expert_dropout=0.1), ParallelConfig(tp=2), 2, "expert_dropout=0.1 would drop other units"),
        (SPARSE, ParallelConfig(ep=4, exchange="hierarchical", ranks_per_node=3), 8, "lie [3, 1] on nodes of 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_words(
    model: ModelConfig, parallel: ParallelConfig, world: int, words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_layout(model, parallel, world, batch_size=8, accumulate=2)
    assert words in str(error.value)
    assert str(error.value).endswith(".")


def test_interleaved_needs_whole_rounds_of_micro_batches() -> None:
    parallel = ParallelConfig(pp=2, stages_per_rank=2, schedule="interleaved")
    with pytest.raises(ConfigError, match=r"accumulate=3 is no multiple of it; set accumulate=4\."):
        check_layout(SPARSE, parallel, 2, batch_size=4, accumulate=3)


def test_uneven_rows_pass_without_stages() -> None:
    assert check_layout(SPARSE, ParallelConfig(), 3, batch_size=7).dp == 3
