"""Multi-head layers: equal to dumb loops over sub-tokens in output and all gradients, and to ``MoE`` with one head."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.cost.count import count_parameters
from moesaic.data.packing import Batch
from moesaic.errors import ConfigError
from moesaic.experts import MoE, MultiHeadMoE
from moesaic.experts.multi_head import sub_tokens
from moesaic.lens import edit, trace
from moesaic.models.build import build_model
from moesaic.models.config import MoEConfig, RouterConfig
from moesaic.models.twin import dense_twin
from moesaic.plan import CapacityRule, RoutingPlan, SoftPlan
from moesaic.routing import Router, TokenContext, TopK
from moesaic.train.recompute import recompute_activations
from moesaic.train.step import train_step
from tests.experts.dumb import gradients, reference_layer
from tests.models.tiny import lively, some_ids, sparse, tiny


def _layer(heads: int, router: str = "topk", options: dict[str, Any] | None = None, **settings: Any) -> MultiHeadMoE:
    torch.manual_seed(0)
    layer = MultiHeadMoE(8, 5, 4, 2, router, {"init_std": 0.7, **(options or {})}, heads=heads, **settings).double()
    layer.reset_parameters()
    return layer


def _dumb(layer: MultiHeadMoE, x_TD: Tensor, ctx: TokenContext) -> tuple[Tensor, RoutingPlan | SoftPlan]:
    """Head by head: cut ``W_mh x``, run every sub-token through the loops of the sparse layer, put them together, merge."""
    width = 8 // layer.heads
    sub_tokens_SR = []
    for x_D in x_TD:
        u_D = layer.split.weight @ x_D
        sub_tokens_SR += [u_D[j * width : (j + 1) * width] for j in range(layer.heads)]
    valid_S = (
        None if ctx.valid_T is None else torch.tensor([v for v in ctx.valid_T.tolist() for _ in range(layer.heads)])
    )
    y_SR, plan = reference_layer(layer, torch.stack(sub_tokens_SR), TokenContext(valid_T=valid_S))
    rows = [torch.cat([y_SR[t * layer.heads + j] for j in range(layer.heads)]) for t in range(len(x_TD))]
    return torch.stack([layer.merge.weight @ y_D for y_D in rows]), plan


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("settings", [{}, {"shared": 1, "shared_gate": True, "zero": 1, "copy": 1, "constant": 1}])
@pytest.mark.parametrize("padding", [False, True])
def test_truth(heads: int, settings: dict[str, Any], padding: bool) -> None:
    layer = _layer(heads, **settings)
    x_TD, upstream_TD = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    ctx, clean_TD = TokenContext(), x_TD
    if padding:
        ctx = TokenContext(valid_T=torch.tensor([True, True, False, True, False, True]))
        x_TD[[2, 4]] = float("nan")
        clean_TD = x_TD.nan_to_num(0.0)
    losses = {"switch": 0.3, "z": 0.1}
    got = gradients(layer, layer, x_TD, ctx, losses, upstream_TD)
    want = gradients(layer, lambda x, c: _dumb(layer, x, c), clean_TD, ctx, losses, upstream_TD)
    assert {name for name, _ in layer.named_parameters()} <= set(got)
    for name, ours in got.items():
        assert ours.isfinite().all(), name
        theirs = want.get(name, torch.zeros_like(ours))
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_one_head_between_identities_is_the_plain_layer() -> None:
    many = _layer(1, shared=1, capacity=CapacityRule(1.0, minimum=0))
    plain = MoE(8, 5, 4, 2, shared=1, capacity=CapacityRule(1.0, minimum=0)).double()
    plain.load_state_dict({k: v for k, v in many.state_dict().items() if k not in ("split.weight", "merge.weight")})
    with torch.no_grad():
        many.split.weight.copy_(torch.eye(8))
        many.merge.weight.copy_(torch.eye(8))
    x_BSD = torch.randn(2, 9, 8, dtype=torch.float64)
    (y, plan), (expected, plain_plan) = many(x_BSD), plain(x_BSD)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    assert torch.equal(plan.expert_N, plain_plan.expert_N)


def test_sub_tokens_of_a_token_stand_together() -> None:
    layer = _layer(4)
    x_BSD = torch.randn(2, 3, 8, dtype=torch.float64)
    y_BSD, plan = layer(x_BSD)
    assert y_BSD.shape == x_BSD.shape
    assert (plan.num_tokens, plan.num_rows) == (2 * 3 * 4, 2 * 3 * 4 * 2)
    changed = x_BSD.clone()
    changed[1, 0] += 1.0  # the fourth token
    moved_S = (layer(changed)[1].weight_TK != plan.weight_TK).any(dim=1)
    assert moved_S.nonzero().flatten().tolist() == [12, 13, 14, 15]


def test_context_of_sub_tokens() -> None:
    """Two sequences of two tokens, a new document at the last one; three heads."""
    ctx = TokenContext(
        ids_T=torch.tensor([5, 6, 7, 8]),
        position_T=torch.tensor([4, 5, 9, 0]),
        valid_T=torch.tensor([True, False, True, True]),
        allowed_TE=torch.eye(4, dtype=torch.bool),
        mixture_TE=torch.eye(4),
        metadata={"age": torch.tensor([1, 2, 3, 4])},
        num_sequences=2,
    )
    sub = sub_tokens(ctx, 3)
    assert sub.position_T.tolist() == [12, 13, 14, 15, 16, 17, 27, 28, 29, 0, 1, 2]
    assert sub.ids_T.tolist() == [5] * 3 + [6] * 3 + [7] * 3 + [8] * 3
    assert sub.valid_T.tolist() == [True] * 3 + [False] * 3 + [True] * 6
    assert torch.equal(sub.allowed_TE[3:6], ctx.allowed_TE[1].expand(3, 4))
    assert sub.metadata["age"].tolist() == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert sub.num_sequences == 2
    assert sub_tokens(ctx, 1) is ctx
    for f in fields(ctx):  # whatever else has an entry per token is repeated as well
        value = getattr(sub, f.name)
        if isinstance(value, Tensor):
            assert len(value) == 12, f.name


def test_start_and_scale() -> None:
    """The projections start at fan-in scale; what makes the residual stream's share small goes to the last matrix."""
    layer = MultiHeadMoE(256, 64, 4, heads=4)
    layer.reset_parameters(scale=0.5, out_scale=0.25)
    # Cut at two standard deviations, a normal keeps 0.880 of its own.
    assert layer.split.weight.std().item() == pytest.approx(0.880 * (0.5 / 256) ** 0.5, rel=0.02)
    assert layer.merge.weight.std().item() == pytest.approx(0.880 * (0.125 / 256) ** 0.5, rel=0.02)
    assert layer.experts.w_out.std().item() == pytest.approx(0.880 * (0.5 / 64) ** 0.5, rel=0.02)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="heads=3 must divide the width dim=8"):
        MultiHeadMoE(8, 4, 4, heads=3)
    with pytest.raises(ConfigError, match="built for dim=8, but its input is 4 wide"):
        _layer(2)(torch.randn(3, 4, dtype=torch.float64))
    for heads in (0, 3):
        with pytest.raises(ConfigError, match=r"model\.moe\.heads"):
            tiny(MoEConfig(num_experts=4, hidden=12, heads=heads))


