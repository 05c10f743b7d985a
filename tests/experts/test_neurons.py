"""Single-neuron experts: equal to loops with every gradient, dense and sparse; in a model, under AdamW; a million of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.cost.count import count_parameters
from moesaic.data.packing import Batch
from moesaic.errors import ConfigError
from moesaic.experts import MoE, NeuronExperts
from moesaic.models import MoEConfig, RouterConfig, build_model
from moesaic.nn.mlp import ACTIVATIONS
from moesaic.ops.permute import group_rows
from moesaic.plan.plan import count_experts
from moesaic.train.optim import OptimConfig, make_optimizer
from moesaic.train.step import train_step
from tests.experts.dumb import assert_truth
from tests.models.tiny import some_ids, sparse, tiny


def neurons(experts: int = 6, dim: int = 4, **options: Any) -> NeuronExperts:
    return NeuronExperts(experts, dim, "silu", **options).double()


def loops(experts: NeuronExperts, x_ND: Tensor, counts_E: Tensor) -> Tensor:
    """Row by row from the definition."""
    act, rows = ACTIVATIONS[experts.activation], []
    for expert, count in enumerate(counts_E.tolist()):
        for _ in range(count):
            x_D = x_ND[len(rows)]
            rows.append(act(sum(x_D[d] * experts.w_in[expert, d] for d in range(experts.dim))) * experts.w_out[expert])
    rows += [torch.zeros_like(x_ND[0])] * (len(x_ND) - len(rows))
    return torch.stack(rows) if rows else x_ND.clone()


def test_by_hand() -> None:
    experts = NeuronExperts(2, 2, "relu")
    with torch.no_grad():
        experts.w_in.copy_(torch.tensor([[1.0, 2.0], [-1.0, 1.0]]))
        experts.w_out.copy_(torch.tensor([[10.0, 0.0], [1.0, 3.0]]))
    x_ND = torch.tensor([[1.0, 1.0], [2.0, 5.0], [5.0, 2.0], [9.0, 9.0]])
    # Expert 0: 1 + 2 = 3. Expert 1: -2 + 5 = 3, -5 + 2 = -3 -> 0. The last row belongs to nobody.
    y_ND = experts(x_ND, torch.tensor([1, 2]))
    assert y_ND.tolist() == [[30, 0], [3, 9], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    "counts", [[2, 0, 3, 1, 0, 4], [0, 0, 0, 0, 0, 10], [10, 0, 0, 0, 0, 0], [1, 0, 2, 0, 0, 0], [0] * 6]
)
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_equals_loops_with_all_gradients(counts: list[int], sparse_grad: bool) -> None:
    experts, counts_E = neurons(sparse_grad=sparse_grad), torch.tensor(counts)
    x_ND = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    upstream_ND = torch.randn(10, 4, dtype=torch.float64)
    inputs = [x_ND, experts.w_in, experts.w_out]
    y_ND, want_ND = experts(x_ND, counts_E), loops(experts, x_ND, counts_E)
    torch.testing.assert_close(y_ND, want_ND)
    got = torch.autograd.grad((y_ND * upstream_ND).sum(), inputs)
    want = torch.autograd.grad((want_ND * upstream_ND).sum() + 0 * sum(tensor.sum() for tensor in inputs), inputs)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.is_sparse == (sparse_grad and ours.shape == (6, 4))
        torch.testing.assert_close(ours.to_dense(), theirs)
    if sparse_grad:
        assert got[1].coalesce().indices().tolist() == [[e for e in range(6) if counts[e]]]


def test_rows_past_the_last_group_may_hold_anything() -> None:
    experts = neurons()
    x_ND = torch.randn(5, 4, dtype=torch.float64)
    x_ND[3:] = float("nan")
    x_ND.requires_grad_()
    y_ND = experts(x_ND, torch.tensor([0, 2, 0, 0, 0, 1]))
    assert not y_ND[3:].any()
    for grad in torch.autograd.grad(y_ND.square().sum(), [x_ND, experts.w_in, experts.w_out]):
        assert grad.isfinite().all()


def test_half_precision_rows_and_single_precision_tables() -> None:
    experts = NeuronExperts(6, 64)
    x_ND, counts_E = torch.randn(12, 64).bfloat16().requires_grad_(), torch.tensor([2, 2, 2, 2, 2, 2])
    y_ND = experts(x_ND, counts_E)
    assert y_ND.dtype == torch.bfloat16
    torch.testing.assert_close(y_ND, experts(x_ND.float(), counts_E).bfloat16(), rtol=0, atol=0)
    y_ND.float().sum().backward()
    assert x_ND.grad is not None
    assert x_ND.grad.dtype == torch.bfloat16
    assert experts.w_in.grad is not None
    assert experts.w_in.grad.dtype == torch.float32


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kinds", [{}, {"shared": 2, "shared_gate": True}, {"zero": 1, "copy": 1, "constant": 2}])
def test_a_layer_of_them_equals_the_loops(activation: Any, kinds: dict[str, Any]) -> None:
    layer = MoE(8, 1, 12, 3, expert_kind="neuron", activation=activation, **kinds).double()
    if "constant" in kinds:
        nn.init.normal_(layer.get_parameter("experts.constant_v"))
    assert_truth(layer, torch.randn(7, 8, dtype=torch.float64), losses={"switch": 0.3, "z": 0.1})
    assert_truth(layer, torch.randn(4, 8, dtype=torch.float64), valid=[1, 0, 1, 1])
    assert_truth(layer, torch.randn(0, 8, dtype=torch.float64))


def test_with_product_keys_and_heads() -> None:
    router = {"heads": 2, "key_dim": 8, "init_std": 0.5}
    layer = MoE(8, 1, 25, 6, "product_keys", router, expert_kind="neuron").double()
    assert_truth(layer, torch.randn(9, 8, dtype=torch.float64))


def test_views_write_through_and_compute_one_agrees() -> None:
    experts, x_ND = neurons(), torch.randn(3, 4, dtype=torch.float64)
    view = experts.expert(4)
    assert (view["in"].shape, view["out"].shape) == ((4, 1), (1, 4))
    torch.testing.assert_close(nn.functional.silu(x_ND @ view["in"]) @ view["out"], experts.compute_one(4, x_ND))
    with torch.no_grad():
        view["out"].zero_()
    assert not experts.compute_one(4, x_ND).any()
    with pytest.raises(ConfigError, match="no expert 6"):
        experts.expert(6)


def test_initialisation_follows_fan_in() -> None:
    experts = NeuronExperts(4000, 100)
    # A normal cut at two standard deviations keeps 0.8796 of its spread: sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)).
    assert experts.w_in.std().item() == pytest.approx(0.8796 / 10, rel=0.01)
    assert experts.w_out.std().item() == pytest.approx(0.8796, rel=0.01)
    experts.reset_parameters(scale=1.0, out_scale=0.25)
    assert experts.w_out.std().item() == pytest.approx(0.8796 / 2, rel=0.01)


# ---- in a model ----------------------------------------------------------------------------------------------------


PEER = {"num_experts": 64, "k": 4, "hidden": 1, "expert_kind": "neuron"}


def test_a_model_counts_what_a_token_uses() -> None:
    router = RouterConfig("product_keys", {"heads": 2, "key_dim": 8})
    model = build_model(sparse(router, **PEER), seed=0)
    count = count_parameters(model)
    assert count.parts["experts"] == 2 * 64 * 2 * 16
    assert count.active_parts["experts"] == 2 * 4 * 2 * 16  # layers * k * two vectors of width 16


def test_training_clips_decays_and_leaves_unused_neurons_alone_otherwise() -> None:
    router = RouterConfig("product_keys", {"heads": 2, "key_dim": 8})
    model = build_model(sparse(router, **PEER), seed=0)
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.5))
    ids = some_ids(2, 9)
    none = torch.zeros(2, 8, dtype=torch.int64)
    batch = Batch(ids[:, :-1], ids[:, 1:], none == 0, none, none)
    before = model.get_parameter("blocks.0.ffn.experts.w_in").detach().clone()
    losses = []
    for step in range(30):
        reading, plans = train_step(model, optimizer, [batch], lr=1e-2, clip=0.1, step=step)
        losses.append(reading.lm_loss)
        if step == 0:
            after = model.get_parameter("blocks.0.ffn.experts.w_in").detach().clone()
            unused_E = count_experts(plans[0].expert_N, 64) == 0
            # An unused neuron has a zero gradient: AdamW's first step is decay alone, lr * weight_decay = 0.005.
            assert 0 < int(unused_E.sum()) < 64
            torch.testing.assert_close(after[unused_E], before[unused_E] * 0.995)
            assert ((after - before * 0.995)[~unused_E].abs() > 1e-3).any()
    assert losses[-1] < 0.5 * losses[0]


def test_adamw_refuses_sparse_gradients_in_words() -> None:
    model = build_model(sparse("product_keys", {"key_dim": 8}, **PEER), seed=0)
    model.blocks[1].ffn.experts.sparse_grad = True
    with pytest.raises(ConfigError, match=r"blocks\.1\.ffn\.experts gives sparse gradients"):
        make_optimizer(model, OptimConfig())


def test_sparse_adam_takes_the_first_step_of_adam_on_used_neurons() -> None:
    dense, lean = neurons(), neurons(sparse_grad=True)
    lean.load_state_dict(dense.state_dict())
    x_ND, counts_E = torch.randn(6, 4, dtype=torch.float64), torch.tensor([2, 0, 3, 0, 0, 1])
    start = dense.w_in.detach().clone()
    for experts, kind in ((dense, torch.optim.Adam), (lean, torch.optim.SparseAdam)):
        optimizer = kind(experts.parameters(), lr=0.1)
        experts(x_ND, counts_E).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(lean.w_in, dense.w_in, rtol=1e-4, atol=0)  # SparseAdam's epsilon stands elsewhere
    assert torch.equal(lean.w_in[1], start[1])
    assert not torch.equal(lean.w_in[0], start[0])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: MoE(8, 4, 16, expert_kind="neuron"), "hidden must be 1, not 4"),
        (lambda: MoE(8, 1, 16, expert_kind="neurons"), 'Did you mean "neuron"'),
        (lambda: tiny(MoEConfig(num_experts=16, hidden=4, expert_kind="neuron")), r"model.moe.hidden must be 1, not 4"),
    ],
)
def test_refusals(build: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build()


# ---- a million -----------------------------------------------------------------------------------------------------


PEAK = Path("/proc/self/clear_refs")


def peak_bytes() -> int:
    """Most memory this process has held since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not PEAK.exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("sparse_grad", [True, False], ids=["sparse", "dense"])
