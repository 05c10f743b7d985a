"""Parameter groups, schedules by hand at their corners, and AdamW against its formula."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.models import Decoder, MoEConfig, RouterConfig, build_model
from moesaic.train.optim import OptimConfig, learning_rate, make_optimizer, parameter_groups
from tests.models.tiny import tiny

KINDS = MoEConfig(
    num_experts=4,
    k=2,
    hidden=12,
    dense_first=1,
    shared=1,
    shared_gate=True,
    constant=1,
    router=RouterConfig(options={"gate_bias": True, "balance_bias": True}),
)


def everything(**changes: Any) -> Decoder:
    return build_model(tiny(KINDS, norm="layernorm", attention_bias="all", qk_norm="head", **changes), seed=0)


def named(model: Decoder) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.3)
    assert [(g["name"], g["weight_decay"]) for g in groups] == [("decay", 0.3), ("no_decay", 0.0)]
    listed = [names[id(p)] for g in groups for p in g["params"]]  # type: ignore[attr-defined]
    assert sorted(listed) == sorted(names.values())  # every parameter, exactly once
    return {str(g["name"]): {names[id(p)] for p in g["params"]} for g in groups}  # type: ignore[attr-defined]


def test_every_parameter_is_in_one_group_by_the_stated_rule() -> None:
    groups = named(everything(tie_embeddings=False))
    attention = {f"blocks.{i}.attention.{w}.weight" for i in (0, 1) for w in ("wq", "wk", "wv", "wo")}
    assert groups["decay"] == attention | {
        "blocks.0.ffn.w_in.weight",
        "blocks.0.ffn.w_out.weight",
        "blocks.1.ffn.experts.stacked.w_in",
        "blocks.1.ffn.experts.stacked.w_out",
        "blocks.1.ffn.experts.constant_mix",
        "blocks.1.ffn.shared.mlp.w_in.weight",
        "blocks.1.ffn.shared.mlp.w_out.weight",
        "blocks.1.ffn.shared.output_gate.weight",
        "head.weight",
    }
    assert {"embedding.weight", "blocks.1.ffn.router.gate.weight", "blocks.1.ffn.router.gate.bias"} <= groups[
        "no_decay"
    ]
    assert {"blocks.1.ffn.experts.constant_v", "blocks.0.attention.q_norm.weight", "norm.bias"} <= groups["no_decay"]


def test_sinks_and_all_biases_do_not_decay() -> None:
    """The biases of stacked experts are matrices by shape alone."""
    moe = MoEConfig(num_experts=4, k=2, hidden=12, dense_first=1, expert_bias=True, zero=1)
    groups = named(build_model(tiny(moe, attention_sinks=True, attention_bias="qkv", mlp_bias=True), seed=0))
    biases = {"blocks.1.ffn.experts.stacked.b_in", "blocks.1.ffn.experts.stacked.b_out", "blocks.0.ffn.w_in.bias"}
    assert (
        biases | {f"blocks.{i}.attention.{name}" for i in (0, 1) for name in ("sinks", "wq.bias")} <= groups["no_decay"]
    )
    assert {"blocks.1.ffn.experts.stacked.w_in", "blocks.1.ffn.experts.stacked.w_out"} <= groups["decay"]


def test_a_tied_head_is_an_embedding_and_frozen_parameters_are_left_out() -> None:
    model = everything()
    assert "embedding.weight" in named(model)["no_decay"]
    model.blocks[0].attention.wq.weight.requires_grad_(False)
    listed = [id(p) for g in parameter_groups(model, 0.1) for p in g["params"]]  # type: ignore[attr-defined]
    assert len(listed) == len(list(model.parameters())) - 1
    assert id(model.blocks[0].attention.wq.weight) not in listed


def test_settings_reach_adamw() -> None:
    config = OptimConfig(lr=0.5, betas=(0.7, 0.8), eps=1e-3, weight_decay=0.25)
    optimizer = make_optimizer(build_model(tiny(), seed=0), config)
    assert [(g["lr"], g["betas"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.5, (0.7, 0.8), 1e-3, 0.25),
        (0.5, (0.7, 0.8), 1e-3, 0.0),
    ]


def test_adamw_is_its_formula() -> None:
    """m and v with bias correction, decay apart from the gradient (Loshchilov & Hutter 2019); three steps of two kinds."""
    model = build_model(tiny(), seed=0)
    optimizer = make_optimizer(model, OptimConfig(lr=0.02, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.5))
    chosen = {"matrix": model.blocks[0].attention.wq.weight, "gain": model.norm.weight}
    decay = {"matrix": 0.5, "gain": 0.0}
    w = {n: p.detach().double().clone() for n, p in chosen.items()}
    m, v = ({n: torch.zeros_like(p) for n, p in w.items()} for _ in range(2))
    for t in (1, 2, 3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for n, p in chosen.items():
            assert p.grad is not None
            g = p.grad.double()
            m[n] = 0.8 * m[n] + 0.2 * g
            v[n] = 0.9 * v[n] + 0.1 * g * g
            step = (m[n] / (1 - 0.8**t)) / ((v[n] / (1 - 0.9**t)).sqrt() + 1e-4)
            w[n] = w[n] - 0.02 * decay[n] * w[n] - 0.02 * step
        optimizer.step()
        for n, p in chosen.items():
            torch.testing.assert_close(p.detach().double(), w[n], rtol=1e-5, atol=1e-6)


def rates(steps: int, **changes: Any) -> list[float]:
    return [learning_rate(OptimConfig(lr=1.0, **changes), step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_reaches_the_peak_on_its_last_step() -> None:
    assert rates(40, warmup=4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates(40, warmup=0)[0] == 1.0
    assert rates(40)[:3] == pytest.approx([0.5, 1.0, 1.0])  # 5% of 40 steps are 2
    assert rates(3, warmup=10) == pytest.approx([1 / 3, 2 / 3, 1.0])  # a warm-up longer than the run fills it
    assert rates(1) == [1.0]


def test_cosine_by_hand() -> None:
    found = rates(20, warmup=4, min_lr_ratio=0.2)
    for step, progress in ((4, 0.0), (8, 0.25), (12, 0.5), (16, 0.75), (19, 15 / 16)):
        assert found[step] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * progress)) / 2)
    assert found[12] == pytest.approx(0.6)
    assert all(a > b for a, b in itertools.pairwise(found[4:]))
    assert min(rates(1000, min_lr_ratio=0.0)) < 1e-4


def test_wsd_by_hand() -> None:
    found = rates(20, schedule="wsd", warmup=2, decay_fraction=0.25, min_lr_ratio=0.1)
    assert found[:2] == [0.5, 1.0]
    assert found[2:16] == [1.0] * 14  # stable; step 15 begins the five last ones at the full rate
    assert found[16:] == pytest.approx([0.1 + 0.9 * left for left in (0.8, 0.6, 0.4, 0.2)])


def test_constant() -> None:
    assert rates(6, schedule="constant", warmup=2) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.0}, "optim.lr must be above 0, not 0.0."),
        ({"lr": float("nan")}, "optim.lr must be above 0, not nan."),
        ({"min_lr_ratio": 1.1}, "optim.min_lr_ratio must lie in"),
        ({"decay_fraction": 0.0}, "optim.decay_fraction in"),
        ({"betas": (0.9,)}, "optim.betas must be two numbers in [0, 1), not [0.9]."),
        ({"betas": (0.9, 1.0)}, "optim.betas must be two numbers in [0, 1), not [0.9, 1.0]."),
        ({"weight_decay": -0.1}, "optim.weight_decay, optim.clip and optim.warmup must be at least 0"),
        ({"clip": -1.0}, "optim.clip"),
        ({"warmup": -1}, "optim.warmup"),
        ({"eps": 0.0}, "optim.eps above 0"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OptimConfig(**changes)
    assert words in str(caught.value)
