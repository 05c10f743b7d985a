"""Sparse models made dense: what was upcycled comes back, what was trained is put together as plain loops would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.experts.stacked import StackedExperts
from moesaic.models.config import MoEConfig, RouterConfig
from moesaic.models.decoder import Decoder
from moesaic.plan.plan import RoutingPlan
from moesaic.upcycle import DensifyConfig, UpcycleConfig, densify, difference, upcycle
from moesaic.upcycle.neurons import Neurons, mean
from tests.models.tiny import lively, tiny
from tests.upcycle.dense import ORDER_A, SHAPES, dense, ids

UNGATED: dict[str, Any] = {"gated": False, "activation": "gelu"}


def trained(moe: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    """A lively model of four experts, no two alike, of which a token gets two; biases that count where it has some."""
    values: dict[str, Any] = {"num_experts": 4, "k": 2, "hidden": 3, "losses": {}}
    model = lively(tiny(MoEConfig(**(values | (moe or {}))), **changes))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".b_in", ".b_out")):
                parameter.normal_(std=0.3, generator=generator)
    return model.to(dtype)


def with_equal_experts(model: Decoder) -> Decoder:
    """The same with every expert a copy of its layer's last one."""
    with torch.no_grad():
        for layer in model.moe_layers().values():
            for parameter in layer.experts.parameters():
                parameter.copy_(parameter[-1:].expand_as(parameter).clone())
    return model


def counted(model: Decoder, layer: int) -> list[int]:
    """How many rows each expert gets on ``ids()``, counted one by one."""
    plan = model(ids()).plans[layer]
    assert isinstance(plan, RoutingPlan)
    chosen = plan.expert_TK.flatten().tolist()
    return [chosen.count(e) for e in range(plan.num_experts)]


def put_together(model: Decoder, layer: int, weights: list[list[float]]) -> dict[str, Tensor]:
    """fp64: shards side by side, shard g of G the mean of experts g, g + G, ... with ``weights[g]``; a token's weights add up
    to 1 over two experts.
    """
    experts = model.moe_layers()[layer].experts
    assert isinstance(experts, StackedExperts)
    G, H, P = len(weights), experts.hidden, 2 if experts.gated else 1
    out = 1 / min(2, G)
    w_in = torch.zeros(P * G * H, experts.dim, dtype=torch.float64)
    w_out = torch.zeros(experts.dim, G * H, dtype=torch.float64)
    b_in, b_out = torch.zeros(P * G * H, dtype=torch.float64), torch.zeros(experts.dim, dtype=torch.float64)
    for g in range(G):
        for c, weight in enumerate(weights[g]):
            e, share = g + c * G, weight / sum(weights[g])
            for h in range(H):
                for p in range(P):
                    row = p * G * H + g * H + h
                    w_in[row] += share * experts.w_in[e, :, p * H + h].detach().double()
                    if experts.b_in is not None:
                        b_in[row] += share * experts.b_in[e, p * H + h].detach().double()
                w_out[:, g * H + h] += share * out * experts.w_out[e, h].detach().double()
            if experts.b_out is not None:
                b_out += share / G * experts.b_out[e].detach().double()
    made = {"w_in.weight": w_in, "w_out.weight": w_out}
    return made | ({} if experts.b_in is None else {"w_in.bias": b_in, "w_out.bias": b_out})


def check_layers(model: Decoder, made: Decoder, weights: dict[int, list[list[float]]]) -> None:
    """Every layer of ``made`` is what the loops put together, and nothing else changed."""
    assert made.config.moe is None
    state, before = made.state_dict(), model.state_dict()
    for layer, of_layer in weights.items():
        wanted = put_together(model, layer, of_layer)
        held = {name.partition(".ffn.")[2]: t for name, t in state.items() if name.startswith(f"blocks.{layer}.ffn.")}
        assert held.keys() == wanted.keys()
        for name, value in held.items():
            torch.testing.assert_close(value.double(), wanted[name], rtol=1e-6, atol=1e-7)
    others = [name for name in state if ".ffn." not in name]
    assert others
    assert all(torch.equal(state[name], before[name]) for name in others)


# ---- trained experts, against loops ------------------------------------------------------------------------------------


@pytest.mark.parametrize("moe", [{}, {"expert_bias": True}], ids=["plain", "biases"])
@pytest.mark.parametrize("changes", [{}, UNGATED], ids=["gated", "ungated"])
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("by_load", [False, True])
def test_the_mean_of_trained_experts(moe: dict[str, Any], changes: dict[str, Any], shards: int, by_load: bool) -> None:
    model = trained(moe, **changes)
    weights = {}
    for layer in (0, 1):
        load = [float(n) for n in counted(model, layer)] if by_load else [1.0] * 4
        weights[layer] = [load[g::shards] for g in range(shards)]
    assert not by_load or len({load for of_layer in weights.values() for shard in of_layer for load in shard}) > 4
    check_layers(model, densify(model, DensifyConfig(by_load=by_load, shards=shards), ids()), weights)


