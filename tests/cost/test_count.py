"""Parameters counted by part: against the built module, and by hand."""

from __future__ import annotations

import pytest

from moesaic.cost.count import ParameterCount, count_config, count_parameters, stored_elements
from moesaic.models import DepthConfig, ModelConfig, MoEConfig, RouterConfig, build_model
from moesaic.models.presets import PRESETS, preset
from tests.models.tiny import tiny

CONFIGS = {
    "dense": tiny(),
    "untied": tiny(tie_embeddings=False, norm="layernorm", attention_bias="all", qk_norm="head"),
    "sparse": tiny(MoEConfig(num_experts=4, k=2, hidden=12)),
    "all kinds": tiny(MoEConfig(num_experts=3, k=2, hidden=12, shared=2, shared_gate=True, zero=1, copy=1, constant=2)),
    "lists": tiny(MoEConfig(num_experts=(3, 5), k=(2, 4), hidden=(6, 7), dense_first=1), num_layers=3, gated=False),
    "window": tiny(num_layers=3, sliding_window=(4, 0, 4), hidden=(8, 9, 8)),
    "some dense": tiny(
        MoEConfig(num_experts=(4, 4, 6), k=2, hidden=12, layers=(1, 3, 4), shared=1),
        num_layers=5,
        hidden=(8, 9, 8, 9, 9),
    ),
    "noisy": tiny(MoEConfig(num_experts=4, k=2, hidden=12, router=RouterConfig("noisy_topk"))),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_parts_add_up_to_every_parameter_of_the_built_model(name: str, device: str) -> None:
    model = build_model(CONFIGS[name], device=device)
    count = count_parameters(model)
    assert count.total == sum(p.numel() for p in model.parameters()) == sum(count.parts.values())
    assert count.active == sum(count.active_parts.values()) <= count.total
    assert set(count.parts) == set(count.active_parts)
    different = [part for part in count.parts if count.parts[part] != count.active_parts[part]]
    assert different == (["experts"] if CONFIGS[name].moe else [])
    assert count.embedding == count.parts["embedding"] + count.parts["head"]


def test_a_dense_model_by_hand() -> None:
    config = ModelConfig(
        vocab_size=50, dim=8, num_layers=2, num_heads=4, num_kv_heads=2, hidden=20, tie_embeddings=False
    )
    count = count_parameters(build_model(config, device="meta"))
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # heads are 2 wide; two key/value heads
    assert count.parts == {
        "embedding": 50 * 8,
        "head": 50 * 8,
        "norm": 2 * 2 * 8 + 8,
        "attention": 2 * attention,
        "feed-forward": 2 * 3 * 8 * 20,
    }
    assert count.active == count.total


def test_a_sparse_model_by_hand() -> None:
    """Layer 0 dense; layer 1: 3 of 8-wide feed-forward experts with 2 constant, 1 zero, 1 copy, 2 shared ones, all gated."""
    moe = MoEConfig(num_experts=3, k=2, hidden=8, dense_first=1, shared=2, shared_gate=True, zero=1, copy=1, constant=2)
    config = ModelConfig(
        vocab_size=50,
        dim=6,
        num_layers=2,
        num_heads=3,
        hidden=10,
        norm="layernorm",
        attention_bias="all",
        qk_norm="head",
        moe=moe,
    )
    count = count_parameters(build_model(config, device="meta"))
    assert count.parts == {
        "embedding": 300,
        "head": 0,
        "norm": 5 * 2 * 6,
        "attention": 2 * (4 * (6 * 6 + 6) + 2 * 2),
        "feed-forward": 3 * 6 * 10,
        "router": 6 * (3 + 1 + 1 + 2),
        "experts": 3 * (3 * 6 * 8) + 2 * (6 + 2 * 6),
        "shared experts": 3 * 6 * 16 + 6,
    }
    assert count.active_parts["experts"] == 2 * (3 * 6 * 8)
    assert count.total - count.active == 3 * 6 * 8 + 2 * 18


def test_plain_experts_have_two_matrices_and_k_is_per_layer() -> None:
    count = count_parameters(build_model(CONFIGS["lists"], device="meta"))
    assert count.parts["experts"] == 2 * 16 * (3 * 6 + 5 * 7)
    assert count.active_parts["experts"] == 2 * 16 * (2 * 6 + 4 * 7)


def test_no_more_than_all_feed_forward_experts_are_active() -> None:
    moe = MoEConfig(num_experts=2, k=4, hidden=8, zero=2, copy=1)
    count = count_parameters(build_model(tiny(moe), device="meta"))
    assert count.active_parts["experts"] == count.parts["experts"]


@pytest.mark.parametrize("name", CONFIGS)
def test_one_block_of_each_kind_counts_for_all(name: str) -> None:
    assert count_config(CONFIGS[name]) == count_parameters(build_model(CONFIGS[name], device="meta"))


@pytest.mark.parametrize("name", PRESETS)
def test_so_it_does_for_presets(name: str) -> None:
    model = build_model(preset(name), device="meta")
    assert count_config(preset(name)) == count_parameters(model)
    assert count_config(preset(name)).total == sum(p.numel() for p in model.parameters())


def test_and_with_heads_that_count_experts_more_than_once() -> None:
    config = tiny(MoEConfig(num_experts=4, k=2, hidden=12, heads=2))
    assert count_config(config) == count_parameters(build_model(config, device="meta"))


def test_and_with_depth_blocks() -> None:
    config = tiny(MoEConfig(num_experts=4, k=2, hidden=12), num_layers=4, depth=DepthConfig(allow_leak=True))
    counts = count_config(config)
    assert counts == count_parameters(build_model(config, device="meta"))
    assert counts.parts["depth router"] > 0


def test_conventions_by_hand() -> None:
    untied = ParameterCount(
        100, 60, {"embedding": 7, "head": 8, "experts": 85}, {"embedding": 7, "head": 8, "experts": 45}
    )
    assert untied.counting("both") is untied
    assert (untied.counting("out").total, untied.counting("out").active) == (93, 53)
    assert (untied.counting("none").total, untied.counting("none").active) == (85, 45)
    assert untied.counting("out").parts == {"embedding": 0, "head": 8, "experts": 85}
    tied = ParameterCount(
        92, 52, {"embedding": 7, "head": 0, "experts": 85}, {"embedding": 7, "head": 0, "experts": 45}
    )
    assert tied.counting("out").total == 92  # the one table is the output's
    assert tied.counting("none").total == 85


def test_what_a_checkpoint_holds() -> None:
    """Tied tensors once, and the selection bias, which is no parameter."""
    moe = MoEConfig(num_experts=4, k=2, hidden=12, router=RouterConfig("topk", {"balance_bias": True}), losses={})
    model = build_model(tiny(moe), device="meta")
    assert stored_elements(model) == count_parameters(model).total + 2 * 4
