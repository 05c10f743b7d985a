"""Tensor parallelism: two processes that slice a model compute what one does, every gradient and one step included."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.models import Decoder, ModelConfig, build_model
from moesaic.parallel import regions
from moesaic.parallel.apply import hold
from moesaic.parallel.comm import Group
from moesaic.parallel.dispatch import ExchangeDispatch
from moesaic.parallel.exchange import FlatPath
from moesaic.parallel.held import Box, Held
from moesaic.parallel.regions import SplitRowsDispatch, enter, leave, once
from moesaic.parallel.tensor import slice_dispatch, slice_model
from moesaic.parallel.watch import Watch
from moesaic.plan.placement import Placement
from moesaic.plan.plan import RoutingPlan, SoftPlan, from_topk
from moesaic.train.recompute import recompute_activations
from tests.distributed import run_distributed
from tests.models.tiny import some_ids, sparse, tiny
from tests.parallel.sliced import CASES, LATENT, compare, gradients, run, sliced_model, whole_model, world_of

# In fp64 each tensor for itself. In fp32 one process's own rounding is as large as 2e-6 in single tensors, of sums that nearly
# cancel, and AdamW's first step divides by the gradient; all tensors as one vector have less.
FP64 = dict.fromkeys(("logits", "loss", "each gradient", "gradients", "each weight", "weights"), 1e-12)
FP32 = {"logits": 1e-6, "loss": 1e-6, "gradients": 1e-6, "weights": 1e-6, "each gradient": 1e-5}


# ---- the truth -------------------------------------------------------------------------------------------------------


def all_cases(rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """All in one start of processes."""
    found = {}
    for name, (config, etp) in CASES.items():
        whole, world = whole_model(config, dtype), world_of(rank, etp)
        sliced, held = sliced_model(whole, world)
        for what, wrong in compare(whole, sliced, held, world).items():
            found[f"{name}: {what}"] = torch.tensor(wrong)
    return found


@functools.cache
def errors(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    return run_distributed(2, all_cases, dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "limits"), [(torch.float64, FP64), (torch.float32, FP32)], ids=["fp64", "fp32"])
def test_two_ranks_compute_what_one_does(name: str, dtype: torch.dtype, limits: dict[str, float]) -> None:
    for answer in errors(dtype):
        found = {what: float(answer[f"{name}: {what}"]) for what in limits}
        assert all(wrong <= limits[what] for what, wrong in found.items()), found


def broken(rank: int, what: str) -> dict[str, Tensor]:
    """The comparison with one piece of the machinery missing."""
    name = {"enter": "gated, grouped queries", "once": "plain, all biases", "share": "top k, split"}[what]
    config, etp = CASES[name]
    if what == "enter":
        regions._Enter.backward = staticmethod(lambda ctx, grad: (grad, None, None))  # type: ignore[method-assign]
    elif what == "once":
        regions._Once.forward = staticmethod(lambda ctx, x, first: x.view_as(x))  # type: ignore[method-assign]
    else:
        SplitRowsDispatch.own_part = lambda self, plan: plan  # type: ignore[method-assign]
    whole, world = whole_model(config, torch.float64), world_of(rank, etp)
    sliced, _ = sliced_model(whole, world)
    (logits, loss), (my_logits, my_loss) = run(whole), run(sliced)
    loss.backward()  # type: ignore[no-untyped-call]
    my_loss.backward()  # type: ignore[no-untyped-call]
    wanted, mine = gradients(whole), gradients(sliced)
    return {
        "logits": (logits - my_logits).abs().max() / logits.abs().max(),
        "embedding": (wanted["embedding.weight"] - mine["embedding.weight"]).abs().max()
        / wanted["embedding.weight"].abs().max(),
    }


@pytest.mark.parametrize(("what", "wrong"), [("enter", "embedding"), ("once", "logits"), ("share", "logits")])
def test_the_comparison_notices_what_is_missing(what: str, wrong: str) -> None:
    assert all(answer[wrong] > 1e-3 for answer in run_distributed(2, broken, what))


# ---- operators -------------------------------------------------------------------------------------------------------


def by_hand(rank: int) -> dict[str, Tensor]:
    tp = world_of(rank, 2)["tp"]
    x, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([10.0, 20.0], requires_grad=True)
    slope = torch.tensor([3.0, 5.0])[rank]
    y = leave(enter(x, tp, "x") * slope + once(b, tp), tp, "y")
    (y * torch.tensor([1.0, 100.0])).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert b.grad is not None
    spent = tp.watch.take()
    calls = torch.tensor([spent["x backward"].calls, spent["y"].calls, len(spent)])
    return {"y": y.detach(), "x": x.grad, "b": b.grad, "calls": calls}


def test_operators_by_hand() -> None:
    """Two slices of slopes 3 and 5 make ``y = 8 x + b``."""
    for answer in run_distributed(2, by_hand):
        assert answer["y"].tolist() == [18.0, 36.0]
        assert answer["x"].tolist() == [8.0, 800.0]
        assert answer["b"].tolist() == [1.0, 100.0]
        assert answer["calls"].tolist() == [1, 1, 2]


# ---- recomputation, generation, half precision -----------------------------------------------------------------------


def in_other_ways(rank: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in ("everything, sliced", "everything, split", "latent, sparse, sliced", "gated, biases"):
        config, etp = CASES[name]
        whole, world = whole_model(config, torch.float32), world_of(rank, etp)
        kept: list[tuple[Tensor, dict[str, Tensor], dict[str, Any]]] = []
        for recompute in (None, recompute_activations):
            model, _ = sliced_model(whole, world, recompute)
            world.watch.take()
            logits, loss = run(model)
            loss.backward()  # type: ignore[no-untyped-call]
            spent = {what: (s.calls, s.sent_bytes) for what, s in world.watch.take().items()}
            kept.append((logits, gradients(model), spent))
        (logits, grads, spent), (again, grads_again, spent_again) = kept
        same = torch.equal(logits, again) and all(torch.equal(grads[n], grads_again[n]) for n in grads)
        found[f"{name}: recomputed, same bits"] = torch.tensor(same)
        found[f"{name}: recomputed, same traffic"] = torch.tensor(spent == spent_again and len(spent) > 2)

        model.eval()
        whole.eval()
        ids = some_ids(2, 7)
        with torch.no_grad():
            cache = model.new_cache(2, 7)
            steps = [model(part, cache=cache).logits for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:6], ids[:, 6:])]
            torch.testing.assert_close(torch.cat(steps, dim=1), whole(ids).logits, rtol=1e-5, atol=1e-5)

        model.train()
        model.compute_dtype = whole.train().compute_dtype = torch.bfloat16
        (logits, loss), (_, whole_loss) = run(model), run(whole)
        loss.backward()  # type: ignore[no-untyped-call]
        assert logits.dtype == torch.bfloat16
        found[f"{name}: bf16, near"] = (loss - whole_loss).detach().abs() < 0.02 * whole_loss.detach()
        for n, grad in gradients(model).items():
            if n.startswith(("embedding", "norm")):
                found[f"{name}: bf16, {n}"] = grad
    return found


def test_recomputation_repeats_no_collective_and_caches_hold_own_heads() -> None:
    first, second = run_distributed(2, in_other_ways)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert value.dtype != torch.bool or bool(value), name


def behind_an_exchange(rank: int) -> dict[str, Tensor]:
    found = {}
    for name in ("everything, sliced", "everything, split"):
        config, etp = CASES[name]
        whole, world = whole_model(config, torch.float64), world_of(rank, etp)

        def exchange(model: Decoder, ep: Group = world["ep"]) -> None:
            for layer in model.moe_layers().values():
                placement = Placement.even(4, 1)
                path = FlatPath(ep, placement.slots_per_rank)
                layer.dispatcher = ExchangeDispatch(path, placement, 0, chunks=2)

        sliced, held = sliced_model(whole, world, exchange)
        assert all(layer.dispatcher.overlaps for layer in sliced.moe_layers().values())  # type: ignore[attr-defined]
        found |= {f"{name}: {what}": torch.tensor(e) for what, e in compare(whole, sliced, held, world).items()}
    return found


def test_shared_experts_beside_an_exchange_are_counted_once() -> None:
    """An exchange computes them while rows travel, inside the region of the experts but no part of it."""
    for answer in run_distributed(2, behind_an_exchange):
        assert all(wrong < 1e-12 for wrong in answer.values()), answer


# ---- what is held ----------------------------------------------------------------------------------------------------


def group(rank: int, size: int = 2) -> Group:
    """Enough of a group to slice by."""
    return Group("tp", range(size), rank, None, Watch(rank))


def sliced_alone(config: ModelConfig, rank: int, size: int = 2, etp: bool = True) -> tuple[Decoder, dict[str, Held]]:
    model = build_model(config, seed=0)
    held = hold(model)
    slice_model(model, group(rank, size), group(rank, size) if etp else None, held)
    return model, held


def test_boxes_by_hand() -> None:
    """Rank 1 of 2 with 4 heads and 2 key heads of width 4, 24 hidden units, experts of 12."""
    model, held = sliced_alone(sparse(dense_first=1, expert_bias=True), 1)
    assert held["blocks.0.attention.wk.weight"].boxes == (Box(((4, 8), (0, 16)), ((0, 4), (0, 16))),)
    assert held["blocks.0.attention.wo.weight"].boxes == (Box(((0, 16), (8, 16)), ((0, 16), (0, 8))),)
    gate, up = held["blocks.0.ffn.w_in.weight"].boxes
    assert (gate.logical[0], gate.local[0]) == ((12, 24), (0, 12))
    assert (up.logical[0], up.local[0]) == ((36, 48), (12, 24))
    gate, up = held["blocks.1.ffn.experts.b_in"].boxes
    assert (gate.logical, gate.local) == (((0, 4), (6, 12)), ((0, 4), (0, 6)))
    assert (up.logical, up.local) == (((0, 4), (18, 24)), ((0, 4), (6, 12)))
    assert held["blocks.1.ffn.experts.w_out"].boxes == (Box(((0, 4), (6, 12), (0, 16)), ((0, 4), (0, 6), (0, 16))),)
    cut = {name: set(record.cut) for name, record in held.items() if record.cut}
    assert cut["blocks.1.ffn.experts.w_in"] == {"etp"}
    assert cut["blocks.1.attention.wq.weight"] == {"tp"}
    whole = {"embedding.weight", "norm.weight", "blocks.1.ffn.experts.b_out", "blocks.1.norm1.weight"}
    assert not whole & set(cut)
    for name, parameter in model.named_parameters():
        assert tuple(parameter.shape) == held[name].local
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, f"{name} keeps the whole in memory"


def test_shapes_alone_can_be_sliced() -> None:
    model = build_model(sparse(shared=1), device="meta")
    held = hold(model)
    slice_model(model, group(0), group(0), held)
    assert model.get_parameter("blocks.0.ffn.experts.w_in").shape == (4, 16, 12)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_one_rank_changes_nothing() -> None:
    model, held = sliced_alone(sparse(shared=1, constant=1), 0, size=1)
    slice_dispatch(model, group(0, 1), group(0, 1))
    twin = build_model(sparse(shared=1, constant=1), seed=0)
    assert held == hold(twin)
    assert torch.equal(model(some_ids(1, 5)).logits, twin(some_ids(1, 5)).logits)


@pytest.mark.parametrize(
    ("config", "size", "etp", "words"),
    [
        (tiny(), 4, True, "parallel.tp=4 slices cannot be equal: there are 2 key/value heads"),
        (tiny(num_heads=3, num_kv_heads=3, head_dim=4), 2, True, "there are 3 attention heads"),
        (tiny(num_heads=3, num_kv_heads=None, latent=LATENT), 2, True, "there are 3 attention heads"),
        (tiny(hidden=(24, 25)), 2, True, "there are 25 hidden units of a feed-forward layer; choose a divisor of 25"),
        (sparse(shared=1, shared_hidden=7), 2, True, "there are 7 hidden units of a feed-forward layer"),
        (sparse(hidden=13), 2, True, "parallel.etp=2 slices cannot be equal: there are 13 hidden units of an expert"),
        (
            sparse(expert_kind="neuron", hidden=1),
            2,
            True,
            'expert_kind="neuron" have one hidden unit; set parallel.etp=1',
        ),
        (sparse(expert_dropout=0.4), 2, False, "expert_dropout=0.4 would drop other units than one process"),
    ],
)
def test_what_cannot_be_sliced_is_refused_and_left_alone(config: ModelConfig, size: int, etp: bool, words: str) -> None:
    model = build_model(config, seed=0)
    held = hold(model)
    with pytest.raises(ConfigError, match=words):
        slice_model(model, group(0, size), group(0, size) if etp else None, held)
    assert held == hold(build_model(config, seed=0))
    assert {name: p.shape for name, p in model.named_parameters()} == {n: record.shape for n, record in held.items()}


# ---- shares of a plan ------------------------------------------------------------------------------------------------


def test_rows_are_shared_by_token() -> None:
    """Of five tokens rank 0 of 2 takes two and rank 1 three; a dropped row stays dropped."""
    plan = from_topk(torch.tensor([[0, 1], [2, 3], [1, 3], [3, 0], [3, 2]]), torch.ones(5, 2), 3)
    shares = [SplitRowsDispatch(None, group(rank)).own_part(plan) for rank in (0, 1)]  # type: ignore[arg-type]
    assert all(isinstance(share, RoutingPlan) for share in shares)
    assert shares[0].expert_TK.tolist() == [[0, 1], [2, 3], [3, 3], [3, 3], [3, 3]]  # type: ignore[union-attr]
    assert shares[1].expert_TK.tolist() == [[3, 3], [3, 3], [1, 3], [3, 0], [3, 2]]  # type: ignore[union-attr]
    assert shares[1].weight_N.tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 0, 1]  # type: ignore[union-attr]


def test_soft_plans_are_shared_by_slot() -> None:
    """Three slots of each of two experts: rank 0 of 2 takes the first, rank 1 the others; together they are the plan."""
    torch.manual_seed(0)
    plan = SoftPlan(torch.rand(2, 4, 6), torch.rand(2, 4, 6), 2)
    x_TD, w_EDD = torch.randn(8, 5), torch.randn(2, 5, 5)
    shares = [SplitRowsDispatch(None, group(rank)).own_part(plan) for rank in (0, 1)]  # type: ignore[arg-type]
    assert [share.counts_E.tolist() for share in shares] == [[2, 2], [4, 4]]

    def through(part: Any) -> Tensor:
        slots_ENd = part.gather(x_TD).view(2, -1, 5)
        y: Tensor = part.combine((slots_ENd @ w_EDD).flatten(0, 1))
        return y

    torch.testing.assert_close(through(shares[0]) + through(shares[1]), through(plan))