@pytest.mark.parametrize("shards", [1, 2])
def test_the_most_used_experts(shards: int) -> None:
    model = trained({"expert_bias": True})
    weights, taken = {}, set()
    for layer in (0, 1):
        load = counted(model, layer)
        assert len(set(load)) == 4
        weights[layer] = [[float(n == max(load[g::shards])) for n in load[g::shards]] for g in range(shards)]
        taken |= {load.index(max(load[g::shards])) for g in range(shards)}
    assert taken - {0}  # not by chance the first of all
    check_layers(model, densify(model, DensifyConfig("most_used", shards=shards), ids()), weights)


def test_by_load_worked_by_hand() -> None:
    """All of 120 tokens go to experts 2 and 3: the others, which here hold NaN, have no part in the mean."""
    options = {"gate_bias": True, "normalize": "chosen"}
    model = trained({"router": RouterConfig("topk", options), "hidden": 1}, dim=4, num_heads=2, num_layers=1, **UNGATED)
    layer = model.moe_layers()[0]
    with torch.no_grad():
        layer.router.gate.weight.zero_()  # type: ignore[union-attr]
        layer.router.gate.bias.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))  # type: ignore[union-attr]
        layer.experts.w_out.copy_(torch.tensor([torch.nan, torch.nan, 2.0, 6.0])[:, None, None].expand(4, 1, 4))  # type: ignore[union-attr, operator]
        layer.experts.w_in.copy_(torch.tensor([torch.nan, torch.nan, 1.0, 2.0])[:, None, None].expand(4, 4, 1))  # type: ignore[union-attr, operator]
    assert counted(model, 0) == [0, 0, 120, 120]
    made = densify(model, DensifyConfig(by_load=True), ids())
    assert made.state_dict()["blocks.0.ffn.w_out.weight"].tolist() == [[4.0]] * 4
    assert made.state_dict()["blocks.0.ffn.w_in.weight"].tolist() == [[1.5] * 4]
    used = densify(model, DensifyConfig("most_used"), ids())  # both as often: the first of them
    assert used.state_dict()["blocks.0.ffn.w_out.weight"].tolist() == [[2.0]] * 4


def test_outputs_are_multiplied_by_what_the_weights_add_up_to() -> None:
    """Order A, with a gate that is far from uniform: on the text the very mean, without one that of random vectors."""
    model = with_equal_experts(trained({"router": ORDER_A}))
    seen, unseen = densify(model, None, ids()), densify(model)
    for layer, plan in model(ids()).plans.items():
        assert isinstance(plan, RoutingPlan)
        total = sum(plan.weight_N.tolist()) / 120
        w_out = model.state_dict()[f"blocks.{layer}.ffn.experts.w_out"][0].T
        name = f"blocks.{layer}.ffn.w_out.weight"
        torch.testing.assert_close(seen.state_dict()[name], w_out * total)
        assert 0.5 < total < 0.95
        factor = float((unseen.state_dict()[name] / w_out).mean())
        assert factor != pytest.approx(total, rel=1e-4)
        assert factor == pytest.approx(total, rel=0.3)


@pytest.mark.parametrize("moe", [{"shared": 1}, {"shared": 2, "expert_bias": True}], ids=str)
@pytest.mark.parametrize("with_text", [False, True])
def test_shared_experts_lie_beside_the_others(moe: dict[str, Any], with_text: bool) -> None:
    model = with_equal_experts(trained(moe))
    made = densify(model, None, ids() if with_text else None)
    assert made.config.hidden == 3 + 3 * moe["shared"]
    assert difference(model, made, ids()).same
    for layer in (0, 1):
        shared = model.state_dict()[f"blocks.{layer}.ffn.shared.mlp.w_out.weight"]
        assert torch.equal(made.state_dict()[f"blocks.{layer}.ffn.w_out.weight"][:, 3:], shared)


def test_dense_layers_between_get_biases_of_zero() -> None:
    model = with_equal_experts(trained({"expert_bias": True, "layers": (1,)}))
    assert not model.config.mlp_bias
    made = densify(model)
    assert made.config.mlp_bias
    assert made.config.hidden == (24, 3)
    state = made.state_dict()
    assert not state["blocks.0.ffn.w_in.bias"].any()
    assert not state["blocks.0.ffn.w_out.bias"].any()
    assert state["blocks.1.ffn.w_out.bias"].any()
    assert difference(model, made, ids()).same


# ---- what was upcycled comes back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("E", [3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", ["plain", "biases", "widths"])
@pytest.mark.parametrize("config", [DensifyConfig(), DensifyConfig(by_load=True), DensifyConfig("most_used")], ids=str)
def test_copies_come_back_bit_for_bit(E: int, dtype: torch.dtype, shape: str, config: DensifyConfig) -> None:
    first = dense(shape, dtype)
    back = densify(upcycle(first, UpcycleConfig(experts=E)), config, ids() if config.needs_text else None)
    assert back.config == first.config
    state = back.state_dict()
    assert state.keys() == first.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize(("experts", "k", "shards"), [(8, 2, 2), (12, 8, 4), (6, 3, 3)])
