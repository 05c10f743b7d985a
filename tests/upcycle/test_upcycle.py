"""Upcycling one dense model: the same function at step 0 where that is promised, factors by hand, what stays and moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config import from_dict, to_dict
from moesaic.errors import ConfigError
from moesaic.experts.stacked import StackedExperts
from moesaic.models.config import RouterConfig
from moesaic.models.decoder import Decoder
from moesaic.plan.plan import RoutingPlan
from moesaic.upcycle import UpcycleConfig, difference, upcycle
from moesaic.upcycle.neurons import Neurons, of_expert, of_mlp
from tests.models.tiny import sparse as sparse_shape
from tests.upcycle.dense import ORDER_A, SHAPES, dense, ids

KEEPING: dict[str, dict[str, Any]] = {
    "copy": {},
    "copy, every second layer": {"every": 2, "experts": 3, "k": 3},
    "copy, one layer": {"layers": (0,)},
    "granular": {"method": "granular"},
    "granular, two copies": {"method": "granular", "experts": 12, "k": 6, "shards": 3},
    "factor in the router": {"method": "granular", "scale_in": "router"},
    "sigmoid with bias": {
        "router": RouterConfig("topk", {"score": "sigmoid", "balance_bias": True, "scale": 2.5}),
        "method": "granular",
    },
    "softmax of the chosen": {"router": RouterConfig("topk", {"normalize": "softmax_chosen", "gate_bias": True})},
    "split, all experts chosen": {"method": "split", "experts": 4, "k": 4, "router_std": 0.0},
}
NEARLY: dict[str, dict[str, Any]] = {  # kept up to a gate that starts small
    "order A": {"router": ORDER_A},
    "order A, granular": {"router": ORDER_A, "method": "granular", "k": 4},
    "order A, factor in the router": {"router": ORDER_A, "scale_in": "router"},
    "switch": {"router": RouterConfig("switch"), "k": 1},
}


def experts_of(model: Decoder, layer: int) -> list[Neurons]:
    """The units of every expert of a layer."""
    stacked = model.moe_layers()[layer].experts
    assert isinstance(stacked, StackedExperts)
    return [of_expert(stacked, e) for e in range(stacked.num_experts)]


def weights(neurons: Neurons) -> list[Tensor]:
    """Its matrices and biases."""
    values = (neurons.w_in_PHD, neurons.w_out_HD, neurons.b_in_PH, neurons.b_out_D)
    return [value for value in values if value is not None]


def equal(first: Neurons, second: Neurons) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


# ---- the function ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", KEEPING)
def test_the_function_is_kept(how: str, shape: str) -> None:
    config = UpcycleConfig(**KEEPING[how])
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        first = dense(shape, dtype)
        second = upcycle(first, config)
        gap = difference(first, second, ids())
        assert gap.max_abs < limit
        assert second.config.moe is not None
        assert second.moe_layers().keys() == set(second.config.moe_layers) != set()
        assert gap.largest > 1  # the models do say something


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", NEARLY)
def test_the_function_is_kept_by_a_gate_that_starts_small(how: str, shape: str) -> None:
    first = dense(shape)
    second = upcycle(first, UpcycleConfig(**NEARLY[how]))
    assert difference(first, second, ids()).max_abs < 1e-5
    for layer, plan in second(ids()).plans.items():
        assert isinstance(plan, RoutingPlan)
        if first.config.depth is None or layer not in first.config.depth_layers:
            assert (plan.counts_E > 0).sum() > second.moe_layers()[
                layer
            ].router.k  # and tokens still choose differently


def test_without_the_factor_the_function_would_not_be_kept() -> None:
    """The tests above see a wrong factor: with E/k left out, order A is far off."""
    first = dense()
    second = upcycle(first, UpcycleConfig(router=ORDER_A))
    for layer in second.moe_layers().values():
        layer.experts.w_out.data.mul_(2 / 8)  # type: ignore[union-attr, operator]
    assert difference(first, second, ids()).max_abs > 0.1


@pytest.mark.parametrize(
    "changes",
    [{"method": "noise"}, {"method": "drop"}, {"method": "split"}, {"method": "granular", "noise": 0.1}],
    ids=str,
)
def test_what_does_not_keep_the_function_says_how_far_it_is(changes: dict[str, Any]) -> None:
    first = dense()
    gap = difference(first, upcycle(first, UpcycleConfig(experts=4, **changes)), ids())
    assert not gap.same
    assert gap.max_abs > 0.05
    assert gap.kl > 1e-5
    assert "another function" in str(gap)
    assert gap.record()["loss_difference"] == gap.second_loss - gap.first_loss


def test_a_difference_worked_by_hand() -> None:
    """The second model has logits of 0: uniform, so that every figure follows from the first's logits."""
    first, second = (dense(tie_embeddings=False) for _ in range(2))
    second.head.weight.data.mul_(0)
    gap = difference(first, second, ids())
    z_TV = first(ids()).logits.detach().flatten(0, 1).double()
    log_p = z_TV.log_softmax(-1)
    V = z_TV.shape[1]
    assert gap.max_abs == pytest.approx(float(z_TV.abs().max()))
    assert gap.largest == gap.max_abs
    assert gap.second_loss == pytest.approx(torch.tensor(float(V)).log().item())
    assert gap.kl == pytest.approx(
        float((log_p.exp() * (log_p + torch.tensor(float(V)).log())).sum(-1).mean()), rel=1e-5
    )
    targets = ids()[:, 1:].flatten()
    losses = -log_p.view(3, 40, V)[:, :-1].flatten(0, 1).gather(1, targets[:, None])
    assert gap.first_loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert gap.tokens == 120


