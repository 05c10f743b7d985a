"""A sparse layer whose batch is in parts: outputs, plans, statistics and gradients are those of the whole, in fp64.

The layers are whole copies (no expert parallelism): this is about decisions and losses that look at all tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.experts import MoE
from moesaic.layout import Layout, ParallelConfig
from moesaic.parallel.world import World
from moesaic.plan import AdaptiveFactor, CapacityRule, RoutingPlan
from moesaic.plan.peers import ALONE, Peers
from moesaic.routing import LossContext, Outcome, Rule, RuleSet, TokenContext, balance_loss
from moesaic.routing.balance import PrototypeMemory
from tests.distributed import run_distributed
from tests.peers import cut, with_peers

B, S, D, E = 6, 4, 8, 6
LOSSES = {"switch": 1.0, "z": 0.1, "semantic": 0.3, "prototype": 0.5}
OPTIONS: dict[str, Any] = {"prototype": {"detach": False, "most": 3, "ema": 0.9}}
CAPACITY = CapacityRule(factor=0.7, minimum=0, groups=6, adapt=AdaptiveFactor(lo=0.1), renormalize=True)
ROWS = [(3, 3), (2, 4), (6, 0), (2, 2, 2), (0, 5, 1)]


def _layer() -> MoE:
    torch.manual_seed(0)
    rules = RuleSet((Rule(when={"token": (3, 4)}, allow=(0, 5, 2)),))
    layer = MoE(
        D,
        4,
        E,
        2,
        "topk",
        {"init_std": 0.7},
        capacity=CAPACITY,
        rules=rules,
        expert_masking=0.2,
        gating_dropout=0.99,
        gating_groups=2,
    ).double()
    layer.reset_parameters()
    layer.evidence = frozenset({"input_TD", "free_logits_TE"})
    layer.memory = PrototypeMemory(E, D, space="input", most=3, ema=0.9).double()
    layer.memory.mean_EV.normal_()
    layer.memory.known_E[::2] = True
    return layer.train()


def _batch(padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors (B, S, D), ids and validity (B, S)."""
    rng = torch.Generator().manual_seed(1)
    x_BSD = torch.randn(B, S, D, generator=rng, dtype=torch.float64) + 1.0
    ids_BS = torch.randint(6, (B, S), generator=rng)
    valid_BS = torch.ones(B, S, dtype=torch.bool)
    if padded:
        valid_BS[5, 2:] = False
    return x_BSD, ids_BS, valid_BS


def _run(layer: MoE, padded: bool, rows: slice, seed: int, peers: Peers) -> tuple[Tensor, RoutingPlan, Tensor]:
    """Output, plan and loss of some rows of the batch."""
    x_BSD, ids_BS, valid_BS = (t[rows] for t in _batch(padded))
    layer.peers = peers
    ctx = TokenContext(
        ids_T=ids_BS.flatten(),
        num_sequences=len(x_BSD),
        valid_T=None if bool(valid_BS.all()) else valid_BS.flatten(),
        generator=torch.Generator().manual_seed(seed),
    )
    y_BSD, plan = layer(x_BSD, ctx)
    assert isinstance(plan, RoutingPlan)
    loss, _ = balance_loss(plan, LOSSES, LossContext(len(x_BSD), peers=peers, step=900), OPTIONS)
    own = layer.router.own_losses(plan, Outcome(x_BSD.flatten(0, 1)[:, 0], peers=peers))
    upstream_BSD = torch.arange(B * S * D, dtype=torch.float64).cos().view(B, S, D)[rows]
    return y_BSD, plan, peers.total((y_BSD * upstream_BSD).sum()) + loss + sum(own.values())


def _gradients(layer: MoE, loss: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad(loss, list(layer.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(layer.parameters(), grads, strict=True)]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_a_layer_on_parts_is_the_layer_on_the_whole(padded: bool) -> None:
    layer = _layer()
    y_BSD, plan, loss = _run(layer, padded, slice(None), 0, ALONE)
    wanted, statistics = _gradients(layer, loss), layer.statistics(plan)
    assert plan.dropped > 0
    assert plan.allowed_TE is not None
    assert not plan.allowed_TE.all()
    for rows in ROWS:

        def work(peers: Peers) -> Any:
            mine, first = copy.deepcopy(layer), sum(rows[: peers.index])  # noqa: B023
            place = slice(first, first + rows[peers.index])  # noqa: B023
            y_BSD, plan, loss = _run(mine, padded, place, 50 * peers.index, peers)  # others' draws must not matter
            return y_BSD.detach(), plan.detach(), loss.detach(), _gradients(mine, loss), mine.statistics(plan)

        answers = with_peers(len(rows), work)
        torch.testing.assert_close(torch.cat([a[0] for a in answers]), y_BSD, rtol=1e-12, atol=1e-13)
        for answer, want in zip(answers, cut(plan.detach(), [n * S for n in rows]), strict=True):
            assert torch.equal(answer[1].expert_N, want.expert_N)
            torch.testing.assert_close(answer[2], loss.detach(), rtol=1e-12, atol=1e-13)
        for grads, want in zip(zip(*(a[3] for a in answers), strict=True), wanted, strict=True):
            torch.testing.assert_close(sum(grads), want, rtol=1e-12, atol=1e-13)
        for name, value in statistics.items():
            torch.testing.assert_close(sum(a[4][name] for a in answers), value, rtol=1e-12, atol=1e-13)


def _ask_processes(rank: int) -> dict[str, Tensor]:
    world, layer, answers = World(Layout.of(ParallelConfig(), 2), rank), _layer(), {}
    for padded, rows in ((False, (slice(0, 3), slice(3, 6))), (True, (slice(0, 0), slice(0, 6)))):
        _, plan, loss = _run(layer, padded, rows[rank], 50 * rank, world.peers)
        answers[f"{padded} loss"], answers[f"{padded} expert_N"] = loss.detach(), plan.expert_N
        for i, grad in enumerate(_gradients(layer, loss)):
            dist.all_reduce(grad)
            answers[f"{padded} {i}"] = grad
    return answers


def test_two_processes_equal_one() -> None:
    """Also where one of them has no token at all."""
    layer, answers = _layer(), run_distributed(2, _ask_processes)
    for padded in (False, True):
        _, plan, loss = _run(layer, padded, slice(None), 0, ALONE)
        assert torch.equal(torch.cat([a[f"{padded} expert_N"] for a in answers]), plan.expert_N)
        for answer in answers:
            torch.testing.assert_close(answer[f"{padded} loss"], loss.detach(), rtol=1e-12, atol=1e-13)
        for i, want in enumerate(_gradients(layer, loss)):
            torch.testing.assert_close(answers[0][f"{padded} {i}"], want, rtol=1e-12, atol=1e-13)