def test_granular_copies_come_back(shape: str, with_text: bool, experts: int, k: int, shards: int) -> None:
    first = dense(shape)
    made = upcycle(first, UpcycleConfig(method="granular", experts=experts, k=k, shards=shards))
    back = densify(made, DensifyConfig(shards=shards), ids() if with_text else None)
    assert back.config == first.config
    state, exact = back.state_dict(), shards != 3  # times 3 and divided by 3 rounds
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=0 if exact else 1e-6, atol=0)


@pytest.mark.parametrize(("shape", "shared"), [("plain", 0), ("plain", 8), ("biases", 0), ("depth", 0), ("depth", 8)])
@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("split_by", ["order", "random"])
def test_split_units_come_back(shape: str, shared: int, with_text: bool, split_by: Any) -> None:
    first = dense(shape)
    config = UpcycleConfig(method="split", experts=4, k=2, shared=shared, split_by=split_by, router_std=0.0)
    back = densify(upcycle(first, config), DensifyConfig(shards=4), ids() if with_text else None)
    assert back.config == first.config
    assert difference(first, back, ids()).same
    for layer in (0, 1):
        name = f"blocks.{layer}.ffn.w_in.weight"
        new, old = back.state_dict()[name], first.state_dict()[name]
        if split_by == "order":  # the first units are the shared expert's, and now lie behind the others
            halves = [torch.cat([half[shared:], half[:shared]]) for half in old.chunk(2)]
            assert torch.equal(new, torch.cat(halves))
        else:
            assert not torch.equal(new, old)
            assert sorted(new.tolist()) == sorted(old.tolist())


def test_blocks_that_skip_tokens_count_those_they_run_on() -> None:
    """Half of the tokens pass block 1 by; the weights of the others still add up to 1."""
    first = dense("depth")
    made = upcycle(first, UpcycleConfig(experts=4))
    plan = made(ids()).plans[1]
    assert isinstance(plan, RoutingPlan)
    assert plan.valid_T is not None
    assert 0 < int(plan.valid_T.sum()) < 120
    assert difference(first, densify(made, None, ids()), ids()).max_abs == 0


def test_models_routed_by_task_get_task_0() -> None:
    model = with_equal_experts(trained({"router": RouterConfig("task")}))
    assert difference(model, densify(model, DensifyConfig(by_load=True), ids()), ids()).same


def test_the_mean_of_equal_numbers_is_that_number() -> None:
    """Whatever the weights and the dtype; and of 1, 2 and 6 weighed 1, 2 and 1 it is 2.75."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        one = Neurons(torch.randn(2, 50, 8, generator=generator).to(dtype), torch.zeros(50, 8, dtype=dtype))
        for weights in ([1.0] * 3, [1.0] * 7, [3.0, 0.0, 11.0], [0.1, 0.2, 0.7]):
            assert torch.equal(mean((one, weight) for weight in weights).w_in_PHD, one.w_in_PHD)
    three = [Neurons(torch.full((1, 1, 1), v), torch.full((1, 1), -v)) for v in (1.0, 2.0, 6.0)]
    made = mean(zip(three, (1.0, 2.0, 1.0), strict=True))
    assert (made.w_in_PHD.item(), made.w_out_HD.item()) == (2.75, -2.75)


# ---- purity and refusals -----------------------------------------------------------------------------------------------


def test_the_sparse_model_is_left_alone_and_nothing_is_shared() -> None:
    model = trained({"shared": 1, "layers": (1,)}).train()
    model.tokenizer, model.companions, model.source = object(), {"chat_template.jinja": b"x"}, {"family": "mixtral"}
    model.compute_dtype = torch.bfloat16
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for config in (DensifyConfig(), DensifyConfig("most_used"), DensifyConfig(by_load=True, shards=4)):
        made = densify(model, config, ids())
        assert model.training
        assert not made.training
        assert (made.tokenizer, made.companions) == (model.tokenizer, model.companions)
        assert (made.compute_dtype, made.source) == (torch.bfloat16, None)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("moe", "config", "words"),
    [
        ({}, {"method": "most_used"}, "seen on text; give some"),
        ({}, {"by_load": True}, "seen on text; give some"),
        ({}, {"shards": 3}, "shards=3 does not divide the 4 experts of layer 0"),
        ({}, {"shards": 0}, "shards must be at least 1, not 0"),
        ({"zero": 1}, {}, "Layer 0 has zero-computation experts"),
        ({"shared": 1, "shared_gate": True}, {}, "Layer 0 has a gated shared expert"),
        ({"router": RouterConfig("soft_moe", allow_leak=True)}, {}, "mixtures of tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(moe: dict[str, Any], config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        densify(trained(moe), DensifyConfig(**config))


def test_dense_models_and_mixtures_seen_on_text_are_refused() -> None:
    with pytest.raises(ConfigError, match="dense already"):
        densify(dense())
    with pytest.raises(ConfigError, match="Layer 0 mixes tokens before its experts"):
        densify(trained({"router": RouterConfig("soft_moe", allow_leak=True)}), None, ids())
