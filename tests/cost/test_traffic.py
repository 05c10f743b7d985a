"""Bytes of a decoded token, by hand."""

from __future__ import annotations

import torch

from moesaic.cost.traffic import cache_bytes, cache_width, decode_bytes
from moesaic.models import LatentConfig, MoEConfig, build_model
from tests.models.tiny import tiny

MOE = MoEConfig(num_experts=8, k=2, hidden=12)


def test_weights_by_hand() -> None:
    model = build_model(tiny(MOE))
    parts = decode_bytes(model)
    assert parts == {
        "embedding": 16 * 4,  # one row
        "head": 64 * 16 * 4,  # the tied matrix, read as head
        "norm": 5 * 16 * 4,
        "attention": 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16) * 4,
        "router": 2 * 16 * 8 * 4,
        "experts": 2 * 2 * 3 * 16 * 12 * 4,  # two layers, two of eight experts
    }
    half = decode_bytes(model.to(torch.bfloat16))
    assert half["router"] == parts["router"]  # stays fp32
    assert {part: 2 * n for part, n in half.items() if part != "router"} == {
        part: n for part, n in parts.items() if part != "router"
    }


def test_an_untied_head_and_experts_used_more_than_once() -> None:
    parts = decode_bytes(build_model(tiny(MoEConfig(num_experts=2, k=2, hidden=12, heads=4), tie_embeddings=False)))
    assert (parts["embedding"], parts["head"]) == (16 * 4, 64 * 16 * 4)
    assert parts["experts"] == 2 * 2 * 3 * 4 * 12 * 4  # all there are, however many sub-tokens use them


def test_keys_and_values() -> None:
    model = build_model(tiny(sliding_window=(0, 10)))
    assert cache_bytes(model, 6) == 2 * 6 * 2 * 2 * 4 * 4  # layers, tokens, keys and values, two heads of 4, fp32
    assert cache_bytes(model, 30) == (30 + 10) * 2 * 2 * 4 * 4
    model.compute_dtype = torch.bfloat16
    assert cache_bytes(model, 30) == (30 + 10) * 2 * 2 * 4 * 2


def test_latent_attention_keeps_one_vector_per_token() -> None:
    """DeepSeek-V2: 512 + 64 numbers, where 128 heads of 192 and 128 would be 40,960. Bytes of the cache itself."""
    config = tiny(num_kv_heads=None, latent=LatentConfig(6, None, 4, 4, 5))
    model = build_model(config)
    assert cache_width(config) == 10
    assert cache_bytes(model, 7) == 2 * 7 * 10 * 4
    cache = model.new_cache(1, 7)
    assert sum(t.untyped_storage().nbytes() for t in cache.keys + cache.values) == cache_bytes(model, 7)
    model.compute_dtype = torch.bfloat16
    assert cache_bytes(model, 7) == 2 * 7 * 10 * 2
    published = tiny(dim=5120, num_heads=128, num_kv_heads=None, latent=LatentConfig(512, 1536, 128, 64, 128))
    assert cache_width(published) == 576


def test_weights_of_latent_attention_and_biased_experts() -> None:
    moe = MoEConfig(num_experts=8, k=2, hidden=12, expert_bias=True, shared=1, shared_hidden=7)
    model = build_model(tiny(moe, num_kv_heads=None, latent=LatentConfig(6, 10, 4, 4, 5)))
    parts = decode_bytes(model)
    assert parts["experts"] == 2 * 2 * (3 * 16 * 12 + 2 * 12 + 16) * 4  # layers, experts used
    assert parts["shared experts"] == 2 * 3 * 16 * 7 * 4
    queries, latents = 16 * 10 + 10 + 10 * 4 * 8, 16 * 10 + 6 + 6 * 4 * 9
    assert parts["attention"] == 2 * (queries + latents + 4 * 5 * 16) * 4
