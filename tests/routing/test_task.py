"""Routing by task, sentence and domain: by hand, mixed batches, unknown ids, mixtures, pooling against dense formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.experts import MoE
from moesaic.plan import RoutingPlan
from moesaic.routing import Router, TextStatistics, TokenContext, build_router
from moesaic.routing.task import Constant, Demix, Sentence, Task, tasks_of


def build(name: str, experts: int = 4, k: int = 2, dim: int = 3, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_router(name, dim, experts, k, options).double()


def route(
    router: Router, T: int, task: list[int] | None = None, x_TD: Tensor | None = None, **more: Any
) -> RoutingPlan:
    x_TD = torch.zeros(T, 3, dtype=torch.float64) if x_TD is None else x_TD
    ctx = TokenContext(task_T=None if task is None else torch.tensor(task), **more)
    plan = router(x_TD, ctx)
    assert isinstance(plan, RoutingPlan)
    return plan


def by_hand(task: Task) -> Task:
    """Gate = identity on 3 of 4 experts; tasks whose embeddings are logits."""
    with torch.no_grad():
        task.choice.gate.weight.copy_(torch.eye(4)[:, :3])
        task.embedding_AD.copy_(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 4.0]]))
    return task


# ---- task ----------------------------------------------------------------------------------------------------------


def test_task_by_hand() -> None:
    # Logits of task 0: 2 1 0 0; of task 1: 0 1 4 0. The two best: 0, 1 with e^2 : e^1, and 2, 1 with e^4 : e^1.
    router = by_hand(build("task", num_tasks=2))
    plan = route(router, 3, [1, 0, 1], x_TD=torch.randn(3, 3, dtype=torch.float64))
    assert plan.expert_TK.tolist() == [[2, 1], [0, 1], [2, 1]]
    a, b = 1 / (1 + torch.e**-1), 1 / (1 + torch.e**-3)
    expected = torch.tensor([[b, 1 - b], [a, 1 - a], [b, 1 - b]], dtype=torch.float64)
    torch.testing.assert_close(plan.weight_TK, expected)
    # Only the embeddings of tasks present are taught.
    route(router, 3, [1, 1, 1]).weight_TK[:, 0].sum().backward()
    grad_AD = router.embedding_AD.grad
    assert grad_AD is not None
    assert not grad_AD[0].any()
    assert grad_AD[1].any()


def test_unknown_tasks() -> None:
    router = by_hand(build("task", num_tasks=2))
    # The mean embedding (1, 1, 2): logits 1 1 2 0; ids below 0 and beyond the last are unknown alike.
    uniform = route(router, 3, [-1, 0, 7])
    assert uniform.expert_TK.tolist() == [[2, 0], [0, 1], [2, 0]]
    fallback = by_hand(build("task", num_tasks=2, unknown="fallback", fallback=[1, 3]))
    plan = route(fallback, 3, [-1, 0, -5])
    assert [sorted(row) for row in plan.expert_TK.tolist()] == [[1, 3], [0, 1], [1, 3]]
    assert plan.weight_TK[[0, 2]].tolist() == [[0.5, 0.5]] * 2
    torch.testing.assert_close(plan.weight_TK[1], uniform.weight_TK[1])
    # Where a rule forbids a fallback expert, the gate names its substitute: logits 1 1 2 0 -> expert 2 for 3.
    allowed = torch.tensor([[True, True, True, False]])
    assert sorted(route(fallback, 1, [-1], allowed_TE=allowed).expert_TK[0].tolist()) == [1, 2]


@pytest.mark.parametrize("unknown", [{}, {"unknown": "fallback", "fallback": [1, 3]}], ids=["uniform", "fallback"])
def test_a_mixture_of_tasks_stands_in_for_unknown_ids_only(unknown: dict[str, Any]) -> None:
    router = by_hand(build("task", num_tasks=2, **unknown))
    mixture = torch.tensor([[0.25, 0.75], [0.25, 0.75], [1.0, 0.0]])
    plan = route(router, 3, [-1, 0, -1], mixture_TE=mixture)
    # 0.25 (2, 1, 0) + 0.75 (0, 1, 4) = (0.5, 1, 3): experts 2, 1. The others are task 0.
    assert plan.expert_TK.tolist() == [[2, 1], [0, 1], [0, 1]]
    without_ids = route(router, 3, None, mixture_TE=mixture)
    assert without_ids.expert_TK.tolist() == [[2, 1], [2, 1], [0, 1]]
    with pytest.raises(ConfigError, match="knows 2 tasks or domains, but the mixture is over 3"):
        route(router, 1, [0], mixture_TE=torch.ones(1, 3) / 3)


def test_one_task_only_and_more_domains_than_tasks() -> None:
    text = TextStatistics(5, lambda: torch.zeros(5), lambda: torch.zeros(5), labels=("code", "prose", "verse"))
    build("task", num_tasks=3).fit(text)
    build("demix", experts=3, k=1).fit(text)
    for router in (build("task", num_tasks=2), build("demix", experts=2, k=1)):
        with pytest.raises(ConfigError, match="The text has 3 domains, but .*=2 of router .* leaves room for 2"):
            router.fit(text)
    single = route(build("task", num_tasks=1), 4, [0, 0, -1, 0])
    assert len({tuple(row) for row in single.expert_TK.tolist()}) == 1


def test_task_ids_as_read() -> None:
    ctx = TokenContext(task_T=torch.tensor([0, -7, 2, 3, -1]))
    assert tasks_of(ctx, "demix", 3)[0].tolist() == [0, -1, 2, -1, -1]


# ---- sentence ------------------------------------------------------------------------------------------------------


def documents(position: list[int], valid: list[bool]) -> list[list[int]]:
    """Places of each document's real tokens, in plain Python."""
    found: list[list[int]] = []
    for place, (p, real) in enumerate(zip(position, valid, strict=True)):
        if real and p == 0:
            found.append([])
        if real:
            found[-1].append(place)
    return found


