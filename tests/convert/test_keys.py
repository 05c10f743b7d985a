"""Config keys: each is used, carried or refused by name, and what is absent means what it means in transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moesaic.convert.families import FAMILIES
from moesaic.convert.keys import Keys
from moesaic.convert.read import config_of
from moesaic.convert.rope import read_rope
from moesaic.errors import ConfigError, MoesaicError
from moesaic.models.config import ModelConfig
from tests.convert.configs import CONFIGS
from tests.convert.variants import TINY

FULL, SLIDING = "full_attention", "sliding_attention"
PLAIN = [(family, variants["plain"]) for family, variants in CONFIGS.items()]


def keys(**data: Any) -> Keys:
    return Keys(data, "config.json")


def read(family: str, data: dict[str, Any]) -> ModelConfig:
    found = Keys(data, "config.json")
    config = FAMILIES[family].read(found)
    found.finish()
    return config


# ---- one key ----


def test_every_kind_of_value() -> None:
    found = keys(n=3, x=2, yes=True, ints=[1, 2], word="b")
    assert found.whole("n") == 3
    assert found.number("x") == 2.0
    assert found.flag("yes") is True
    assert found.wholes("ints") == (1, 2)
    assert found.choice("word", {"a": 1, "b": 2}) == 2
    assert found.mapped == ["n", "x", "yes", "ints", "word"]
    found.finish()


@pytest.mark.parametrize(
    ("kind", "value"),
    [("whole", v) for v in (1.0, "1", True, [1], {})]
    + [("number", v) for v in ("1", True, math.nan, math.inf, [])]
    + [("flag", v) for v in (0, 1, "true")]
    + [("wholes", v) for v in (1, [1.0], [True], "12", {})],
)
def test_a_value_of_another_type_is_refused(kind: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^config\.json: a must be .*, not "):
        getattr(keys(a=value), kind)("a", None)


def test_an_unknown_word_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'a must be one of silu, gelu, not "gelus"\. Did you mean "gelu"\?'):
        keys(a="gelus").choice("a", {"silu": 1, "gelu": 2})


def test_null_is_absent_and_absent_is_the_default() -> None:
    assert keys(a=None).whole("a", 5) == 5
    assert keys().flag("a", True) is True
    for data in ({}, {"a": None}):
        with pytest.raises(ConfigError, match=r"config\.json lacks the key a,"):
            keys(**data).whole("a")


def test_fixed_takes_what_is_known_and_nothing_else() -> None:
    for value in (None, 0.0, 0):
        found = keys(a=value)
        found.fixed("a", 0.0)
        found.finish()
        assert found.carried == {"a": value}
    for value in (0.1, False, "0"):
        with pytest.raises(ConfigError, match="a=.* is not supported, only 0.0; moesaic would compute something else"):
            keys(a=value).fixed("a", 0.0)


def test_an_unknown_key_is_refused_with_its_value_and_the_nearest_known() -> None:
    found = keys(hidden_size=1, hiden_size=2, other=3)
    found.whole("hidden_size")
    with pytest.raises(ConfigError) as refused:
        found.finish()
    assert str(refused.value) == (
        'config.json: the key "hiden_size" (2) is unknown for this model type, so what it computes is not sure; refused. Did '
        'you mean "hidden_size"? If it changes nothing, remove it. So are "other".'
    )


@pytest.mark.parametrize("name", ["trust_remote_code", "custom_pipelines"])
def test_a_key_that_runs_code_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"the key {name} would have other code run"):
        keys(**{name: True}).finish()


def test_the_code_a_checkpoint_brings_is_neither_followed_nor_passed_on() -> None:
    found = keys(auto_map={"AutoConfig": "a.B"})
    found.finish()
    assert found.dropped == ["auto_map"]
    assert not found.carried


# ---- families ----


@pytest.mark.parametrize(("family", "data"), PLAIN)
def test_every_family_refuses_what_it_does_not_know(family: str, data: dict[str, Any]) -> None:
    read(family, data)
    with pytest.raises(ConfigError, match=r'the key "logit_softcap" \(30\) is unknown'):
        read(family, data | {"logit_softcap": 30})
    with pytest.raises(ConfigError, match="attention_dropout=0.1 is not supported"):
        read(family, data | {"attention_dropout": 0.1})


@pytest.mark.parametrize(("family", "data"), PLAIN)
def test_every_family_needs_its_sizes_and_takes_whole_numbers(family: str, data: dict[str, Any]) -> None:
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        with pytest.raises(ConfigError, match=f"lacks the key {name}"):
            read(family, {k: v for k, v in data.items() if k != name})
        with pytest.raises(ConfigError, match=f'{name} must be a whole number, not "8"'):
            read(family, data | {name: "8"})
        for impossible in (0, -1):
            with pytest.raises(ConfigError):
                read(family, data | {name: impossible})


def _in_transformers(family: str, data: dict[str, Any]) -> dict[str, Any] | None:
    """``data`` as transformers completes it; None where it wants none of it."""
    transformers = pytest.importorskip("transformers")
    kind = transformers.CONFIG_MAPPING[family]
    try:
        return json.loads(kind.from_dict(data).to_json_string(use_diff=False))  # type: ignore[no-any-return]
    except Exception:  # noqa: BLE001 - many kinds, and all mean no
        return None


# Sizes without a useful default: asked for, where transformers would make up the largest model of the family.
SIZES = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
    "num_experts_per_tok", "num_experts", "num_local_experts", "moe_intermediate_size", "shared_expert_intermediate_size",
}  # fmt: skip


@pytest.mark.parametrize(("family", "data"), PLAIN)
@pytest.mark.parametrize("change", ["absent", "null"])
def test_absent_and_null_mean_what_they_mean_in_transformers(family: str, data: dict[str, Any], change: str) -> None:
    # So many heads that every family's own number of key/value heads divides them.
    full = _in_transformers(family, data | {"num_attention_heads": 32, "hidden_size": 256})
    assert full is not None
    compared = set()
    for name in full:
        rest = {k: v for k, v in full.items() if k != name} | ({name: None} if change == "null" else {})
        theirs = _in_transformers(family, rest)
        if theirs is None:
            continue
        compared.add(name)
        try:
            ours = read(family, rest)
        except MoesaicError:
            assert name in SIZES, name
            continue
        assert ours == read(family, theirs), name
    if change == "absent":
        assert compared >= {
            "rms_norm_eps",
            "hidden_act",
            "tie_word_embeddings",
            "rope_parameters",
            "num_key_value_heads",
        }
        assert len(compared) > len(full) - 3, full.keys() - compared


def test_the_number_of_key_value_heads_that_is_null_is_not_the_one_that_is_absent() -> None:
    rest = {k: v for k, v in TINY.items() if k != "num_key_value_heads"} | {
        "num_attention_heads": 16,
        "hidden_size": 128,
    }
    assert read("mixtral", rest).kv_heads == 8
    assert read("mixtral", rest | {"num_key_value_heads": None}).kv_heads == 16


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("mistral", {}, [4096] * 3),
        ("mistral", {"sliding_window": None}, [None] * 3),
        ("mistral", {"sliding_window": 4, "layer_types": [SLIDING] * 3}, [4] * 3),
        ("mixtral", {"layer_types": [FULL] * 3}, [None] * 3),
        ("qwen3", {"sliding_window": 4, "max_window_layers": 1}, [None] * 3),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, [None, 4, 4]),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1}, [None] * 3),
        # The list decides, whatever the other keys would make of it.
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "layer_types": [SLIDING, FULL, FULL]}, [4, None, None]),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, [4, None, None]),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 4}, [4, None, 4]),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, [4, 4, 4]),
        ("llama", {"layer_types": [FULL] * 3}, [None] * 3),
    ],
)  # fmt: skip
def test_windows(family: str, changes: dict[str, Any], windows: list[int | None]) -> None:
    config = read(family, CONFIGS[family]["plain"] | changes)
    assert [config.window(i) for i in range(3)] == windows


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mistral", {"sliding_window": None, "layer_types": [SLIDING] * 3}, "layer_types says"),
        ("mistral", {"sliding_window": 4, "layer_types": [FULL, SLIDING, FULL]}, "layer_types says"),
        ("mixtral", {"sliding_window": 4, "layer_types": [FULL] * 3}, "layer_types says"),
        ("mixtral", {"sliding_window": 0}, "sliding_window must be at least 1, not 0"),
        ("llama", {"sliding_window": 4}, "sliding_window=4 is not supported"),
        ("olmoe", {"sliding_window": 4}, "sliding_window=4 is not supported"),
        ("olmoe", {"layer_types": [SLIDING] * 3}, "layer_types says"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4, "layer_types": [FULL] * 3}, "layer_types says"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": -2}, "at least 1, not -2"),
        ("qwen3", {"layer_types": [SLIDING, FULL, FULL], "sliding_window": 4}, "no sliding_window in use"),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": None}, "no sliding_window in use"),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 0}, "at least 1, not 0"),
        ("qwen3", {"layer_types": [FULL] * 2}, "for each of 3 layers"),
        ("qwen3", {"layer_types": [FULL, FULL, "linear_attention"]}, "for each of 3 layers"),
        ("qwen3", {"layer_types": FULL}, "for each of 3 layers"),
        ("qwen3_moe", {"num_local_experts": 8}, "num_experts=6 and num_local_experts=8; keep one"),
        ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm=false is not supported"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "is not supported, only 0"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "none of the 3 layers is sparse"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1, not 0"),
        ("olmoe", {"head_dim": 16}, "head_dim=16 is not supported, only 8"),
        ("olmoe", {"clip_qkv": -1.0}, "clip_qkv must be above 0"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_or_is_not_computed_is_refused(
    family: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        read(family, CONFIGS[family]["plain"] | changes)


def test_sparse_layers_by_step_and_list() -> None:
    base = CONFIGS["qwen3_moe"]["plain"] | {"num_hidden_layers": 6}
    assert read("qwen3_moe", base | {"decoder_sparse_step": 2}).moe_layers == (1, 3, 5)
    assert read("qwen3_moe", base | {"mlp_only_layers": [0, 5, 77]}).moe_layers == (1, 2, 3, 4)
    assert read("qwen3_moe", base | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}).moe_layers == (1, 5)


# ---- rotary positions ----


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"rope_parameters": {"rope_type": "longrope"}}, '"longrope" is not supported; known: default, linear'),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, 'the key "factor" is unknown for this rope type'),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, '"full_attention" is unknown'),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "linear"}}, 'the rope type "linear" needs a factor'),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be at least 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, 'the key "mscale" is unknown'),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "two rotary bases"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "they differ"),
        ({"rope_parameters": [1]}, "must be a table"),
    ],
)  # fmt: skip
def test_rope_settings_that_are_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_rope(Keys(data, "config.json"), 1e4, 64)


def test_rope_base_from_either_place() -> None:
    assert read_rope(keys(), 1e4, 64) == (1e4, None)
    assert read_rope(keys(rope_theta=5e5), 1e4, 64) == (5e5, None)
    assert read_rope(keys(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}), 1e4, 64) == (5e5, None)


# ---- the folder ----


def _folder(tmp_path: Path, data: dict[str, Any]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(data), "utf-8")
    return tmp_path


def test_model_type_and_architecture_are_known_or_refused(tmp_path: Path) -> None:
    llama = CONFIGS["llama"]["plain"] | {"model_type": "llama"}
    assert config_of(_folder(tmp_path, llama)).dim == 32
    assert config_of(_folder(tmp_path, llama | {"architectures": ["LlamaForCausalLM"]})).dim == 32
    with pytest.raises(MoesaicError, match=r'type "lama" are not read; .* Did you mean "llama"\?'):
        config_of(_folder(tmp_path, llama | {"model_type": "lama"}))
    with pytest.raises(MoesaicError, match="moesaic reads LlamaForCausalLM alone"):
        config_of(_folder(tmp_path, llama | {"architectures": ["LlamaForSequenceClassification"]}))


def test_impossibly_many_layers_are_refused_before_any_is_enumerated(tmp_path: Path) -> None:
    data = CONFIGS["qwen3"]["plain"] | {"model_type": "qwen3", "num_hidden_layers": 10**12}
    with pytest.raises(ConfigError, match="impossible"):
        config_of(_folder(tmp_path, data))
