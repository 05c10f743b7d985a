"""Presets of published models: they survive JSON, build without memory, and have the parts their papers name."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod

import pytest
import torch

from moesaic.config import from_dict, to_dict
from moesaic.errors import ConfigError
from moesaic.models import ModelConfig, build_model
from moesaic.models.presets import PRESETS, preset
from moesaic.routing.token_choice import TopK


@pytest.mark.parametrize("name", PRESETS)
def test_it_survives_json(name: str) -> None:
    config = preset(name)
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config), allow_nan=False))) == config
    assert preset(name) is not config


@pytest.mark.parametrize("name", PRESETS)
def test_the_head_and_tail_of_it_run(name: str) -> None:
    """The same settings on narrow layers: what the config says can be built with numbers in it and computes."""
    config = preset(name)
    moe = config.moe
    narrow = {"dim": 64, "hidden": 32, "num_layers": 2, "vocab_size": 50, "max_seq_len": 4096, "num_heads": 4}
    if config.latent is not None:
        latent = replace(config.latent, kv_rank=8, nope_dim=8, rope_dim=8, value_dim=8)
        narrow["latent"] = latent if latent.q_rank is None else replace(latent, q_rank=8)  # type: ignore[assignment]
    else:
        narrow |= {"num_kv_heads": 2, "head_dim": 16}
    if isinstance(config.sliding_window, tuple):
        narrow["sliding_window"] = config.sliding_window[:2]  # type: ignore[assignment]
    if moe is not None:
        narrow["moe"] = replace(
            moe, hidden=8, shared_hidden=moe.shared_hidden and 12, dense_first=min(1, moe.dense_first)
        )  # type: ignore[assignment]
    model = build_model(replace(config, **narrow), seed=0)  # type: ignore[arg-type]
    logits = model(torch.arange(6)[None]).logits
    assert logits.shape == (1, 6, 50)
    assert logits.isfinite().all()


def test_deepseek_v3_by_its_tensors() -> None:
    model = build_model(preset("deepseek-v3"), device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["blocks.2.ffn.w_in.weight"] == (2 * 18432, 7168)
    assert shapes["blocks.3.ffn.experts.w_in"] == (256, 7168, 2 * 2048)
    assert shapes["blocks.3.ffn.shared.mlp.w_out.weight"] == (7168, 2048)
    assert shapes["blocks.3.ffn.router.choice_bias_E"] == (256,)
    assert shapes["blocks.60.attention.wkv_a.weight"] == (512 + 64, 7168)
    assert shapes["blocks.60.attention.wq_b.weight"] == (128 * (128 + 64), 1536)
    assert not any(name.startswith("blocks.61") for name in shapes)
    router = model.moe_layers()[3].router
    assert isinstance(router, TopK)
    assert (router.score, router.normalize, router.scale, router.groups, router.groups_kept) == (
        "sigmoid",
        "chosen",
        2.5,
        8,
        4,
    )


def test_gpt_oss_by_its_tensors() -> None:
    config = preset("gpt-oss-120b")
    shapes = {name: tuple(t.shape) for name, t in build_model(config, device="meta").state_dict().items()}
    assert shapes["blocks.0.attention.sinks"] == (64,)
    assert shapes["blocks.0.attention.wk.bias"] == (8 * 64,)
    assert shapes["blocks.0.ffn.experts.b_in"] == (128, 2 * 2880)
    assert shapes["blocks.0.ffn.router.gate.bias"] == (128,)
    assert [config.window(layer) for layer in range(4)] == [128, None, 128, None]
    assert config.window(35) is None


def test_what_sets_each_family_apart() -> None:
    assert preset("dbrx").clip_qkv == 8
    assert preset("dbrx").norm == "layernorm"
    assert preset("olmoe-1b-7b").qk_norm == "projection"
    assert preset("qwen3-30b-a3b").qk_norm == "head"
    assert preset("qwen1.5-moe-a2.7b").attention_bias == "qkv"
    assert preset("mistral-7b").window(31) == 4096
    assert preset("mixtral-8x7b").window(31) is None
    assert preset("qwen3-0.6b").tie_embeddings
    assert not preset("qwen3-8b").tie_embeddings
    for name, order in (
        ("mixtral-8x7b", "chosen"), ("qwen3-235b-a22b", "chosen"), ("dbrx", "chosen"), ("olmoe-1b-7b", "none"),
        ("qwen2-57b-a14b", "none"), ("deepseek-v2", "none"), ("gpt-oss-20b", "softmax_chosen"),
    ):  # fmt: skip
        moe = preset(name).moe
        assert moe is not None
        assert moe.router.options["normalize"] == order, name


def test_nothing_is_allocated() -> None:
    model = build_model(preset("qwen3-235b-a22b"), device="meta")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert sum(prod(tensor.shape) for tensor in model.state_dict().values()) > 235e9


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'no preset "mixtral8x7b". Did you mean "mixtral-8x7b"\?'):
        preset("mixtral8x7b")
