"""Which graph of llama.cpp a config gets, and in what words one is refused that no graph computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moesaic.convert.gguf.architectures import _PLAIN, ARCHITECTURES, architecture_of, features
from moesaic.errors import ConfigError
from moesaic.models.config import DepthConfig, ModelConfig, MoEConfig, RouterConfig
from moesaic.nn.rope import RopeScaling
from moesaic.plan.capacity import CapacityRule
from tests.convert.gguf.families import (
    FAMILIES,
    VARIANTS,
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    llama,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)

NAMES = {
    "mixtral": "llama", "llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "qwen2_moe": "qwen2moe",
    "olmoe": "olmoe", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "gpt_oss": "gpt-oss",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_told_apart(family: str) -> None:
    assert architecture_of(FAMILIES[family]()).name == NAMES[family]


def test_only_one_architecture_computes_a_config() -> None:
    from moesaic.convert.gguf.architectures import _misfits

    for config in [make() for make in FAMILIES.values()] + list(VARIANTS.values()):
        found = features(config)
        assert sum(not _misfits(arch, found) for arch in ARCHITECTURES) == 1


def test_rows_name_settings_that_exist() -> None:
    for arch in ARCHITECTURES:
        assert arch.allows.keys() <= _PLAIN.keys() | {"rope_scaling.kind"}


def test_training_settings_do_not_matter() -> None:
    options = {"normalize": "chosen", "init_std": 0.5}
    moe = MoEConfig(8, 2, 32, router=RouterConfig("topk", options), expert_dropout=0.3, capacity=CapacityRule(1.25))
    assert architecture_of(replace(mixtral(), moe=moe)).name == "llama"


def test_switch_with_one_expert_is_token_choice() -> None:
    moe = MoEConfig(8, 1, 32, router=RouterConfig("switch"))
    assert architecture_of(replace(olmoe(), moe=moe)).name == "olmoe"


def _with(config: ModelConfig, **moe: Any) -> ModelConfig:
    assert config.moe is not None
    return replace(config, moe=replace(config.moe, **moe))


def _routed(config: ModelConfig, **options: Any) -> ModelConfig:
    assert config.moe is not None
    router = config.moe.router
    return _with(config, router=RouterConfig(router.name, {**router.options, **options}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        # what no graph computes
        (llama(norm="layernorm"), r"model.norm='layernorm' \(it must be 'rmsnorm'\)"),
        (llama(norm_placement="post"), r"model.norm_placement='post'"),
        (llama(gated=False, activation="gelu"), r"model.gated=False \(it must be True\)"),
        (olmoe(clip_qkv=8.0), r"model.clip_qkv=8.0 \(it must be None\)"),
        (llama(depth=DepthConfig(allow_leak=True)), r"Mixture-of-Depths blocks \(model.depth\)"),
        (llama(rope_scaling=RopeScaling("dynamic", 2.0, 64)), r'model.rope_scaling.kind="dynamic"'),
        (llama(hidden=(96, 64)), r"dense layers of several widths \(model.hidden=\(96, 64\)\)"),
        (deepseek_v2(attention_bias="all"), r"model.attention_bias='all' \(it must be 'none'\)"),
        (deepseek_v2(norm_eps=1e-5), r"model.norm_eps=1e-05, where it has one for all norms"),
        (_with(mixtral(), zero=1), r"model.moe.zero=1 \(it must be 0\)"),
        (_with(mixtral(), heads=2), r"model.moe.heads=2"),
        (_with(mixtral(), num_experts=(8, 4)), r"model.moe.num_experts that differs by layer"),
        (_with(mixtral(), k=(2, 3)), r"model.moe.k that differs by layer \(\[2, 3\]\)"),
        (_with(mixtral(), capacity=CapacityRule(1.0, eval_factor=2.0)), r"capacity.eval_factor=2.0"),
        (_with(mixtral(), router=RouterConfig("gshard")), r'router.name="gshard"'),
        (_routed(mixtral(), groups=8, groups_kept=2, group_score="top2_sum"), r"groups of one expert"),
        (_with(deepseek_v2(), shared_hidden=80), r"a shared expert of width 80, no multiple of model.moe.hidden=32"),
        # what the nearest one does not
        (llama(activation="gelu"), r'"llama".*it needs activation = "silu", and this model has "gelu"'),
        (_with(mixtral(), dense_first=1), r'it needs moe.layers = "none" or "all", and this model has "all but the first"'),
        (_with(mixtral(), every=2, dense_first=0), r'"all but the first"'),
        (_with(deepseek_v2(), layers=(0, 2)), r'it needs moe.layers = "none" or "all" or "all but the first".*"some"'),
        (qwen3_moe(rope_scaling=RopeScaling("llama3", 8.0, 32)), r'needs rope_scaling.kind = null or "linear" or "yarn"'),
        (_routed(qwen3_moe(), normalize="none"), r'"qwen3moe".*moe.router.normalize = "chosen", and this model has "none"'),
        (_routed(qwen2_moe(), normalize="chosen"), r'"qwen2moe".*moe.router.normalize = "none"'),
        (_routed(mixtral(), scale=2.0), r'"llama".*moe.router.scale = "1"'),
        (_with(qwen2_moe(), shared_gate=False), r'"qwen2moe".*moe.shared = "gated", and this model has "plain"'),
        (_with(deepseek_v2(), shared=0), r'"deepseek2".*moe.shared = "plain", and this model has "none"'),
        (_routed(deepseek_v2(), groups=4, groups_kept=2), r'moe.router.groups = "none" or "top2_sum".*has "max"'),
        (_routed(deepseek_v3(), score="sqrt_softplus"), r'"deepseek2".*moe.router.score = "softmax" or "sigmoid"'),
        (olmoe(num_kv_heads=2), r'"olmoe".*num_kv_heads = "num_heads"'),
        (olmoe(head_dim=32), r'"olmoe".*num_heads \* head_dim = "dim"'),
        (gpt_oss(attention_bias="qkv"), r'"gpt-oss".*attention_bias = "all"'),
        (_with(gpt_oss(), expert_bias=False), r'"gpt-oss".*moe.expert_bias = true, and this model has false'),
    ],
)  # fmt: skip
def test_refusals_name_the_setting(config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        architecture_of(config)


def test_several_reasons_are_given_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        architecture_of(llama(norm="layernorm", norm_placement="post"))
    assert "model.norm=" in str(error.value)
    assert "model.norm_placement=" in str(error.value)
