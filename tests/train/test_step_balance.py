"""What balancing needs of a step: labels, options, evidence, sums over micro-batches, and state that moves once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moesaic.data.packing import Batch
from moesaic.errors import ConfigError
from moesaic.models import build_model
from moesaic.plan import AdaptiveFactor, CapacityRule
from moesaic.routing import LossContext, balance_loss
from moesaic.train.reading import StepReading
from moesaic.train.step import forward, train_step
from tests.models.tiny import lively, sparse
from tests.train.test_step import batch_of, rows_of


def _step(model: Any, batches: list[Batch]) -> StepReading:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return train_step(model, optimizer, batches, lr=1e-3, clip=0.0, step=1)[0]


def test_labels_and_options_reach_the_losses() -> None:
    losses = {"entropy_local": 0.1, "v2_device": 0.05, "switch": 0.01}
    options: dict[str, dict[str, Any]] = {
        "entropy_local": {"labels": [1]},
        "v2_device": {"devices": 2},
        "switch": {"normalize": "slots"},
    }
    model = lively(sparse(losses=losses, loss_options=options)).train()
    batch = batch_of(3)
    with torch.no_grad():
        plans = forward(model, batch).plans.values()
    ctx = LossContext(3, label_T=batch.label_BS.flatten())
    wanted = dict.fromkeys(losses, 0.0)
    for plan in plans:
        for name, value in balance_loss(plan, losses, ctx, options)[1].items():
            wanted[name] += float(value) / 2
    unlabelled = balance_loss(next(iter(plans)), {"entropy_local": 1.0}, LossContext(3))[1]["entropy_local"]
    assert float(unlabelled) != pytest.approx(wanted["entropy_local"], rel=1e-3)
    assert _step(model, [batch]).losses == pytest.approx(wanted, rel=1e-5)


def test_the_prototype_loss_teaches_the_layers_below() -> None:
    """With it alone, the embedding gets a gradient through the router's input."""
    config = sparse(losses={"prototype": 1.0}, loss_options={"prototype": {"tau": 0.5}})
    model = lively(config).train()
    output = forward(model, batch_of(3))
    total = sum(balance_loss(plan, {"prototype": 1.0}, LossContext(3))[0] for plan in output.plans.values())
    total.backward()  # type: ignore[union-attr]
    embedding, gate = model.embedding.weight.grad, model.moe_layers()[1].router.get_parameter("gate.weight").grad
    assert embedding is not None
    assert float(embedding.abs().sum()) > 0
    assert gate is None or not gate.any()
    assert "input_TD" not in model.eval()(batch_of(3).ids_BS).plans[0].gate.extra
    assert "input_TD" not in lively(sparse()).train()(batch_of(3).ids_BS).plans[0].gate.extra


@pytest.mark.parametrize("space", ["input", "logits", "router_proj"])
def test_prototypes_are_remembered_once_per_step_over_all_micro_batches(space: str) -> None:
    config = sparse(losses={"prototype": 0.1}, loss_options={"prototype": {"ema": 0.9, "space": space, "most": 1000}})
    whole = batch_of(4)
    means = []
    for batches in ([whole], [rows_of(whole, 0, 1), rows_of(whole, 1, 4)]):
        model = lively(config)
        assert model.moe_layers()[0].memory is not None
        before = model.moe_layers()[0].memory.mean_EV.clone()  # type: ignore[union-attr]
        forward(model.train(), whole)
        assert torch.equal(model.moe_layers()[0].memory.mean_EV, before)  # type: ignore[union-attr]
        reading = _step(model, batches)
        assert reading.losses["prototype"] > 0
        means.append({n: b.clone() for n, b in model.named_buffers() if "memory" in n})
    assert means[0]["blocks.0.ffn.memory.mean_EV"].abs().sum() > 0
    for name, value in means[0].items():
        torch.testing.assert_close(means[1][name], value)


def test_the_quantile_bias_of_micro_batches_is_that_of_the_batch() -> None:
    options = {"score": "sigmoid", "balance_bias": True, "bias_rule": "quantile"}
    whole = batch_of(6)
    biases = []
    for batches in ([whole], [rows_of(whole, 0, 1), rows_of(whole, 1, 6)]):
        model = lively(sparse("topk", options))
        _step(model, batches)
        biases.append(model.moe_layers()[0].router.choice_bias_E)
    assert biases[0] is not None
    assert float(biases[0].abs().max()) > 0.001
    assert torch.equal(biases[0], biases[1])


def test_an_adapted_capacity_moves_after_the_step() -> None:
    rule = CapacityRule(factor=0.5, minimum=0, adapt=AdaptiveFactor(target=0.0, eta=1.0, memory=0.0))
    model = lively(sparse(capacity=rule))
    reading = _step(model, [batch_of(4), batch_of(4, seed=8)])
    for layer, sparse_layer in model.moe_layers().items():
        mine = reading.layers[layer]
        assert sparse_layer.adapted is not None
        assert mine.dropped > 0
        wanted = 0.5 * (1 + mine.dropped / float(mine.load_E.sum()))
        assert float(sparse_layer.adapted.factor) == pytest.approx(wanted, rel=1e-5)


def test_random_draws_of_a_step_come_from_the_global_state() -> None:
    """Checkpoints hold that state, so a resumed run masks the same experts."""
    config = sparse(expert_dropout=0.3, expert_masking=0.3, gating_dropout=0.5, gating_groups=2)
    runs = []
    for seed in (1, 1, 2):
        model = lively(config)
        torch.manual_seed(seed)
        runs.append([_step(model, [batch_of(4)]).loss for _ in range(2)])
    assert runs[0] == runs[1] != runs[2]


def test_options_are_refused_when_the_model_is_built() -> None:
    for losses, options, words in (
        ({"switch": 0.1}, {"switch": {"normalise": "slots"}}, 'no option "normalise". Did you mean "normalize"?'),
        ({"v2_device": 0.1}, {}, "needs the option devices"),
        ({"switch": 0.1}, {"z": {}}, 'options for loss "z", which is not among the losses'),
    ):
        with pytest.raises(ConfigError, match=words):
            build_model(sparse(losses=losses, loss_options=options), device="meta")