@pytest.mark.parametrize("pool", ["mean", "prefix"])
def test_pooling_against_plain_loops(pool: str) -> None:
    """Two rows: three documents, padding between and after; and left padding before one document."""
    router = build("sentence", pool=pool)
    assert isinstance(router, Sentence)
    position = [[0, 1, 2, 0, 0, 1, 2], [0, 0, 0, 1, 2, 3, 4]]
    valid = [[True, True, True, True, True, True, False], [False, False, True, True, True, True, True]]
    x_BSD = torch.randn(2, 7, 3, dtype=torch.float64)
    pooled_BSD = torch.zeros_like(x_BSD)
    for row in (0, 1):
        for places in documents(position[row], valid[row]):
            for n, place in enumerate(places):
                read = places if pool == "mean" else places[: n + 1]
                pooled_BSD[row, place] = x_BSD[row, read].mean(dim=0)
    ctx = TokenContext(
        position_T=torch.tensor(position).flatten(), valid_T=torch.tensor(valid).flatten(), num_sequences=2
    )
    plan = router(x_BSD.flatten(0, 1), ctx)
    expected = router.choice(pooled_BSD.flatten(0, 1), ctx)
    assert torch.equal(plan.expert_N, expected.expert_N)
    torch.testing.assert_close(plan.weight_N, expected.weight_N, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        plan.gate.logits_TE[ctx.valid_T], expected.gate.logits_TE[ctx.valid_T], rtol=1e-12, atol=1e-12
    )


def test_a_mean_sends_a_whole_document_to_the_same_experts() -> None:
    plan = route(build("sentence", pool="mean"), 6, x_TD=torch.randn(6, 3, dtype=torch.float64), num_sequences=2)
    torch.testing.assert_close(plan.weight_TK[:3], plan.weight_TK[:1].expand(3, 2))
    assert len({tuple(row) for row in plan.expert_TK[:3].tolist()}) == 1


@pytest.mark.parametrize("pool", ["mean", "prefix"])
def test_gradients_reach_the_tokens_that_were_pooled(pool: str) -> None:
    router = build("sentence", pool=pool)
    x_TD = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: router(x, TokenContext()).gate.logits_TE, (x_TD,))


def test_in_generation_a_mean_is_of_what_has_been_read() -> None:
    router, x_TD = build("sentence", pool="mean"), torch.randn(6, 3, dtype=torch.float64)
    state: dict[str, Tensor] = {}
    parts = [slice(0, 4), slice(4, 5), slice(5, 6)]
    for part in parts:
        position_T = torch.arange(6)[part]
        plan = route(router, 0, x_TD=x_TD[part], position_T=position_T, state=state)
        read = router.choice(x_TD[: part.stop].mean(dim=0, keepdim=True))
        torch.testing.assert_close(plan.weight_TK[-1:], read.weight_TK)
        assert plan.expert_TK[-1].tolist() == read.expert_TK[0].tolist()


def test_a_finished_row_does_not_disturb_what_is_remembered() -> None:
    """Padding between the steps of a generation adds nothing to the sums."""
    router, x_TD = build("sentence"), torch.randn(4, 3, dtype=torch.float64)
    whole = route(router, 0, x_TD=x_TD)
    state: dict[str, Tensor] = {}
    route(router, 0, x_TD=x_TD[:3], position_T=torch.arange(3), state=state)
    padding = torch.zeros(1, dtype=torch.bool)
    route(router, 0, x_TD=torch.full((1, 3), 9.0), position_T=torch.tensor([3]), valid_T=padding, state=state)
    last = route(router, 0, x_TD=x_TD[3:], position_T=torch.tensor([3]), state=state)
    torch.testing.assert_close(last.weight_TK, whole.weight_TK[3:])


