"""The layer's own promises: what it refuses, what it leaves alone, determinism, and properties of whole forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.experts import MoE, StackedExperts
from moesaic.plan import CapacityRule, RoutingPlan, replay
from moesaic.routing import TokenContext, TopK, balance_loss


def test_any_leading_dimensions() -> None:
    layer = MoE(8, 4, 4, 2, shared=1)
    x = torch.randn(2, 3, 5, 8)
    y, plan = layer(x)
    assert y.shape == x.shape
    assert plan.num_tokens == 30
    flat, _ = layer(x.reshape(30, 8))
    assert torch.equal(y.reshape(30, 8), flat)
    single, _ = layer(x[0, 0, 0])
    torch.testing.assert_close(single, y[0, 0, 0])
    turned, _ = layer(x.transpose(0, 2))  # not contiguous
    torch.testing.assert_close(turned.transpose(0, 2), y)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"dim": 0}, "positive widths"),
        ({"hidden": -4}, "positive widths"),
        ({"zero": -1}, "no negative counts"),
        ({"shared_gate": True}, "shared_gate=True needs at least one shared expert"),
        ({"activation": "swish"}, "not 'swish'"),
        ({"backend": "grouped"}, 'Did you mean "grouped_mm"?'),
        ({"k": 9}, "k=9 experts per token are impossible with num_experts=4"),
        ({"router": TopK(8, 5, 2)}, "router serves 5 experts, but the layer has 4"),
        ({"router": "nonsense"}, 'no router "nonsense"'),
    ],
)
def test_impossible_layers_are_refused(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        MoE(**({"dim": 8, "hidden": 4, "experts": 4} | kwargs))
    assert words in str(error.value)


def test_the_router_sees_special_experts_too() -> None:
    layer = MoE(8, 4, 3, 6, zero=1, copy=1, constant=1)
    assert layer.router.num_experts == 6
    _, plan = layer(torch.randn(5, 8))
    assert plan.counts_E.tolist() == [5] * 6


@pytest.mark.parametrize("kinds", [{}, {"zero": 1}, {"copy": 1}, {"constant": 1}, {"copy": 1, "constant": 1}])
def test_rows_past_the_last_group_give_zeros(kinds: dict[str, int]) -> None:
    layer = MoE(8, 4, 2, 1, router_options={"normalize": "none"}, **kinds)
    counts_E = torch.ones(layer.router.num_experts, dtype=torch.int64)
    y_ND = layer.experts(torch.randn(9, 8), counts_E)
    assert not y_ND[int(counts_E.sum()) :].any()
    assert y_ND[0].any()


def test_forward_stores_nothing() -> None:
    layer = MoE(8, 4, 4, 2, shared=1, constant=1)
    before = {name: dict(vars(module)) for name, module in layer.named_modules()}
    layer(torch.randn(5, 8))
    for name, module in layer.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[key] is value for key, value in before[name].items())


def test_named_views_of_one_expert_are_views() -> None:
    experts = StackedExperts(3, 8, 4)
    views = experts.expert(1)
    assert {name: tuple(view.shape) for name, view in views.items()} == {"gate": (8, 4), "up": (8, 4), "out": (4, 8)}
    x_ND = torch.randn(2, 8)
    expected = (torch.nn.functional.silu(x_ND @ views["gate"]) * (x_ND @ views["up"])) @ views["out"]
    torch.testing.assert_close(experts.compute_one(1, x_ND), expected)
    with torch.no_grad():
        views["out"].zero_()
    assert not experts.w_out[1].any()
    assert experts.w_out[0].any()
    assert {name: tuple(v.shape) for name, v in StackedExperts(3, 8, 4, gated=False).expert(0).items()} == {
        "in": (8, 4),
        "out": (4, 8),
    }
    with pytest.raises(ConfigError, match="no expert 3: this layer has experts 0 to 2"):
        experts.expert(3)


def test_initialisation_is_by_the_fan_in_of_one_expert() -> None:
    experts = StackedExperts(6, 64, 128)
    for weight, fan_in in ((experts.w_in, 64), (experts.w_out, 128)):
        # A normal cut at two standard deviations has .8796 of its spread.
        assert float(weight.detach().std()) == pytest.approx(0.8796 * fan_in**-0.5, rel=0.02)
        assert float(weight.detach().abs().max()) <= 2 * fan_in**-0.5 + 1e-6
        assert not torch.equal(weight[0], weight[1])
    experts.reset_parameters(scale=0.1, out_scale=0.25)
    assert float(experts.w_in.detach().std()) == pytest.approx(0.8796 * (0.1 / 64) ** 0.5, rel=0.02)
    assert float(experts.w_out.detach().std()) == pytest.approx(0.8796 * (0.025 / 128) ** 0.5, rel=0.02)


# ---- determinism ---------------------------------------------------------------------------------------------------


def _bits(layer: MoE, x_TD: Tensor) -> list[Tensor]:
    layer.zero_grad(set_to_none=True)
    x_TD = x_TD.clone().requires_grad_()
    y_TD, plan = layer(x_TD, TokenContext(generator=torch.Generator().manual_seed(3)))
    (y_TD.square().sum() + balance_loss(plan, {"switch": 1.0, "z": 1.0, "importance": 1.0})[0]).backward()
    assert x_TD.grad is not None
    return [y_TD.detach(), x_TD.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize(("name", "k"), [("topk", 4), ("switch", 1), ("noisy_topk", 2)])
def test_bits_do_not_depend_on_run_or_thread_count(name: str, k: int, backend: Any) -> None:
    # Large enough for torch to split the sums over threads.
    layer, x_TD = MoE(64, 64, 8, k, name, {"init_std": 0.5}, backend=backend, shared=1), torch.randn(700, 64)
    torch.set_num_threads(1)
    one, again = _bits(layer, x_TD), _bits(layer, x_TD)
    torch.set_num_threads(2)
    two = _bits(layer, x_TD)
    assert len(one) == 2 + len(list(layer.parameters()))
    for a, b, c in zip(one, again, two, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


# ---- properties ----------------------------------------------------------------------------------------------------

layers = st.fixed_dictionaries(
    {
        "experts": st.integers(1, 6),
        "k": st.integers(1, 3),
        "zero": st.integers(0, 1),
        "copy": st.integers(0, 1),
        "shared": st.integers(0, 1),
        "gated": st.booleans(),
    }
)


def _build(config: dict[str, Any], seed: int, **kwargs: Any) -> MoE:
    torch.manual_seed(seed)
    k = min(config["k"], config["experts"])
    options = {"init_std": 0.7, "normalize": "none"}
    return MoE(8, 4, router_options=options, **(config | {"k": k}), **kwargs).double()


@settings(max_examples=25)
@given(config=layers, T=st.integers(0, 12), seed=st.integers(0, 999))
def test_permuting_tokens_permutes_outputs_and_plan(config: dict[str, Any], T: int, seed: int) -> None:
    layer = _build(config, seed)
    x_TD, order_T = torch.randn(T, 8, dtype=torch.float64), torch.randperm(T)
    y_TD, plan = layer(x_TD)
    y_permuted_TD, permuted = layer(x_TD[order_T])
    torch.testing.assert_close(y_permuted_TD, y_TD[order_T], atol=1e-12, rtol=0)
    assert torch.equal(permuted.expert_TK, plan.expert_TK[order_T])
    torch.testing.assert_close(permuted.weight_TK, plan.weight_TK[order_T], atol=1e-12, rtol=0)


@settings(max_examples=25)
@given(config=layers, sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 999))
def test_batches_may_be_split_anywhere(config: dict[str, Any], sizes: list[int], seed: int) -> None:
    layer = _build(config, seed)
    x_TD = torch.randn(sum(sizes), 8, dtype=torch.float64)
    apart = [layer(part_TD) for part_TD in x_TD.split(sizes)]
    y_TD, plan = layer(x_TD)
    torch.testing.assert_close(torch.cat([y for y, _ in apart]), y_TD, atol=1e-12, rtol=0)
    assert torch.equal(torch.cat([p.expert_N for _, p in apart]), plan.expert_N)
    assert torch.equal(sum(p.counts_E for _, p in apart), plan.counts_E)


@settings(max_examples=25)
@given(
    config=layers,
    T=st.integers(0, 12),
    seed=st.integers(0, 999),
    factor=st.floats(0.1, 3.0),
    overflow=st.sampled_from(["residual", "next_best", "reroute_to_free"]),
)
def test_replay_reproduces_the_output(config: dict[str, Any], T: int, seed: int, factor: float, overflow: Any) -> None:
    layer = _build(config, seed, capacity=CapacityRule(factor, minimum=0, overflow=overflow))
    x_TD = torch.randn(T, 8, dtype=torch.float64)
    y_TD, plan = layer(x_TD)
    slots = layer.capacity.slots(T, plan.per_token, plan.num_experts)  # type: ignore[union-attr, arg-type]
    assert T == 0 or int(plan.counts_E.max()) <= slots  # type: ignore[operator]
    assert int(plan.kept_N.sum() + plan.dropped) == T * plan.per_token  # type: ignore[operator]
    recorded = plan.detach()
    layer.capacity = None
    for weigh in (None, layer.router.weigh):

        def again(live: RoutingPlan, weigh: Any = weigh) -> RoutingPlan:
            return replay(live, recorded, weigh)

        layer.edits = (again,)
        replayed_TD, replayed = layer(x_TD)
        torch.testing.assert_close(replayed_TD, y_TD, atol=1e-12, rtol=0)
        assert torch.equal(replayed.expert_N, plan.expert_N)