# ---- in a model ----------------------------------------------------------------------------------------------------


def test_active_parameters_are_those_of_equal_compute() -> None:
    """D = 16, h = 4, H = 12, k = 2, gated: experts 2 * 3 * 16 * 12 = 1152 as in the plain layer; router 4 * (4 * 4) = 64;
    projections 2 * 256 = 512."""
    model = build_model(sparse(heads=4))
    layer = model.moe_layers()[0]
    assert layer.active_parameters() == 1152 + 64 + 512
    plain = build_model(sparse()).moe_layers()[0]
    assert plain.active_parameters() == 1152 + 64
    counts = count_parameters(model)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.parts["head projections"] == 2 * 512
    # Experts of 3 * 4 * 12 in two layers of four.
    assert counts.parts["experts"] == 2 * 4 * 144
    # One hidden unit of a gated dense layer has 3 * 16 weights.
    assert dense_twin(sparse(heads=4)).hidden == (36, 36)


@pytest.mark.parametrize("router", ["topk", "conv", "attention", "recurrent"])
def test_generation_with_a_cache_sees_what_reading_at_once_sees(router: str) -> None:
    """Routers that look back remember sub-tokens; left padding and all."""
    config = sparse(router, options={} if router != "attention" else {"head_dim": 4}, heads=2)
    model = lively(config).double()
    ids_BS = some_ids(2, 9)
    valid_BS = torch.ones(2, 9, dtype=torch.bool)
    valid_BS[1, :2] = False
    whole = model(ids_BS, valid_BS=valid_BS).logits
    cache = model.new_cache(2, 16)
    parts = [model(ids_BS[:, :4], valid_BS=valid_BS[:, :4], cache=cache).logits]
    parts += [model(ids_BS[:, t : t + 1], valid_BS=valid_BS[:, t : t + 1], cache=cache).logits for t in range(4, 9)]
    torch.testing.assert_close(torch.cat(parts, dim=1)[valid_BS], whole[valid_BS], atol=1e-9, rtol=0)