# ---- demix and constant --------------------------------------------------------------------------------------------


def test_demix_by_hand() -> None:
    router = build("demix", experts=3, k=2)
    plan = route(router, 4, [2, 0, -1, 1], mixture_TE=torch.tensor([[0.2, 0.3, 0.5]] * 4))
    assert plan.expert_TK.tolist() == [[2, 3], [0, 3], [2, 1], [1, 3]]
    expected = torch.tensor([[1, 0], [1, 0], [0.625, 0.375], [1, 0]], dtype=torch.float64)  # 0.5 / 0.8, 0.3 / 0.8
    torch.testing.assert_close(plan.weight_TK, expected, rtol=1e-6, atol=1e-6)
    everyone = route(build("demix", experts=3, k=3), 1, None, mixture_TE=torch.tensor([[0.2, 0.3, 0.5]]))
    torch.testing.assert_close(
        everyone.weight_N, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), rtol=1e-6, atol=1e-6
    )
    uniform = route(router, 1, [-1])
    assert (uniform.expert_N.tolist(), uniform.weight_N.tolist()) == ([0, 1], [0.5, 0.5])
    assert router.rows_per_token == 1.0
    sure = route(router, 1, [-1], mixture_TE=torch.tensor([[0.0, 1.0, 0.0]]))
    assert sure.weight_N.tolist() == [1.0, 0.0]


def test_demix_is_one_network_per_domain_and_mixes_outputs() -> None:
    torch.manual_seed(0)
    layer = MoE(3, 5, 4, 4, "demix").double()
    x_TD = torch.randn(4, 3, dtype=torch.float64)
    y_TD, _ = layer(x_TD, TokenContext(task_T=torch.tensor([3, 1, -1, 0])))
    alone = torch.stack([layer.experts.compute_one(e, x_TD) for e in range(4)])
    torch.testing.assert_close(y_TD, torch.stack([alone[3, 0], alone[1, 1], alone[:, 2].mean(dim=0), alone[0, 3]]))


def test_constant_is_a_trained_weighted_sum() -> None:
    torch.manual_seed(0)
    layer = MoE(3, 5, 4, 4, "constant").double()
    assert isinstance(layer.router, Constant)
    with torch.no_grad():
        layer.router.weight_E.copy_(torch.tensor([0.5, 0.0, -1.0, 2.0]))
    x_TD = torch.randn(6, 3, dtype=torch.float64)
    y_TD, _ = layer(x_TD)
    outputs = torch.stack([layer.experts.compute_one(e, x_TD) for e in range(4)])
    torch.testing.assert_close(y_TD, torch.einsum("e,etd->td", layer.router.weight_E, outputs))
    y_TD.sum().backward()  # type: ignore[no-untyped-call]
    assert layer.router.weight_E.grad is not None
    torch.testing.assert_close(layer.router.weight_E.grad, outputs.sum(dim=(1, 2)).detach())


def test_refusals() -> None:
    for name, k, options, words in [
        ("task", 1, {}, 'k=1 with normalize="chosen" makes every weight exactly 1'),
        ("task", 2, {"num_tasks": 0}, "num_tasks must be at least 1, not 0"),
        ("task", 2, {"unknown": "fallback"}, "list k experts in fallback, or leave both out"),
        ("task", 2, {"fallback": [0, 1]}, "list k experts in fallback, or leave both out"),
        ("task", 2, {"unknown": "fallback", "fallback": [0, 4]}, "must list k=2 different experts between 0 and 3"),
        ("task", 2, {"unknown": "fallback", "fallback": [1, 1]}, "must list k=2 different experts"),
        ("task", 2, {"unknown": "uniformly"}, 'Did you mean "uniform"?'),
        ("sentence", 2, {"pool": "max"}, "pool"),
        ("sentence", 5, {}, "k=5 experts per token are impossible"),
        ("constant", 2, {}, "k must be num_experts=4, not 2"),
        ("demix", 5, {}, "k=5 experts per token are impossible"),
    ]:
        with pytest.raises(ConfigError) as caught:
            build_router(name, 8, 4, k, options)
        assert words in str(caught.value)
    assert isinstance(build("demix", k=1), Demix)
    for name in ("task", "demix"):
        with pytest.raises(ConfigError, match=f'Router "{name}" needs task_T'):
            route(build(name), 2)
