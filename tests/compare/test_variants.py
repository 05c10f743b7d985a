"""Every named variant builds from the base of ``moesaic compare`` at equal active compute."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moesaic.compare.variants import VARIANTS, flops_ratio, layer_of, named, variant_model
from moesaic.cost.flops import layer_flops
from moesaic.errors import ConfigError
from moesaic.models import build_model
from moesaic.models.config import ModelConfig
from moesaic.routing import ROUTERS
from moesaic.train.recipes import RECIPES

BASE = RECIPES["compare"]().model
SIZES = (2048, 16)


def test_every_router_there_is_can_be_compared() -> None:
    assert {variant.router for variant in VARIANTS.values()} | {"constant"} >= set(ROUTERS)


@pytest.mark.parametrize("name", VARIANTS)
def test_builds_at_equal_active_compute(name: str) -> None:
    model = variant_model(BASE, VARIANTS[name], *SIZES)
    build_model(model, device="meta")
    if VARIANTS[name].depth is None:
        assert flops_ratio(model, BASE, *SIZES) == pytest.approx(1, abs=0.05)


def test_layer_flops_by_hand() -> None:
    # Router 2 * 96 * 16; two experts of three 96 x 128 matrices, 2 FLOPs per entry.
    assert layer_flops(layer_of(BASE), *SIZES, {}) == 2 * 96 * 16 + 2 * 2 * 3 * 96 * 128


def test_k_1_gets_experts_twice_as_wide() -> None:
    switch = variant_model(BASE, VARIANTS["switch"], *SIZES)
    assert switch.moe is not None
    assert switch.moe.hidden == 256


def test_unknown_and_impossible() -> None:
    with pytest.raises(ConfigError, match='There is no router "topkk" to compare. Did you mean "topk"'):
        named("topkk")
    dense: ModelConfig = replace(BASE, moe=None)
    with pytest.raises(ConfigError, match="starts from a sparse model"):
        variant_model(dense, VARIANTS["topk"], *SIZES)