# ---- factors by hand ---------------------------------------------------------------------------------------------------


def one_unit_each() -> Decoder:
    """One layer of width 2 with the relu units (1, 0) -> (3, 0) and (2, 0) -> (4, 0), and an output bias of (1, 1)."""
    sizes = {"dim": 2, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "hidden": 2}
    model = dense(**sizes, gated=False, activation="relu", mlp_bias=True)
    ffn = model.blocks[0].ffn
    with torch.no_grad():
        ffn.w_in.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))  # type: ignore[union-attr]
        ffn.w_out.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))  # type: ignore[union-attr]
        ffn.w_in.bias.zero_()  # type: ignore[union-attr]
        ffn.w_out.bias.fill_(1)  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize(
    ("changes", "outs", "bias"),
    [
        ({"experts": 2}, [[[3, 0], [4, 0]]] * 2, 1),  # weights add up to 1: the very layer
        ({"experts": 4, "router": ORDER_A}, [[[6, 0], [8, 0]]] * 4, 2),  # 1/4 each, two chosen: times 2
        ({"experts": 4, "method": "granular"}, [[[6, 0]], [[8, 0]]] * 2, 1),  # 1/2 each: times G = 2; the bias once
        ({"experts": 4, "method": "granular", "router": ORDER_A}, [[[12, 0]], [[16, 0]]] * 2, 2),  # E G / k = 4
        ({"experts": 2, "method": "split", "split_by": "order"}, [[[6, 0]], [[8, 0]]], 1),  # k = 2 both in full
        ({"experts": 2, "method": "split", "split_by": "order", "split_scale": 1.0}, [[[3, 0]], [[4, 0]]], 1),
        ({"experts": 4, "method": "granular", "scale_in": "router"}, [[[3, 0]], [[4, 0]]] * 2, 0.5),
    ],
    ids=str,
)
def test_factors_by_hand(changes: dict[str, Any], outs: list[Any], bias: float) -> None:
    made = upcycle(one_unit_each(), UpcycleConfig(**({"k": 2} | changes)))
    experts = experts_of(made, 0)
    for expert, out in zip(experts, outs, strict=True):
        torch.testing.assert_close(expert.w_out_HD, torch.tensor(out, dtype=torch.float32), rtol=1e-5, atol=0)
        assert expert.b_out_D is not None
        torch.testing.assert_close(expert.b_out_D, torch.full((2,), float(bias)), rtol=1e-5, atol=0)
    assert made.config.moe is not None
    if changes.get("scale_in") == "router":
        assert made.config.moe.router.options["scale"] == pytest.approx(2)
    x_12 = torch.tensor([[1.0, 5.0]])
    y_12, _ = made.moe_layers()[0](x_12)
    # relu(1) * 3 + relu(2) * 4 + 1 = 12; split with a sum of 1 and two chosen at 1/2 (nearly) is half of the units
    if changes.get("split_scale") is None and changes.get("method") != "split":
        torch.testing.assert_close(y_12, torch.tensor([[12.0, 1.0]]), rtol=1e-5, atol=1e-5)


# ---- what experts are made of ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["plain", "biases", "ungated", "widths"])
def test_copies_are_the_layer_bit_for_bit(shape: str) -> None:
    first = dense(shape)
    made = upcycle(first, UpcycleConfig(experts=3, k=2))
    for layer in made.moe_layers():
        for expert in experts_of(made, layer):
            assert equal(expert, of_mlp(first.blocks[layer].ffn))  # type: ignore[arg-type]


