"""Routers with context: values by hand, documents, padding anywhere, what generation remembers, layers that hand on a state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.models import build_model
from moesaic.routing import NO_CONTEXT, ROUTERS, Router, TokenContext, build_router
from moesaic.routing.contextual import AttentionRouter, Conv, Recurrent
from tests.models.tiny import some_ids, sparse
from tests.routing.cases import some_input

LOOKS_BACK: list[tuple[str, dict[str, Any]]] = [
    ("conv", {"width": 3}),
    ("attention", {"head_dim": 4}),
    ("attention", {"head_dim": 4, "combine": "concat"}),
    ("segment", {"segment_len": 3, "coupling": 0.3}),
    ("segment", {"segment_len": 4, "pool": "first"}),
]


def loud(name: str, options: dict[str, Any], dim: int = 16) -> Router:
    router = build_router(name, dim, 8, 2, options).double().eval()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(std=0.7, generator=torch.Generator().manual_seed(parameter.numel()))
    return router


def logits_of(router: Router, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> Tensor:
    plan = router(x_TD, ctx)
    assert plan.gate is not None
    return plan.gate.logits_TE.detach()


# ---- conv -----------------------------------------------------------------------------------------------------------


def test_a_convolution_by_hand() -> None:
    """Gate I, taps a0 = [1, 2], a1 = [10, 0]: c_t = [x_t0 + 10 x_(t-1)0, 2 x_t1]; a second document starts at token 2."""
    router = Conv(2, 2, 2, width=2)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(2))
        router.tap_WD.copy_(torch.tensor([[1.0, 2.0], [10.0, 0.0]]))
    x_TD = torch.tensor([[1.0, 1.0], [2.0, 3.0], [5.0, 0.0], [7.0, 4.0]])
    together = logits_of(router, x_TD)
    assert together.tolist() == [[1, 2], [12, 6], [25, 0], [57, 8]]
    packed = logits_of(router, x_TD, TokenContext(position_T=torch.tensor([0, 1, 0, 1])))
    assert packed.tolist() == [[1, 2], [12, 6], [5, 0], [57, 8]]
    # Padding between the tokens is no token: the fourth looks back over it to the second.
    valid_T = torch.tensor([True, True, False, True])
    ctx = TokenContext(position_T=torch.tensor([0, 1, 2, 2]), valid_T=valid_T)
    assert logits_of(router, x_TD, ctx)[valid_T].tolist() == [[1, 2], [12, 6], [27, 8]]


def test_conv_and_added_attention_start_as_the_plain_gate() -> None:
    x_TD = torch.randn(6, 16)
    for router in (Conv(16, 4, 2), AttentionRouter(16, 4, 2)):
        assert torch.equal(logits_of(router, x_TD), x_TD @ router.gate.weight.detach().T)


# ---- attention ------------------------------------------------------------------------------------------------------


def written_out(router: AttentionRouter, x_TD: Tensor, allowed: list[list[int]]) -> Tensor:
    """The definition, token by token; ``allowed[t]`` are the tokens that t may read."""
    rows = []
    for t, seen in enumerate(allowed):
        query_R = router.query.weight @ x_TD[t]
        score = torch.stack([query_R @ (router.key.weight @ x_TD[j]) for j in seen]) / math.sqrt(len(query_R))
        share = score.softmax(0)
        read_R = sum(
            (s * (router.value.weight @ x_TD[j]) for s, j in zip(share, seen, strict=True)), torch.zeros_like(query_R)
        )
        if router.back is None:
            rows.append(router.gate.weight @ torch.cat([x_TD[t], read_R]))
        else:
            rows.append(router.gate.weight @ (x_TD[t] + router.back.weight @ read_R))
    return torch.stack(rows)


@pytest.mark.parametrize("combine", ["add", "concat"])
def test_the_head_is_what_is_written_out_with_all_gradients(combine: str) -> None:
    router = loud("attention", {"head_dim": 4, "combine": combine})
    assert isinstance(router, AttentionRouter)
    x_TD = torch.randn(7, 16, dtype=torch.float64)
    # Documents of 3 and 4 tokens; the token at place 4 is padding.
    ctx = TokenContext(position_T=torch.tensor([0, 1, 2, 0, 1, 1, 2]), valid_T=torch.arange(7) != 4)
    allowed = [[0], [0, 1], [0, 1, 2], [3], [4], [3, 5], [3, 5, 6]]
    plan = router(x_TD, ctx)
    assert plan.gate is not None
    valid_T = torch.arange(7) != 4
    found, expected = plan.gate.logits_TE[valid_T], written_out(router, x_TD, allowed)[valid_T]
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(found.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((z * upstream).sum(), list(router.parameters())) for z in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# ---- recurrent ------------------------------------------------------------------------------------------------------


def test_one_recurrent_step_by_hand() -> None:
    """R = 1, projection 1, all input weights 1, all state weights 2, no biases.

    From h = 0 with x = 1: r = z = sigmoid(1), n = tanh(1), h' = (1 - z) n = 0.26894 * 0.76159 = 0.20482.
    The next layer, x = 1, h = 0.20482: z = r = sigmoid(1.40965) = 0.80370, n = tanh(1 + 0.80370 * 0.40965) = 0.86908,
    h' = 0.19630 * 0.86908 + 0.80370 * 0.20482 = 0.33521.
    """
    router = Recurrent(1, 2, 2, hidden=1)
    with torch.no_grad():
        router.project.weight.fill_(1.0)
        router.cell.weight_ih.fill_(1.0)
        router.cell.weight_hh.fill_(2.0)
        router.cell.bias_ih.zero_()
        router.cell.bias_hh.zero_()
        router.gate.weight.copy_(torch.tensor([[1.0], [-3.0]]))
    x_TD = torch.ones(1, 1)
    first = router(x_TD)
    torch.testing.assert_close(first.gate.logits_TE, torch.tensor([[0.20482, -0.61446]]), atol=2e-5, rtol=0)
    second = router(x_TD, TokenContext(previous=first.gate))
    torch.testing.assert_close(second.gate.extra["recurrent_TR"], torch.tensor([[0.33521]]), atol=2e-5, rtol=0)


def test_the_state_and_its_gradient_go_through_all_layers() -> None:
    model = build_model(sparse("recurrent", {"hidden": 8}, num_experts=4), seed=0)
    ids = some_ids(2, 6)
    output = model(ids)
    states = [plan.gate.extra["recurrent_TR"] for plan in output.plans.values()]  # type: ignore[union-attr]
    grad = torch.autograd.grad(states[1].sum(), states[0], retain_graph=True)[0]
    assert bool(grad.any(dim=1).all())
    output.plans[1].gate.logits_TE.square().sum().backward()  # type: ignore[union-attr]
    assert bool(model.get_parameter("blocks.0.ffn.router.cell.weight_ih").grad.any())  # type: ignore[union-attr]


def test_a_state_of_another_width_is_refused_and_another_router_is_passed_by() -> None:
    wide, narrow = Recurrent(4, 4, 2, hidden=6), Recurrent(4, 4, 2, hidden=3)
    x_TD = torch.randn(3, 4)
    with pytest.raises(ConfigError, match="6 wide, but this one's is hidden=3"):
        narrow(x_TD, TokenContext(previous=wide(x_TD).gate))
    other = build_router("topk", 4, 4, 2)(x_TD).gate
    assert torch.equal(logits_of(narrow, x_TD, TokenContext(previous=other)), logits_of(narrow, x_TD))


# ---- what generation remembers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), LOOKS_BACK, ids=str)
def test_padding_anywhere_in_any_piece_changes_nothing(name: str, options: dict[str, Any]) -> None:
    """A row of 11 tokens, spread over 20 places in five pieces, against the same tokens in one go: left padding, gaps, a
    piece without a single token, a piece without a place.
    """
    router, batch = loud(name, options), some_input(1, 11)
    whole = router(batch.x_BSD.flatten(0, 1), TokenContext(num_sequences=1))
    places = [2, 3, 4, 7, 8, 9, 12, 13, 16, 18, 19]
    x_TD = torch.full((20, 16), 100.0, dtype=torch.float64)
    x_TD[places] = batch.x_BSD[0]
    valid_T = torch.zeros(20, dtype=torch.bool)
    valid_T[places] = True
    position_T = valid_T.long().cumsum(0) - valid_T.long()
    state: dict[str, Tensor] = {}
    logits = []
    for piece in (slice(0, 6), slice(6, 10), slice(10, 12), slice(12, 12), slice(12, 15), slice(15, 20)):
        ctx = TokenContext(position_T=position_T[piece], valid_T=valid_T[piece], num_sequences=1, state=state)
        logits.append(logits_of(router, x_TD[piece], ctx))
    assert whole.gate is not None
    torch.testing.assert_close(torch.cat(logits)[places], whole.gate.logits_TE.detach())


@pytest.mark.parametrize(("name", "options"), LOOKS_BACK, ids=str)
def test_a_document_that_begins_inside_a_generation_forgets_the_one_before(name: str, options: dict[str, Any]) -> None:
    router, batch = loud(name, options), some_input(1, 10)
    x_TD, position_T = batch.x_BSD.flatten(0, 1), torch.cat([torch.arange(6), torch.arange(4)])
    alone = logits_of(router, x_TD[6:], TokenContext(num_sequences=1))
    state: dict[str, Tensor] = {}
    logits = [
        logits_of(router, x_TD[part], TokenContext(position_T=position_T[part], num_sequences=1, state=state))
        for part in (slice(0, 3), slice(3, 8), slice(8, 9), slice(9, 10))
    ]
    torch.testing.assert_close(torch.cat(logits)[6:], alone)


@pytest.mark.parametrize(("name", "options"), LOOKS_BACK, ids=str)
def test_context_is_used(name: str, options: dict[str, Any]) -> None:
    """Otherwise all of the above would hold for a router that looks at nothing."""
    router, batch = loud(name, options), some_input(1, 9)
    x_TD = batch.x_BSD.flatten(0, 1)
    together, alone = logits_of(router, x_TD)[7], logits_of(router, x_TD[7:8])[0]
    assert float((together - alone).abs().max()) > 0.1


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "k", "words"),
    [
        ("conv", {"width": 1}, 2, 'width=1 taps see no earlier token; use at least 2, or the router "topk"'),
        ("attention", {"head_dim": 0}, 2, "head_dim must be at least 1, not 0"),
        ("attention", {"combine": "sum"}, 2, "combine"),
        ("recurrent", {"hidden": 0}, 2, "hidden must be at least 1, not 0"),
        ("segment", {"segment_len": 0}, 2, "segment_len must be at least 1, not 0"),
        ("segment", {"coupling": 1.0}, 2, "coupling must be at least 0 and below 1, not 1.0"),
        ("segment", {"pool": "max"}, 2, "pool"),
        *((name, {}, 1, 'k=1 with normalize="chosen"') for name in ("conv", "attention", "recurrent", "segment")),
        *((name, {}, 5, "k=5 experts per token are impossible") for name in ("conv", "recurrent", "segment")),
    ],
)
def test_refusals(name: str, options: dict[str, Any], k: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ROUTERS[name](4, 4, k, **options)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["conv", "attention", "recurrent", "segment"])
def test_ties_go_to_the_lowest_expert_and_one_expert_is_enough(name: str) -> None:
    router = build_router(name, 4, 6, 3, {"init_std": 0.0})
    assert router(torch.randn(5, 4)).expert_TK.tolist() == [[0, 1, 2]] * 5
    alone = build_router(name, 4, 1, 1)(torch.randn(5, 4))
    assert alone.expert_TK.tolist() == [[0]] * 5
    torch.testing.assert_close(alone.weight_N, torch.ones(5))
