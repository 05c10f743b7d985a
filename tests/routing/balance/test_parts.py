"""Every balancing loss of a batch in parts is that of the whole: its value in each part, and the sum of the parts' gradients.

Parts are played by threads (``tests/peers.py``); one test asks real processes. Everything is fp64 and must agree to 1e-12.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.layout import Layout, ParallelConfig
from moesaic.parallel.world import World
from moesaic.plan import RoutingPlan
from moesaic.plan.peers import ALONE, Peers
from moesaic.routing import LOSSES, LossContext, TokenContext, balance_loss
from moesaic.routing.balance import PrototypeMemory
from tests.distributed import run_distributed
from tests.peers import cut, with_peers
from tests.routing.gates import identity_router

B, S, E, D = 6, 4, 5, 3
T = B * S
ROWS = [(3, 3), (2, 4), (1, 5), (6, 0), (0, 6), (2, 2, 2), (1, 0, 5), (3, 2, 1)]  # of each part; a row is a sequence

CASES: list[tuple[str, dict[str, Any]]] = [
    ("importance", {}),
    ("importance", {"of": "scores"}),
    ("load", {}),
    ("switch", {}),
    ("switch", {"normalize": "slots"}),
    ("sequence", {}),
    ("v2_expert", {}),
    ("v2_device", {"devices": 2}),
    ("v2_communication", {"devices": 3, "limit": 2}),
    ("z", {}),
    ("logit_l2", {}),
    ("entropy", {}),
    ("entropy", {"maximize": True}),
    ("entropy_local", {}),
    ("entropy_local", {"labels": [0, 3]}),
    ("entropy_global", {}),
    ("entropy_global", {"tau": 1.5}),
    ("entropy_global", {"labels": [3, 1]}),
    ("semantic", {}),
    ("prototype", {}),
    ("prototype", {"most": 2}),
    ("prototype", {"most": 2, "detach": False}),
    ("prototype", {"most": 3, "detach": False, "leave_one_out": True, "similarity": "dot"}),
    ("prototype", {"leave_one_out": True, "most": 2}),
    ("prototype", {"space": "logits", "detach": False, "ema": 0.9}),
    ("prototype", {"space": "router_proj", "ema": 0.9, "leave_one_out": True}),
]
KINDS = ["random", "skewed", "ties", "padding", "a part of padding"]
every_loss = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda x: str(x))


def test_every_loss_has_a_case() -> None:
    assert {name for name, _ in CASES} == set(LOSSES)


def _batch(kind: str, name: str, options: dict[str, Any]) -> tuple[RoutingPlan, Tensor, list[Tensor]]:
    """A plan of B rows, its labels, and the leaves that gradients are taken to."""
    rng = torch.Generator().manual_seed(len(kind))
    z_TE = 2 * torch.randn(T, E, generator=rng, dtype=torch.float64)
    z_TE[:, 4] -= 20.0  # an expert nobody chooses
    x_TD = torch.randn(T, D, generator=rng, dtype=torch.float64)
    if kind == "skewed":
        z_TE[:, 1] += 3.0
    if kind == "ties":
        z_TE, x_TD = z_TE[:3].repeat(T // 3, 1), x_TD.clone()
    valid_BS = torch.ones(B, S, dtype=torch.bool)
    if kind == "padding":
        valid_BS[5, 1:] = valid_BS[2, :2] = False
    if kind == "a part of padding":
        valid_BS[:3] = False
    leaves = [z_TE.requires_grad_(), x_TD.requires_grad_()]
    router = identity_router("noisy_topk" if name == "load" else "topk", E, 2).double()
    valid_T = None if valid_BS.all() else valid_BS.flatten()
    plan = router(z_TE, TokenContext(valid_T=valid_T, generator=rng))
    assert isinstance(plan, RoutingPlan)
    assert plan.gate is not None
    rules_TE = torch.rand(T, E, generator=rng) < 0.4
    rules_TE[: 2 * S] = False  # no rule applies to the first two rows: they permit no expert, so they are not counted
    plan.gate.extra.update(input_TD=x_TD, free_logits_TE=plan.gate.logits_TE, rules_TE=rules_TE)
    if "ema" in options:
        memory = PrototypeMemory(E, E, space="logits", most=2, ema=0.9).double()
        memory.mean_EV.normal_(generator=rng)
        memory.known_E[1:] = True
        plan.gate.extra.update(memory.recall())
    label_T = torch.randint(-1, 4, (B, 1), generator=rng).expand(B, S).flatten()
    return plan, torch.where(valid_BS.flatten(), label_T, -1), leaves


def _context(label_T: Tensor, rows: int, scope: Any, peers: Peers = ALONE) -> LossContext:
    counts_E = torch.tensor([30, 3, 20, 9, 0]) if scope == "global_batch" else None
    return LossContext(rows, scope, counts_E, label_T, step=400, peers=peers)


def _parts(plan: RoutingPlan, rows: tuple[int, ...]) -> list[RoutingPlan]:
    """As processes make them: without a mask where all is valid, without rules where none applies."""
    parts = []
    for part in cut(plan, [n * S for n in rows]):
        assert part.gate is not None
        extra = dict(part.gate.extra)
        if not extra["rules_TE"].any():
            del extra["rules_TE"]
        valid_T = None if part.valid_T is None or bool(part.valid_T.all()) else part.valid_T
        parts.append(replace(part, valid_T=valid_T, gate=replace(part.gate, extra=extra)))
    return parts


def _gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    grads = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]


def _value(name: str, options: dict[str, Any], plan: RoutingPlan, ctx: LossContext) -> Tensor:
    return balance_loss(plan, {name: 1.0}, ctx, {name: options})[0]


@pytest.mark.parametrize("kind", KINDS)
@every_loss
def test_parts_equal_the_whole(name: str, options: dict[str, Any], kind: str) -> None:
    plan, label_T, leaves = _batch(kind, name, options)
    scopes = ("micro_batch", "sequence", "global_batch") if name == "switch" else ("micro_batch",)
    for scope in scopes:
        whole = _value(name, options, plan, _context(label_T, B, scope))
        wanted = _gradients(whole, leaves)
        for rows in ROWS:
            parts, labels = _parts(plan, rows), label_T.split([n * S for n in rows])

            def work(peers: Peers) -> tuple[Tensor, list[Tensor]]:
                i = peers.index
                value = _value(name, options, parts[i], _context(labels[i], rows[i], scope, peers))  # noqa: B023
                return value.detach(), _gradients(value, leaves)

            answers = with_peers(len(rows), work)
            for value, _ in answers:
                torch.testing.assert_close(value, whole.detach(), rtol=1e-12, atol=1e-14)
            for grads, want in zip(zip(*(grads for _, grads in answers), strict=True), wanted, strict=True):
                torch.testing.assert_close(sum(grads), want, rtol=1e-12, atol=1e-14)


@every_loss
def test_a_mean_of_parts_would_be_another_loss(name: str, options: dict[str, Any]) -> None:
    """So the test above says something: without peers these batches give other values."""
    plan, label_T, _ = _batch("padding", name, options)
    whole = _value(name, options, plan, _context(label_T, B, "micro_batch"))
    parts, labels = _parts(plan, (1, 5)), label_T.split([S, 5 * S])
    apart = [
        _value(name, options, p, _context(label, p.num_tokens // S, "micro_batch"))
        for p, label in zip(parts, labels, strict=True)
    ]
    assert abs(float(sum(apart).detach()) / 2 - float(whole.detach())) > 1e-6  # type: ignore[union-attr]


def test_prototypes_remembered_follow_the_likeliest_of_all_parts() -> None:
    for kind in KINDS:
        plan, _, _ = _batch(kind, "prototype", {})
        memory = PrototypeMemory(E, D, space="input", most=2, ema=0.9).double()
        whole = memory.statistics(plan)
        assert whole["prototype_counts_E"].max() == 2
        for rows in ROWS:
            parts = _parts(plan, rows)
            shares = with_peers(len(rows), lambda peers: memory.statistics(parts[peers.index], peers))  # noqa: B023
            for name, value in whole.items():
                torch.testing.assert_close(sum(share[name] for share in shares), value, rtol=1e-12, atol=1e-14)


# ---- processes ------------------------------------------------------------------------------------------------------


def _ask_processes(rank: int) -> dict[str, Tensor]:
    world = World(Layout.of(ParallelConfig(), 2), rank)
    answers = {}
    for name, options in CASES:
        plan, label_T, leaves = _batch("padding", name, options)
        rows, labels = (2, 4), label_T.split([2 * S, 4 * S])
        part = _parts(plan, rows)[rank]
        value = _value(name, options, part, _context(labels[rank], rows[rank], "micro_batch", world.peers))
        answers[f"{name} {options}"] = value.detach()
        for i, grad in enumerate(_gradients(value, leaves)):
            dist.all_reduce(grad)
            answers[f"{name} {options} {i}"] = grad
    return answers


def test_two_processes_equal_one() -> None:
    answers = run_distributed(2, _ask_processes)
    for name, options in CASES:
        plan, label_T, leaves = _batch("padding", name, options)
        whole = _value(name, options, plan, _context(label_T, B, "micro_batch"))
        for answer in answers:
            torch.testing.assert_close(answer[f"{name} {options}"], whole.detach(), rtol=1e-12, atol=1e-14)
            for i, grad in enumerate(_gradients(whole, leaves)):
                torch.testing.assert_close(answer[f"{name} {options} {i}"], grad, rtol=1e-12, atol=1e-14)
