"""Configs to JSON and back: every field survives, and what does not fit is refused under its dotted name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.config import apply_overrides, from_dict, load_config_file, to_dict
from moesaic.errors import ConfigError
from moesaic.models.config import ModelConfig, MoEConfig, RouterConfig
from moesaic.plan.capacity import CapacityRule


@dataclass(frozen=True)
class Inner:
    size: int = 1
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    sizes: int | tuple[int, ...] = 3
    pair: tuple[float, ...] = (0.9, 0.95)
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    losses: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    text: str | None = None


def test_a_number_or_a_word() -> None:
    rule = from_dict(CapacityRule, {"factor": "exact", "max_factor": 2})
    assert (rule.factor, rule.max_factor) == ("exact", 2.0)
    assert from_dict(CapacityRule, json.loads(json.dumps(to_dict(rule)))) == rule
    with pytest.raises(ConfigError, match="^capacity.factor must be a number or 'exact', not \"exat\".$"):
        from_dict(CapacityRule, {"factor": "exat"}, "capacity")


def test_defaults_and_nested_values() -> None:
    data = {"name": "n", "inner": {"size": 4}, "maybe": {"rate": 2}, "sizes": [1, 2], "losses": {"z": 1}, "kind": "b"}
    made = from_dict(Outer, data)
    assert made == Outer("n", Inner(4), Inner(1, 2.0), (1, 2), losses={"z": 1.0}, kind="b")
    assert isinstance(made.maybe.rate, float)  # type: ignore[union-attr]
    assert isinstance(made.losses["z"], float)
    assert from_dict(Outer, to_dict(made)) == made
    assert from_dict(Outer, {"name": "n", "maybe": None, "text": None}) == Outer("n")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "The config lacks the required key name."),
        ({"name": "n", "nam": 1}, 'Unknown key "nam" in the config. Did you mean "name"? Valid keys: name, inner,'),
        (
            {"name": "n", "inner": {"siz": 1}},
            'Unknown key "siz" in inner. Did you mean "size"? Valid keys: size, rate.',
        ),
        ({"name": "n", "maybe": {"siz": 1}}, 'Unknown key "siz" in maybe. Did you mean "size"?'),
        ({"name": 3}, "name must be a text, not 3."),
        ({"name": None}, "name must be a text, not null."),
        ({"name": "n", "inner": 3}, "inner must be a table of settings, not 3."),
        ({"name": "n", "inner": {"size": 1.5}}, "inner.size must be a whole number, not 1.5."),
        ({"name": "n", "inner": {"size": True}}, "inner.size must be a whole number, not true."),
        ({"name": "n", "inner": {"rate": "fast"}}, 'inner.rate must be a number, not "fast".'),
        ({"name": "n", "inner": {"rate": True}}, "inner.rate must be a number, not true."),
        ({"name": "n", "inner": {"rate": float("nan")}}, "inner.rate must be a finite number, not nan."),
        ({"name": "n", "losses": {"z": float("-inf")}}, "losses.z must be a finite number, not -inf."),
        ({"name": "n", "flag": 1}, "flag must be true or false, not 1."),
        ({"name": "n", "kind": "c"}, "kind must be one of 'a', 'b', not \"c\"."),
        ({"name": "n", "kind": ["a"]}, "kind must be one of 'a', 'b', not [\"a\"]."),
        ({"name": "n", "sizes": "3"}, 'sizes must be a whole number or a list, not "3".'),
        ({"name": "n", "sizes": [1, "2"]}, "sizes"),
        ({"name": "n", "pair": 0.9}, "pair must be a list such as [0.9], not 0.9."),
        ({"name": "n", "pair": [0.9, "b"]}, 'pair[1] must be a number, not "b".'),
        ({"name": "n", "losses": ["z"]}, 'losses must be a table of settings, not ["z"].'),
        ({"name": "n", "options": {"a": [{"b": float("inf")}]}}, "options.a[0].b must be a finite number, not inf."),
        (
            {"name": "n", "options": {"a": {1, 2}}},
            "options.a must be a text, a number, true or false, a list or a table",
        ),
        ({"name": "n", "inner": {"size": "x" * 100}}, '"' + "x" * 56 + "..."),
        ([], "The config must be a table of settings, not []."),
    ],
)
def test_refused_in_words(data: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Outer, data)
    assert words in str(caught.value)
    with pytest.raises(ConfigError) as below:
        from_dict(Outer, data, where="run")
    assert "run" in str(below.value)


def test_overrides() -> None:
    data = {"a": {"b": 1}, "c": "x", "n": None}
    changed = apply_overrides(
        data, ["a.b=2.5", "a.new=[1, 2]", "c=plain words", "n.deep=true", "e=null", "f=a=b", "g=", 'h="3"']
    )
    assert changed == {
        "a": {"b": 2.5, "new": [1, 2]},
        "c": "plain words",
        "n": {"deep": True},
        "e": None,
        "f": "a=b",
        "g": "",
        "h": "3",
    }
    assert data == {"a": {"b": 1}, "c": "x", "n": None}  # the original stays
    assert apply_overrides({"a": 1}, ["a=2", "a=3"]) == {"a": 3}
    with pytest.raises(ConfigError, match='"a" is not an override; write name=value'):
        apply_overrides(data, ["a"])
    with pytest.raises(ConfigError, match='"=3" is not an override'):
        apply_overrides(data, ["=3"])
    with pytest.raises(ConfigError, match='"c" is a single value, so "c.d.e" cannot be set.'):
        apply_overrides(data, ["c.d.e=1"])


def test_config_files(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('steps = 5\n[model.moe]\nk = 2\nhidden = [1, 2]\nrouter = {name = "topk"}\n')
    (tmp_path / "a.json").write_text(
        '{"steps": 5, "model": {"moe": {"k": 2, "hidden": [1, 2], "router": {"name": "topk"}}}}'
    )
    assert load_config_file(tmp_path / "a.toml") == load_config_file(str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"{", "a.json is not valid JSON: "),
        ("a.json", b"[" * 100_000, "a.json is not valid JSON: "),
        ("a.json", b"[1]", "a.json must hold a table of settings, not [1]."),
        ("a.toml", b"steps == 3", "a.toml is not valid TOML: "),
        ("a.toml", b"a = 1\na = 2", "a.toml is not valid TOML: "),
        ("a.json", b'{"a": "\xff"}', "Cannot read the config file"),
        (None, b"", "There is no config file"),
    ],
)
def test_broken_config_files(name: str | None, content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / (name or "gone.json")
    if name:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config_file(path)
    assert words in str(caught.value)
    assert path.name in str(caught.value)


def test_a_folder_for_a_config_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read the config file"):
        load_config_file(tmp_path)


counts = st.integers(1, 8)
names = st.text("abcdefgh_", min_size=1, max_size=8)
scalars = (
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False) | names
)


@st.composite
def model_configs(draw: st.DrawFn) -> ModelConfig:
    """Any valid config, per-layer lists included."""
    layers = draw(st.integers(1, 5))
    heads = draw(st.sampled_from([1, 2, 4]))
    first, every = draw(st.integers(0, layers - 1)), 1
    sparse = layers - first

    def per_layer(number: int, low: int, high: int) -> Any:
        one = st.integers(low, high)
        return draw(one | st.lists(one, min_size=number, max_size=number).map(tuple))

    experts = per_layer(sparse, 4, 9)
    moe = MoEConfig(
        num_experts=experts,
        k=per_layer(sparse, 1, 4),
        hidden=per_layer(sparse, 1, 99),
        dense_first=first,
        every=every,
        router=RouterConfig(draw(names), draw(st.dictionaries(names, scalars | st.lists(scalars, max_size=3)))),
        shared=draw(st.integers(0, 2)),
        zero=draw(st.integers(0, 2)),
        capacity=draw(st.none() | st.builds(CapacityRule, st.floats(0.5, 4))),
        losses=draw(st.dictionaries(names, st.floats(0, 10))),
        loss_scope=draw(st.sampled_from(["micro_batch", "sequence", "global_batch"])),
    )
    return ModelConfig(
        vocab_size=draw(st.integers(1, 10**6)),
        dim=4 * heads * draw(counts),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=draw(st.sampled_from([None, 1, heads])),
        hidden=per_layer(layers, 1, 999),
        sliding_window=draw(st.none()) if draw(st.booleans()) else per_layer(layers, 0, 99),
        norm_eps=draw(st.floats(1e-12, 1)),
        tie_embeddings=draw(st.booleans()),
        moe=draw(st.none() | st.just(moe)),
    )


@given(model_configs())
def test_any_model_config_survives_json(config: ModelConfig) -> None:
    text = json.dumps(to_dict(config), allow_nan=False)
    assert from_dict(ModelConfig, json.loads(text)) == config


@given(st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4)))
def test_any_json_is_a_config_or_refused_in_words(data: Any) -> None:
    for value in (
        data,
        {"vocab_size": data},
        {"vocab_size": 9, "moe": data},
        {"vocab_size": 9, "moe": {"router": data}},
    ):
        try:
            made = from_dict(ModelConfig, value)
        except ConfigError as error:
            assert str(error).endswith((".", "?"))  # noqa: PT017
        else:
            assert from_dict(ModelConfig, to_dict(made)) == made
