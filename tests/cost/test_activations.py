"""Kept activations against what autograd saves of the real modules: every storage once, parameters left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.cost.activations import block_activations, head_activations
from moesaic.cost.blocks import blocks_of
from moesaic.cost.layout import Training, forecast
from moesaic.layout import ParallelConfig
from moesaic.models import ModelConfig, MoEConfig, build_model
from moesaic.models.config import LatentConfig
from moesaic.train.loss import cross_entropy
from moesaic.train.recompute import recompute_activations

B, S = 2, 64
DENSE = ModelConfig(vocab_size=7, dim=32, num_layers=1, num_heads=4, num_kv_heads=2, hidden=80, max_seq_len=S)
MOE = MoEConfig(num_experts=8, k=2, hidden=24, backend="grouped_mm")
# Name -> config and how far the forecast may be off: what plans keep of a row is rounded, sums of rows may be kept in fp32.
CASES: dict[str, tuple[ModelConfig, float]] = {
    "dense": (DENSE, 0.001),
    "plain": (replace(DENSE, gated=False, activation="gelu"), 0.001),
    "norm per head": (replace(DENSE, qk_norm="head"), 0.001),
    "latent": (
        replace(DENSE, num_kv_heads=None, latent=LatentConfig(16, 24, nope_dim=8, rope_dim=4, value_dim=12)),
        0.001,
    ),
    "sparse": (replace(DENSE, moe=MOE), 0.01),
    "shared": (replace(DENSE, moe=replace(MOE, shared=1)), 0.01),
    "sub-tokens": (replace(DENSE, moe=replace(MOE, heads=2)), 0.15),
}


def saved_bytes(config: ModelConfig, recompute: bool, dtype: torch.dtype) -> int:
    """Bytes of all storages that the forward saves for the backward, without parameters."""
    model = build_model(config, seed=0).train()
    model.compute_dtype = dtype
    if recompute:
        recompute_activations(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # alive, so that no other one gets its address
        return tensor

    ids_BS = torch.randint(config.vocab_size, (B, S), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cross_entropy(model(ids_BS).logits.flatten(0, 1), ids_BS.flatten()).mean()
    return sum(storage.nbytes() for storage in kept.values())


def of_one_block(config: ModelConfig, recompute: bool, dtype: torch.dtype) -> int:
    """What a second block adds."""
    two = replace(config, num_layers=2)
    return saved_bytes(two, recompute, dtype) - saved_bytes(config, recompute, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_a_block_keeps_what_autograd_saves(name: str, dtype: torch.dtype) -> None:
    config, tolerance = CASES[name]
    block = blocks_of(config)[0]
    rows = B * S * block.rows
    casts = sum(p.numel() for n, p in build_model(config, seed=0).blocks[0].named_parameters() if p.dim() > 1)
    casts -= sum(
        p.numel() for layer in build_model(config, seed=0).moe_layers().values() for p in layer.router.parameters()
    )
    found = block_activations(config, block, B * S, rows, rows, dtype.itemsize, casts=casts)
    assert found.kept + found.casts == pytest.approx(of_one_block(config, False, dtype), rel=tolerance)
    # Multi-head layers project into sub-tokens and back outside what is recomputed.
    if name != "sub-tokens":
        assert found.recomputed == pytest.approx(of_one_block(config, True, dtype), rel=max(tolerance / 2, 0.001))


def test_a_dense_block_by_hand() -> None:
    """fp32, a token: two norms of 3 D and a statistic; queries, keys, values, output, a statistic a head; 4 H."""
    found = block_activations(DENSE, blocks_of(DENSE)[0], 1, 0, 0, 4)
    norms = 2 * (3 * 32 * 4 + 4)
    assert found.recomputed == norms
    assert found.kept == norms + (4 + 2 + 2 + 4) * 8 * 4 + 4 * 4 + 4 * 80 * 4
    assert head_activations(DENSE, 1, 4) == 3 * 32 * 4 + 4 + 2 * 7 * 4


def test_slices_halve_what_is_inside_regions() -> None:
    block = blocks_of(DENSE)[0]
    whole, half = (block_activations(DENSE, block, 10, 0, 0, 2, tp=tp) for tp in (1, 2))
    assert whole.recomputed == half.recomputed
    assert 2 * (half.kept - half.recomputed) == whole.kept - whole.recomputed


def test_a_whole_model_alone() -> None:
    """The forecast of one process: two blocks and the head, with the logits' gradient that the backward adds."""
    config = replace(CASES["sparse"][0], num_layers=2)
    training = Training(B, 1, S, dtype="fp32")
    (group,) = forecast(config, ParallelConfig(), 1, training).groups
    gradient = B * S * config.vocab_size * 4
    assert group.memory.activations == pytest.approx(saved_bytes(config, False, torch.float32) + gradient, rel=0.05)
    assert group.memory.casts == 0
    half = forecast(config, ParallelConfig(), 1, replace(training, dtype="bf16")).groups[0].memory
    assert half.activations + half.casts == pytest.approx(
        saved_bytes(config, False, torch.bfloat16) + gradient // 2, rel=0.05
    )