def test_a_million_experts_forward_and_backward(sparse_grad: bool) -> None:
    """PEER's layer, 1024^2 experts, 8 heads of 16: loops agree on the rows used, and memory follows rows, not rows * E."""
    E, D, T = 1024**2, 64, 64
    layer = MoE(D, 1, E, 128, "product_keys", {"heads": 8}, expert_kind="neuron")
    layer.experts.sparse_grad = sparse_grad
    x_TD = torch.randn(T, D)
    PEAK.write_text("5")  # the peak starts again from what is held now
    before = peak_bytes()
    y_TD, plan = layer(x_TD)
    y_TD.square().sum().backward()
    grown, table = peak_bytes() - before, E * D * 4
    # Two gradient tables if dense. Scores of all experts for all tokens would be as large as a table by themselves.
    assert grown < 0.9 * table + (0 if sparse_grad else 2 * table)
    want_TD = torch.zeros_like(y_TD)
    for t in range(3):
        for e, w in zip(plan.expert_TK[t].tolist(), plan.weight_TK[t], strict=True):
            want_TD[t] += w * layer.experts.compute_one(e, x_TD[t])
    torch.testing.assert_close(y_TD[:3], want_TD[:3])
    grad = layer.experts.w_in.grad
    assert grad.is_sparse == sparse_grad
    used = plan.expert_N.unique()
    values = grad.coalesce().values() if sparse_grad else grad[used]
    assert values.shape[0] == len(used)
    assert values.isfinite().all()
    assert group_rows(plan.expert_N, E).counts_E.sum() == T * 128