def test_shards_side_by_side_are_the_layer() -> None:
    first = dense("biases")
    made = upcycle(first, UpcycleConfig(method="granular", experts=6, k=3, shards=3))
    for layer in made.moe_layers():
        ffn = of_mlp(first.blocks[layer].ffn)  # type: ignore[arg-type]
        experts = experts_of(made, layer)
        for copy in (experts[:3], experts[3:]):
            assert torch.equal(torch.cat([e.w_in_PHD for e in copy], dim=1), ffn.w_in_PHD)
            torch.testing.assert_close(torch.cat([e.w_out_HD for e in copy]), ffn.w_out_HD * 3)


def test_virtual_groups_send_a_token_to_whole_copies() -> None:
    made = upcycle(dense(), UpcycleConfig(method="granular", experts=12, k=6, shards=3))
    seen = set()
    for plan in made(ids()).plans.values():
        assert isinstance(plan, RoutingPlan)
        for row in plan.expert_TK.tolist():
            copies = {e // 3 for e in row}
            assert sorted(row) == sorted(3 * c + s for c in copies for s in range(3))
            seen |= copies
    assert seen == {0, 1, 2, 3}


def test_noise_is_in_proportion_to_each_matrix() -> None:
    first = dense(hidden=512, dim=64)
    made = upcycle(first, UpcycleConfig(method="noise", noise=0.2, experts=3))
    ffn = of_mlp(first.blocks[1].ffn)  # type: ignore[arg-type]
    experts = experts_of(made, 1)
    for expert in experts:
        for new, old in (
            (expert.w_in_PHD[0], ffn.w_in_PHD[0]),
            (expert.w_in_PHD[1], ffn.w_in_PHD[1]),
            (expert.w_out_HD, ffn.w_out_HD),
        ):
            assert float((new - old).std() / old.std()) == pytest.approx(0.2, rel=0.05)
    assert not torch.equal(experts[0].w_out_HD, experts[1].w_out_HD)


def test_drop_draws_the_stated_share_from_the_statistics_of_what_it_replaces() -> None:
    first = dense(hidden=400, dim=64, mlp_bias=True)
    first.blocks[0].ffn.w_out.weight.data.add_(0.5)  # type: ignore[union-attr, operator]
    made = upcycle(first, UpcycleConfig(method="drop", drop=0.3, experts=4))
    ffn = of_mlp(first.blocks[0].ffn)  # type: ignore[arg-type]
    chosen = []
    for expert in experts_of(made, 0):
        anew_H = (expert.w_out_HD != ffn.w_out_HD).any(dim=1)
        assert int(anew_H.sum()) == 120
        for p in range(2):
            assert torch.equal((expert.w_in_PHD[p] != ffn.w_in_PHD[p]).any(dim=1), anew_H)
            assert torch.equal(expert.b_in_PH[p] != ffn.b_in_PH[p], anew_H)  # type: ignore[index]
            assert float(expert.w_in_PHD[p, anew_H].std() / ffn.w_in_PHD[p, anew_H].std()) == pytest.approx(1, abs=0.03)
        assert float(expert.w_out_HD[anew_H].mean()) == pytest.approx(float(ffn.w_out_HD[anew_H].mean()), abs=0.02)
        assert float(expert.w_out_HD[anew_H].std() / ffn.w_out_HD[anew_H].std()) == pytest.approx(1, abs=0.03)
        assert torch.equal(expert.b_out_D, ffn.b_out_D)  # type: ignore[arg-type]
        chosen.append(anew_H)
    assert not torch.equal(chosen[0], chosen[1])


def test_nothing_dropped_is_copies_and_everything_dropped_keeps_no_unit() -> None:
    first = dense()
    ffn = of_mlp(first.blocks[0].ffn)  # type: ignore[arg-type]
    for expert in experts_of(upcycle(first, UpcycleConfig(method="drop", drop=0)), 0):
        assert equal(expert, ffn)
    for expert in experts_of(upcycle(first, UpcycleConfig(method="drop", drop=1)), 0):
        assert (expert.w_out_HD != ffn.w_out_HD).any(dim=1).all()


@pytest.mark.parametrize("split_by", ["order", "random", "weights", "activations"])
@pytest.mark.parametrize("shared", [0, 8])
def test_split_deals_out_every_unit_once(split_by: Any, shared: int) -> None:
    first = dense()
    config = UpcycleConfig(method="split", experts=4, k=2, split_by=split_by, shared=shared, split_scale=1.0)
    made = upcycle(first, config, ids())
    for layer, sparse in made.moe_layers().items():
        ffn = of_mlp(first.blocks[layer].ffn)  # type: ignore[arg-type]
        parts = experts_of(made, layer)
        assert {part.count for part in parts} == {(24 - shared) // 4}
        if shared:
            assert sparse.shared is not None
            parts.append(of_mlp(sparse.shared.mlp))
            assert parts[-1].count == shared
        dealt = torch.cat([torch.cat([p.w_in_PHD.transpose(0, 1).flatten(1), p.w_out_HD], dim=1) for p in parts])
        whole = torch.cat([ffn.w_in_PHD.transpose(0, 1).flatten(1), ffn.w_out_HD], dim=1)
        order = [int((whole == row).all(dim=1).nonzero()) for row in dealt]
        assert sorted(order) == list(range(24))
        if split_by == "order" and not shared:
            assert order == list(range(24))


def test_all_of_a_split_layer_with_a_shared_expert_is_the_layer() -> None:
    first = dense("ungated", torch.float64, mlp_bias=False)
    config = UpcycleConfig(method="split", experts=4, k=4, shared=8, split_by="activations", router_std=0.0)
    assert difference(first, upcycle(first, config, ids()), ids()).max_abs < 1e-12


def test_a_router_that_predicts_excitement_beats_a_random_one() -> None:
    """Of a layer whose halves answer to opposite directions, the router sends tokens to the half that is excited."""
    first = dense(hidden=32, gated=False, activation="relu")
    axis_D = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(0)), dim=0)
    with torch.no_grad():
        for block in first.blocks:
            sign_H1 = torch.tensor([1.0, -1.0]).repeat(16)[:, None]
            block.ffn.w_in.weight.copy_(3 * sign_H1 * axis_D + 0.1 * block.ffn.w_in.weight)  # type: ignore[union-attr]
    config = UpcycleConfig(
        method="split", experts=2, k=1, router=ORDER_A, split_by="activations", router_init="activations"
    )
    gaps = {}
    for init in ("random", "activations"):
        made = upcycle(first, replace(config, router_init=init), ids())  # type: ignore[arg-type]
        signs = [(of.w_in_PHD[0] @ axis_D).sign() for of in experts_of(made, 0)]
        assert sorted(float(s.mean()) for s in signs) == [-1, 1]  # the halves were found
        gaps[init] = difference(first, made, ids()).kl
    assert gaps["activations"] < 0.7 * gaps["random"]


