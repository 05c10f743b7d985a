"""What a config computes, and exports: a model a family holds is the same function there, any other is refused in words."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moesaic as mo
from moesaic.convert.families import FAMILIES
from moesaic.convert.meaning import meaning
from moesaic.convert.write import family_for, plan_export, write_hf
from moesaic.errors import ConfigError, LintWarning, MoesaicError
from moesaic.models.build import build_model
from moesaic.models.config import DepthConfig, LatentConfig, ModelConfig, MoEConfig, RouterConfig
from moesaic.models.decoder import Decoder
from moesaic.nn.rope import RopeScaling
from moesaic.plan.capacity import CapacityRule

MOE = MoEConfig(num_experts=4, k=2, hidden=16, router=RouterConfig("topk", {"normalize": "chosen"}))
MIXTRAL = ModelConfig(vocab_size=64, dim=32, num_layers=3, num_heads=4, num_kv_heads=2, max_seq_len=64, moe=MOE)
LLAMA = replace(MIXTRAL, moe=None, hidden=48)
TOP1 = replace(MOE, k=1, router=RouterConfig("topk", {"normalize": "none"}))
YARN, LINEAR = RopeScaling("yarn", 8.0, 16), RopeScaling("linear", 2.0)


def moe(**changes: Any) -> ModelConfig:
    return replace(MIXTRAL, moe=replace(MOE, **changes))


def router(name: str = "topk", **options: Any) -> ModelConfig:
    return moe(router=RouterConfig(name, options))


# ---- the same function in other words ----


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (MIXTRAL, replace(MIXTRAL, hidden=7, init_scale=0.1, mlp_bias=True)),  # no dense layer has it
        (MIXTRAL, replace(MIXTRAL, head_dim=8, sliding_window=0)),
        (MIXTRAL, replace(MIXTRAL, sliding_window=(0, 0, 0))),
        (LLAMA, replace(LLAMA, hidden=(48, 48, 48), num_kv_heads=2)),
        (MIXTRAL, moe(num_experts=(4, 4, 4), k=(2, 2, 2), hidden=(16, 16, 16), every=1, layers=(0, 1, 2))),
        (moe(every=2), moe(layers=(1,))),
        (moe(dense_first=1), moe(layers=(1, 2))),
        (MIXTRAL, moe(losses={"z": 0.1}, capacity=CapacityRule(factor=1.5), expert_dropout=0.1, backend="loop")),
        (moe(shared=2), moe(shared=1, shared_hidden=32)),
        (MIXTRAL, router()),
        (MIXTRAL, router(normalize="softmax_chosen")),
        (MIXTRAL, router(groups=2, groups_kept=2, group_score="top2_sum", init_std=0.5)),
        (moe(k=1, router=RouterConfig("switch", {"jitter": 0.3})), replace(router(normalize="none"), moe=TOP1)),
        (replace(LLAMA, rope_scaling=LINEAR), replace(LLAMA, rope_scaling=replace(LINEAR, beta_fast=9.0))),
        (replace(LLAMA, rope_scaling=LINEAR), replace(LLAMA, rope_scaling=replace(LINEAR, original_max_seq_len=32))),
        (replace(LLAMA, rope_scaling=YARN), replace(LLAMA, rope_scaling=replace(YARN, mscale=0.7, low_freq_factor=2.0))),
    ],
)  # fmt: skip
def test_other_words(one: ModelConfig, other: ModelConfig) -> None:
    assert one != other
    assert meaning(one) == meaning(other)


@pytest.mark.parametrize(
    "other",
    [
        *(replace(MIXTRAL, **{name: value}) for name, value in [
            ("vocab_size", 65), ("dim", 64), ("num_layers", 2), ("num_heads", 2), ("num_kv_heads", 4), ("head_dim", 16),
            ("activation", "gelu"), ("gated", False), ("norm", "layernorm"), ("norm_eps", 1e-5), ("norm_placement", "post"),
            ("rope_theta", 1e6), ("max_seq_len", 65), ("rope_scaling", YARN), ("qk_norm", "head"), ("qk_norm", "projection"),
            ("attention_bias", "qkv"), ("attention_bias", "all"), ("clip_qkv", 1.0), ("attention_sinks", True),
            ("sliding_window", 5), ("sliding_window", (5, 0, 0)), ("tie_embeddings", False), ("moe", None),
            ("depth", DepthConfig(allow_leak=True)),
        ]),
        *(moe(**{name: value}) for name, value in [
            ("num_experts", 5), ("num_experts", (4, 4, 5)), ("k", 1), ("k", (2, 2, 3)), ("hidden", 8), ("hidden", (16, 16, 8)),
            ("dense_first", 1), ("every", 2), ("layers", (0,)), ("shared", 1), ("expert_bias", True), ("zero", 1),
            ("copy", 1), ("constant", 1), ("heads", 2),
            ("capacity", CapacityRule(eval_factor=1.0)),
        ]),
        *(router(**options) for options in [
            {"normalize": "none"}, {"score": "sigmoid"}, {"scale": 2.0}, {"gate_bias": True}, {"balance_bias": True},
            {"groups": 2, "groups_kept": 1},
        ]),
        router("noisy_topk"), router("soft_moe"),
        moe(shared=1, shared_gate=True), moe(shared=1, shared_hidden=3),
    ],
)  # fmt: skip
def test_another_function_has_another_meaning(other: Any) -> None:
    assert meaning(other) != meaning(MIXTRAL)


def test_settings_that_need_others_have_a_meaning_too() -> None:
    assert meaning(moe(hidden=1, expert_kind="neuron")) != meaning(moe(hidden=1))
    assert meaning(moe(shared=1, shared_gate=True)) != meaning(moe(shared=1))
    assert meaning(replace(LLAMA, mlp_bias=True)) != meaning(LLAMA)
    assert meaning(replace(LLAMA, hidden=(48, 48, 24))) != meaning(LLAMA)


def test_rope_scalings_differ_by_what_their_kind_uses() -> None:
    def of(kind: Any, **changes: Any) -> Any:
        return meaning(
            replace(LLAMA, rope_scaling=RopeScaling(kind, **{"factor": 8.0, "original_max_seq_len": 16} | changes))
        )

    for kind in ("dynamic", "yarn", "llama3"):
        assert of(kind) != of(kind, original_max_seq_len=17)
        assert of(kind) != of(kind, factor=9.0)
    for changes in ({"beta_fast": 8.0}, {"beta_slow": 2.0}, {"truncate": False}, {"attention_factor": 2.0}):
        assert of("yarn") != of("yarn", **changes)
    assert of("yarn") != of("yarn", mscale=0.7, mscale_all_dim=1.0)
    assert of("llama3") != of("llama3", low_freq_factor=2.0)
    assert of("llama3") != of("llama3", high_freq_factor=8.0)
    latent = ModelConfig(vocab_size=64, dim=32, num_layers=1, latent=LatentConfig(8), rope_scaling=YARN)
    scaled = replace(latent, rope_scaling=replace(YARN, mscale_all_dim=0.5))  # of the scores alone
    assert meaning(latent) != meaning(scaled)
    assert meaning(replace(LLAMA, rope_scaling=YARN)) == meaning(replace(LLAMA, rope_scaling=scaled.rope_scaling))


# ---- which family ----


def _qwen2(**changes: Any) -> ModelConfig:
    shared = replace(MOE, shared=1, shared_gate=True, shared_hidden=20)
    return replace(MIXTRAL, attention_bias="qkv", moe=replace(shared, **changes))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("mixtral", MIXTRAL),
        ("mixtral", replace(MIXTRAL, sliding_window=(8, 8, 8), tie_embeddings=False)),
        ("llama", LLAMA),
        ("llama", replace(LLAMA, attention_bias="all", mlp_bias=True)),
        ("mistral", replace(LLAMA, sliding_window=8)),
        ("qwen3", replace(LLAMA, qk_norm="head", sliding_window=(0, 8, 0))),
        ("qwen2_moe", _qwen2()),
        ("qwen2_moe", replace(_qwen2(layers=(0, 2)), attention_bias="none", sliding_window=(8, 0, 8))),
        ("qwen3_moe", replace(moe(every=3), qk_norm="head")),
        ("olmoe", replace(moe(router=RouterConfig("topk", {"normalize": "none"})), qk_norm="projection", clip_qkv=2.0)),
    ],
)  # fmt: skip
def test_the_family_that_holds_a_config(family: str, config: ModelConfig) -> None:
    assert family_for(config)[0].model_type == family
    assert family_for(config, family)[0].model_type == family


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(LLAMA, norm="layernorm"), r'norm is "rmsnorm" there and "layernorm" here'),
        (replace(LLAMA, norm_placement="post"), r'norm_placement is "pre" there and "post" here'),
        (replace(LLAMA, gated=False), "gated is true there and false here"),
        (replace(LLAMA, hidden=(48, 32, 48)), r"hidden\.1 is 48 there and 32 here"),
        (replace(LLAMA, sliding_window=(8, 4, 8)), r"sliding_window is \[8, 8, 8\] there and \[8, 4, 8\] here"),
        (replace(LLAMA, activation="clamped_swiglu"), 'hidden_act must be one of .* not "clamped_swiglu"'),
        (replace(MIXTRAL, depth=DepthConfig(allow_leak=True)), "depth is null there and"),
        (moe(zero=1), "moe.zero is 0 there and 1 here"),
        (moe(num_experts=(4, 4, 8)), r"moe.num_experts is \[4, 4, 4\] there and \[4, 4, 8\] here"),
        (moe(shared=1), r"moe.shared is \[0, 0, 0\] there and \[16, 16, 16\] here"),
        (router("soft_moe"), 'moe.router.name is "topk" there and "soft_moe" here'),
        (router(score="sigmoid"), 'moe.router.options.score is null there and "sigmoid" here'),
        (moe(heads=2), "moe.heads is 1 there and 2 here"),
        (moe(capacity=CapacityRule(eval_factor=1.0)), "moe.capacity is null there and"),
    ],
)  # fmt: skip
def test_a_model_no_family_can_hold_is_refused_naming_the_setting(config: ModelConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        family_for(config)
    assert str(refused.value).startswith(
        "This model cannot be exported as any family of Hugging Face that is known here: "
    )
    assert all(f"{name} (" in str(refused.value) for name in FAMILIES)


def test_a_named_family_that_cannot_and_one_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"as that family: llama \(moe is null there"):
        family_for(MIXTRAL, "llama")
    with pytest.raises(ConfigError, match='no family "lama"; known: mixtral'):
        family_for(MIXTRAL, "lama")
    with pytest.raises(ConfigError, match="the family is one of sparse models"):
        family_for(LLAMA, "mixtral")


def test_a_model_goes_back_to_the_family_it_came_from_while_that_can_hold_it() -> None:
    source = {"family": "mistral", "config": {"bos_token_id": 1, "torch_dtype": "bfloat16"}}
    export = plan_export(LLAMA, source)
    assert export.family.model_type == "mistral"
    assert export.values["bos_token_id"] == 1
    assert export.values["architectures"] == ["MistralForCausalLM"]
    assert "torch_dtype" not in export.values
    changed = plan_export(replace(LLAMA, mlp_bias=True), source)
    assert changed.family.model_type == "llama"
    assert "bos_token_id" not in changed.values  # what another family's keys mean is not known


def test_nothing_is_written_of_a_model_that_is_refused(tmp_path: Path) -> None:
    model = build_model(moe(zero=1), seed=0)
    with pytest.raises(ConfigError):
        write_hf(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- any config at all ----


_BASES: list[dict[str, Any]] = [
    {},
    {"sliding_window": 3},
    {"qk_norm": "head"},
    {"moe": MOE},
    {"moe": replace(MOE, router=TOP1.router, shared=1, shared_gate=True), "attention_bias": "qkv"},
    {"moe": replace(MOE, every=2), "qk_norm": "head"},
    {"moe": MOE, "qk_norm": "projection"},
]
_CHANGES: dict[str, list[Any]] = {
    "num_heads": [2, 8],
    "num_kv_heads": [1, 2],
    "head_dim": [4, 16],
    "hidden": [24, (24, 16, 24), (24, 24, 16)],
    "activation": ["gelu", "gelu_tanh", "relu", "squared_relu", "clamped_swiglu"],
    "gated": [False],
    "norm": ["layernorm"],
    "norm_placement": ["post"],
    "norm_eps": [1e-3],
    "rope_theta": [100.0],
    "rope_scaling": [
        RopeScaling("linear", 4.0),
        RopeScaling("yarn", 4.0, 8, beta_fast=4.0),
        RopeScaling("yarn", 4.0, 8, truncate=False, attention_factor=1.2),
        RopeScaling("yarn", 1.0, 8, mscale=0.7, mscale_all_dim=0.9),
        RopeScaling("llama3", 4.0, 8, low_freq_factor=2.0),
        RopeScaling("dynamic", 4.0, 8),
        RopeScaling("dynamic", 2.0, 16),
    ],
    "qk_norm": ["none", "head", "projection"],
    "attention_bias": ["none", "qkv", "all"],
    "mlp_bias": [True],
    "clip_qkv": [0.5],
    "attention_sinks": [True],
    "sliding_window": [None, 0, 4, (3, 3, 3), (0, 3, 3), (3, 0, 3), (3, 4, 0)],
    "tie_embeddings": [False],
    "moe.num_experts": [1, 3, (4, 4, 5)],
    "moe.k": [1, 3, (2, 2, 3)],
    "moe.hidden": [8, (8, 8, 16)],
    "moe.layers": [(0,), (1,), (0, 2), (1, 2)],
    "moe.dense_first": [1, 2],
    "moe.every": [1, 2, 3],
    "moe.shared": [0, 1, 2],
    "moe.shared_gate": [True, False],
    "moe.shared_hidden": [5],
    "moe.expert_bias": [True],
    "moe.zero": [1],
    "moe.router": [
        RouterConfig("topk", {"normalize": "none"}),
        RouterConfig("topk", {"normalize": "softmax_chosen"}),
        RouterConfig("topk", {"normalize": "chosen", "scale": 2.5}),
        RouterConfig("topk", {"gate_bias": True}),
        RouterConfig("topk", {"score": "sigmoid", "balance_bias": True}),
        RouterConfig("switch"),
        RouterConfig("noisy_topk"),
    ],
}
_change = st.sampled_from([(name, value) for name, values in _CHANGES.items() for value in values])


def _changed(base: dict[str, Any], changes: list[tuple[str, Any]]) -> dict[str, Any]:
    """``base`` with changes, those of the sparse layers only where there are any."""
    values = dict(base)
    for name, value in changes:
        if not name.startswith("moe."):
            values[name] = value
        elif "moe" in values:
            values["moe"] = replace(values["moe"], **{name.removeprefix("moe."): value})
    return values


# Near to some family, so that many are held and many are not.
CONFIGS = st.builds(_changed, st.sampled_from(_BASES), st.lists(_change, max_size=4))


def _shaken(values: dict[str, Any]) -> Decoder | None:
    """A model whose every parameter matters; None for settings that do not go together."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LintWarning)
            model = build_model(ModelConfig(vocab_size=32, dim=16, num_layers=3, max_seq_len=32, **values), seed=0)
    except MoesaicError:
        return None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.eval()


