"""The model's shape as data: through JSON and back, every impossible combination in words, and the dense twin."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from moesaic.config import from_dict, to_dict
from moesaic.cost.count import count_parameters
from moesaic.errors import ConfigError
from moesaic.models import DepthConfig, ModelConfig, MoEConfig, RouterConfig, build_model, dense_twin
from moesaic.models.config import LatentConfig, pick
from moesaic.nn.rope import RopeScaling
from moesaic.plan.capacity import CapacityRule
from moesaic.routing import Rule, RuleSet
from tests.models.tiny import tiny

FULL = ModelConfig(
    vocab_size=128,
    dim=32,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    hidden=(40, 41, 42, 43),
    activation="gelu",
    gated=False,
    norm="layernorm",
    norm_eps=1e-5,
    norm_placement="post",
    rope_theta=500.0,
    max_seq_len=96,
    qk_norm="head",
    attention_bias="all",
    rope_scaling=RopeScaling("yarn", 4.0, original_max_seq_len=24, truncate=False),
    mlp_bias=True,
    clip_qkv=8.0,
    attention_sinks=True,
    sliding_window=(4, 0, 8, 0),
    tie_embeddings=False,
    init_scale=0.1,
    moe=MoEConfig(
        num_experts=(4, 6, 8),
        k=(1, 2, 3),
        hidden=(8, 9, 10),
        dense_first=1,
        layers=(1, 2, 3),
        router=RouterConfig("topk", {"normalize": "none", "balance_bias": True}, allow_leak=True),
        shared=1,
        shared_gate=True,
        shared_hidden=11,
        expert_bias=True,
        zero=1,
        copy=1,
        constant=1,
        capacity=CapacityRule(factor=1.5, eval_factor=None, priority="probability", overflow="next_best"),
        heads=2,
        losses={"switch": 0.5, "z": 0.0},
        loss_options={"switch": {"normalize": "slots"}},
        loss_scope="global_batch",
        backend="loop",
        expert_dropout=0.4,
        expert_masking=0.1,
        gating_dropout=0.2,
        gating_groups=2,
        rules=RuleSet((Rule(when={"task": ((0, 3), 7)}, forbid=(1,)), Rule(allow=(0,), weight=0.5)), on_none="refuse"),
    ),
    depth=DepthConfig(
        capacity=0.5, every=3, first=1, options={"weight": "sigmoid", "predictor_hidden": 8}, allow_leak=True
    ),
)


LATENT = ModelConfig(vocab_size=64, latent=LatentConfig(kv_rank=16, q_rank=8, nope_dim=4, rope_dim=6, value_dim=5))


@pytest.mark.parametrize(
    "config",
    [ModelConfig(vocab_size=64), FULL, LATENT, tiny(MoEConfig())],
    ids=["default", "full", "latent", "tiny"],
)
def test_a_config_survives_json(config: ModelConfig) -> None:
    text = json.dumps(to_dict(config))
    again = from_dict(ModelConfig, json.loads(text))
    assert again == config
    assert json.dumps(to_dict(again)) == text


def test_every_field_of_the_full_config_differs_from_its_default() -> None:
    """Otherwise the round trip above would prove nothing about that field."""
    plain, moe = ModelConfig(vocab_size=64), MoEConfig()
    same = [name for name in plain.__dataclass_fields__ if getattr(plain, name) == getattr(FULL, name)]
    assert same == ["latent"]  # goes with no grouped queries, and has a round trip of its own
    assert FULL.moe is not None
    same = [n for n in moe.__dataclass_fields__ if getattr(moe, n) == getattr(FULL.moe, n)]
    assert same == ["every", "expert_kind"]  # both at odds with the other fields


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 0}, "model.vocab_size must be at least 1, not 0."),
    ({"dim": 0}, "model.dim must be at least 1, not 0."),
    ({"num_layers": 0}, "model.num_layers must be at least 1, not 0."),
    ({"num_heads": 0}, "model.num_heads must be at least 1, not 0."),
    ({"max_seq_len": -3}, "model.max_seq_len must be at least 1, not -3."),
    ({"num_heads": 3}, "model.dim=16 is not a multiple of model.num_heads=3; change one or set model.head_dim."),
    ({"head_dim": 5}, "The head width must be even for rotary positions, not 5."),
    ({"num_heads": 16, "num_kv_heads": 2}, "The head width must be even for rotary positions, not 1."),
    ({"num_kv_heads": 3}, "model.num_kv_heads=3 must divide model.num_heads=4."),
    ({"num_kv_heads": 0}, "model.num_kv_heads=0 must divide model.num_heads=4."),
    ({"norm_eps": 0.0}, "model.norm_eps, model.init_scale and model.rope_theta must be above 0."),
    ({"init_scale": -1.0}, "model.norm_eps, model.init_scale and model.rope_theta must be above 0."),
    ({"rope_theta": float("nan")}, "model.norm_eps, model.init_scale and model.rope_theta must be above 0."),
    ({"hidden": 0}, "model.hidden must be at least 1, not 0."),
    ({"hidden": (8, 8, 8)}, "model.hidden lists 3 values for 2 layers; give one number or one per layer."),
    ({"hidden": (8, 0)}, "model.hidden must be at least 1, not 0."),
    ({"sliding_window": -1}, "model.sliding_window must be at least 0, not -1."),
    ({"sliding_window": (4,)}, "model.sliding_window lists 1 values for 2 layers; give one number or one per layer."),
]
MOE_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"every": 0}, "model.moe.every must be at least 1, not 0."),
    ({"dense_first": -1}, "model.moe.dense_first must be at least 0, not -1."),
    ({"shared": -1}, "model.moe.shared must be at least 0, not -1."),
    ({"zero": -1}, "model.moe.zero must be at least 0, not -1."),
    ({"copy": -1}, "model.moe.copy must be at least 0, not -1."),
    ({"constant": -1}, "model.moe.constant must be at least 0, not -1."),
    ({"dense_first": 2}, "No layer is sparse: 2 layers with moe.dense_first=2 and moe.every=1; lower one"),
    ({"every": 3}, "No layer is sparse: 2 layers with moe.dense_first=0 and moe.every=3; lower one"),
    ({"num_experts": 0}, "model.moe.num_experts must be at least 1, not 0."),
    (
        {"num_experts": (4,)},
        "model.moe.num_experts lists 1 values for 2 sparse layers; give one number or one per sparse layer.",
    ),
    ({"k": (1, 2, 3)}, "model.moe.k lists 3 values for 2 sparse layers; give one number or one per sparse layer."),
    ({"k": 0}, "model.moe.k must be at least 1, not 0."),
    ({"hidden": (4, 0)}, "model.moe.hidden must be at least 1, not 0."),
    ({"num_experts": 4, "k": 5}, "model.moe.k=5 is more than the 4 experts of a layer; choose k between 1 and 4."),
    ({"num_experts": (8, 4), "k": 5}, "model.moe.k=5 is more than the 4 experts of a layer; choose k between 1 and 4."),
    ({"shared_gate": True}, "model.moe.shared_gate needs at least one shared expert; set model.moe.shared=1."),
    ({"losses": {"switch": -0.1}}, "model.moe.losses.switch must be at least 0, not -0.1."),
    ({"losses": {"z": float("nan")}}, "model.moe.losses.z must be at least 0, not nan."),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[str(c) for c, _ in REFUSED])
def test_an_impossible_model_is_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(**changes)
    assert str(caught.value) == words


@pytest.mark.parametrize(("changes", "words"), MOE_REFUSED, ids=[str(c) for c, _ in MOE_REFUSED])
def test_impossible_experts_are_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(MoEConfig(**changes))
    assert str(caught.value).startswith(words)


def test_zero_experts_make_room_for_a_larger_k() -> None:
    assert tiny(MoEConfig(num_experts=2, k=3, zero=1)).moe is not None
    with pytest.raises(ConfigError, match="k=4 is more than the 3 experts"):
        tiny(MoEConfig(num_experts=2, k=4, zero=1))


@pytest.mark.parametrize(
    ("layers", "first", "every", "expected"),
    [
        (4, 0, 1, (0, 1, 2, 3)),
        (4, 1, 1, (1, 2, 3)),
        (6, 0, 2, (1, 3, 5)),
        (6, 1, 2, (2, 4)),
        (7, 2, 3, (4,)),
        (3, 2, 1, (2,)),
    ],
)
def test_which_layers_are_sparse(layers: int, first: int, every: int, expected: tuple[int, ...]) -> None:
    config = tiny(MoEConfig(dense_first=first, every=every), num_layers=layers)
    assert config.moe_layers == expected
    assert tuple(build_model(config, device="meta").moe_layers()) == expected


def test_lists_give_each_sparse_layer_its_own_shape() -> None:
    moe = MoEConfig(num_experts=(3, 5), k=(2, 3), hidden=(6, 10), dense_first=1)
    model = build_model(tiny(moe, num_layers=3, hidden=(20, 21, 22)), seed=0)
    first, second = model.moe_layers().values()
    assert (first.router.num_experts, second.router.num_experts) == (3, 5)
    assert (first.router.k, second.router.k) == (2, 3)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["blocks.1.ffn.experts.w_in"] == (3, 16, 12)
    assert shapes["blocks.2.ffn.experts.w_in"] == (5, 16, 20)
    assert shapes["blocks.0.ffn.w_in.weight"] == (40, 16)


def test_window_of_each_block() -> None:
    assert [tiny(sliding_window=(4, 0)).window(i) for i in range(2)] == [4, None]
    assert [tiny(sliding_window=7).window(i) for i in range(2)] == [7, 7]
    assert tiny(sliding_window=0).window(1) is None
    assert tiny().window(0) is None
    assert (pick(3, 9), pick((5, 6), 1)) == (3, 6)


# ---- the dense twin -------------------------------------------------------------------------------------------------


def test_the_twin_by_hand() -> None:
    """Sparse layer: 2 of 16 experts of width 96 plus one shared, and a router of 16 x D: 3 * 96 + round(16 / 3) = 293."""
    moe = MoEConfig(num_experts=16, k=2, hidden=96, shared=1, dense_first=1)
    twin = dense_twin(tiny(moe, num_layers=3, hidden=100))
    assert twin.moe is None
    assert twin.hidden == (100, 293, 293)
    plain = dense_twin(tiny(moe, num_layers=3, hidden=100, gated=False))
    assert plain.hidden == (100, 296, 296)


def test_the_twin_of_a_dense_model_is_itself() -> None:
    assert dense_twin(tiny()) == tiny()


BIG = {"vocab_size": 1024, "dim": 96, "num_layers": 4, "num_heads": 4, "hidden": 256}
TWINS = {
    "16 of 2": MoEConfig(num_experts=16, k=2, hidden=128),
    "64 of 8": MoEConfig(num_experts=64, k=8, hidden=48),
    "shared": MoEConfig(num_experts=8, k=2, hidden=64, shared=2, shared_gate=True, dense_first=1),
    "lists": MoEConfig(
        num_experts=(4, 9), k=(1, 3), hidden=(64, 40), every=2, router=RouterConfig(options={"normalize": "none"})
    ),
    "special": MoEConfig(num_experts=8, k=2, hidden=64, zero=1, copy=1, constant=2),
    "more k than feed-forward experts": MoEConfig(num_experts=2, k=4, hidden=64, zero=2, copy=2),
}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", TWINS)
def test_the_twin_has_the_same_active_parameters(name: str, gated: bool) -> None:
    config = ModelConfig(**BIG, gated=gated, moe=TWINS[name])  # type: ignore[arg-type]
    wanted = count_parameters(build_model(config, device="meta")).active
    twin = count_parameters(build_model(dense_twin(config), device="meta"))
    assert twin.total == twin.active
    assert abs(twin.active / wanted - 1) < 0.002
    # One hidden unit of every sparse block is what rounding may cost; a gate per shared expert adds D.
    unit = (3 if gated else 2) * config.dim
    assert abs(twin.active - wanted) <= len(config.moe_layers) * unit


def test_a_twin_keeps_everything_but_the_experts() -> None:
    twin = dense_twin(FULL)
    assert replace(twin, moe=FULL.moe, hidden=FULL.hidden) == FULL