@pytest.mark.parametrize("router", ["topk", "conv", "recurrent"])
def test_packed_documents_stay_apart(router: str) -> None:
    model = lively(sparse(router, heads=4)).double()
    ids_BS = some_ids(1, 10)
    document_BS = torch.tensor([[0] * 4 + [1] * 6])
    together = model(ids_BS, document_BS=document_BS).logits
    torch.testing.assert_close(together[:, 4:], model(ids_BS[:, 4:]).logits, atol=1e-9, rtol=0)


def test_trace_knockout_and_replay() -> None:
    model = lively(sparse(heads=2))
    ids_BS = some_ids(2, 5)
    with trace(model) as recorded:
        before = model(ids_BS)
    assert {layer: plan.num_tokens for layer, plan in recorded.plans[0].items()} == {0: 20, 1: 20}
    with edit(model, layer=1, knockout=[2], reroute=True):
        out = model(ids_BS)
    assert not (out.plans[1].expert_N == 2).any()
    assert (before.plans[1].expert_N == 2).any()
    with edit(model, replay=recorded.plans[0]):
        torch.testing.assert_close(model(ids_BS).logits, before.logits)


def test_recompute_gives_the_same_gradients() -> None:
    ids_BS, grads = some_ids(2, 7), []
    for recompute in (False, True):
        model = lively(sparse(heads=2, shared=1)).double().train()
        if recompute:
            recompute_activations(model)
        model(ids_BS).logits.square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-12, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_own_losses_see_one_loss_per_sub_token() -> None:
    """A router whose own loss reads the text's loss per token of its plan is given one per sub-token."""
    config = sparse(RouterConfig("reinforce", {}), heads=2)
    model = build_model(config, seed=0)
    ids_BS = some_ids(2, 6)
    batch = Batch(
        ids_BS, ids_BS, torch.ones_like(ids_BS, dtype=torch.bool), torch.zeros_like(ids_BS), torch.zeros_like(ids_BS)
    )
    reading, plans = train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), [batch], lr=0.1, clip=1.0, step=0)
    assert plans[0].num_tokens == 24
    assert reading.losses
    assert reading.layers[0].tokens == 24


def test_a_ready_router_serves_sub_tokens() -> None:
    router: Router = TopK(4, 3, 2)
    layer = MultiHeadMoE(8, 6, 3, router=router, heads=2)
    assert layer.router is router
    y_TD, plan = layer(torch.randn(5, 8))
    assert y_TD.shape == (5, 8)
    assert plan.num_tokens == 10
