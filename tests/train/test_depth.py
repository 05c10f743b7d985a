"""Training with Mixture-of-Depths: the predictor's loss, readings, recomputation, and a whole run that generates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.native import load_model
from moesaic.infer.token_loop import generate_ids
from moesaic.models import DepthConfig, MoEConfig
from moesaic.plan import read
from moesaic.routing import Outcome, StepStats
from moesaic.routing.depth import DepthRouter
from moesaic.train.recompute import recompute_activations
from moesaic.train.step import forward, lm_losses, train_step
from tests.models.tiny import lively, tiny
from tests.train.test_recompute import gradients
from tests.train.test_step import batch_of, rows_of
from tests.train.tiny_run import tiny_config, train

DEPTH = DepthConfig(capacity=0.5, allow_leak=True)
CONFIGS = {
    "dense": tiny(num_layers=4, depth=DEPTH),
    "experts inside": tiny(MoEConfig(num_experts=4, k=2, hidden=12, losses={"switch": 0.1}), num_layers=4, depth=DEPTH),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


@every_config
def test_the_step_adds_the_predictors_loss_and_tells_the_routers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[DepthRouter, StepStats]] = []
    monkeypatch.setattr(DepthRouter, "after_step", lambda router, stats: told.append((router, stats)))
    model, batch = lively(CONFIGS[name]).train(), batch_of(4)
    with torch.no_grad():
        output = forward(model, batch)
        routers = model.depth_routers()
        outcome = Outcome(torch.zeros(36), num_layers=2)
        wanted = sum(float(routers[i].own_losses(p, outcome)["depth_predictor"]) for i, p in output.depth.items())
        lm = lm_losses(output.logits, batch.targets_BS).sum() / (batch.targets_BS >= 0).sum()
    reading, _ = train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), [batch], lr=0.0, clip=0.0, step=1)
    assert reading.losses["depth_predictor"] == pytest.approx(wanted)
    balance = 0.1 * reading.losses.get("switch", 0.0)
    assert reading.loss == pytest.approx(float(lm) + wanted + balance, rel=1e-5)
    # Rows of 9, 8, 7 and 6 real tokens give 5 + 4 + 4 + 3 places.
    assert [stats.counts_E.tolist() for _, stats in told] == [[16], [16]]
    assert [router for router, _ in told] == list(routers.values())
    assert all(stats.num_tokens == 30 for _, stats in told)
    assert reading.record()["depth_share"] == [pytest.approx(16 / 30)] * 2
    assert "depth_share" not in _record_without_depth()


def _record_without_depth() -> dict[str, object]:
    model = lively(tiny())
    reading, _ = train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), [batch_of(2)], lr=0, clip=0, step=1)
    return reading.record()


def test_load_is_that_of_the_tokens_that_arrived_over_all_micro_batches() -> None:
    model = lively(CONFIGS["experts inside"]).train()
    parts = [rows_of(batch_of(4), i, i + 2) for i in (0, 2)]
    with torch.no_grad():
        outputs = [forward(model, part) for part in parts]
    reading, _ = train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), parts, lr=0.0, clip=0.0, step=1)
    for layer, mine in reading.layers.items():
        assert torch.equal(mine.load_E, sum(read.load(output.plans[layer]) for output in outputs))  # type: ignore[arg-type]
        arrived = 16 if layer in reading.depth else 30
        assert int(mine.load_E.sum()) == 2 * arrived
        assert mine.tokens == arrived


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@every_config
def test_recomputation_keeps_both_decisions_out_and_changes_no_bit(name: str, dtype: torch.dtype | None) -> None:
    torch.set_num_threads(1)
    plain, again = lively(CONFIGS[name]), lively(CONFIGS[name])
    plain.compute_dtype = again.compute_dtype = dtype
    recompute_activations(again)
    calls: list[str] = []
    for layer, block in enumerate(again.blocks):
        block.attention.wq.register_forward_hook(lambda *_, i=layer: calls.append(f"attention {i}"))  # type: ignore[union-attr]
    for layer, router in again.depth_routers().items():
        router.register_forward_hook(lambda *_, i=layer: calls.append(f"depth {i}"))
    for layer, sparse in again.moe_layers().items():
        sparse.router.register_forward_hook(lambda *_, i=layer: calls.append(f"router {i}"))
    expected, (reading, _) = gradients(plain)
    found, (reading_2, _) = gradients(again)
    assert found.keys() == expected.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert reading_2.record() == reading.record()
    for layer in range(4):
        assert calls.count(f"attention {layer}") == 2
    for layer in again.depth_routers():
        assert calls.count(f"depth {layer}") == 1
    for layer in again.moe_layers():
        assert calls.count(f"router {layer}") == 1


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_whole_run_trains_evaluates_and_generates(recompute: bool, tmp_path: Path) -> None:
    config = tiny_config(model={"num_layers": 3, "depth": DEPTH}, recompute=recompute)
    train(config, tmp_path / "run")
    steps = records(tmp_path / "run", "step")
    assert steps[-1]["lm_loss"] < steps[0]["lm_loss"] - 0.5
    assert steps[-1]["losses"]["depth_predictor"] < steps[0]["losses"]["depth_predictor"]
    assert all(0.5 <= share < 0.6 for step in steps for share in step["depth_share"])
    assert all(len(step["load"]) == 3 for step in steps)
    assert (tmp_path / "run" / "sample.txt").read_text()
    model = load_model(tmp_path / "run" / "checkpoints" / "step-00000040").eval()
    assert list(model.depth_routers()) == [1]
    assert len(generate_ids(model, [[5, 6, 7], [9]], max_new_tokens=6).ids[0]) == 6
    loads = records(tmp_path / "run", "val")[-1]["domain_load"]
    assert all(len(layers) == 3 for layers in loads.values())
    totals = [sum(sum(layers[i]) for layers in loads.values()) for i in range(3)]
    assert totals[0] == totals[2] > totals[1]  # fewer tokens arrive at the block in the middle
