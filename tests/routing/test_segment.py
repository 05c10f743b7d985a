"""Segment routing: scores by hand, against a loop for every pool, one decision per segment, the leak of the mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.models import RouterConfig, build_model
from moesaic.routing import NO_CONTEXT, TokenContext
from moesaic.routing.segment import Segment
from tests.models.tiny import sparse


def scores(
    logits: list[list[float]],
    ctx: TokenContext = NO_CONTEXT,
    *,
    length: int = 2,
    pool: str = "first",
    c: float = 0.0,
) -> list[list[float]]:
    """What an identity gate makes of these per-token logits."""
    router = Segment(len(logits[0]), len(logits[0]), 2, segment_len=length, pool=pool, coupling=c)  # type: ignore[arg-type]
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(len(logits[0])))
        plan = router(torch.tensor(logits), ctx)
    assert plan.gate is not None
    rounded: list[list[float]] = plan.gate.logits_TE.mul(1000).round().div(1000).tolist()
    return rounded


U = [[1.0, 0.0], [3.0, 2.0], [5.0, 4.0], [7.0, 0.0], [9.0, 8.0]]


@pytest.mark.parametrize(
    ("pool", "c", "expected"),
    [
        # Segments of two: {0, 1}, {2, 3}, {4}. Means [2, 1], [6, 2], [9, 8].
        ("first", 0.0, [[1, 0], [1, 0], [5, 4], [5, 4], [9, 8]]),
        ("prev_segment", 0.0, [[1, 0], [1, 0], [2, 1], [2, 1], [6, 2]]),
        ("mean", 0.0, [[2, 1], [2, 1], [6, 2], [6, 2], [9, 8]]),
        # A quarter of the segment before: 0.75 [5, 4] + 0.25 [1, 0] = [4, 3]; 0.75 [9, 8] + 0.25 [5, 4] = [8, 7].
        ("first", 0.25, [[1, 0], [1, 0], [4, 3], [4, 3], [8, 7]]),
        # 0.5 [2, 1] + 0.5 [1, 0]; 0.5 [6, 2] + 0.5 [2, 1].
        ("prev_segment", 0.5, [[1, 0], [1, 0], [1.5, 0.5], [1.5, 0.5], [4, 1.5]]),
        # Both neighbours: 0.5 [2, 1] + 0.5 [6, 2]; 0.5 [6, 2] + 0.5 ([2, 1] + [9, 8]) / 2; 0.5 [9, 8] + 0.5 [6, 2].
        ("mean", 0.5, [[4, 1.5], [4, 1.5], [5.75, 3.25], [5.75, 3.25], [7.5, 5]]),
    ],
)
def test_scores_by_hand(pool: str, c: float, expected: list[list[float]]) -> None:
    assert scores(U, pool=pool, c=c) == expected


@pytest.mark.parametrize("c", [0.0, 0.3])
@pytest.mark.parametrize("pool", ["first", "prev_segment", "mean"])
def test_pools_and_gradients_are_those_of_a_loop(pool: str, c: float) -> None:
    """Two rows, documents of 5, 4 and 9 tokens, padding on both sides."""
    router = Segment(6, 5, 2, segment_len=3, pool=pool, coupling=c).double()  # type: ignore[arg-type]
    texts = [(0, [2, 3, 4, 5, 6]), (0, [7, 8, 9, 10]), (1, list(range(9)))]
    valid_BS = torch.zeros(2, 12, dtype=torch.bool)
    position_BS = torch.zeros(2, 12, dtype=torch.int64)
    for row, places in texts:
        valid_BS[row, places] = True
        position_BS[row, places] = torch.arange(len(places))
    x_TD = torch.randn(24, 6, dtype=torch.float64)
    ctx = TokenContext(position_T=position_BS.flatten(), valid_T=valid_BS.flatten(), num_sequences=2)
    plan = router(x_TD, ctx)
    u_BSE = (x_TD @ router.gate.weight.T).view(2, 12, 5)
    expected = torch.zeros(2, 12, 5, dtype=torch.float64)
    for row, places in texts:
        parts = [places[i : i + 3] for i in range(0, len(places), 3)]
        means = [u_BSE[row, part].mean(0) for part in parts]
        firsts = [u_BSE[row, part[0]] for part in parts]
        z = {"first": firsts, "mean": means, "prev_segment": [firsts[0], *means[:-1]]}[pool]
        for s, part in enumerate(parts):
            near: list[Tensor] = [z[n] for n in ((s - 1, s + 1) if pool == "mean" else (s - 1,)) if 0 <= n < len(z)]
            neighbour = sum(near[1:], near[0]) / len(near) if near else z[s]
            expected[row, part] = ((1 - c) * z[s] + c * neighbour).expand(len(part), 5)
    kept = valid_BS.flatten()
    assert plan.gate is not None
    found, wanted = plan.gate.logits_TE[kept], expected.flatten(0, 1)[kept]
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn(found.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((z * upstream).sum(), router.gate.weight)[0] for z in (found, wanted)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("pool", ["first", "prev_segment", "mean"])
def test_tokens_of_a_segment_share_one_decision(pool: str) -> None:
    router = Segment(8, 6, 2, segment_len=4, pool=pool)  # type: ignore[arg-type]
    expert_TK = router(torch.randn(40, 8), TokenContext(num_sequences=2)).expert_TK.view(2, 20, 2)
    parts = expert_TK.view(2, 5, 4, 2)
    assert torch.equal(parts, parts[:, :, :1].expand_as(parts))
    assert len({tuple(part) for part in parts[:, :, 0].flatten(0, 1).tolist()}) > 1


def test_segments_of_one_token_are_plain_routing() -> None:
    for pool in ("first", "mean"):
        assert scores(U, pool=pool, length=1) == U
        assert Segment(2, 2, 2, segment_len=1, pool=pool).facts.causal  # type: ignore[arg-type]
    assert not Segment(2, 2, 2, segment_len=1, pool="mean", coupling=0.1).facts.causal


def test_a_decoder_refuses_the_mean_unless_asked() -> None:
    options = {"pool": "mean"}
    with pytest.raises(ConfigError, match='"segment" looks at later tokens'):
        build_model(sparse("segment", options), device="meta")
    build_model(sparse(RouterConfig("segment", options, allow_leak=True)), device="meta")
