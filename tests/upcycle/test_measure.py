"""What counts as the same function, and models whose logits are no numbers."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.errors import CheckpointError
from moesaic.upcycle import Difference, difference, random_ids
from tests.upcycle.dense import dense, ids


@pytest.mark.parametrize(
    ("max_abs", "largest", "same"),
    [
        (0.0, 0.0, True),
        (1e-5, 0.5, True),
        (1.1e-5, 0.5, False),
        (1.1e-5, 1.0, False),
        (9e-4, 100.0, True),  # logits of 100 may differ by a hundred times as much
        (1.1e-3, 100.0, False),
        (math.nan, 1.0, False),
        (math.inf, 1.0, False),
    ],
)
def test_the_same_function_is_one_to_a_hundred_thousandth(max_abs: float, largest: float, same: bool) -> None:
    gap = Difference(max_abs, largest, 0.0, 1.0, 1.0, 2)
    assert gap.same is gap.record()["same"] is same
    assert str(gap).startswith("the same function: " if same else "another function: ")


@pytest.mark.parametrize(("factor", "same"), [(1 + 1e-6, True), (1 + 1e-4, False)])
def test_logits_scaled_a_little(factor: float, same: bool) -> None:
    first, second = (dense(dtype=torch.float64, tie_embeddings=False) for _ in range(2))
    second.head.weight.data.mul_(factor)
    gap = difference(first, second, ids())
    assert gap.same is same
    assert gap.max_abs == pytest.approx((factor - 1) * gap.largest, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_logits_that_are_no_numbers_have_no_distance(value: float, which: int) -> None:
    models = [dense(), dense()]
    models[which].norm.weight.data[3] = value  # type: ignore[union-attr]
    models[0].train()
    name = ("ours", "The model made")[which]
    with pytest.raises(CheckpointError) as error:
        difference(models[0], models[1], ids(), ("ours", "The model made"))
    assert str(error.value) == (
        f"{name} gives logits that are not finite numbers: norm.weight holds NaN or infinity; take an undamaged checkpoint."
    )
    assert models[0].training


def test_one_bad_token_is_enough_wherever_it_stands() -> None:
    first, second = dense(tie_embeddings=False), dense(tie_embeddings=False)
    last = int(ids()[2, 39])
    tokens = ids()
    tokens[tokens == last] = (last + 1) % 64
    tokens[2, 39] = last
    second.embedding.weight.data[last] = math.nan
    with pytest.raises(CheckpointError, match=r"The second model gives logits .*: embedding\.weight holds NaN"):
        difference(first, second, tokens)


def test_weights_too_large_for_their_sums_are_named_so() -> None:
    first, second = dense(tie_embeddings=False), dense(tie_embeddings=False)
    second.head.weight.data.fill_(3e38)
    with pytest.raises(CheckpointError, match="not finite numbers although its weights are"):
        difference(first, second, ids())


def test_random_tokens_are_of_the_vocabulary_and_within_the_context() -> None:
    model = dense()
    tokens = random_ids(model)
    assert tokens.shape == (2, 64)
    assert torch.equal(tokens, random_ids(model))
    assert not torch.equal(tokens, random_ids(model, seed=1))
    assert 0 <= int(tokens.min()) < int(tokens.max()) < 64
    assert len(tokens.unique()) > 30
