"""Bytes of weights, caches and training against sums by hand (field guide 7.3), and the cache against a real one."""

from __future__ import annotations

import pytest

from moesaic.cost.count import ParameterCount, count_config
from moesaic.cost.sizes import STORAGE, cache_of, training_of, weight_bytes
from moesaic.models import build_model
from moesaic.models.config import LatentConfig, ModelConfig
from moesaic.models.presets import preset
from tests.models.tiny import tiny

PARTS = {"embedding": 1000, "head": 1000, "norm": 10, "router": 100, "experts": 163_840, "attention": 16_384}
COUNTS = ParameterCount(sum(PARTS.values()), 0, PARTS)
MATRICES = 163_840 + 16_384


def test_formats_by_hand() -> None:
    rest = 2 * (1000 + 1000 + 10)  # bf16
    router = 4 * 100
    assert weight_bytes(COUNTS, "fp32") == 4 * COUNTS.total
    assert weight_bytes(COUNTS, "bf16") == weight_bytes(COUNTS, "fp16") == 2 * MATRICES + rest + router
    assert weight_bytes(COUNTS, "fp8") == MATRICES + 4 * 11 + rest + router  # 11 blocks of 128 x 128
    assert weight_bytes(COUNTS, "int4") == MATRICES // 2 + 2 * MATRICES // 128 + rest + router
    assert weight_bytes(COUNTS, "int4", scales=False) == MATRICES // 2 + rest + router
    assert weight_bytes(COUNTS, "mxfp4") == 163_840 // 2 + 163_840 // 32 + 2 * 16_384 + rest + router
    assert {"fp32", "bf16", "fp8", "int4", "mxfp4"} <= set(STORAGE)


def test_known_sizes() -> None:
    mixtral = count_config(preset("mixtral-8x7b"))
    assert weight_bytes(mixtral, "bf16") == 2 * mixtral.total + 2 * 32 * 4096 * 8  # routers fp32
    assert round(weight_bytes(mixtral, "bf16") / 1e9, 1) == 93.4
    assert 24e9 < weight_bytes(mixtral, "int4") < 26e9
    # The released gpt-oss-120b, MXFP4 experts beside bf16: 60.8 GiB.
    assert weight_bytes(count_config(preset("gpt-oss-120b")), "mxfp4") / 2**30 == pytest.approx(60.8, abs=0.1)
    # 175 billion in fp32: 700 GB; a trillion: 4 TB, in bf16 2 TB.
    assert weight_bytes(ParameterCount(175 * 10**9, 0, {"experts": 175 * 10**9}), "fp32") == 700 * 10**9
    assert weight_bytes(ParameterCount(10**12, 0, {"experts": 10**12}), "bf16") == 2 * 10**12


def test_training_by_hand() -> None:
    found = training_of(1000)
    assert (found.mixed, found.mixed_fp32_gradient, found.own) == (16_000, 18_000, 16_000)


def test_caches_by_hand() -> None:
    mixtral = cache_of(preset("mixtral-8x7b"), 4096)
    assert mixtral.per_token == 32 * 2 * 8 * 128 * 2
    assert mixtral.needed == mixtral.held == 4096 * mixtral.per_token
    latent = cache_of(preset("deepseek-v3"), 1000)
    assert latent.per_token == 61 * (512 + 64) * 2
    assert latent.needed == latent.held == 1000 * latent.per_token
    windowed = cache_of(preset("gpt-oss-20b"), 1000)
    one = 2 * 8 * 64 * 2
    assert windowed.per_token == 24 * one
    assert windowed.needed == 12 * 1000 * one + 12 * 128 * one
    assert windowed.held == 24 * 1000 * one
    assert cache_of(preset("gpt-oss-20b"), 100).needed == 24 * 100 * one  # no window is full
    assert cache_of(preset("mixtral-8x7b"), 4096, 4).needed == 2 * mixtral.needed


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        tiny(sliding_window=4),
        tiny(num_kv_heads=None, latent=LatentConfig(kv_rank=6, nope_dim=4, rope_dim=2, value_dim=4)),
    ],
)
def test_what_is_held_is_what_a_cache_takes(config: ModelConfig) -> None:
    cache = build_model(config, seed=0).new_cache(1, 10)
    taken = sum(store.nbytes for store in (*cache.keys, *cache.values))
    assert cache_of(config, 10, 4).held == taken