# ---- purity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["copy", "noise", "granular", "drop", "split"])
def test_the_dense_model_is_left_alone_and_nothing_is_shared(method: Any) -> None:
    first = dense("biases")
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    made = upcycle(first, UpcycleConfig(method=method, experts=4))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in first.state_dict().items())
    assert made.head.weight is made.embedding.weight


def test_the_same_seed_gives_the_same_model_and_leaves_the_random_state_alone() -> None:
    config = UpcycleConfig(method="drop", noise=0.1, seed=5)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    states = [upcycle(dense(), replace(config, seed=seed)).state_dict() for seed in (5, 5, 6)]
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0] if "router" in name)
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0] if "w_out" in name)
    assert not torch.equal(states[0]["blocks.0.ffn.router.gate.weight"], states[0]["blocks.1.ffn.router.gate.weight"])


def test_what_is_no_tensor_travels_but_for_the_source() -> None:
    first = dense()
    first.tokenizer, first.companions, first.source = object(), {"chat_template.jinja": b"x"}, {"family": "llama"}
    first.compute_dtype = torch.bfloat16
    made = upcycle(first, UpcycleConfig())
    assert (made.tokenizer, made.companions, made.compute_dtype) == (first.tokenizer, first.companions, torch.bfloat16)
    assert made.source is None


def test_half_precision_keeps_routers_in_fp32() -> None:
    made = upcycle(dense(dtype=torch.bfloat16), UpcycleConfig(method="drop", noise=0.1))
    kinds = {name: parameter.dtype for name, parameter in made.named_parameters()}
    assert kinds["blocks.0.ffn.experts.w_in"] == kinds["embedding.weight"] == torch.bfloat16
    assert kinds["blocks.0.ffn.router.gate.weight"] == torch.float32


