"""The ``config.json`` of released models, key for key, and what they must and must not lead to."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.convert.families import FAMILIES
from moesaic.convert.keys import Keys
from moesaic.convert.meaning import meaning
from moesaic.convert.read import config_of
from moesaic.convert.write import plan_export
from moesaic.errors import ConfigError
from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig
from moesaic.models.presets import preset

FOLDER = Path(__file__).with_name("published")
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def published(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))  # type: ignore[no-any-return]


def read(values: dict[str, Any]) -> tuple[ModelConfig, Keys]:
    keys = Keys(values, "config.json")
    config = FAMILIES[values["model_type"]].read(keys)
    keys.get("quantization_config", None)
    keys.finish()
    return config, keys


def refused(name: str, words: str, **values: Any) -> None:
    with pytest.raises(ConfigError, match=words):
        read(published(name) | values)


@pytest.mark.parametrize("name", NAMES)
def test_it_means_what_the_preset_does(name: str, tmp_path: Path) -> None:
    shutil.copy(FOLDER / f"{name}.json", tmp_path / "config.json")
    found, expected = config_of(tmp_path), preset(name)
    assert meaning(found) == meaning(expected)
    assert found.moe is not None
    assert expected.moe is not None
    assert found.moe.losses == expected.moe.losses


@pytest.mark.parametrize("name", NAMES)
def test_every_key_comes_back(name: str) -> None:
    """Numbers may be spelled otherwise (10000 and 10000.0); of what is not written, each key is named here."""
    there = published(name)
    config, keys = read(there)
    assert {*keys.mapped, *keys.carried, *keys.dropped} >= set(there)
    back = plan_export(config, {"family": there["model_type"], "config": keys.carried}).values
    for key in ("auto_map", "quantization_config", "torch_dtype", "transformers_version"):
        there.pop(key, None)
        assert key not in back
    scaling, written = there.pop("rope_scaling"), dict(back["rope_scaling"])
    assert written.pop("rope_type") == scaling.pop("type", None) or scaling.pop("rope_type")
    defaults = {"beta_fast": 32, "beta_slow": 1}
    assert defaults | written == scaling
    assert {key: back.get(key) for key in there} == there


@pytest.mark.parametrize("name", NAMES)
def test_the_other_direction_starts_from_the_preset(name: str) -> None:
    """A model of ours is written with no checkpoint behind it, and read back as the same."""
    export = plan_export(preset(name))
    assert export.family.model_type == published(name)["model_type"]
    again, _ = read(json.loads(json.dumps(export.values)))
    assert meaning(again) == meaning(preset(name))


def test_the_key_that_names_code_is_neither_followed_nor_written() -> None:
    there = published("deepseek-v3")
    config, keys = read(there)
    assert keys.dropped == ["auto_map"]
    # Nor where somebody's moesaic folder claims to have carried it.
    forged = {
        "family": "deepseek_v3",
        "config": {**keys.carried, "auto_map": there["auto_map"], "trust_remote_code": True},
    }
    assert not {"auto_map", "trust_remote_code"} & plan_export(config, forged).values.keys()


def test_deepseek_settings_that_would_compute_something_else() -> None:
    refused("deepseek-v2-lite", "norm_topk_prob=true means two things for deepseek_v2", norm_topk_prob=True)
    refused("deepseek-v2-lite", 'scoring_func="sigmoid" is not supported, only "softmax"', scoring_func="sigmoid")
    refused(
        "deepseek-v2-lite",
        'topk_method must be one of greedy, group_limited_greedy, not "noaux_tc"',
        topk_method="noaux_tc",
    )
    refused("deepseek-v2-lite", "moe_layer_freq=2", moe_layer_freq=2)
    refused("deepseek-v2-lite", "num_key_value_heads=4", num_key_value_heads=4)
    refused("deepseek-v2-lite", "head_dim=128", head_dim=128)
    refused("deepseek-v2-lite", "mlp_bias=true", mlp_bias=True)
    refused("deepseek-v2-lite", "rope_interleave", rope_interleave=False)
    refused("deepseek-v3", 'scoring_func="softmax" is not supported, only "sigmoid"', scoring_func="softmax")
    refused("deepseek-v3", 'topk_method="greedy"', topk_method="greedy")
    refused("deepseek-v3", "index_topk", index_topk=2048)  # V3.2's sparse attention
    refused("deepseek-v3", "n_routed_experts", n_routed_experts=None)
    refused("deepseek-v3", "num_nextn_predict_layers must be a whole number", num_nextn_predict_layers="one")


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("deepseek-v2", {"topk_group": 9}, "groups_kept=9 must be between 1 and groups=8"),
        ("deepseek-v3", {"n_group": 7}, "groups=7 must divide num_experts=256"),
        ("deepseek-v3", {"topk_group": 0}, "groups_kept=0 must be between 1 and groups=8"),
        ("gpt-oss-20b", {"num_experts_per_tok": 1, "experts_per_token": 1}, "the router gets no gradient"),
    ],
)
def test_routers_that_cannot_be(name: str, values: dict[str, Any], words: str) -> None:
    """Noticed when the model is built, which opening a folder does, on paper."""
    config, _ = read(published(name) | values)
    with pytest.raises(ConfigError, match=words):
        build_model(replace(config, num_layers=5, sliding_window=None), device="meta")


def test_gpt_oss_settings_that_would_compute_something_else() -> None:
    refused("gpt-oss-20b", "swiglu_limit=10.0 is not supported, only 7.0", swiglu_limit=10.0)
    refused("gpt-oss-20b", "swiglu_alpha=1.0 is not supported, only 1.702", swiglu_alpha=1.0)
    refused("gpt-oss-20b", 'hidden_act="gelu"', hidden_act="gelu")
    refused("gpt-oss-20b", "experts_per_token=2 is not supported, only 4", experts_per_token=2)
    refused("gpt-oss-20b", "layer_types must name", layer_types=["full_attention"])
    refused("gpt-oss-20b", "layer_types has sliding layers, but there is no sliding_window", sliding_window=None)


def test_a_gpt_oss_config_without_scaling_has_the_released_one() -> None:
    """As transformers takes it; a model of ours without any says so."""
    there = published("gpt-oss-20b")
    whole, _ = read(there)
    for absent in ({}, {"rope_scaling": None}, {"rope_parameters": None}):
        short = {key: value for key, value in there.items() if key != "rope_scaling"} | absent
        assert read(short)[0].rope_scaling == whole.rope_scaling
    plain = {**there, "rope_scaling": {"rope_type": "default"}}
    config, _ = read(plain)
    assert config.rope_scaling is None
    again, _ = read(plan_export(config).values)
    assert again.rope_scaling is None


@pytest.mark.parametrize("count", [None, 0])
def test_no_shared_experts(count: int | None) -> None:
    """Of a count of 0 networks of no width are stored, as DeepSeek's code and transformers do; of null none at all."""
    config, keys = read(published("deepseek-v3") | {"n_shared_experts": count})
    assert config.moe is not None
    assert config.moe.shared == 0
    table = FAMILIES["deepseek_v3"].table(config, "stacked", keys.carried)
    empty = [piece for entry in table for piece in entry.pieces if "shared_experts" in piece.theirs]
    assert len(empty) == (0 if count is None else 3 * 58)
    assert all(torch.Size(piece.shape).numel() == 0 for piece in empty)
    # Written as 0, which transformers needs, with the tensors that go with it.
    export = plan_export(config, {"family": "deepseek_v3", "config": keys.carried})
    assert export.values["n_shared_experts"] == 0
    assert sum("shared_experts" in piece.theirs for entry in export.table for piece in entry.pieces) == 3 * 58


def test_as_transformers_reads_them() -> None:
    """Its config classes take the published keys, and ours when they have been through here, for the same model."""
    transformers = pytest.importorskip("transformers")
    kinds = {
        "deepseek_v2": transformers.DeepseekV2Config,
        "deepseek_v3": transformers.DeepseekV3Config,
        "gpt_oss": transformers.GptOssConfig,
    }
    for name in NAMES:
        there = published(name)
        there.pop("quantization_config", None)
        config, keys = read(there)
        back = plan_export(config, {"family": there["model_type"], "config": keys.carried}).values
        kind = kinds[there["model_type"]]
        one, other = (kind.from_dict(json.loads(json.dumps(values))).to_dict() for values in (there, back))
        for found in (one, other):
            for key in ("auto_map", "dtype", "torch_dtype", "transformers_version"):
                found.pop(key, None)
            rope = {key: value for key, value in found["rope_parameters"].items() if key != "type"}
            found["rope_parameters"] = {"beta_fast": 32, "beta_slow": 1} | rope
        extra = {"seq_aux", "aux_loss_alpha", "swiglu_alpha"}  # written out where the published one relied on a default
        assert {k: v for k, v in one.items() if k not in extra} == {k: v for k, v in other.items() if k not in extra}