IDS = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(2))


def _exported_is_the_same(values: dict[str, Any], read: Callable[[Path], Any], tolerance: float) -> bool | None:
    """Whether it was exported; None if there is no such model. Raises where the export is another function."""
    model = _shaken(values)
    if model is None:
        return None
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where) / "out"
        try:
            write_hf(model, folder)
        except ConfigError as error:
            if folder.exists() or not str(error).startswith("This model cannot be exported"):
                raise
            return False
        with torch.no_grad():
            assert (read(folder)(IDS).logits - model(IDS).logits).abs().max() < tolerance
    return True


@settings(max_examples=150, deadline=None)
@given(values=CONFIGS)
def test_any_config_is_exported_as_the_same_function_or_refused(values: dict[str, Any]) -> None:
    _exported_is_the_same(values, mo.load, 1e-5)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(values=CONFIGS)
def test_any_config_is_exported_as_the_same_function_to_transformers_or_refused(values: dict[str, Any]) -> None:
    from tests.convert.parity import load_hf

    _exported_is_the_same(values, load_hf, 2e-5)


def test_the_draws_above_hold_models_of_many_families() -> None:
    """Else refusing everything would pass."""
    held = set()
    for values in _BASES:
        assert _exported_is_the_same(values, mo.load, 1e-5)
        held.add(family_for(_shaken(values).config)[0].model_type)  # type: ignore[union-attr]
    assert held == {"llama", "mixtral", "mistral", "qwen3", "qwen3_moe", "olmoe", "qwen2_moe"}