@pytest.mark.parametrize("method", ["copy", "granular"])
def test_the_sparse_model_learns(method: Any) -> None:
    made = upcycle(dense(), UpcycleConfig(method=method, experts=4)).train()
    made(ids()).logits.square().mean().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        # Experts that are all alike give a router nothing to choose between, until noise or data makes them differ; shards do.
        if "router" not in name or method == "granular":
            assert parameter.grad.abs().sum() > 0, name


def test_the_config_survives_json() -> None:
    config = UpcycleConfig(method="split", layers=(0, 1), router=ORDER_A, losses={"z": 1e-3}, split_scale=2.0)
    assert from_dict(UpcycleConfig, to_dict(config)) == config


def test_losses_are_those_the_router_advises() -> None:
    losses = {}
    for name, options in (("topk", {}), ("topk", {"balance_bias": True}), ("gshard", {})):
        made = upcycle(dense(), UpcycleConfig(router=RouterConfig(name, options)))
        assert made.config.moe is not None
        losses[name, *options] = made.config.moe.losses
    assert losses["topk",] == {"switch": 1e-2, "z": 1e-3}
    assert losses["topk", "balance_bias"] == {}
    assert losses["gshard",] == {"switch": 1e-2}


# ---- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 9}, "k=9 experts per token are impossible with 8 experts"),
        ({"method": "granular", "experts": 9}, "experts=9 is not a multiple of shards=2"),
        ({"method": "granular", "k": 3}, "k=3 is not a multiple of shards=2"),
        ({"method": "granular", "experts": 10, "k": 5, "shards": 5}, "Layer 0 has 24 hidden units, which shards=5"),
        ({"method": "split", "experts": 7}, "cannot be dealt out to 7"),
        ({"method": "split", "experts": 4, "shared": 24}, "24 - 24 shared ones"),
        ({"method": "split", "experts": 4, "split_by": "activations"}, "look at what the model does on text"),
        ({"method": "split", "experts": 4, "router_init": "activations"}, "look at what the model does on text"),
        ({"method": "btx"}, "makes experts of several models"),
        ({"shared": 4}, 'need method="split"'),
        ({"noise": 0.1}, 'with noise=0.1 the method is "noise"'),
        ({"drop": 1.5}, "drop is a share"),
        ({"router_init": "prompts"}, 'belongs to method="btx"'),
        ({"router_init": "activations"}, 'belongs to method="split"'),
        ({"layers": (5,)}, "must list blocks 0 to 1"),
        ({"k": 1}, "the router gets no gradient"),
        ({"router": RouterConfig("soft_moe")}, "mixtures of tokens"),
        ({"router": RouterConfig("expert_choice")}, "weights that add up to 0|looks at later tokens"),
        ({"router": RouterConfig("tpok")}, 'Did you mean "topk"'),
        ({"router": RouterConfig("hash"), "router_std": 0.1}, "no linear gate"),
        ({"router": RouterConfig("hash"), "method": "granular"}, "no linear gate"),
        ({"router": RouterConfig("switch"), "k": 1, "scale_in": "router"}, "no option scale"),
        ({"experts": 0}, "experts must be at least 1"),
        ({"method": "noise", "noise": float("inf")}, "noise must be a number of at least 0, not inf"),
        ({"router_std": float("inf")}, "router_std must be a number of at least 0, not inf"),
        ({"method": "split", "split_scale": float("inf")}, "split_scale must be a number above 0, not inf"),
        ({"shards": 0}, "^shards must be at least 1, not 0.$"),
        ({"shared": -1}, "^shared must be at least 0, not -1.$"),
        ({"seed": -1}, "seed must be from 0 to 2\\*\\*63 - 1, not -1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    first = dense()
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    with pytest.raises(ConfigError, match=words):
        upcycle(first, UpcycleConfig(**changes))
    assert all(torch.equal(tensor, before[name]) for name, tensor in first.state_dict().items())


def test_a_sparse_model_and_biases_with_shared_experts_are_refused() -> None:
    from moesaic.models.build import build_model

    with pytest.raises(ConfigError, match=r"sparse already \(layers 0, 1\)"):
        upcycle(build_model(sparse_shape()), UpcycleConfig())
    with pytest.raises(ConfigError, match="Shared experts have no biases"):
        upcycle(dense("biases"), UpcycleConfig(method="split", experts=4, shared=4))


def test_models_of_other_vocabularies_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match="vocabularies of 64 and 32|vocabularies of"):
        difference(dense(), dense(vocab_size=32), ids())
    with pytest.raises(ConfigError, match="at least two tokens"):
        difference(dense(), dense(), ids()[:, :1])
