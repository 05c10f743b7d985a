"""Forecast traffic against what a step over gloo processes sends, byte for byte, category by category."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from moesaic.cost.communication import (
    all_reduce_bytes,
    all_to_all_bytes,
    gather_bytes,
    nodes_reached,
    rows_away,
    step_bytes,
    two_level_bytes,
)
from moesaic.cost.forecast import Training
from moesaic.cost.layout import forecast
from moesaic.layout import Layout, ParallelConfig
from moesaic.models import ModelConfig, MoEConfig, build_model
from moesaic.models.config import LatentConfig
from moesaic.parallel.apply import apply
from moesaic.parallel.world import World
from moesaic.plan.capacity import CapacityRule
from moesaic.plan.edit import force_balanced
from moesaic.train.recompute import recompute_activations
from tests.distributed import run_distributed

MOE = MoEConfig(num_experts=8, k=2, hidden=8, losses={})
SPARSE = ModelConfig(
    vocab_size=16, dim=8, num_layers=2, num_heads=4, num_kv_heads=2, hidden=16, max_seq_len=16, moe=MOE, tie_embeddings=False
)  # fmt: skip
LATENT = replace(SPARSE, num_kv_heads=None, latent=LatentConfig(6, 4, nope_dim=4, rope_dim=2, value_dim=6))
# Name -> model, layout, recomputation.
CASES: dict[str, tuple[ModelConfig, ParallelConfig, bool]] = {
    "ep over dp": (SPARSE, ParallelConfig(ep=4), False),
    "recomputed": (SPARSE, ParallelConfig(ep=2), True),
    "in slices": (replace(SPARSE, moe=replace(MOE, shared=1)), ParallelConfig(ep=2, tp=2), False),
    "in slices, recomputed": (replace(SPARSE, qk_norm="projection"), ParallelConfig(ep=2, tp=2), True),
    "rows shared out": (replace(SPARSE, moe=replace(MOE, dense_first=1)), ParallelConfig(ep=4, tp=2, etp=1), False),
    "latent": (LATENT, ParallelConfig(tp=4), False),
    "padded": (
        replace(SPARSE, moe=replace(MOE, capacity=CapacityRule(2.0, groups=4))),
        ParallelConfig(ep=4, padded=True),
        False,
    ),
    "two levels": (SPARSE, ParallelConfig(ep=4, exchange="hierarchical", ranks_per_node=2), False),
    "copies": (SPARSE, ParallelConfig(ep=2, replicas=2), False),
    "sub-tokens": (replace(SPARSE, moe=replace(MOE, heads=2)), ParallelConfig(ep=2), False),
}
_KINDS = {"dispatch": "exchange", "combine": "exchange", "gradients": "gradients"}
_SLICES = (
    "slices of",
    "weights of slices",
    "norm over slices",
)


def kind_of(what: str) -> str:
    """The category of a collective, by its name; losses and loads are in none."""
    for start, kind in _KINDS.items():
        if what.startswith(start):
            return kind
    return "slices" if what.startswith(_SLICES) else "other"


def step(rank: int, name: str, accumulate: int) -> dict[str, Tensor]:
    """One step of two rows a micro-batch and dp rank; bytes sent by category."""
    model_config, parallel, recompute = CASES[name]
    world = World(Layout.of(parallel, 4), rank, ranks_per_node=parallel.ranks_per_node)
    model = build_model(model_config, seed=0).train()
    spread = apply(model, world, parallel, recompute=recompute_activations if recompute else None)
    for layer in model.moe_layers().values():
        layer.edits = (force_balanced,)
    world.watch.take()
    for _ in range(accumulate):
        model(torch.zeros(2, 16, dtype=torch.int64)).logits.square().mean().backward()
    spread.sum_gradients()
    found: dict[str, int] = {}
    for what, spent in world.watch.take().items():
        found[kind_of(what)] = found.get(kind_of(what), 0) + spent.sent_bytes
    return {kind: torch.tensor(sent) for kind, sent in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_step_sends_what_was_forecast(name: str) -> None:
    model, parallel, recompute = CASES[name]
    layout = Layout.of(parallel, 4)
    training = Training(2 * layout.dp, 2, 16, dtype="fp32", recompute=recompute)
    expected = forecast(model, parallel, 4, training)
    answers = run_distributed(4, step, name, 2)
    for group in expected.groups:
        for rank in group.ranks:
            # Which copy computes a row depends on the token; how many gradients are summed does not.
            for kind in ("slices", "gradients") if parallel.replicas else ("exchange", "slices", "gradients"):
                sent = int(answers[rank].get(kind, torch.tensor(0)))
                assert sent == getattr(group.traffic, kind), (name, rank, kind)
    assert any(int(answer.get(kind, torch.tensor(0))) for answer in answers for kind in ("exchange", "slices"))


def test_formula_by_hand() -> None:
    """Fieldguide 4.2: 4 T k d b (P - 1) / P; 6 when the forward is computed twice."""
    T, k, d, b, P = 1024, 8, 7168, 2, 64
    assert step_bytes(T * k, d, b, P) == 4 * T * k * d * b * 63 // 64
    assert step_bytes(T * k, d, b, P, recompute=True) == 6 * T * k * d * b * 63 // 64
    assert rows_away(12, 2, 8) == 9
    assert rows_away(10, 1, 3) == Fraction(20, 3)
    assert all_to_all_bytes(96, 512, 2) == 98304


def test_rings_by_hand() -> None:
    assert all_reduce_bytes(100, 1) == 0
    assert all_reduce_bytes(100, 4) == 150
    assert gather_bytes(100, 4) == 75


def test_two_levels_by_hand() -> None:
    """Eight ranks, four a node: 3/4 of the rows leave for another place, then 1/2 of them for the other node."""
    assert two_level_bytes(80, 4, 2, per_node=4, nodes=2) == (480, 320)


def test_each_node_once_by_counting() -> None:
    """Two nodes of two experts, k = 2: of six pairs four lie on both nodes; half of all that is reached is elsewhere."""
    assert nodes_reached(4, 2, 2) == pytest.approx((4 * 2 + 2 * 1) / 6 / 2)
    # DeepSeek-V3: 8 of 128 experts on 4 of 8 nodes. 1 - C(96, 8) / C(128, 8) of the four are reached, 7/8 of them elsewhere.
    missed = 1.0
    for i in range(8):
        missed *= (96 - i) / (128 - i)
    assert nodes_reached(256, 8, 8, limit=4) == pytest.approx(4 * (1 - missed) * 7 / 8)
    assert 3.1 < nodes_reached(256, 8, 8, limit=4) < 3.3
