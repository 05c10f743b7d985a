"""Every named variant builds from the base of ``moesaic compare`` at equal active compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moesaic.compare.variants import VARIANTS, flops_ratio, layer_of, named, variant_model
from moesaic.cost.flops import layer_flops
from moesaic.errors import ConfigError
from moesaic.experts.layer import MoE
from moesaic.models import build_model
from moesaic.models.build import build_ffn
from moesaic.models.config import ModelConfig
from moesaic.routing import ROUTERS, TokenContext
from moesaic.train.recipes import RECIPES

BASE = RECIPES["compare"]().model
SIZES = (2048, 16)


def test_every_router_there_is_can_be_compared() -> None:
    assert {variant.router for variant in VARIANTS.values()} | {"constant"} >= set(ROUTERS)


@pytest.mark.parametrize("name", VARIANTS)
def test_builds_at_equal_active_compute(name: str) -> None:
    model = variant_model(BASE, VARIANTS[name], *SIZES)
    build_model(model, device="meta")
    assert flops_ratio(model, BASE, *SIZES) == pytest.approx(1, abs=0.05)


# Where FLOPs are what PyTorch counts: single neurons multiply without a matrix product.
COUNTED = [name for name, variant in VARIANTS.items() if name != "product_keys" and not variant.dense]


@pytest.mark.parametrize("name", COUNTED)
def test_stated_flops_are_those_that_run(name: str) -> None:
    """Forward in training of one real layer, with the rows per token that this forward happened to compute."""
    model = variant_model(BASE, VARIANTS[name], 512, 4)
    assert model.moe is not None
    # PyTorch's counter sees its own products, not those of the C kernel.
    layer = build_ffn(replace(model, moe=replace(model.moe, backend="loop")), 0).train()
    assert isinstance(layer, MoE)
    x_BSD = torch.randn(4, 128, 96)
    tokens = torch.randint(1024, (512,))
    ctx = TokenContext(ids_T=tokens, task_T=tokens % 5, num_sequences=4)
    with FlopCounterMode(display=False) as counter:
        _, plan = layer(x_BSD, ctx)
    special = model.moe.zero + model.moe.copy + model.moe.constant
    rows = float(plan.counts_E[: len(plan.counts_E) - special].sum()) / plan.num_tokens
    stated = layer_flops(layer, 512, 4, model.moe.router.options, rows)
    assert counter.get_total_flops() / 512 == pytest.approx(stated, rel=0.03)


def test_layer_flops_by_hand() -> None:
    # Router 2 * 96 * 16; two experts of three 96 x 128 matrices, 2 FLOPs per entry.
    assert layer_flops(layer_of(BASE), *SIZES, {}) == 2 * 96 * 16 + 2 * 2 * 3 * 96 * 128


def test_k_1_gets_experts_twice_as_wide() -> None:
    switch = variant_model(BASE, VARIANTS["switch"], *SIZES)
    assert switch.moe is not None
    assert switch.moe.hidden == 256


def test_unknown_and_impossible() -> None:
    with pytest.raises(ConfigError, match='There is no router "topkk". Did you mean "topk"'):
        named("topkk")
    dense: ModelConfig = replace(BASE, moe=None)
    with pytest.raises(ConfigError, match="starts from a sparse model"):
        variant_model(dense, VARIANTS["topk"], *SIZES)
