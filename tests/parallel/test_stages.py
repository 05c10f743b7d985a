"""Which blocks go to which stage, what a rank keeps, and what cannot be cut: in words."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from moesaic.errors import ConfigError, MoesaicError
from moesaic.models import Decoder, MoEConfig, RouterConfig, build_model
from moesaic.models.config import DepthConfig
from moesaic.parallel.stages import check_stages, cut_evenly, split_stages, take_stages, with_loss
from tests.models.tiny import some_ids, sparse, tiny

BY_TWO = (range(2), range(2, 4))


@pytest.mark.parametrize(
    ("costs", "parts", "bounds"),
    [
        ([1, 1, 1, 1], 2, [0, 2, 4]),
        ([1, 1, 1, 1, 3], 2, [0, 3, 5]),  # 3 and 4, or 4 and 3: of equals the earlier
        ([5, 1, 1, 1], 2, [0, 1, 4]),
        ([1, 1, 5, 1, 1], 3, [0, 2, 3, 5]),
        ([9, 1, 1, 1], 3, [0, 1, 2, 4]),  # the first decides; the others share evenly, none is empty
        ([2, 2, 2], 3, [0, 1, 2, 3]),
        ([7], 1, [0, 1]),
    ],
)
def test_cuts_by_hand(costs: list[int], parts: int, bounds: list[int]) -> None:
    assert cut_evenly(costs, parts) == bounds


def test_no_cut_has_a_cheaper_costliest_part() -> None:
    rng = random.Random(0)
    for _ in range(300):
        n = rng.randint(1, 9)
        costs, parts = [rng.choice([1, 2, 3, 7, 20]) for _ in range(n)], rng.randint(1, n)
        found = cut_evenly(costs, parts)
        assert (found[0], found[-1], len(found)) == (0, n, parts + 1)
        assert all(a < b for a, b in itertools.pairwise(found))
        best = min(
            max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *inner, n]))
            for inner in itertools.combinations(range(1, n), parts - 1)
        )
        assert max(sum(costs[a:b]) for a, b in itertools.pairwise(found)) == best


def test_a_block_costs_what_a_token_meets_and_the_last_one_the_head() -> None:
    """Attention of 16 x (16 + 8 + 8 + 16) = 768; dense 3 x 16 x 24 = 1152; sparse 2 x 3 x 16 x 12 and a router of 16 E."""
    assert split_stages(tiny(num_layers=4, vocab_size=1), 2) == BY_TWO
    assert split_stages(tiny(num_layers=4, vocab_size=4 * (768 + 1152) // 16), 2) == (range(3), range(3, 4))
    # 64 experts and not 4 change only the router: 1024 more, and not 15 times as much.
    wide = MoEConfig(num_experts=64, k=2, hidden=12, layers=(0,), losses={})
    assert split_stages(tiny(wide, num_layers=4, vocab_size=1), 2) == BY_TWO
    # A quarter of the tokens takes each of the last four blocks: together they are one.
    quarters = tiny(num_layers=6, vocab_size=1, depth=DepthConfig(capacity=0.25, every=1, first=2, allow_leak=True))
    assert split_stages(quarters, 2) == (range(2), range(2, 6))


def test_more_stages_than_blocks_are_refused() -> None:
    assert split_stages(tiny(num_layers=4), 2, 2) == tuple(range(i, i + 1) for i in range(4))
    with pytest.raises(
        ConfigError, match=r"pp=2 with stages_per_rank=3 makes 6 pipeline stages of a model of 4 blocks"
    ):
        split_stages(tiny(num_layers=4), 2, 3)


def names_of(model: Decoder) -> set[str]:
    return {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_every_rank_keeps_its_part_under_the_names_of_the_whole(tied: bool) -> None:
    config = replace(sparse(num_experts=3), num_layers=4, tie_embeddings=tied)
    whole = build_model(config, seed=0)
    ranges = tuple(range(i, i + 1) for i in range(4))
    parts = []
    for index in range(2):
        model = build_model(config, seed=0)
        take_stages(model, ranges, 2, index)
        parts.append(names_of(model))
        assert [layer for layer, _ in model.layers()] == list(model.moe_layers()) == [index, index + 2]
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(name))
        with pytest.raises(MoesaicError, match=r"2 of its 4 blocks, a part of a pipeline"):
            model(some_ids(1, 3))
    assert parts[0] | parts[1] == names_of(whole)
    assert parts[0] & parts[1] == ({"embedding.weight"} if tied else set())
    assert "embedding.weight" in parts[0]
    assert "norm.weight" in parts[1]
    assert ("head.weight" in parts[1]) != tied


def test_a_part_computes_in_the_activation_dtype_of_the_whole() -> None:
    model = build_model(tiny(num_layers=4), seed=0).double()
    take_stages(model, BY_TWO, 2, 1)
    assert model.compute_dtype == torch.float64


@pytest.mark.parametrize(
    ("router", "layers", "refused"),
    [
        ("recurrent", (1, 2), 'Router "recurrent" of block 2 reads what that of block 1 decided'),
        ("recurrent", (2, 3), ""),
        ("recurrent", (0, 1), ""),
        ("moepp", (0, 1, 3), 'Router "moepp" of block 3 reads what that of block 1 decided'),
        ("reinforce", (1, 3), 'Router "reinforce" of block 1 learns from the loss of every token.*stage 0 of 2'),
        ("reinforce", (2, 3), ""),
        ("memory", (0,), 'Router "memory" of block 0 learns from'),
        ("topk", (0, 3), ""),
    ],
)
def test_what_another_stage_would_have_to_say(router: str, layers: tuple[int, ...], refused: str) -> None:
    special = {"zero": 1} if router == "moepp" else {}
    _refused(four_blocks(router=RouterConfig(router), layers=layers, **special), refused)


def test_one_draw_for_all_layers_cannot_be_shared() -> None:
    both: dict[str, Any] = {"gating_dropout": 0.3, "gating_groups": 2}
    for layers, refused in (((0, 3), "gating_dropout=0.3 draws once for all sparse layers"), ((2, 3), "")):
        _refused(four_blocks(layers=layers, **both), refused)


def four_blocks(**moe: Any) -> Decoder:
    """Shapes alone."""
    values: dict[str, Any] = {"num_experts": 4, "k": 2, "hidden": 12, "losses": {}}
    return build_model(tiny(MoEConfig(**(values | moe)), num_layers=4), device="meta")


def _refused(model: Decoder, sentence: str) -> None:
    if not sentence:
        check_stages(model, BY_TWO)
        return
    with pytest.raises(ConfigError, match=sentence):
        check_stages(model, BY_TWO)
    with pytest.raises(ConfigError, match=sentence):
        take_stages(model, BY_TWO, 2, 0)
    assert len(model.blocks) == 4  # nothing was dropped


def test_a_loss_joins_the_graph_on_the_way() -> None:
    """y = 2 x with the loss 3 x^2 joined, upstream gradient 5: dx = 2 * 5 + 6 x."""
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = with_loss(2 * x, (3 * x.square()).sum())
    assert torch.equal(y, 2 * x)
    y.backward(torch.full((2,), 5.0))
    assert x.grad is not None
    assert x.grad.tolist() == [16.0, -2.0]
