"""The memory router: the vote by hand, the bounded store, tenants that cannot reach each other, and learning by observing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.checkpoint.native import load_model, save_model
from moesaic.data.packing import Batch
from moesaic.errors import ConfigError
from moesaic.models import MoEConfig, RouterConfig, build_model
from moesaic.plan import RoutingPlan
from moesaic.routing import Outcome, TokenContext
from moesaic.routing.memory import UNIFORM_SHARE, MemoryRouter
from moesaic.train.step import train_step
from tests.models.tiny import some_ids, tiny

D, E = 4, 3


def memory(**options: Any) -> MemoryRouter:
    """An empty memory for 4-wide vectors and 3 experts, fp64, whose gate says nothing (all logits 0)."""
    router = MemoryRouter(D, E, 1, **{"capacity": 4, "neighbors": 2, "init_std": 0.0} | options).double()
    return router.eval()


def unit(*places: int) -> Tensor:
    """Rows with a 1 at these places."""
    return torch.eye(D, dtype=torch.float64)[list(places)]


def sure(*experts: int) -> Tensor:
    """Rows that give all to these experts."""
    return torch.eye(E, dtype=torch.float64)[list(experts)]


def logits(router: MemoryRouter, x_TD: Tensor, tenant: int | None = None) -> Tensor:
    """The logits the router routes by."""
    ctx = TokenContext(tenant_T=None if tenant is None else torch.full((len(x_TD),), tenant))
    plan = router(x_TD, ctx)
    assert plan.gate is not None
    return plan.gate.logits_TE.detach()


def test_the_vote_by_hand() -> None:
    router = memory(beta=2.0, temperature=0.5, threshold=0.5)
    router.remember(torch.cat([10 * unit(0), unit(1), unit(2)]), torch.cat([sure(1), sure(2), sure(0)]))
    # x = (3, 4, 0, 0): cosines 0.6, 0.8, 0; of the two nearest, weights softmax(0.8 / 0.5, 0.6 / 0.5).
    nearest = 1 / (1 + math.exp(-0.4))
    vote = torch.tensor([[0.0, 1 - nearest, nearest]], dtype=torch.float64)
    q_TE = (1 - UNIFORM_SHARE) * vote + UNIFORM_SHARE / 3
    x_TD = torch.tensor([[3.0, 4.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(logits(router, x_TD), 2.0 * q_TE.log())
    plan = router(x_TD)
    assert plan.expert_TK.tolist() == [[2]]
    torch.testing.assert_close(plan.weight_TK, (q_TE**2 / (q_TE**2).sum())[:, 2:])


def test_below_the_threshold_and_without_entries_it_is_silent() -> None:
    router = memory(threshold=0.75)
    x_TD = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert not logits(router, x_TD).any()  # nothing remembered; empty entries do not count as keys at cosine 0
    router.remember(unit(0), sure(0))
    assert not logits(router, x_TD).any()  # 0.6, 0, -1
    router.remember(unit(1), sure(1))
    assert logits(router, x_TD).any(dim=1).tolist() == [True, False, False]  # 0.8 of the first
    always = memory(threshold=-1.0)
    assert not logits(always, x_TD).any()
    always.remember(unit(0), sure(2))
    assert logits(always, x_TD).any(dim=1).tolist() == [True, True, True]
    torch.testing.assert_close(logits(always, x_TD)[0], logits(always, x_TD)[2])  # one entry: its vote is everybody's


def test_fewer_entries_than_neighbors() -> None:
    three, one = memory(capacity=4, neighbors=3), memory(capacity=4, neighbors=1)
    for router in (three, one):
        router.remember(unit(0), sure(1))
    x_TD = torch.tensor([[3.0, 4.0, 0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(logits(three, x_TD), logits(one, x_TD))


def test_the_store_is_a_ring() -> None:
    router = memory(capacity=3, neighbors=1)
    router.remember(unit(0, 1), sure(0, 0))
    router.remember(unit(2, 3), sure(1, 1))  # replaces the oldest, unit(0)
    assert router.written_N.tolist() == [4]
    assert router.recall(unit(0, 1, 2, 3), torch.zeros(4, dtype=torch.int64)).any(dim=1).tolist() == [
        False,
        True,
        True,
        True,
    ]
    router.remember(unit(3, 3, 0, 1, 2), sure(2, 2, 2, 1, 0))  # five at once: the last three stay
    assert router.recall(unit(0, 1, 2, 3), torch.zeros(4, dtype=torch.int64)).argmax(dim=1).tolist()[:3] == [2, 1, 0]
    assert not router.recall(unit(3), torch.zeros(1, dtype=torch.int64)).any()
    assert router.key_NMD.shape == (1, 3, D)


def test_written_at_once_or_one_by_one_is_the_same() -> None:
    x_TD = torch.randn(23, D, dtype=torch.float64)
    votes_TE = torch.randn(23, E, dtype=torch.float64).softmax(dim=1)
    tenant_T = torch.randint(3, (23,))
    together, single = memory(tenants=3), memory(tenants=3)
    together.remember(x_TD, votes_TE, tenant_T)
    for t in range(23):
        single.remember(x_TD[t : t + 1], votes_TE[t : t + 1], tenant_T[t : t + 1])
    for name, buffer in together.named_buffers():
        torch.testing.assert_close(buffer, single.get_buffer(name), rtol=1e-15, atol=1e-15)


def test_nothing_written_for_one_tenant_reaches_another() -> None:
    """Bitwise, through every way there is: keys, votes, evictions, counters and ties."""
    rng = torch.Generator().manual_seed(0)
    router = memory(tenants=3, threshold=-1.0, beta=3.0)
    x_TD = torch.randn(30, D, generator=rng, dtype=torch.float64)
    for tenant in (0, 1, 2):
        router.remember(torch.randn(3, D, generator=rng), sure(0, 1, 2), torch.full((3,), tenant))
    before = {tenant: logits(router, x_TD, tenant) for tenant in (None, 0, 1, 2)}
    for step in range(20):  # five times round the ring, the victim's own vectors and extreme ones among them
        x = x_TD[step : step + 4] if step % 2 else 1e30 * torch.randn(4, D, generator=rng)
        router.remember(x, sure(*[step % 3] * 4), torch.ones(4, dtype=torch.int64))
    router.forget(1)
    router.remember(x_TD[:1], sure(0), torch.tensor([1]))
    for tenant in (None, 0, 2):
        assert torch.equal(logits(router, x_TD, tenant), before[tenant])
    assert not torch.equal(logits(router, x_TD, 1), before[1])


def test_tenants_mixed_in_one_batch_read_as_they_would_alone() -> None:
    router = memory(tenants=2, threshold=-1.0)
    router.remember(unit(0, 1), sure(0, 1), torch.tensor([0, 1]))
    x_TD = torch.randn(40, D, dtype=torch.float64)
    tenant_T = torch.arange(40) % 4 - 1  # -1, 0, 1, 2: the first and the last have no memory
    plan = router(x_TD, TokenContext(tenant_T=tenant_T))
    for tenant in (-1, 0, 1, 2):
        mine_T = tenant_T == tenant
        torch.testing.assert_close(plan.gate.logits_TE[mine_T], logits(router, x_TD[mine_T], tenant))
        assert bool(plan.gate.logits_TE[mine_T].any()) == (tenant in (0, 1))
    assert torch.equal(logits(router, x_TD), logits(router, x_TD, 0))


def test_forget_erases_one_tenant() -> None:
    router = memory(tenants=2)
    router.remember(unit(0, 0), sure(1, 2), torch.tensor([0, 1]))
    router.forget(1)
    assert logits(router, unit(0), 0).any()
    assert not logits(router, unit(0), 1).any()
    assert not router.key_NMD[1].any()
    with pytest.raises(ConfigError, match="serves tenants 0 to 1, not 2"):
        router.forget(2)


def test_the_forward_writes_nothing_and_no_gradient_reaches_the_memory() -> None:
    router = MemoryRouter(D, E, 2, capacity=4, neighbors=2, threshold=-1.0).double()
    router.remember(unit(0, 1, 2), sure(0, 1, 2))
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    x_TD = torch.randn(9, D, dtype=torch.float64, requires_grad=True)
    plan = router(x_TD)
    upstream_TK = torch.randn(9, 2, dtype=torch.float64)
    (plan.weight_TK * upstream_TK).sum().backward()
    for name, buffer in router.named_buffers():
        assert torch.equal(buffer, before[name])
        assert not buffer.requires_grad
    # A dense formulation with the bonus as a constant has the same gradients.
    weight_ED, again_TD = router.gate.weight.detach().requires_grad_(), x_TD.detach().requires_grad_()
    bonus_TE = router.beta * router.recall(x_TD.detach(), torch.zeros(9, dtype=torch.int64))
    probs_TE = (again_TD @ weight_ED.T + bonus_TE).softmax(dim=1)
    (probs_TE.gather(1, plan.expert_TK) * upstream_TK).sum().backward()
    torch.testing.assert_close(router.gate.weight.grad, weight_ED.grad)
    torch.testing.assert_close(x_TD.grad, again_TD.grad)


def test_rules_are_stronger_than_memories() -> None:
    router = memory(beta=100.0)
    router.remember(unit(0), sure(1))
    plan = router(unit(0), TokenContext(allowed_TE=torch.tensor([[True, False, True]])))
    assert plan.expert_TK.tolist() == [[0]]


def observed(router: MemoryRouter, loss: list[float], **ctx: Tensor) -> list[int]:
    """Places of the tokens 0..3 that the router remembers after one training step with these losses."""
    router.train()
    plan = router(unit(0, 1, 2, 3), TokenContext(**ctx))
    router.observe(plan.detach(), Outcome(torch.tensor(loss)))
    return router.key_NMD.sum(dim=(0, 1)).nonzero()[:, 0].tolist()


def test_observing_keeps_what_was_predicted_well() -> None:
    assert observed(memory(), [1.0, 2.0, 3.0, 4.0]) == [0, 1]
    assert observed(memory(), [0.0, 2.0, 3.0, 4.0]) == [1]  # 0: nothing to predict there; the mean of the others is 3
    assert observed(memory(writes=1), [1.0, 1.0, 1.0, 9.0]) == [0]
    assert observed(memory(writes=2), [1.0, 1.0, 1.0, 9.0]) == [0, 1]
    assert observed(memory(writes=0), [1.0, 2.0, 3.0, 4.0]) == []
    assert observed(memory(), [1.0, 1.0, 1.0, 9.0], valid_T=torch.tensor([False, True, True, True])) == [1, 2]
    assert observed(memory(tenants=2), [1.0, 1.0, 1.0, 9.0], tenant_T=torch.tensor([-1, 1, 2, 0])) == [1]
    assert observed(memory(), [0.0] * 4) == []


def test_what_is_remembered_is_the_gates_own_opinion() -> None:
    router = memory(beta=5.0)
    with torch.no_grad():
        router.gate.weight.copy_(torch.randn(E, D))
    own_TE = router.gate(unit(0, 1, 2, 3)).softmax(dim=1)
    for _ in range(2):  # the second time a memory is there and speaks, but is not what is written
        observed(router, [1.0, 9.0, 9.0, 9.0])
    assert router.written_N.tolist() == [2]
    torch.testing.assert_close(router.vote_NME[0, :2], own_TE[:1].detach().expand(2, E))


def test_evaluation_carries_no_evidence_and_observing_it_does_nothing() -> None:
    router = memory()
    plan = router(unit(0, 1))
    assert plan.gate.extra == {}
    router.observe(plan, Outcome(torch.tensor([1.0, 2.0])))
    assert router.written_N.tolist() == [0]


def test_a_training_step_writes_once_and_checkpoints_hold_it(tmp_path: Path) -> None:
    router = RouterConfig("memory", {"capacity": 32, "neighbors": 4, "writes": 5, "threshold": 0.0})
    model = build_model(tiny(MoEConfig(num_experts=4, k=2, hidden=8, router=router)), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        zeros_BS = torch.zeros(2, 9, dtype=torch.int64)
        micro = [Batch(some_ids(2, 9, s), some_ids(2, 9, s + 1), zeros_BS == 0, zeros_BS, zeros_BS) for s in (step, 7)]
        train_step(model, optimizer, micro, lr=1e-2, clip=1.0, step=step)
    written = [sparse.router.get_buffer("written_N").tolist() for sparse in model.moe_layers().values()]
    assert written == [[15]] * 2
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m", dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"capacity": 0}, "capacity=0, tenants=1 and neighbors=8 must be at least 1"),
        ({"writes": -1}, "writes=-1 at least 0"),
        ({"neighbors": 300}, "neighbors=300 cannot vote when a memory holds capacity=256"),
        ({"beta": -0.5}, "beta=-0.5 must be at least 0"),
        ({"temperature": 0.0}, "temperature=0.0 above 0"),
        ({"threshold": 1.5}, "threshold=1.5 between -1 and 1"),
    ],
)
def test_impossible_memories_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        MemoryRouter(D, E, 1, **options)
    assert words in str(error.value)


def test_impossible_entries_are_refused() -> None:
    router = memory(tenants=2)
    with pytest.raises(ConfigError, match="serves tenants 0 to 1, not -1 to 2"):
        router.remember(unit(0, 1), sure(0, 1), torch.tensor([-1, 2]))
    for wrong in (2 * sure(0), torch.tensor([[1.5, -0.5, 0.0]]), torch.full((1, 3), math.nan)):
        with pytest.raises(ConfigError, match="needs a distribution over the experts"):
            router.remember(unit(0), wrong)
    router.remember(unit(), sure())  # nothing is fine
    assert router.written_N.tolist() == [0, 0]


def test_half_precision_inputs_are_read_in_fp32() -> None:
    router = MemoryRouter(D, E, 1, threshold=-1.0, capacity=8).bfloat16()
    x_TD = torch.randn(8, D).bfloat16()
    router.remember(x_TD, torch.rand(8, E).softmax(dim=1))
    assert {buffer.dtype for name, buffer in router.named_buffers() if name != "written_N"} == {torch.float32}
    plan = router(x_TD)
    assert isinstance(plan, RoutingPlan)
    assert torch.equal(plan.weight_N, replace(router(x_TD.float())).weight_N)
