"""The sub-network of one task equals the full model with that task, holds only its experts, and is a model like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moesaic as mo
from moesaic.cost.count import count_parameters
from moesaic.errors import ConfigError
from moesaic.models import Decoder, MoEConfig, RouterConfig
from moesaic.models.extract import extract_task_model
from moesaic.plan.capacity import CapacityRule
from tests.models.tiny import lively, some_ids, sparse, tiny


def logits(model: Decoder, task: int | None = None) -> torch.Tensor:
    ids = some_ids(2, 9)
    with torch.no_grad():
        output = model(ids, task_BS=None if task is None else torch.full_like(ids, task))
    result: torch.Tensor = output.logits
    return result


def full(router: str = "task", options: dict[str, Any] | None = None, **changes: Any) -> Decoder:
    return lively(sparse(router, options or {}, **changes)).double()


@pytest.mark.parametrize("task", [0, 3])
@pytest.mark.parametrize(
    ("router", "k", "changes"),
    [
        ("task", 2, {}),
        ("task", 3, {"shared": 1, "shared_gate": True}),
        ("demix", 1, {}),
        ("demix", 4, {"dense_first": 1}),
        ("task", 4, {"capacity": CapacityRule()}),  # dropless in evaluation
    ],
)
def test_it_equals_the_full_model_with_that_task(router: str, k: int, changes: dict[str, Any], task: int) -> None:
    model = full(router, k=k, **changes)
    small = extract_task_model(model, task)
    torch.testing.assert_close(logits(small), logits(model, task), rtol=1e-12, atol=1e-12)
    kept = 1 if router == "demix" else k
    assert [layer.experts.w_in.shape[0] for layer in small.moe_layers().values()] == [kept] * len(small.moe_layers())
    others = [t for t in range(4) if t != task]
    assert any(not torch.allclose(logits(model, other), logits(model, task)) for other in others)


def test_layers_of_different_sizes_and_unnormalised_weights() -> None:
    moe = MoEConfig(
        num_experts=(3, 5), k=(1, 2), hidden=8, losses={},
        router=RouterConfig("task", {"num_tasks": 2, "normalize": "none"}),
    )  # fmt: skip
    model = lively(tiny(moe, tie_embeddings=False)).double()
    small = extract_task_model(model, 1)
    torch.testing.assert_close(logits(small), logits(model, 1), rtol=1e-12, atol=1e-12)
    weights = [layer.router.weight_E for layer in small.moe_layers().values()]
    assert [w.shape[0] for w in weights] == [1, 2]
    assert float(weights[0].detach().sum()) < 1  # "none": a share of the softmax, folded in
    # Experts and router of layer 0: 1 of 3; of layer 1: 2 of 5, each with D (2H + H) weights, D = 16, H = 8.
    saved = (2 + 3) * 16 * 3 * 8
    gates = 2 * 2 * 16 + (3 + 5) * 16 - (1 + 2)
    assert count_parameters(model).total - count_parameters(small).total == saved + gates


def test_it_shares_nothing_and_saves_and_loads(tmp_path: Path) -> None:
    model = full()
    before = logits(model, 2)
    small = extract_task_model(model, 2)
    mo.save(small, tmp_path / "small")
    expected = logits(small)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, 2), before)
    loaded = mo.load(tmp_path / "small")
    assert loaded.config == small.config
    assert torch.equal(logits(loaded), expected)
    assert loaded.head.weight is loaded.embedding.weight


def test_half_precision_stays_half_precision() -> None:
    model = lively(sparse("task")).bfloat16()
    small = extract_task_model(model, 1)
    assert small.embedding.weight.dtype == torch.bfloat16
    assert small.moe_layers()[0].router.weight_E.dtype == torch.float32
    torch.testing.assert_close(logits(small), logits(model, 1))


def test_what_cannot_be_extracted_is_refused() -> None:
    for model, task, words in [
        (lively(tiny()), 0, "This model is dense"),
        (full("topk"), 0, "Layer 0 is routed by TopK, not by task alone"),
        (full(), 4, "There is no task 4: layer 0 knows tasks 0 to 3."),
        (full(), -1, "There is no task -1"),
        (full(zero=1), 0, "Layer 0 has zero-computation experts"),
    ]:
        with pytest.raises(ConfigError) as caught:
            extract_task_model(model, task)
        assert str(caught.value).startswith(words)
    edited = full()
    with mo.edit(edited, layer=1, knockout=[0]), pytest.raises(ConfigError, match="Layer 1 has plan edits"):
        extract_task_model(edited, 0)
    leaky = sparse(RouterConfig("task", allow_leak=True), capacity=CapacityRule(eval_factor=1.0))
    with pytest.raises(ConfigError, match="a capacity in evaluation"):
        extract_task_model(lively(replace(leaky)), 0)
